"""Checkpoints as they lie on the disk: which are whole, and what is done about those that are not.

A checkpoint is a folder named by its step. `digests.json` in it was written last, with size and SHA-256 of every file,
before the folder got its name; so a folder without it was not written here, and one that does not agree with it is
damaged. In a bucket folders cannot be renamed: there a checkpoint has its name from the start, and is one once it has
the last file, `commit_success.txt`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm4d_jax import __version__
from mllm4d_jax.files import digests
from mllm4d_jax.files.quoting import plain
from mllm4d_jax.files.remote import found, is_remote, upload
from mllm4d_jax.files.storage import storing

UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of what Orbax is still writing
# Orbax writes these once more after the digests; what they say is of no use here but for being there.
WRITTEN_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_PARTS = ("trainable", "opt", "meta", "metrics")  # folders of a checkpoint
_STEP = re.compile(r"0|[1-9][0-9]*")
_SMALL = 1 << 16  # bytes: descriptions, which Orbax reads of every checkpoint, are smaller, arrays are larger

log = logging.getLogger(__name__)


class ResumeError(ValueError):
    """The checkpoints in the workdir cannot be continued with this config."""


def steps(folder: Path) -> list[int]:
    """Return the numbers in a folder of checkpoints, whole or not, ascending."""
    if is_remote(folder):  # unfinished ones have their own names there
        names = [name for name, files in _parts(folder).items() if not _is_unfinished(files)]
    else:
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def _parts(folder: Path) -> dict[str, set[str]]:
    """Return what is in a folder of a bucket: name -> names in it."""
    parts: dict[str, set[str]] = {}
    for name in found(folder):
        first, _, rest = name.partition("/")
        parts.setdefault(first, set()).add(rest.partition("/")[0])
    return parts


def _is_unfinished(files: set[str]) -> bool:
    """Whether Orbax has begun, and not ended, to write these files of a checkpoint in a bucket, in whatever order."""
    about, commit = WRITTEN_LATER
    return commit not in files and bool(files & {about, *_PARTS})


def _finish(folder: Path) -> None:
    """Give the last file to checkpoints in a bucket that lack nothing else: a run was killed between it and the list
    of the others, which says that they are whole."""
    for name, files in _parts(folder).items():
        if _is_unfinished(files) and digests.LIST in files:
            if wrong := digests.damage(folder / name):
                aside = _set_aside(folder / name)
                log.warning("%s is damaged (%s): set aside as %s", folder / name, wrong, aside)
            else:
                upload(folder / name / WRITTEN_LATER[1], b"finished by the run that went on")


def damage(folder: Path, largest: float = float("inf"), parts: Sequence[str] = ("",)) -> str:
    """Return what is wrong with a checkpoint, '' for nothing.

    Args:
      largest: of files above so many bytes only the size is looked at.
      parts: its folders to look at; all of it by default.
    """
    wrong = digests.damage(folder, largest, parts)
    if wrong or parts != ("",):
        return wrong
    about, commit = (folder / name for name in WRITTEN_LATER)
    try:
        known = isinstance(json.loads(about.read_bytes()), dict)
    except (OSError, ValueError):
        known = False
    return "" if known and commit.is_file() else f"{commit.name if known else about.name} is missing or damaged"


def take_up(folder: Path) -> None:
    """Leave a whole checkpoint as the newest of a folder, or none. Only for who alone writes there.

    What a killed run had not finished is removed. What is named like a step and is no checkpoint is set aside under
    another name, and so is a damaged checkpoint where there is a whole one to go on from. The newest whole one is read
    and compared byte for byte; of older ones, which nobody reads now, sizes and small files.

    Raises:
      ResumeError: there are checkpoints, and not one is whole.
      StorageError: the folder cannot be written.
    """
    if is_remote(folder):
        _finish(folder)
    remove_unfinished(folder)
    good, bad = None, {}
    for step in reversed(steps(folder)):
        if _is_foreign(folder / str(step)):
            aside = _set_aside(folder / str(step))
            log.warning("%s is no checkpoint: set aside as %s", folder / str(step), aside)
            continue
        wrong = damage(folder / str(step), float("inf") if good is None else _SMALL)
        if wrong:
            bad[step] = wrong
        elif good is None:
            good = step
    if good is None and bad:
        listed = "\n  ".join(f"{step}: {wrong}" for step, wrong in bad.items())
        raise ResumeError(
            f"none of the checkpoints in {folder} is whole:\n  {listed}\n"
            "Put a copy of one in its place to go on, or move them away (or give another --workdir) to begin anew"
        )
    for step, wrong in bad.items():
        aside = _set_aside(folder / str(step))
        on = f"; going on from step {good} instead" if step > good else ""
        log.warning(
            "the checkpoint of step %d in %s is damaged (%s): set aside as %s%s", step, folder, wrong, aside, on
        )


def remove_unfinished(folder: Path, settle_s: float = 0.0) -> None:
    """Delete checkpoints that nobody will finish.

    Args:
      settle_s: seconds in which writes that are still under way may make files anew, after one of them has failed.
    """
    until = time.monotonic() + settle_s
    while True:
        if is_remote(folder):
            for name, files in _parts(folder).items():
                if _is_unfinished(files) and digests.LIST not in files:
                    (folder / name).rmtree(missing_ok=True)
        for path in () if is_remote(folder) else folder.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        if time.monotonic() >= until:
            return
        time.sleep(0.05)


def _is_foreign(path: Path) -> bool:
    return not path.is_dir() or not {p.name for p in path.iterdir()} & {*WRITTEN_LATER, digests.LIST, "trainable"}


def _set_aside(path: Path) -> str:
    number = 1
    while (aside := path.with_name(f"aside-{path.name}" + f".{number}" * (number > 1))).exists():
        number += 1
    with storing(path):
        path.rename(aside)
    return aside.name


def read_meta(folder: Path) -> Mapping[str, Any]:
    """Return what a checkpoint says of itself: "run", "shapes", "pending" (see `Checkpoints.save`).

    Raises:
      ResumeError: it is none, or that part of it is damaged.
    """
    wrong = damage(folder, parts=("meta",))
    if wrong:
        raise ResumeError(f"{folder} is not a checkpoint of a run, or is damaged: {wrong}")
    found = json.loads((folder / "meta" / "metadata").read_bytes())
    missing = [key for key in ("shapes", "opt_shapes", "run") if key not in found]
    if missing:
        raise ResumeError(f"{made_by_another(folder, found)}: it does not say {', '.join(missing)}")
    return found


def made_by_another(folder: Path, meta: Mapping[str, Any]) -> str:
    """Return the beginning of an error about a checkpoint of another form."""
    version = f" ({plain(meta['version'])}, this is {__version__})" if "version" in meta else ""
    return f"{folder} was made by another version of this program{version}"
