"""Whether the clips of a run are still the files that it began with.

Records name their clips and do not hold them, so a digest of the records says nothing of the clips. `clips.json` in the
workdir keeps size and sampled content of some: of all, where there are at most 256, else of as many, spread evenly over
the records. A data set of another encoding or version is noticed so; one clip among very many may be missed. Times of
files do not count, since copying changes them; a clip that was missing then or is now is the quarantine's matter.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mllm4d_jax.data.sources import RecordSource
from mllm4d_jax.files import digests
from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.files.cache import held_if_there
from mllm4d_jax.files.remote import RemoteError, is_remote, place
from mllm4d_jax.qa.errors import RecordError

CLIPS = "clips.json"
_CLIPS = 256
_READ = 1 << 20  # bytes read of a clip: all of most clips of a few seconds

log = logging.getLogger(__name__)


class ClipsError(ValueError):
    """Clips are not those that the run began with."""


def check_clips(folder: Path, sources: Sequence[RecordSource], fresh: bool) -> None:
    """Compare the clips of a run with those that it began with, and note those that were not known yet.

    Args:
      folder: its workdir.
      fresh: True for a run that begins: what is there of another one is forgotten.

    Raises:
      ClipsError: some have another content now.
    """
    path = folder / CLIPS
    known = {} if fresh else _read(path)
    now = dict(_digests(sources))
    changed = [name for name in now if known.get(name, now[name]) != now[name]]
    if changed:
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise ClipsError(
            f"{len(changed)} of the {len(now)} clips looked at are not the files that this run began with: {listed}. "
            f"Put those back to go on, or give another --workdir to start with these ({path} holds what they were)"
        )
    if not fresh and known == known | now:
        return
    write_json(path, known | now)


def _digests(sources: Sequence[RecordSource]) -> Iterator[tuple[str, str]]:
    """Yield (name, digest) of the files of chosen records; a file that cannot be read is left out."""
    for number, source in enumerate(sources):
        _, first = np.unique(source.clips, return_index=True)  # a record of each clip
        first, most = np.sort(first), max(1, _CLIPS // len(sources))
        chosen = first[np.linspace(0, len(first) - 1, min(most, len(first))).astype(int)]
        for i in chosen.tolist():
            try:
                record = source[i]
            except RecordError:
                continue
            parts = (part for message in record.messages for part in message["content"] if isinstance(part, dict))
            for file in (part["path"] for part in parts if isinstance(part.get("path"), str)):
                try:
                    yield f"{place(file).name} (record {i} of source {number})", _digest(file)
                except RemoteError:
                    raise
                except (OSError, ValueError):  # missing, no permission, a name that cannot be one
                    continue


def _digest(file: str) -> str:
    """Return the digest of a clip: of one in a bucket that of its copy on this machine, which is what a run reads."""
    with held_if_there(file) if is_remote(file) else contextlib.nullcontext() as copy:
        return digests.sampled(copy or file, _READ)


def _read(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as problem:
        known = problem
    if not isinstance(known, dict):
        log.warning("%s cannot be read: whether the clips are still the same is not known", path)
        return {}
    return known
