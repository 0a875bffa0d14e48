"""Digests of files: of every byte, to find damage; of samples, to tell one version of a large file from another."""

from __future__ import annotations

import concurrent.futures
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mllm4d_jax.files import remote
from mllm4d_jax.files.atomic import write_json

LIST = "digests.json"
_CRC = "crc32c:"  # before the digest of a file in a bucket, in base64; others are SHA-256 in hex
_BLOCK = 1 << 16  # bytes of a sample
_THREADS = 8
T, R = TypeVar("T"), TypeVar("R")


def sampled(path: str | Path, most: int) -> str:
    """Return "SIZE:SHA256" of a file of which at most `most` bytes are read: all of it, or evenly spaced samples.

    Another size is always noticed, and so is any change to a file of at most `most` bytes. In a larger one, a change is
    noticed where it touches a sample of 64 KiB: surely if it is longer than the gap between two of them, `size / (most
    / 64 KiB)`. A few changed bytes may be missed. Names and times do not count.
    """
    size = remote.size(path)
    count = max(2, most // _BLOCK)
    starts = [(size - _BLOCK) * n // (count - 1) for n in range(count)]
    parts = [(0, size)] if size <= most else [(start, start + _BLOCK) for start in starts]
    sha = hashlib.sha256()
    if remote.is_remote(path):
        for data in _in_threads(lambda part: remote.read_range(path, *part), parts):
            sha.update(data)
    else:
        with open(path, "rb") as file:
            for start, stop in parts:
                file.seek(start)
                sha.update(file.read(stop - start))
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

    Costs reading all files once (1 to 2 GB/s of a core, several files at a time). In a bucket, nothing is read: it
    knows the CRC-32C of every object, which was compared when the object was written.

    Args:
      without: names below the folder that are left out, e.g. those which are still to change.
    """
    left_out = {LIST, *without}
    if remote.is_remote(folder):
        there = remote.found(folder).items()
        files = {name: (int(about["size"]), _CRC + about["crc32c"]) for name, about in there if name not in left_out}
    else:
        names = sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())
        names = [name for name in names if name not in left_out]
        digests = _in_threads(lambda name: _whole(Path(folder) / name, sync=True), names)
        files = dict(zip(names, digests, strict=True))
    write_json(remote.place(folder) / LIST, {"files": files})


def damage(folder: str | Path, largest: float = float("inf"), parts: Sequence[str] = ("",)) -> str:
    """Return what is wrong with the files that `record` has listed, '' for nothing.

    Args:
      largest: of files above so many bytes only the size is looked at.
      parts: folders below it; other files are not looked at.
    """
    folder = remote.place(folder)
    there = remote.found(folder) if remote.is_remote(folder) else {}
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
            found = int(there[name]["size"]) if remote.is_remote(folder) else (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            same = size > largest or _digest(folder / name, sha.startswith(_CRC), there.get(name)) == sha
            return "" if same else f"{name} has changed bytes"
        except (FileNotFoundError, KeyError):
            return f"{name} is missing"
        except OSError as problem:
            return f"{name} cannot be read: {problem.strerror}"

    wrong = [said for said in _in_threads(look, itertools.chain(*chosen)) if said]
    return "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def _digest(path: Path, crc: bool, about: Mapping[str, Any] | None) -> str:
    """Return the digest of one kind or the other, of a file or of an object of which a bucket says `about`."""
    if crc:
        return _CRC + (remote.crc32c(path) if about is None else about["crc32c"])
    if about is None:
        return _whole(path)[1]
    return hashlib.sha256(remote.read_range(path, 0, int(about["size"]))).hexdigest()


def _whole(path: Path, sync: bool = False) -> tuple[int, str]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _in_threads(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    with concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(work, items))
