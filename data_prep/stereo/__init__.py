"""The stereo stage: from a rectified stereo clip alone to a scene with poses and object points.

    disparity.py   pair -> disparity -> metric depth
    trajectory.py  frames, depths -> camera poses
    tracks.py      frames, depths, poses, masks -> points in the world
    quality.py     figures and limits
    stage.py       all of it

Measured on synthetic clips by `benchmarks/stereo_accuracy.py`.
"""

from data_prep.stereo.disparity import (
    StereoError,
    depth_from_disparity,
    estimate_disparity,
    split_side_by_side,
)
from data_prep.stereo.stage import ObjectMasks, Reconstruction, reconstruct, reconstruct_clip
from data_prep.stereo.trajectory import estimate_trajectory

__all__ = [
    "ObjectMasks",
    "Reconstruction",
    "StereoError",
    "depth_from_disparity",
    "estimate_disparity",
    "estimate_trajectory",
    "reconstruct",
    "reconstruct_clip",
    "split_side_by_side",
]
