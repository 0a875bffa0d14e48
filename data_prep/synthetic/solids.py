"""The solids of the rendered worlds, boxes, balls and cylinders: where rays meet them, and what their skin is like.

Textures are periodic and procedural: one grey atlas with mip levels, tinted per surface. A texture holds noise at every
scale, so that stereo and feature tracking find something to hold on to both near and far. The library is fixed (not per
clip): clips differ by tint, scale and offset.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import cv2
import numpy as np

PATTERNS = ("plaster", "wood", "planks", "bricks", "tiles", "fabric", "carpet", "checks", "stripes", "dots", "metal")
SIZE = 512  # texels of a tile at level 0
LEVELS = 8
_PAD = 2  # wrapped texels around each tile, for the bilinear taps
_SEED = 20260301


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """How a surface looks.

    Attributes:
      pattern: index into `PATTERNS`.
      tile: metres (round solids: turns) that one texture tile covers.
      offset: (u, v) in tiles.
      dark, light: RGB in [0, 255] at the darkest and lightest texel.
    """

    pattern: int
    tile: float
    offset: tuple[float, float]
    dark: tuple[float, float, float]
    light: tuple[float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Solid:
    """A box, ball or upright cylinder that moves as a rigid body.

    Attributes:
      shape: "box", "ball" or "cylinder" (axis = its own y).
      half: (x, y, z) half extents, metres; a ball's radius, or a cylinder's radius, half height, radius.
      centers: f64[T, 3] world.
      rotations: f64[T, 3, 3] body -> world.
      surface: id in the label image.
      material: how it looks.
    """

    shape: str
    half: tuple[float, float, float]
    centers: np.ndarray
    rotations: np.ndarray
    surface: int
    material: Material

    @property
    def radius(self) -> float:
        """Return that of the bounding sphere, metres."""
        return self.half[0] if self.shape == "ball" else math.hypot(*self.half[: 2 if self.shape == "cylinder" else 3])


def _box_depth(half: tuple, origin: np.ndarray, ray: np.ndarray) -> np.ndarray:
    """f32[n] depth of the first crossing, inf if none; as the other two."""
    size = np.array(half, np.float32)[:, None]
    inverse = 1 / ray
    middle, reach = -origin * inverse, size * np.abs(inverse)
    enter, leave = (middle - reach).max(0), (middle + reach).min(0)
    return np.where(enter < leave, enter, np.float32(np.inf))


def _ball_depth(half: tuple, origin: np.ndarray, ray: np.ndarray) -> np.ndarray:
    return _round_depth(origin, ray, half[0], (0, 1, 2))


def _cylinder_depth(half: tuple, origin: np.ndarray, ray: np.ndarray) -> np.ndarray:
    side = _round_depth(origin, ray, half[0], (0, 2))
    side[~(np.abs(origin[1] + side * ray[1]) <= half[1])] = np.inf
    cap = (-np.sign(ray[1]) * np.float32(half[1]) - origin[1]) / ray[1]  # the cap that faces the ray
    x, z = origin[0] + cap * ray[0], origin[2] + cap * ray[2]
    cap[~(x * x + z * z <= np.float32(half[0] ** 2))] = np.inf
    return np.minimum(side, cap)


def _round_depth(origin: np.ndarray, ray: np.ndarray, radius: float, axes: tuple[int, ...]) -> np.ndarray:
    """Where rays first come within `radius` of the origin, measured along `axes`."""
    a = sum(ray[n] * ray[n] for n in axes)
    b = sum(origin[n] * ray[n] for n in axes)
    c = sum(origin[n] * origin[n] for n in axes) - np.float32(radius**2)
    return np.where(b * b > a * c, (-b - np.sqrt(np.maximum(b * b - a * c, 0))) / a, np.float32(np.inf))


def _box_surface(half: tuple, point: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(outward normal f32[3, n], u, v) at surface points in the solid's own axes; as the other two."""
    axis = (np.abs(point) / np.array(half, np.float32)[:, None]).argmax(0)
    normal = np.zeros_like(point)
    each = np.arange(point.shape[1])
    normal[axis, each] = np.sign(point[axis, each])
    # The sides of a box show different parts of the texture.
    u = np.where(axis == 0, point[2], point[0]) + np.float32(0.37) * axis + np.float32(0.11) * normal.sum(0)
    return normal, u, np.where(axis == 1, point[2], point[1])


def _ball_surface(half: tuple, point: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    normal = point / np.float32(half[0])
    turn = np.arctan2(normal[0], normal[2]) / np.float32(2 * math.pi)
    return normal, turn, np.arcsin(np.clip(normal[1], -1, 1)) / np.float32(2 * math.pi)


def _cylinder_surface(half: tuple, point: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cap = np.abs(np.abs(point[1]) - np.float32(half[1])) < np.float32(1e-4)
    normal = point / np.float32(half[0])
    normal[1] = np.where(cap, np.sign(point[1]), 0)
    normal[0], normal[2] = np.where(cap, 0, normal[0]), np.where(cap, 0, normal[2])
    around = np.float32(2 * math.pi * half[0])
    turn = np.where(cap, point[0] / around, np.arctan2(point[0], point[2]) / np.float32(2 * math.pi))
    return normal, turn, np.where(cap, point[2], point[1]) / around


DEPTH = {"box": _box_depth, "ball": _ball_depth, "cylinder": _cylinder_depth}
SURFACE = {"box": _box_surface, "ball": _ball_surface, "cylinder": _cylinder_surface}


def surface_points(
    rng: np.random.Generator, shape: str, half: tuple[float, float, float], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw points uniform on the surface of a solid in its own axes, f64[count, 3], and their outward normals."""
    if shape == "ball":
        normal = rng.standard_normal((count, 3))
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        return normal * half[0], normal
    size = np.array(half)
    if shape == "box":
        areas = np.array([size[1] * size[2], size[0] * size[2], size[0] * size[1]])
        axis = rng.choice(3, count, p=areas / areas.sum())
        point = rng.uniform(-1, 1, (count, 3)) * size
        normal = np.zeros((count, 3))
        normal[np.arange(count), axis] = rng.choice([-1.0, 1.0], count)
        return np.where(normal != 0, normal * size, point), normal
    turn, height = rng.uniform(0, 2 * np.pi, count), rng.uniform(-half[1], half[1], count)
    cap = rng.random(count) < half[0] / (half[0] + 2 * half[1])  # 2 pi r^2 against 2 pi r 2h
    circle = np.stack([np.sin(turn), np.zeros(count), np.cos(turn)], 1)
    ends = rng.choice([-1.0, 1.0], count)[:, None] * [0.0, 1.0, 0.0]
    top = circle * half[0] * np.sqrt(rng.random(count))[:, None] + ends * half[1]
    side = circle * half[0] + height[:, None] * [0.0, 1.0, 0.0]
    return np.where(cap[:, None], top, side), np.where(cap[:, None], ends, circle)


@dataclasses.dataclass(frozen=True, eq=False)
class Atlas:
    """All patterns at all mip levels in one picture."""

    image: np.ndarray  # u8[rows, columns]
    left: np.ndarray  # f32[LEVELS], column of texel 0 of a level
    top: np.ndarray  # f32[patterns * LEVELS], row of texel 0 of (pattern, level), pattern-major
    size: np.ndarray  # f32[LEVELS], texels of a tile

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
