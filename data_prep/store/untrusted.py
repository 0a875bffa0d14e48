"""Reading files of unknown origin: no pickle, and no more memory than the file can really fill."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mllm4d_jax.files.quoting import shown

MAX_NPZ_BYTES = 2**31
MAX_JSON_BYTES = 2**26  # Python objects take up to some twenty times that
_MOST_PER_BYTE = 1100  # deflate unpacks one byte into at most 1032
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class SceneError(ValueError):
    """A scene, or a file it is made from, is wrong or damaged; the message names the field or the file and key."""


@contextlib.contextmanager
def as_scene_error(*kinds: type[Exception], name: str = "") -> Iterator[None]:
    """Raise errors of `kinds` from the block as a SceneError; its message begins with `name` unless that is ''."""
    try:
        yield
    except kinds as error:
        raise SceneError(f"{name}: {error}" if name else str(error)) from error


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Return the content of a file. Raises SceneError: unreadable, or larger than `limit` bytes."""
    try:
        with open(path, "rb") as file:
            # Reading allocates what is asked for, so ask for what is there.
            data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    except OSError as error:
        raise SceneError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise SceneError(f"{path} is larger than {limit} bytes")
    return data


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in a file of at most `MAX_JSON_BYTES`.

    Raises:
      SceneError: anything else, or a text that cannot be written again (half a surrogate pair).
    """
    data = read_bytes(path, MAX_JSON_BYTES)
    with as_scene_error(ValueError, RecursionError, name=f"{path} is not JSON"):
        document = json.loads(data.decode("utf-8"))
    if b"\\ud" in data or b"\\uD" in data:  # as UTF-8 it has no other way in
        with as_scene_error(UnicodeError, name=f"{path}: a text holds half a surrogate pair, which no record can hold"):
            json.dumps(document, ensure_ascii=False).encode("utf-8")
    if not isinstance(document, dict):
        raise SceneError(f"{path}: expected a JSON object, got {shown(document)}")
    return document


def read_npz(source: str | Path | bytes, name: str = "", max_bytes: int = MAX_NPZ_BYTES) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file (a path, or its bytes) without pickle.

    Every declared size is checked against the bytes that are there before anything is allocated.

    Args:
      name: what errors call it; the path if ''.
      max_bytes: limit on all arrays together, unpacked.

    Raises:
      SceneError: missing, not a readable npz, Python objects inside, or larger than `max_bytes` when unpacked.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "npz bytes")
    try:
        length = len(source) if isinstance(source, bytes) else os.path.getsize(source)
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            return _read_all(archive, name, min(max_bytes, _MOST_PER_BYTE * length))
    except SceneError:
        raise
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy raise a dozen kinds
        raise SceneError(f"{name}: not a readable npz file ({type(error).__name__}: {error})") from error


def _read_all(archive: zipfile.ZipFile, name: str, room: int) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for entry in archive.infolist():
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SceneError(f"{name}: {entry.filename} is packed in a way NumPy does not write")
        with archive.open(entry) as member:
            shape, _, dtype = _HEADERS[np.lib.format.read_magic(member)](member)
        size = math.prod(shape) * dtype.itemsize
        room -= entry.file_size
        if dtype.hasobject or dtype.itemsize == 0:
            raise SceneError(f"{name}: {entry.filename} holds {dtype}, which is not an array of numbers or text")
        if size > entry.file_size or room < 0:
            raise SceneError(
                f"{name}: {entry.filename} declares {dtype}{list(shape)}, {size} bytes, more than the file holds or "
                "than is allowed"
            )
        with archive.open(entry) as member:
            arrays[entry.filename.removesuffix(".npy")] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return arrays as a compressed npz file; the bytes depend on the arrays (and the zlib in use), not on the time."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def numbers(
    path: str | Path,
    arrays: Mapping[str, np.ndarray],
    key: str,
    shape: tuple[int | None, ...],
    *,
    kinds: str = "fiu",
    finite: bool = True,
) -> np.ndarray:
    """Return a float64 copy of an array of a file.

    Args:
      shape: its sides; None = any.
      kinds: NumPy dtype kinds that are allowed.
      finite: refuses NaN and infinite values.

    Raises:
      SceneError: missing, or of another shape, type or content; naming file and key.
    """
    if key not in arrays:
        raise SceneError(f"{path}: no {key!r}; it has {sorted(arrays)[:20]}")
    array = arrays[key]
    fits = array.ndim == len(shape) and all(w is None or n == w for n, w in zip(array.shape, shape, strict=True))
    if array.dtype.kind not in kinds or not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise SceneError(f"{path}: {key} is {array.dtype}{list(array.shape)}, expected numbers [{wanted}]")
    array = array.astype(np.float64)
    if finite and not np.isfinite(array).all():
        raise SceneError(f"{path}: {key} holds NaN or infinite values")
    return array


def keep_visible(path: str | Path, key: str, values: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Set `values` to NaN where `visible` (bool, their first axes) is False, in place, and return them.

    Raises:
      SceneError: a visible one is not finite; naming file and key.
    """
    if not np.isfinite(values[visible]).all():
        raise SceneError(f"{path}: {key} holds NaN or infinite values that are marked visible")
    values[~visible] = np.nan
    return values
