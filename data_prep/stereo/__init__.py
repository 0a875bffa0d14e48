"""The stereo stage: from a rectified stereo clip alone to a scene with poses and object points; `stage.py` is all of it."""
