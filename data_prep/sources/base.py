"""Where clips come from: each source turns a clip id into the scene and the video that the model will see.

    synthetic    rendered here, written in Stereo4D's layout, read back
    stereo4d     Stereo4D annotations with rectified left frames
    stereo       nothing but two views: the stereo stage finds poses and points
    monocular    SpatialTrackerV2 tracks, brought to metres by MoGe-2

All take masks (`<clip>-masks.npz` or `.json`) and captions (`<clip>-captions.json`) of other tools.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from data_prep.errors import SceneError
from data_prep.scenes.objects import objects_from_tracks, read_captions, read_masks
from data_prep.scenes.scene import Scene
from data_prep.sources.frames import read_folder, write_video
from data_prep.sources.stereo4d import frames_size, read_stereo4d
from data_prep.store.parts import ClipRejected
from data_prep.synthetic.clip import make_clip, write_clip
from data_prep.synthetic.worlds import SyntheticConfig

LeftOut = tuple[Mapping[str, str], ...]  # objects that could not be used, each with "reason" and "detail"


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A clip ready to be asked about.

    Attributes:
      scene: with its objects.
      video: the file that the model sees, below the source's `root`.
      left_out: objects that could not be used.
    """

    scene: Scene
    video: Path
    left_out: LeftOut = ()


class Source(Protocol):
    """Clips of one kind. Picklable; `load` depends on the clip id alone.

    Attributes:
      root: media root: videos are named relative to it.
    """

    root: Path

    def clip_ids(self) -> list[str]:
        """Ids of all clips, sorted."""

    def load(self, clip_id: str) -> Clip:
        """The clip.

        Raises:
          ClipRejected: a file is missing, or the clip is below the quality limits.
          SceneError: a file is damaged, or files do not fit each other.
        """


def find(folder: Path, stem: str, names: Iterable[tuple[str, ...]]) -> list[Path]:
    """The files of clip `stem`: for each entry the first of its endings that exists.

    Raises:
      ClipRejected: "missing_file", naming all that are not there.
    """
    found, missing = [], []
    for endings in names:
        here = [path for path in (folder / f"{stem}{ending}" for ending in endings) if path.exists()]
        found += here[:1]
        missing += [] if here else [" or ".join(f"{stem}{ending}" for ending in endings)]
    if missing:
        raise ClipRejected("missing_file", f"{folder} has no {', '.join(missing)}")
    return found


MASKS, CAPTIONS = ("-masks.npz", "-masks.json"), ("-captions.json",)


def dropped_objects(entries: Iterable[tuple[str, str]]) -> LeftOut:
    """(object id, why) as entries of `Clip.left_out`."""
    return tuple({"reason": "object_dropped", "detail": f"{name}: {why}"} for name, why in entries)


@dataclasses.dataclass(frozen=True)
class Stereo4DSource:
    """Stereo4D clips: `<clip>.npz`, `<clip>-left_rectified.mp4` or a folder `<clip>-left_rectified` of images.

    Attributes:
      folder: where the clips' files are.
      root: see `Source`; `folder` itself unless the frames are images.
      scale: how far their metres can be trusted, see `scene.SCALES`.
    """

    folder: Path
    root: Path
    scale: str = "assumed_baseline"

    def clip_ids(self) -> list[str]:
        return sorted(p.stem for p in self.folder.glob("*.npz") if not p.stem.endswith("-masks"))

    def load(self, clip_id: str) -> Clip:
        files = find(self.folder, clip_id, [(".npz",), ("-left_rectified.mp4", "-left_rectified"), MASKS, CAPTIONS])
        annotations, frames, mask_file, captions = files
        clip = read_stereo4d(annotations)
        scene = clip.scene(frames_size(frames, len(clip.timestamps)), scale=self.scale)
        masks = read_masks(mask_file, scene.num_frames, scene.image_size)
        objects, dropped = objects_from_tracks(scene, clip.tracks, masks, read_captions(captions))
        scene = dataclasses.replace(scene, objects=objects)
        left_out = dropped_objects((d.object_id, d.reason) for d in dropped)
        return Clip(scene, self._video(clip_id, frames, scene), left_out)

    def _video(self, clip_id: str, frames: Path, scene: Scene) -> Path:
        """`frames` if it is a video; images become one below the media root."""
        if frames.is_file():
            if self.root != self.folder:
                raise SceneError(f"{frames} is a video, but this run reads frames from folders (stereo4d.frames)")
            return frames
        if self.root == self.folder:
            raise SceneError(
                f"{frames} is a folder of images: set stereo4d.frames=images, which writes a video of them"
            )
        video = self.root / f"{clip_id}.mp4"
        if not video.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            seconds = (scene.timestamps[-1] - scene.timestamps[0]) / max(1, scene.num_frames - 1)
            write_video(video, read_folder(frames), 1 / seconds if seconds > 0 else 30.0, "mpeg4")
        return video


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """Rendered clips, written in Stereo4D's layout and read back by its reader.

    Attributes:
      root: media root; the clips are written into its folder `clips`.
      config: what they look like.
      seed, count: clip n of `count` follows from (seed, n, config).
    """

    root: Path
    config: SyntheticConfig
    seed: int
    count: int

    @property
    def folder(self) -> Path:
        """Where the clips are."""
        return self.root / "clips"

    def clip_ids(self) -> list[str]:
        return [f"synthetic-{self.seed}-{n:06d}" for n in range(self.count)]

    def load(self, clip_id: str) -> Clip:
        made = make_clip(self.seed, int(clip_id.rpartition("-")[2]), self.config)
        files = write_clip(made, self.folder, codec="mpeg4")
        return Stereo4DSource(self.folder, self.folder, scale="metric").load(files.annotations.stem)
