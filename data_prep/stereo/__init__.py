"""The stereo stage: from a rectified stereo clip alone to a scene with poses and object points.

    disparity.py   pair -> disparity -> metric depth
    trajectory.py  frames, depths -> camera poses
    tracks.py      frames, depths, poses, masks -> points in the world
    quality.py     figures and limits
    stage.py       all of it

Measured on synthetic clips by `benchmarks/stereo_accuracy.py`.
"""
