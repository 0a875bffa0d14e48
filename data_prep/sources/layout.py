"""Where the files of clips lie below a folder, and what they may be called.

All in one folder; or each clip's in a folder of its name, or of its source video's name (Stereo4D: "<video>_<time>");
or in a folder per kind ("npz/<clip>.npz" beside "processed/<clip>/<clip>-left_rectified.mp4"); at any depth. Links to
files are used as the files (so a folder of links picks clips), links to folders are not followed.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_prep.store.parts import ClipRejected, StoreError

VIDEOS = (".mp4", ".mov", ".MP4", ".MOV")
_EYES = [[f"{mark}{eye}{end}" for end in ("_rectified", "") for mark in "-_"] for eye in ("left", "right")]
LEFT_EYE, RIGHT_EYE = map(tuple, _EYES)  # endings of a view's name: "-left_rectified", "_left", ...
LEFT, RIGHT = (tuple(f"{eye}{video}" for eye in eyes for video in VIDEOS) for eyes in _EYES)
# What other names of a clip end with, before their suffix.
SIDECARS = ("-masks", "-captions", "-clip", "-bootstap", "-spatialtracker", "_result", "_manual", "_auto", "-moge")
# Folders that hold a clip's measurements or truth, not clips, and those that a run writes into its workdir.
_CLOSED = ("-moge", "-truth")
_WORKDIR = {"parts", "scenes", "videos", "clips", "forms", "tfds"}


def walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below `root` in which clips may lie, relative to it, with the files in it, both sorted.

    Hidden folders, links to folders, and what runs wrote are left out.

    Raises:
      StoreError: a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise StoreError(f"{error.filename} cannot be listed ({error.strerror}): its clips would be missing") from error

    for folder, subfolders, files in os.walk(root, onerror=fail):
        yield os.path.relpath(folder, root).removeprefix("."), sorted(files)
        written = _WORKDIR if "run.json" in files else ()
        subfolders[:] = sorted(n for n in subfolders if n[0] != "." and not n.endswith(_CLOSED) and n not in written)


def clip_groups(root: Path, endings: tuple[str, ...]) -> tuple[str, ...]:
    """List the folders, relative to `root`, where clips' files or folders lie: few, however many clips there are.

    Args:
      endings: of the names that clips are known by.
    """
    groups = {""}
    known = "|".join((*LEFT_EYE, *RIGHT_EYE, *SIDECARS))
    for folder, files in walk(root):
        names = [name for name in files if name.endswith((".npz", ".json", *VIDEOS))]  # not the images of a view
        clip = re.escape(os.path.basename(folder))
        own = re.compile(rf"{clip}(_[0-9]+)?(\.|{known})")
        others = [name for name in names if not own.match(name)]
        groups |= {os.path.dirname(folder)} if len(others) < len(names) else set()
        # A clip's folder may hold anything besides; of other clips it holds what they are known by.
        if len(others) == len(names) > 0 or any(name.endswith(endings) for name in others):
            groups.add(folder)
    return tuple(sorted(groups))


def clip_stems(root: Path, endings: tuple[str, ...]) -> list[str]:
    """List what stands before any of `endings` in the names below `root`, each once, sorted.

    Raises:
      StoreError: a folder cannot be listed, or the path of such a file is not UTF-8.
    """
    found = set()
    for folder, names in walk(root):
        for name in names:
            ending = next((ending for ending in endings if name.endswith(ending)), "")
            if ending and not _is_text(path := os.path.join(folder, name)):
                raise StoreError(f"{root}: the path {ascii(path)} is not UTF-8, as records are: rename it")
            found |= {name.removesuffix(ending)} if ending else set()
    return sorted(found - {""})


def _is_text(path: str) -> bool:
    return path == path.encode("utf-8", "replace").decode("utf-8")


def find(
    root: Path, stem: str, names: Iterable[Sequence[str]], groups: Sequence[str] = ("",), *, optional: bool = False
) -> list[Path]:
    """Find the files of clip `stem`: for each entry of `names` the one that has any of its endings.

    Args:
      groups: of `clip_groups`.
      optional: a file that is not there is no error; it is left out.

    Raises:
      ClipRejected: "missing_file", naming all that are not there; "ambiguous_files", naming two of which one is meant;
        "path_outside_root", `stem` is a path instead of a name.
    """
    if os.path.basename(stem) != stem:
        raise ClipRejected(
            "path_outside_root", f"clip id {stem!r} is a path; it must be what a file's name begins with"
        )
    inner = dict.fromkeys(("", stem, stem.rpartition("_")[0]))
    folders = [folder for group, name in itertools.product(groups, inner) if (folder := root / group / name).is_dir()]
    found, missing = [], []
    for endings in names:
        paths = (folder / f"{stem}{ending}" for folder in folders for ending in endings)
        # One file may have two names where case does not count.
        here = {os.stat(path)[1:3]: path for path in paths if os.path.exists(path)}  # noqa: PTH110 - never raises
        if len(here) > 1:
            listed = " and ".join(str(path) for path in here.values())
            raise ClipRejected("ambiguous_files", f"clip {stem} has {listed}: keep the one that is meant", again=True)
        found += here.values()
        missing += [] if here else [" or ".join(f"{stem}{ending}" for ending in endings if ending.islower())]
    if missing and not optional:
        raise ClipRejected("missing_file", f"{root} has no {', '.join(missing)}", again=True)
    return found
