"""Where records come from: one or several files or sets behind one small protocol, mixed at given rates."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from mllm4d_jax.data.clip_sets import DEFAULT_SPLIT, ClipSet
from mllm4d_jax.data.json_index import RecordFileError
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.files.remote import is_file, is_folder
from mllm4d_jax.qa.records import Record

_SEPARATOR = "::"
_SHOWN_FIELDS = 20

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Questions:
    """A group before anything is read: records `indices` of source `source`, about one clip.

    `position`: in the order of a run, counted over all hosts.
    """

    source: int
    indices: tuple[int, ...]
    position: int = 0


class RecordSource(Protocol):
    """Random access to records. Pickles, and opens what it reads from anew in another process.

    Attributes:
      name: for messages.
      digest: of the content, so that a resumed run can tell that its data changed.
      clips: i32 per record: equal for records that (very likely) have the same media. Known without decoding anything.
    """

    name: str
    digest: str
    clips: np.ndarray

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The record's name in messages."""
        ...

    def __getitem__(self, i: int) -> Record:
        """Record i. Raises RecordError when it cannot be used."""
        ...


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """One entry of `data.mixture`.

    Attributes:
      path: file or folder, see `open_source`.
      root: media folder; '' for sets that bring their frames.
      rate: relative share of the question groups.
    """

    path: str
    root: str
    rate: float


def parse_mixture(entries: Iterable[str]) -> tuple[Ingredient, ...]:
    """Entries "path::root::rate".

    Raises:
      RecordFileError: naming the entry that is not of this form or has a rate that is not positive.
    """
    found = []
    for entry in entries:
        path, *others = entry.split(_SEPARATOR)
        try:
            root, rate = others[0], float(others[1])
        except (IndexError, ValueError):
            root, rate = "", 0.0
        if len(others) != 2 or not path or not 0 < rate < float("inf"):
            raise RecordFileError(f"data.mixture: '{entry}' is not of the form path::root::rate with a positive rate")
        found.append(Ingredient(path, root, rate))
    return tuple(found)


def named_set(path: str | Path) -> tuple[str | Path, str] | None:
    """Return the folder and the split of a TFDS set that a path names, "folder" or "folder@split"; None for a file."""
    if is_folder(path):
        return path, DEFAULT_SPLIT
    folder, _, split = str(path).rpartition("@")
    if folder and "/" not in split and is_folder(folder) and not is_file(path):  # "@" may be in any name
        return folder, split
    return None


def open_source(path: str | Path, root: str | Path, system_prompt: str = "") -> RecordSource:
    """Opens a record file (JSON list or JSONL), or a TFDS set of clips: its version's folder, "@split" behind it if not
    the training split. The log names the fields of a record file that nothing reads, once.

    Args:
      path: the file or folder.
      root: media folder of a record file.
      system_prompt: for records that bring none.

    Raises:
      RecordFileError: nothing usable there.
    """
    if named := named_set(path):
        return ClipSet(*named, system_prompt)
    records = RecordFile(path, root, system_prompt)
    if records.unread:
        often = sorted(records.unread.items(), key=lambda field: -field[1])
        listed = ", ".join(f"{shown(name)} ({n} records)" for name, n in often[:_SHOWN_FIELDS])
        more = f" and {len(often) - _SHOWN_FIELDS} more" if len(often) > _SHOWN_FIELDS else ""
        log.warning("%s has fields that are not read and change nothing: %s%s", path, listed, more)
    return records


class Mixture:
    """The records of a run.

    Attributes:
      sources: where they come from.
      rates: share of the question groups from each, adding up to 1.
      digest: of all contents and rates; of one source alone, its own digest.
      system_prompt: given to records without one.
    """

    def __init__(
        self, sources: Sequence[RecordSource], rates: Sequence[float] = (1.0,), system_prompt: str = ""
    ) -> None:
        """
        Raises:
          RecordFileError: a source without records, or rates and sources that differ in number.
        """
        if len(sources) != len(rates) or not sources:
            raise RecordFileError(f"{len(sources)} sources of records with {len(rates)} rates")
        for source in sources:
            if not len(source):
                raise RecordFileError(f"{source.name} holds no records")
        self.sources, self.system_prompt = tuple(sources), system_prompt
        self.rates = tuple(rate / sum(rates) for rate in rates)
        said = repr([(s.digest, rate) for s, rate in zip(sources, self.rates, strict=True)])
        self.digest = sources[0].digest if len(sources) == 1 else hashlib.sha256(said.encode()).hexdigest()

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    @property
    def name(self) -> str:
        """What messages call all of them."""
        return ", ".join(source.name for source in self.sources)


def open_mixture(path: str, root: str, mixture: Sequence[str], system_prompt: str = "") -> Mixture:
    """What a config's `data` group names: `mixture` when it is not empty, else `path` alone.

    Raises:
      RecordFileError: an entry or a file cannot be used.
    """
    parts = parse_mixture(mixture) if mixture else (Ingredient(path, root, 1.0),)
    return Mixture([open_source(p.path, p.root, system_prompt) for p in parts], [p.rate for p in parts], system_prompt)
