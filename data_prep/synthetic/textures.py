"""Periodic procedural textures for the rendered worlds: one grey atlas with mip levels, tinted per surface.

A texture holds noise at every scale, so that stereo and feature tracking find something to hold on to both near and
far. The library is fixed (not per clip): clips differ by tint, scale and offset.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import cv2
import numpy as np

PATTERNS = ("plaster", "wood", "planks", "bricks", "tiles", "fabric", "carpet", "checks", "stripes", "dots", "metal")
SIZE = 512  # texels of a tile at level 0
LEVELS = 8
_PAD = 2  # wrapped texels around each tile, for the bilinear taps
_SEED = 20260301


@dataclasses.dataclass(frozen=True, eq=False)
class Atlas:
    """All patterns at all mip levels in one picture.

    Attributes:
      image: u8[rows, columns].
      left: f32[LEVELS], column of texel 0 of a level.
      top: f32[patterns * LEVELS], row of texel 0 of (pattern, level), pattern-major.
      size: f32[LEVELS], texels of a tile.
    """

    image: np.ndarray
    left: np.ndarray
    top: np.ndarray
    size: np.ndarray

    def sample(self, pattern: np.ndarray, level: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Sample grey values u8[n] (bilinear) at tile coordinates (u, v), period 1, of pattern and level, i64[n]."""
        size = self.size[level]
        x = (u - np.floor(u)) * size
        y = (v - np.floor(v)) * size
        x += self.left[level]
        y += self.top[pattern * LEVELS + level]
        # cv2.remap limits an image's sides to 2^15; its coordinates count from texel centres.
        width = min(len(x), 4096)
        rows = -(-len(x) // width)
        grid = [np.resize(a - np.float32(0.5), rows * width).reshape(rows, width) for a in (x, y)]
        return cv2.remap(self.image, *grid, cv2.INTER_LINEAR).reshape(-1)[: len(x)]


@lru_cache(maxsize=1)
def atlas() -> Atlas:
    """Return the library; drawn once per process, always the same."""
    sizes = [SIZE >> n for n in range(LEVELS)]
    left = np.cumsum([0] + [s + 2 * _PAD for s in sizes])
    image = np.zeros((len(PATTERNS) * (SIZE + 2 * _PAD), int(left[-1])), np.uint8)
    top = np.zeros((len(PATTERNS), LEVELS), np.float32)
    for p, name in enumerate(PATTERNS):
        tile = _draw(name, np.random.default_rng([_SEED, p]))
        for n, side in enumerate(sizes):
            small = cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA)
            row, column = p * (SIZE + 2 * _PAD), int(left[n])
            image[row : row + side + 2 * _PAD, column : column + side + 2 * _PAD] = np.pad(small, _PAD, mode="wrap")
            top[p, n] = row + _PAD
    image.setflags(write=False)
    return Atlas(image, (left[:-1] + _PAD).astype(np.float32), top.reshape(-1), np.array(sizes, np.float32))


def _noise(rng: np.random.Generator, slope: float, stretch: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Periodic noise f64[SIZE, SIZE], zero mean and unit deviation, amplitude falling as frequency^-slope.

    Args:
      stretch: (rows, columns) factor on the frequency; a large one makes the grain short along that axis' other.
    """
    fy = np.fft.fftfreq(SIZE)[:, None] * SIZE * stretch[0]
    fx = np.fft.rfftfreq(SIZE)[None] * SIZE * stretch[1]
    spectrum = np.fft.rfft2(rng.standard_normal((SIZE, SIZE))) / np.maximum(np.hypot(fy, fx), 1.0) ** slope
    spectrum[0, 0] = 0
    field = np.fft.irfft2(spectrum, (SIZE, SIZE))
    return field / field.std()


def _grid(rng: np.random.Generator, rows: int, columns: int, gap: int, offset: bool) -> np.ndarray:
    """Blocks with joints, f64[SIZE, SIZE]: each block a grey of its own, joints dark; odd rows shifted if `offset`."""
    y, x = np.mgrid[:SIZE, :SIZE]
    height, width = SIZE // rows, SIZE // columns
    row = y // height
    shifted = (x + (row % 2) * (width // 2) * offset) % SIZE
    shade = rng.uniform(-1, 1, (rows + 1, columns + 1))[np.minimum(row, rows), shifted // width]
    joint = (y % height < gap) | (shifted % width < gap)
    return np.where(joint, -2.0, shade)


def _draw(name: str, rng: np.random.Generator) -> np.ndarray:
    """u8[SIZE, SIZE], periodic."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    fine = _noise(rng, 0.5)
    coarse = _noise(rng, 1.3)
    if name == "plaster":
        field = 0.4 * coarse + 0.6 * fine
    elif name == "wood":
        rings = np.sin(2 * np.pi * (12 * y + 0.6 * _noise(rng, 1.8, (1.0, 4.0))))
        field = 0.6 * rings + 0.5 * _noise(rng, 0.8, (1.0, 8.0)) + 0.35 * fine
    elif name == "planks":
        field = 0.6 * _grid(rng, 8, 2, 4, True) + 0.45 * _noise(rng, 0.8, (1.0, 8.0)) + 0.35 * fine
    elif name == "bricks":
        field = 0.6 * _grid(rng, 16, 4, 5, True) + 0.5 * fine + 0.2 * coarse
    elif name == "tiles":
        field = 0.55 * _grid(rng, 8, 8, 4, False) + 0.35 * fine + 0.45 * coarse
    elif name == "fabric":
        weave = np.sign(np.sin(2 * np.pi * 64 * x) * np.sin(2 * np.pi * 64 * y))
        field = 0.25 * weave + 0.6 * coarse + 0.45 * fine
    elif name == "carpet":
        field = 0.8 * _noise(rng, 0.25) + 0.5 * coarse
    elif name == "checks":
        field = 1.1 * np.sign(np.sin(2 * np.pi * 4 * x) * np.sin(2 * np.pi * 4 * y)) + 0.35 * fine + 0.2 * coarse
    elif name == "stripes":
        field = 1.1 * np.sign(np.sin(2 * np.pi * 6 * x)) + 0.35 * fine + 0.2 * coarse
    elif name == "dots":
        distance = np.hypot((x * 6) % 1 - 0.5, (y * 6) % 1 - 0.5)
        field = np.where(distance < 0.27, 1.2, -1.0) + 0.35 * fine + 0.2 * coarse
    else:  # metal: brushed, with scratches
        field = 0.7 * _noise(rng, 0.6, (1.0, 16.0)) + 0.45 * fine + 0.3 * coarse
    return np.clip(128 + 52 * field, 0, 255).astype(np.uint8)
