"""The `monocular` source: what SpatialTrackerV2 and MoGe-2 left beside each video.

`<clip>.mp4`, `<clip>-spatialtracker.npz`, and a folder `<clip>-moge` with one npz per frame that was measured, named by
the frame's number ("000012.npz"). If the tracker was given frames of another size than the video's, `<clip>-clip.json`
says so (`frame_size`); masks have that size too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from data_prep.scenes.objects import objects_from_tracks, read_captions, read_masks
from data_prep.scenes.scene import SceneError
from data_prep.sources.base import CAPTIONS, MASKS, Clip, dropped_objects, find
from data_prep.sources.clip_card import read_card
from data_prep.sources.monocular_files import (
    MAX_SPREAD,
    MogeDepth,
    metric_scale,
    monocular_scene,
    read_moge,
    read_spatialtracker,
)
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.qa.errors import MediaError

_TRACKER = "-spatialtracker.npz"
_OFF_CENTRE = 0.1  # share of the side by which a principal point may lie off the middle


@dataclasses.dataclass(frozen=True)
class MonocularSource:
    """Clips with one view.

    Attributes:
      folder: where the clips' files are; root: the same.
      max_spread: the scale is trusted up to this spread, see `monocular.monocular_scene`.
      pool: reads the videos' headers under a time limit.
    """

    folder: Path
    root: Path
    max_spread: float = MAX_SPREAD
    pool: DecodePool = dataclasses.field(default_factory=DecodePool)

    def clip_ids(self) -> list[str]:
        return sorted(p.name.removesuffix(_TRACKER) for p in self.folder.glob(f"*{_TRACKER}"))

    def load(self, clip_id: str) -> Clip:
        names = [(".mp4",), (_TRACKER,), ("-moge",), MASKS, CAPTIONS]
        video, tracker, moge, mask_file, captions = find(self.folder, clip_id, names)
        card = read_card(self.folder / f"{clip_id}-clip.json", clip_id)
        spatial = read_spatialtracker(tracker)
        count = len(spatial.world_to_camera)
        try:
            info = self.pool.probe(str(video))
        except MediaError as error:
            raise SceneError(str(error)) from error
        if info.frames is not None and info.frames != count:
            raise SceneError(f"{video} has {info.frames} frames, {tracker.name} {count}: track every frame")
        size = card.frame_size or (info.height, info.width)
        _check_size(tracker, spatial.intrinsics, size)
        scene, tracks = monocular_scene(
            spatial,
            size,
            np.arange(count) / info.fps,
            clip_id=clip_id,
            source_id=card.source_id,
            scale=metric_scale(spatial, _depths(moge), size),
            max_spread=self.max_spread,
        )
        masks = read_masks(mask_file, count, size)
        objects, dropped = objects_from_tracks(scene, tracks, masks, read_captions(captions))
        left_out = dropped_objects((d.object_id, d.reason) for d in dropped)
        return Clip(dataclasses.replace(scene, objects=objects), video, left_out)


def _depths(folder: Path) -> dict[int, MogeDepth]:
    files = sorted(folder.glob("*.npz"))
    wrong = [file for file in files if not file.stem.isascii() or not file.stem.isdigit()]
    if wrong or not files:
        raise SceneError(
            f"{wrong[0] if wrong else folder}: MoGe files are named by their frame's number, e.g. 000012.npz"
        )
    return {int(file.stem): read_moge(file) for file in files}


def _check_size(path: Path, intrinsics: np.ndarray, size: tuple[int, int]) -> None:
    """A tracker that was given smaller frames has a principal point far from the middle of the video's."""
    middle = np.array([size[1], size[0]]) / 2
    if (np.abs(intrinsics[:, :2, 2] - middle) > 2 * _OFF_CENTRE * middle).any():
        raise SceneError(
            f"{path}: its principal point {np.round(intrinsics[0, :2, 2], 1).tolist()} is not near the middle of a "
            f"{size[0]} x {size[1]} frame; if the tracker was given frames of another size, say so in frame_size of "
            "<clip>-clip.json"
        )
