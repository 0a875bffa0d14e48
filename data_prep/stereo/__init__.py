"""The stereo stage: from a rectified stereo clip alone to a scene with poses and object points; see `stage.py`."""
