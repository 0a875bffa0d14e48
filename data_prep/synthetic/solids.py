"""The solids of the rendered worlds, boxes, balls and cylinders: where rays meet them, how their skin is laid."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """How a surface looks.

    Attributes:
      pattern: index into `textures.PATTERNS`.
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
