"""The `stereo` source: raw stereo pairs or packed side-by-side videos, through the stereo stage.

Two views of a clip are `<clip>-left.mp4` and `<clip>-right.mp4` (or `_left`, `_right`, or Stereo4D's `-left_rectified`,
`-right_rectified`; or `.mov`), or one packed `<clip>.mp4`. The camera is in `<clip>-clip.json` (`base.ClipCard`) or the
same for all clips. Where a BootsTAP file `<clip>-bootstap.npz` is there, object points are its tracks of the left view
instead of the stage's own. Views pressed to half their width or height (`squeezed`) are used as they are, by a camera
whose pixels are not square. A clip takes seconds to minutes, so its scene is kept and read back by the next run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from data_prep.questions.propose import asked_frames
from data_prep.scenes.objects import Caption, lift_tracks, objects_from_tracks, read_bootstap, read_captions, read_masks
from data_prep.scenes.scene import Scene, intrinsics_of, load_scene, save_scene
from data_prep.sources.base import ClipCard, LoadedClip, ObjectFiles, card_of, no_objects, object_files
from data_prep.sources.frames import read_all_frames, write_video, written_times
from data_prep.sources.layout import LEFT, RIGHT, VIDEOS, clip_groups, clip_stems, find
from data_prep.stereo.disparity import MAX_DEPTH, StereoError, split_side_by_side
from data_prep.stereo.quality import QualityLimits
from data_prep.stereo.stage import Reconstruction, reconstruct_clip
from data_prep.store.parts import ClipRejected, clip_file_name, lost_object
from data_prep.store.untrusted import SceneError, as_scene_error
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.video import VideoClip

PAIR = "pair"
_NARROW, _WIDE = 0.95, 2.5  # width / height of a view that may be squeezed: side by side, and one above the other


@dataclasses.dataclass(frozen=True)
class StereoSource:
    """Stereo clips of one layout.

    Attributes:
      folder: where the clips' files are, see `layout`.
      root: media root: `folder` for pairs; for packed videos the place where their left views are written.
      scenes: folder that keeps the scenes.
      layout: "pair", or how both views are packed, see `split_side_by_side`.
      fov_degrees: horizontal field of view of one eye, for clips whose card has neither that nor intrinsics.
      baseline: metres between the eyes, for clips whose card has none; None = 0.063 m is assumed, and the scale is
        marked so.
      max_frames: a longer clip is rejected.
      max_disparity: pixels; None = an eighth of the width.
      max_depth: metres; what is farther counts as unknown.
      num_frames: frames of a clip that the model sees. None = all, and all get a depth.
      min_gap: share of the clip that both frames of a question are apart; only what can be asked about gets a depth.
      limits: quality a clip must have.
      pool: decodes under a time limit.
      groups: of `layout.clip_groups`; None = found now.
    """

    folder: Path
    root: Path
    scenes: Path
    layout: str = PAIR
    fov_degrees: float = 60.0
    baseline: float | None = None
    max_frames: int = 300
    max_disparity: int | None = None
    max_depth: float = MAX_DEPTH
    num_frames: int | None = None
    min_gap: float = 0.0
    limits: QualityLimits = QualityLimits()  # noqa: B008, RUF009 - frozen
    pool: DecodePool = dataclasses.field(default_factory=DecodePool)
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.groups is None:
            object.__setattr__(self, "groups", clip_groups(self.folder, self._known_by))

    @property
    def _known_by(self) -> tuple[str, ...]:
        return LEFT if self.layout == PAIR else VIDEOS

    def clip_ids(self) -> list[str]:
        return clip_stems(self.folder, self._known_by)

    def load(self, clip_id: str) -> LoadedClip:
        videos = find(self.folder, clip_id, [LEFT, RIGHT] if self.layout == PAIR else [VIDEOS], self.groups)
        objects = object_files(self.folder, clip_id, self.groups)
        video = videos[0] if self.layout == PAIR else self.root / f"{clip_id}-left.mp4"
        kept = self.scenes / clip_file_name(clip_id)
        scene = _kept_scene(kept) if video.exists() else None
        if scene is None:
            scene = self._reconstruct(clip_id, videos, video, objects)
            save_scene(scene, kept)
        if objects is None:
            return LoadedClip(scene, video, (no_objects(),))
        said = read_captions(objects.captions)
        left_out = sorted(scene.provenance["objects_left_out"].items())
        no_more = Caption("")  # the scene was kept from a run with another caption file
        lost = (lost_object("object_dropped", n, said.get(n, no_more).description, why) for n, why in left_out)
        return LoadedClip(scene, video, tuple(lost))

    def _reconstruct(self, clip_id: str, videos: list[Path], video: Path, objects: ObjectFiles | None) -> Scene:
        card = card_of(self.folder, clip_id, self.groups)
        left, right, clip = self._views(videos, card.source_id)
        masks, names = _masks_and_captions(objects, left.shape[:3]) if objects else ({}, {})
        camera = self._camera(card, left.shape[1:3], clip_id)
        times = clip.times if self.layout == PAIR else written_times(clip.times)  # of the video that the model will see
        used = None if self.num_frames is None else asked_frames(times, self.num_frames, self.min_gap).tolist()
        try:
            found = reconstruct_clip(
                left,
                right,
                clip_id=clip_id,
                source_id=card.source_id,
                timestamps=times,
                baseline=self.baseline if card.baseline is None else card.baseline,
                masks=masks,
                captions=names,
                max_disparity=self.max_disparity,
                max_depth=self.max_depth,
                used=used,
                limits=self.limits,
                provenance={"files": [path.name for path in videos]},
                disparity_offset=card.disparity_offset or 0.0,
                intrinsics=camera,
            )
        except StereoError as error:
            raise ClipRejected(error.reason, str(error), card.source_id) from error
        scene = found.scene
        for bootstap in find(self.folder, clip_id, [("-bootstap.npz",)], self.groups, optional=True):
            scene = _with_tracks(found, read_bootstap(bootstap, len(left)), masks, names, bootstap.name)
        if self.layout != PAIR:
            video.parent.mkdir(parents=True, exist_ok=True)
            write_video(video, left, times, "mpeg4")
        return scene

    def _camera(self, card: ClipCard, size: tuple[int, int], clip_id: str) -> np.ndarray:
        """Intrinsics f64[3,3] of one eye. Raises ClipRejected where its pixels may not be square and nobody says."""
        if card.intrinsics is not None:
            return card.intrinsics
        stacked = self.layout in ("top_bottom", "bottom_top")
        height, width = size
        if card.squeezed is None and (width > _WIDE * height if stacked else width < _NARROW * height):
            raise ClipRejected(
                "squeezed_views",
                f"each view is {width} x {height} pixels: pressed to half its {'height' if stacked else 'width'}, or "
                f'really of that shape? Write "squeezed": true or false into {clip_id}-clip.json',
                card.source_id,
                again=True,
            )
        camera = intrinsics_of(size, self.fov_degrees if card.fov_degrees is None else card.fov_degrees)
        if card.squeezed:
            camera[1, 1] *= 0.5 if stacked else 2.0
        return camera

    def _views(self, videos: list[Path], source_id: str) -> tuple[np.ndarray, np.ndarray, VideoClip]:
        """Left and right frames u8[T,H,W,3], and the (first) video they are from."""
        clips = [read_all_frames(path, self.pool, self.max_frames) for path in videos]
        if self.layout != PAIR:
            with as_scene_error(StereoError, name=str(videos[0])):
                return *split_side_by_side(clips[0].frames, self.layout), clips[0]
        left, right = (clip.frames for clip in clips)
        if left.shape != right.shape:
            raise SceneError(
                f"{videos[0]} is {left.shape[:3]} (frames, height, width), {videos[1]} {right.shape[:3]}: both eyes "
                "need the same size, frame rate and length"
            )
        apart = np.abs(clips[0].times - clips[1].times)
        if apart.max() > 0.5 * np.diff(clips[0].times, append=np.inf).min():
            frame = int(apart.argmax())
            raise ClipRejected(
                "eyes_out_of_step",
                f"frame {frame} is at {clips[0].times[frame]:.3f} s in {videos[0].name} and at "
                f"{clips[1].times[frame]:.3f} s in {videos[1].name}: bring both eyes to the same frame rate and start",
                source_id,
                again=True,
            )
        return left, right, clips[0]


def _kept_scene(folder: Path) -> Scene | None:
    """The scene that an earlier run kept; None where there is none that is whole, as after a kill: it is made anew."""
    try:
        return load_scene(folder)
    except SceneError:
        return None


def _masks_and_captions(files: ObjectFiles, size: tuple[int, int, int]) -> tuple[Mapping, dict[str, Caption]]:
    """Masks bool[T,H,W] and captions per object id; `size` is that of the video.

    Raises:
      SceneError: unreadable, of another size, not of every frame, or a mask without a caption.
    """
    masks, captions = read_masks(files.masks, size[0], size[1:]), read_captions(files.captions)
    if not masks.annotated.all():
        raise SceneError(
            f"{files.masks} has masks of {int(masks.annotated.sum())} of {size[0]} frames; the stereo stage follows "
            "objects from frame to frame and needs them all"
        )
    nameless = sorted(set(masks) - set(captions))
    if nameless:
        raise SceneError(f"{files.captions}: no caption for the masks {nameless[0]!r}")
    return masks, captions


def _with_tracks(
    found: Reconstruction, pixels: np.ndarray, masks: Mapping[str, np.ndarray], names: Mapping[str, Caption], file: str
) -> Scene:
    """The scene with the objects that 2D tracks f64[N,T,2] give on its depth and poses."""
    scene = found.scene
    tracks = lift_tracks(pixels, found.depths, scene.intrinsics, scene.camera_to_world)
    objects, dropped = objects_from_tracks(scene, tracks, masks, names)
    notes = {"objects_left_out": dropped, "tracks": file}
    return dataclasses.replace(scene, objects=objects, provenance={**scene.provenance, **notes})
