"""What all sources share: the files of a clip, its objects, and `<clip>-clip.json`, the card of what they cannot tell.

    synthetic    rendered here, written in Stereo4D's layout, read back
    stereo4d     Stereo4D annotations with rectified left frames
    stereo       nothing but two views: the stereo stage finds poses and points
    monocular    SpatialTrackerV2 tracks, brought to metres by MoGe-2

All take masks (`<clip>-masks.npz` or `.json`, or SA-V's `<clip>_manual.json` or `_auto.json`) and captions
(`<clip>-captions.json`) of other tools; of a clip that has neither only the camera is asked about. `layout` says in
which folders a clip's files may lie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.scenes.objects import objects_from_tracks, read_captions, read_masks
from data_prep.scenes.scene import Scene
from data_prep.sources.layout import find
from data_prep.store.parts import LostObject, lost_object
from data_prep.store.untrusted import SceneError, read_json

# The last two are SA-V's own names.
MASKS, CAPTIONS = ("-masks.npz", "-masks.json", "_manual.json", "_auto.json"), ("-captions.json",)
LeftOut = tuple[LostObject, ...]  # objects that could not be used


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedClip:
    """A clip ready to be asked about.

    Attributes:
      scene: with its objects.
      video: the file that the model sees, below the source's `root`.
      left_out: objects that could not be used.
    """

    scene: Scene
    video: Path
    left_out: LeftOut = ()


class ClipSource(Protocol):
    """Clips of one kind. Picklable; `load` depends on the clip id alone.

    Attributes:
      root: media root: videos are named relative to it.
    """

    root: Path

    def clip_ids(self) -> list[str]:
        """List the ids of all clips, sorted."""

    def load(self, clip_id: str) -> LoadedClip:
        """Load a clip.

        Raises:
          ClipRejected: a file is missing, or the clip is below the quality limits.
          SceneError: a file is damaged, or files do not fit each other.
        """


@dataclasses.dataclass(frozen=True)
class ObjectFiles:
    """The mask file and the caption file of a clip."""

    masks: Path
    captions: Path


def object_files(folder: Path, stem: str, groups: Sequence[str]) -> ObjectFiles | None:
    """Find the files of the objects of clip `stem` below `folder`; None where it has neither, as clips as downloaded.

    Raises:
      ClipRejected: as `layout.find`; also where one of both is missing.
    """
    if not find(folder, stem, [MASKS, CAPTIONS], groups, optional=True):
        return None
    return ObjectFiles(*find(folder, stem, [MASKS, CAPTIONS], groups))


def no_objects() -> LostObject:
    """Return the entry of a clip whose objects nobody has named."""
    return {"reason": "no_objects", "detail": "it has neither masks nor captions: only its camera is asked about"}


def with_objects(scene: Scene, tracks: np.ndarray, files: ObjectFiles | None) -> tuple[Scene, LeftOut]:
    """Give a scene the objects of its mask and caption files that its tracks f64[N, T, 3] place in the world.

    Raises:
      SceneError: as `read_masks`, `read_captions` and `objects_from_tracks`.
    """
    if files is None:
        return scene, (no_objects(),)
    read, said = read_masks(files.masks, scene.num_frames, scene.image_size), read_captions(files.captions)
    objects, dropped = objects_from_tracks(scene, tracks, read, said, annotated=read.annotated)
    lost = (lost_object("object_dropped", name, said[name].description, why) for name, why in dropped.items())
    return dataclasses.replace(scene, objects=objects), tuple(lost)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipCard:
    """What is known of a clip.

    Attributes:
      source_id: the video that it was cut from; clips of one source video never get into both splits.
      fov_degrees: horizontal field of view; None if unknown.
      intrinsics: f64[3,3] pixels of one eye's frame; None if unknown.
      baseline: metres between the eyes; None if unknown.
      squeezed: whether stereo views are pressed to half their width (top-bottom: height); None = unknown.
      disparity_offset: pixels that the stereo views' disparity is too large everywhere (principal points that differ).
      frame_size: (height, width) of the frames that an external tool was given; None = those of the video.
    """

    source_id: str
    fov_degrees: float | None = None
    intrinsics: np.ndarray | None = None
    baseline: float | None = None
    squeezed: bool | None = None
    disparity_offset: float | None = None
    frame_size: tuple[int, int] | None = None


def read_card(path: str | Path, stem: str) -> ClipCard:
    """Read the card at `path`, whose fields may all be left out; without a file, clip `stem` is its own source video.

    Raises:
      SceneError: not a JSON object, an unknown field, or a value that cannot be; naming file and field.
    """
    fields = {"source_id": stem} | (read_json(path) if Path(path).exists() else {})
    checks = {
        "source_id": (lambda v: isinstance(v, str) and v.strip(), "a text that is not empty"),
        "fov_degrees": (lambda v: _is_number(v) and 0 < v < 1000, "a number above 0"),
        "intrinsics": (lambda v: v is None or _is_camera(v), "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels"),
        "baseline": (lambda v: _is_number(v) and 0 < v < 1000, "a number above 0"),
        "squeezed": (lambda v: type(v) is bool, "true or false"),
        "disparity_offset": (lambda v: _is_number(v) and abs(v) < 1000, "a number of pixels"),
        "frame_size": (lambda v: v is None or _is_size(v), "[height, width]"),
    }
    for name, value in fields.items():
        if name not in checks:
            raise SceneError(f"{path}: unknown field {name!r}; there are {', '.join(checks)}")
        fits, wanted = checks[name]
        if not fits(value):
            raise SceneError(f"{path}: {name} must be {wanted}, not {value!r:.80}")
    if fields.get("intrinsics"):
        fields["intrinsics"] = np.array(fields["intrinsics"], np.float64)
    if fields.get("frame_size"):
        fields["frame_size"] = tuple(fields["frame_size"])
    return ClipCard(**fields)


def card_of(folder: Path, stem: str, groups: Sequence[str]) -> ClipCard:
    """Read the card of clip `stem` below `folder`. Raises: as `layout.find` and `read_card`."""
    found = find(folder, stem, [("-clip.json",)], groups, optional=True)
    return read_card(*found, stem) if found else ClipCard(stem)


def _is_camera(value: Any) -> bool:
    if not _is_list(value, 3) or not all(_is_list(row, 3) and all(map(_is_number, row)) for row in value):
        return False
    return value[2] == [0, 0, 1] and min(value[0][0], value[1][1]) > 0


def _is_size(value: Any) -> bool:
    return _is_list(value, 2) and all(type(n) is int and 0 < n < 2**16 for n in value)


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9
