"""Whether a GIF is whole: its blocks have to come to the trailer, which says that nothing is missing."""

from __future__ import annotations

from typing import BinaryIO

_EXTENSION, _IMAGE, _TRAILER = 0x21, 0x2C, 0x3B
_COLOURS = 0x80  # flag: a table of colours follows
_HEADER, _DESCRIPTOR = 13, 9  # bytes


def has_trailer(path: str) -> bool:
    """Return whether a GIF has all its blocks; whatever follows the trailer does not matter."""
    with open(path, "rb") as file:
        header = file.read(_HEADER)
        if len(header) < _HEADER:
            return False
        _skip_colours(file, header[10])
        while kind := file.read(1):
            if kind[0] == _TRAILER:
                return True
            if kind[0] == _IMAGE:
                descriptor = file.read(_DESCRIPTOR)
                if len(descriptor) < _DESCRIPTOR:
                    return False
                _skip_colours(file, descriptor[8])
                file.seek(1, 1)  # the size of its codes
            elif kind[0] == _EXTENSION:
                file.seek(1, 1)  # its label
            else:  # players look for the next block
                continue
            while (length := file.read(1)) and length[0]:
                file.seek(length[0], 1)
    return False


def _skip_colours(file: BinaryIO, flags: int) -> None:
    if flags & _COLOURS:
        file.seek(3 << (flags & 7) + 1, 1)
