"""Reading npz files of unknown origin: no pickle, and no more memory than the file can really fill."""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path

import numpy as np

from data_prep.errors import SceneError

MAX_NPZ_BYTES = 2**31
_MOST_PER_BYTE = 1100  # deflate unpacks one byte into at most 1032
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(source: str | Path | bytes, name: str = "", max_bytes: int = MAX_NPZ_BYTES) -> dict[str, np.ndarray]:
    """The arrays of an npz file (a path, or its bytes), without pickle.

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
