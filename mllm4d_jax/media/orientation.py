"""How a stored frame is turned and mirrored to be upright, by the display matrix of its container or codec.

Cameras turn no pixels, they note how they were held; front cameras note a mirror besides. FFmpeg hands the matrix out
with each frame, whatever kind of file it was noted in.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer, Type

from mllm4d_jax.qa.errors import MediaError

_TOLERANCE = math.sin(math.radians(1.0))  # what FFmpeg's own player takes for a quarter turn
_KINDS = 64  # more than FFmpeg has kinds of side data


@dataclasses.dataclass(frozen=True)
class Orientation:
    """One of the eight ways to put a picture on a grid of pixels.

    Attributes:
      transposed: rows become columns, before anything else.
      up_down: then top and bottom change places.
      left_right: then left and right change places.
    """

    transposed: bool = False
    up_down: bool = False
    left_right: bool = False

    def applied(self, image: np.ndarray) -> np.ndarray:
        """Return an image [H, W, ...] as it is to be shown: [W, H, ...] if transposed."""
        if self == Orientation():
            return image
        image = image.swapaxes(0, 1) if self.transposed else image
        return np.ascontiguousarray(image[:: -1 if self.up_down else 1, :: -1 if self.left_right else 1])


def read_orientation(frame: av.VideoFrame, path: str) -> Orientation | None:
    """Return how a frame of a file is to be shown; None where nothing is said with it.

    A container's matrix comes with every frame; that of a codec with its key frames, and it stays in force after them.

    Raises:
      MediaError: "bad_orientation" (askew or sheared).
    """
    matrix = _display_matrix(frame)
    if matrix is None:
        return None
    # A pixel at (x, y) shows at (x, y) @ matrix; how much it is stretched is a matter of its aspect.
    with np.errstate(invalid="ignore"):
        unit = matrix / np.hypot(matrix[0], matrix[1])
    whole = np.nan_to_num(np.round(unit))
    if not (np.abs(unit - whole) <= _TOLERANCE).all() or abs(np.linalg.det(whole)) != 1:
        told = ", ".join(f"{value:g}" for value in matrix.ravel())
        message = f"{path} asks to be shown by the matrix ({told}), which is no quarter turn and no mirror of one"
        raise MediaError(f"{message}: re-encode it upright", "bad_orientation")
    (a, b), (c, d) = whole
    transposed = a == 0
    return Orientation(bool(transposed), bool((b if transposed else d) < 0), bool((c if transposed else a) < 0))


def _display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """f64[2, 2], the part that turns and mirrors; None for a frame without one."""
    # `frame.side_data` is the same, but the frame keeps it, and it keeps the frame, until garbage is collected.
    try:
        found = SideDataContainer(frame).get("DISPLAYMATRIX")
    except ValueError:  # PyAV lists nothing where it has no name for one of the kinds, as for EXIF
        found = SideDataContainer(_without_unnamed(frame)).get("DISPLAYMATRIX")
    return None if found is None else np.frombuffer(bytes(found), np.int32).reshape(3, 3)[:2, :2] / 65536


def _without_unnamed(frame: av.VideoFrame) -> av.VideoFrame:
    """Return the frame without the side data that PyAV has no names for."""
    graph, named = av.filter.Graph(), {kind.value for kind in Type}
    base = frame.time_base or Fraction(1)
    first = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name, time_base=base)
    last = first
    for kind in sorted(set(range(_KINDS)) - named):
        step = graph.add("sidedata", f"mode=delete:type={kind}")
        last.link_to(step)
        last = step
    last.link_to(graph.add("buffersink"))
    graph.configure()
    first.push(frame)
    return graph.pull()
