"""Digests of files: of every byte, to find damage; of samples, to tell one version of a large file from another."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from mllm4d_jax.files.atomic import write_json

LIST = "digests.json"
_BLOCK = 1 << 16  # bytes of a sample
_THREADS = 8
T, R = TypeVar("T"), TypeVar("R")


def sampled(path: str | Path, most: int) -> str:
    """Return "SIZE:SHA256" of a file of which at most `most` bytes are read: all of it, or evenly spaced samples.

    Another size is always noticed, and so is any change to a file of at most `most` bytes. In a larger one, a change is
    noticed where it touches a sample of 64 KiB: surely if it is longer than the gap between two of them, `size / (most
    / 64 KiB)`. A few changed bytes may be missed. Names and times do not count.
    """
    size = os.stat(path).st_size
    sha, count = hashlib.sha256(), max(2, most // _BLOCK)
    with open(path, "rb") as file:
        if size <= most:
            sha.update(file.read())
        else:
            for n in range(count):
                file.seek((size - _BLOCK) * n // (count - 1))
                sha.update(file.read(_BLOCK))
    return f"{size}:{sha.hexdigest()}"


def all_sampled(folder: Path, files: Iterable[Path], most: int) -> list[str]:
    """Return "NAME SIZE:SHA256" of files below a folder, each `sampled`, several at a time."""
    files = list(files)
    return [
        f"{file.relative_to(folder).as_posix()} {digest}"
        for file, digest in zip(files, _in_threads(lambda file: sampled(file, most), files), strict=True)
    ]


def record(folder: str | Path, without: Collection[str] = ()) -> None:
    """Write size and SHA-256 of every file below a folder to `digests.json` in it, once they are all safely on disk.

    Costs reading all files once (1 to 2 GB/s of a core, several files at a time).

    Args:
      without: names below the folder that are left out, e.g. those which are still to change.
    """
    folder = Path(folder)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name not in {LIST, *without}]
    digests = _in_threads(lambda name: _whole(folder / name, sync=True), names)
    write_json(folder / LIST, {"files": dict(zip(names, digests, strict=True))})


def damage(folder: str | Path, largest: float = float("inf"), parts: Sequence[str] = ("",)) -> str:
    """Return what is wrong with the files that `record` has listed, '' for nothing.

    Args:
      largest: of files above so many bytes only the size is looked at.
      parts: folders below it; other files are not looked at.
    """
    folder = Path(folder)
    try:
        listed = json.loads((folder / LIST).read_bytes())["files"]
        entries = [(str(name), int(size), str(sha)) for name, (size, sha) in listed.items()]
        chosen = [[one for one in entries if not part or one[0].startswith(f"{part}/")] for part in parts]
    except FileNotFoundError:
        return f"{LIST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        return f"{LIST} cannot be read ({type(problem).__name__})"
    lacking = [part for part, found in zip(parts, chosen, strict=True) if not found]
    if lacking:
        return f"{', '.join(lacking) or 'everything'} is missing"

    def look(entry: tuple[str, int, str]) -> str:
        name, size, sha = entry
        try:
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            return f"{name} has changed bytes" if size <= largest and _whole(folder / name)[1] != sha else ""
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as problem:
            return f"{name} cannot be read: {problem.strerror}"

    wrong = [said for said in _in_threads(look, itertools.chain(*chosen)) if said]
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def _whole(path: Path, sync: bool = False) -> tuple[int, str]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    with concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))
