"""Random rooms: furniture, named moving objects, and a camera that travels and turns; all from one rng."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.random import Generator

from data_prep.store.untrusted import SceneError
from data_prep.synthetic.render import ROOM, Camera, World
from data_prep.synthetic.solids import PATTERNS, Material, Solid

COLOURS = {
    "red": (206, 44, 40),
    "orange": (236, 130, 28),
    "yellow": (238, 208, 52),
    "green": (52, 146, 64),
    "turquoise": (44, 178, 172),
    "blue": (42, 84, 196),
    "purple": (128, 62, 168),
    "pink": (240, 134, 176),
    "brown": (134, 86, 48),
    "white": (240, 238, 232),
    "black": (54, 54, 58),
}
# Those of plain worlds: hard to mistake for each other, for the floor or for the walls, even at a few pixels.
_PLAIN_COLOURS = ("red", "yellow", "green", "blue", "purple", "pink")
# shape -> [(adjective, pattern)]; the last three adjectives mean "with white".
_TWO_TONE = {"checkered": "checks", "striped": "stripes", "spotted": "dots"}
_FINISHES = {
    "box": {"wooden": "wood", "metal": "metal", "stone": "plaster", "cloth-covered": "fabric", **_TWO_TONE},
    "ball": {"leather": "plaster", "woollen": "carpet", **_TWO_TONE},
    "cylinder": {"wooden": "planks", "metal": "metal", "stone": "plaster", **_TWO_TONE},
}
NOUNS = ("ball", "barrel", "column", "drum", "cube", "crate", "box")
_WALL_MARGIN = 0.75  # metres along the walls that belong to the furniture
_TRIES = 24  # paths drawn together per object
_LAYOUTS = 40


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """What the clips of a synthetic set look like.

    Attributes:
      height, width: pixels.
      frames: per clip.
      fps: frames per second.
      fov: horizontal field of view, degrees (Stereo4D: 60).
      baseline: metres between the eyes.
      stereo: whether the right eye is rendered too.
      smooth: antialias the edges.
      objects: (fewest, most) named objects.
      object_size: factor on their sizes; 1 = 0.24 to 1 m across.
      furniture: (fewest, most) cabinets and pictures along the walls.
      object_travel, camera_travel: (shortest, longest) displacement over a clip, metres, drawn log-uniformly.
      object_still, camera_still: probability of no motion at all.
      camera_height: (lowest, highest) in the middle of a clip, metres above the floor.
      camera_tilt: (least, most) the camera looks down, degrees.
      turn: most the camera yaws over a clip, degrees; it nods a quarter of that and leans a little with it.
      size_spread: factor on how far objects' sizes are from the middle one of their kind; 0 = all of that size.
      tumble: factor on how far moving objects turn, and on the probability that a ball bounces; 0 = all slide.
      plain: objects of one colour with dots, which tracking holds on to, named by colour and shape; walls of plaster,
        a checkered floor. What a model sees in a few pixels.
      object_points, background_points: tracked surface points per object; of room and furniture.
    """

    height: int = 64
    width: int = 64
    frames: int = 8
    fps: float = 4.0
    fov: float = 60.0
    baseline: float = 0.063
    stereo: bool = False
    smooth: bool = True
    objects: tuple[int, int] = (2, 4)
    object_size: float = 1.0
    furniture: tuple[int, int] = (2, 5)
    object_travel: tuple[float, float] = (0.3, 2.4)
    camera_travel: tuple[float, float] = (0.2, 1.6)
    object_still: float = 0.2
    camera_still: float = 0.1
    camera_height: tuple[float, float] = (1.2, 1.75)
    camera_tilt: tuple[float, float] = (8.0, 20.0)
    turn: float = 20.0
    size_spread: float = 1.0
    tumble: float = 1.0
    plain: bool = False
    object_points: int = 48
    background_points: int = 128

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> SyntheticConfig:
        """Return what a config's group `synthetic` says; its number of clips is not part of how they look."""
        return cls(**{name: value for name, value in group.items() if name != "clips"})

    def __post_init__(self) -> None:
        """Check the ranges. Raises SceneError: naming the field."""
        for name, least in {"height": 8, "width": 8, "frames": 2, "object_points": 1}.items():
            if not least <= getattr(self, name) <= 8192:
                raise SceneError(f"synthetic {name} is {getattr(self, name)}; it must be within [{least}, 8192]")
        if not 10 <= self.fov <= 120 or not 0 < self.fps <= 1000 or not self.baseline > 0:
            raise SceneError("synthetic fov must be within [10, 120] degrees, fps within (0, 1000], baseline above 0")
        most = len(self.colours)
        if not 1 <= self.objects[0] <= self.objects[1] <= most:
            raise SceneError(f"synthetic objects is {self.objects}; it must be (fewest, most) in [1, {most}]")
        if not 0.1 <= self.object_size <= 4 or not 0 <= self.turn <= 180:
            raise SceneError("synthetic object_size must be within [0.1, 4], turn within [0, 180] degrees")
        if not 0 <= self.furniture[0] <= self.furniture[1] <= 20 or self.background_points < 0:
            raise SceneError("synthetic furniture must be (fewest, most) within [0, 20], background_points at least 0")
        for name in ("object_travel", "camera_travel"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise SceneError(f"synthetic {name} is {(low, high)}; it must be (shortest, longest) above 0")
        for name, bounds in {"camera_height": (0.7, 1.9), "camera_tilt": (-60, 60)}.items():
            low, high = getattr(self, name)
            if not bounds[0] <= low <= high <= bounds[1]:
                raise SceneError(f"synthetic {name} is {(low, high)}; it must be (least, most) within {list(bounds)}")
        for name in ("size_spread", "tumble"):
            if not 0 <= getattr(self, name) <= 1:
                raise SceneError(f"synthetic {name} is {getattr(self, name)}; it must be within [0, 1]")

    @property
    def colours(self) -> tuple[str, ...]:
        """Return the names of the colours that objects have, each one at most once in a clip."""
        return _PLAIN_COLOURS if self.plain else tuple(COLOURS)

    @property
    def focal(self) -> float:
        """Return the focal length, pixels."""
        return self.width / 2 / math.tan(math.radians(self.fov) / 2)


@dataclasses.dataclass(frozen=True)
class Named:
    """A named object of a world: which solid it is, and what a person would call it."""

    solid: Solid
    description: str
    category: str


def make_world(rng: Generator, config: SyntheticConfig) -> tuple[World, Camera, tuple[Named, ...]]:
    """Draw a room, the left camera and the named objects (surface ids 1, 2, ... in this order).

    Raises:
      SceneError: no arrangement of the asked objects and travels fits into a room.
    """
    for _ in range(_LAYOUTS):
        size = np.array([rng.uniform(5.5, 8.5), rng.uniform(2.5, 3.1), rng.uniform(5.5, 8.5)])
        camera = _camera(rng, config, size)
        objects = None if camera is None else _objects(rng, config, size, camera)
        if objects is not None:
            still = np.broadcast_to(np.eye(3), (config.frames, 3, 3))
            solids = (*(o.solid for o in objects), *_furniture(rng, config, size, still))
            light = np.array([rng.uniform(-0.6, 0.6), -1.0, rng.uniform(-0.6, 0.6)])
            world = World(tuple(size), _walls(rng, config.plain), solids, light / np.linalg.norm(light))
            return world, camera, objects
    raise SceneError(
        f"no room fits {config.objects[0]} objects travelling {config.object_travel} m before a camera travelling "
        f"{config.camera_travel} m; ask for fewer or for less travel"
    )


def _log_uniform(rng: Generator, bounds: tuple[float, float], size: int | None = None) -> np.ndarray:
    return np.exp(rng.uniform(math.log(bounds[0]), math.log(bounds[1]), size))


def _progress(rng: Generator, frames: int, count: int | None = None) -> np.ndarray:
    """f64[frames] or f64[count, frames] from -0.5 to 0.5, monotone, with a random ease-in and ease-out."""
    t = np.linspace(0, 1, frames)
    ease = rng.uniform(0, 0.9, None if count is None else (count, 1))
    return t - ease * np.sin(2 * np.pi * t) / (2 * np.pi) - 0.5


def _about(axis: int, angle: np.ndarray | float) -> np.ndarray:
    """f64[..., 3, 3] rotation about x, y or z (0, 1, 2): takes the axis after it towards the one after that.

    Written out, not composed by a library, since the clips' bytes follow from its last bit.
    """
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.zeros((*np.shape(angle), 3, 3))
    matrix[..., axis, axis] = 1
    matrix[..., first, first] = matrix[..., second, second] = np.cos(angle)
    matrix[..., second, first] = np.sin(angle)
    matrix[..., first, second] = -matrix[..., second, first]
    return matrix


def _camera(rng: Generator, config: SyntheticConfig, size: np.ndarray) -> Camera | None:
    """The left camera, or None when the drawn path leaves the room."""
    frames = config.frames
    still = rng.random() < config.camera_still
    motion = 0.0 if still else 1.0
    heading = rng.uniform(-np.pi, np.pi)
    swing = motion * np.radians(rng.uniform(-config.turn, config.turn))
    yaw = heading + swing * _progress(rng, frames)
    nod, lean, sway = (share * config.turn for share in (0.25, 0.1, 0.15))
    tilt = rng.uniform(*config.camera_tilt)
    down = np.radians(tilt) + motion * np.radians(rng.uniform(-nod, nod)) * _progress(rng, frames)
    roll = np.radians(rng.uniform(-lean, lean)) + motion * np.radians(rng.uniform(-sway, sway)) * _progress(rng, frames)
    rotation = _about(1, yaw) @ _about(0, -down) @ _about(2, roll)
    # The direction of travel favours one camera axis, so that every direction has its share of clear examples.
    travel = rng.uniform(-0.45, 0.45, 3)
    axis, sign = rng.integers(3), rng.choice([-1.0, 1.0])
    travel[axis] = sign
    length = _log_uniform(rng, config.camera_travel)
    if axis == 1:
        length = min(length, 0.7)  # people crouch and stretch, they do not fly
    step = motion * length * rotation[0] @ (travel / np.linalg.norm(travel))
    forward = np.array([np.sin(heading), 0.0, np.cos(heading)])
    middle = size / 2 - forward * rng.uniform(0.8, 2.2) + rng.uniform(-0.5, 0.5, 3) * [1, 0, 1]
    middle[1] = size[1] - rng.uniform(*config.camera_height)
    centers = middle + _progress(rng, frames)[:, None] * step
    low, high = np.array([_WALL_MARGIN, 0.4, _WALL_MARGIN]), size - [_WALL_MARGIN, 0.6, _WALL_MARGIN]
    if (centers < low).any() or (centers > high).any():
        return None
    return Camera(np.concatenate([rotation, centers[:, :, None]], 2), config.focal, config.height, config.width)


def _objects(rng: Generator, config: SyntheticConfig, size: np.ndarray, camera: Camera) -> tuple[Named, ...] | None:
    """Named objects with paths that stay in the room, mostly in view, and clear of each other and of the camera."""
    wanted = int(rng.integers(config.objects[0], config.objects[1] + 1))
    colours = rng.permutation(list(config.colours))[:wanted]
    placed: list[Named] = []
    for colour in colours:
        shape = str(rng.choice(["box", "ball", "cylinder"]))
        half = tuple(config.object_size * side for side in _half(rng, shape, config.size_spread))
        solid = Solid(shape, half, np.zeros((1, 3)), np.zeros((1, 3, 3)), len(placed) + 1, _plain(rng))
        path = _path(rng, config, size, camera, solid, [o.solid for o in placed])
        if path is None:
            continue
        finish, material = ("", _dotted(rng, str(colour))) if config.plain else _finish(rng, shape, str(colour))
        rotation = _spin(rng, shape, half, path, config.tumble)
        solid = dataclasses.replace(solid, centers=path, rotations=rotation, material=material)
        placed.append(
            Named(solid, " ".join(filter(None, ("the", str(colour), finish, _noun(shape, half, finish)))), shape)
        )
    return tuple(placed) if len(placed) >= config.objects[0] else None


def pieces_of_names() -> set[str]:
    """Return the pieces that descriptions of objects are put together from, such as "the red", " wooden", " box"."""
    rest = {*NOUNS, *(finish for finishes in _FINISHES.values() for finish in finishes)}
    return {f"the {colour}" for colour in COLOURS} | {f" {word}" for word in rest}


def _half(rng: Generator, shape: str, spread: float) -> tuple[float, ...]:
    def drawn(low: float, high: float, size: int | None = None) -> np.ndarray:
        middle, reach = (low + high) / 2, (high - low) / 2
        return rng.uniform(middle - spread * reach, middle + spread * reach, size)

    if shape == "ball":
        radius = float(drawn(0.14, 0.32))
        return radius, radius, radius
    if shape == "cylinder":
        radius = float(drawn(0.12, 0.26))
        return radius, float(drawn(0.18, 0.5)), radius
    if rng.random() < 0.4:
        side = float(drawn(0.14, 0.32))
        return side, side, side
    return tuple(float(v) for v in drawn(0.13, 0.38, 3))


def _noun(shape: str, half: tuple[float, float, float], finish: str) -> str:
    if shape == "ball":
        return "ball"
    if shape == "cylinder":
        return "barrel" if finish == "wooden" else "column" if half[1] > 1.8 * half[0] else "drum"
    return "cube" if half[0] == half[1] else "crate" if finish == "wooden" else "box"


def _plain(rng: Generator) -> Material:
    return Material(0, 1.0, (float(rng.random()), float(rng.random())), (0, 0, 0), (255, 255, 255))


def _dotted(rng: Generator, colour: str) -> Material:
    rgb = np.array(COLOURS[colour], float)
    offset = (float(rng.random()), float(rng.random()))
    return Material(PATTERNS.index("dots"), 0.6, offset, tuple(rgb * 0.42), tuple(np.minimum(rgb * 1.08, 255)))


def _finish(rng: Generator, shape: str, colour: str) -> tuple[str, Material]:
    """(adjective, material)."""
    # White with white is no pattern.
    choices = {k: v for k, v in _FINISHES[shape].items() if not (colour == "white" and k in _TWO_TONE)}
    finish = str(rng.choice(list(choices)))
    rgb = np.array(COLOURS[colour], float)
    dark, light = rgb * 0.42, np.minimum(rgb * 1.08, 255)
    if finish in _TWO_TONE:
        dark, light = rgb * 0.9, np.array(COLOURS["white"], float)
    tile = float(rng.uniform(0.7, 1.1)) if shape == "box" else 1.0
    offset = (float(rng.random()), float(rng.random()))
    return finish, Material(PATTERNS.index(choices[finish]), tile, offset, tuple(dark), tuple(light))


def _path(
    rng: Generator, config: SyntheticConfig, size: np.ndarray, camera: Camera, solid: Solid, others: list[Solid]
) -> np.ndarray | None:
    """f64[T, 3] centres of the first of `_TRIES` random paths that is free, or None."""
    frames, floor = config.frames, size[1] - solid.half[1]
    moving = rng.random() >= config.object_still
    middle = camera.camera_to_world[frames // 2]
    heading = math.atan2(middle[0, 2], middle[2, 2])
    bearing = heading + np.radians(rng.uniform(-0.4, 0.4, _TRIES) * config.fov)
    distance = rng.uniform(1.5, 4.5, _TRIES)
    start = middle[[0, 2], 3] + distance[:, None] * np.stack([np.sin(bearing), np.cos(bearing)], 1)
    course = rng.uniform(-np.pi, np.pi, _TRIES)
    along = np.stack([np.sin(course), np.cos(course)], 1)
    travel = _log_uniform(rng, config.object_travel, _TRIES) * moving
    progress = _progress(rng, frames, _TRIES)
    bow = rng.uniform(-0.2, 0.2, (_TRIES, 1)) * np.sin(2 * np.pi * (progress + 0.5))
    flat = start[:, None] + travel[:, None, None] * (
        progress[:, :, None] * along[:, None] + bow[:, :, None] * along[:, None, ::-1] * [1, -1]
    )
    paths = np.full((_TRIES, frames, 3), floor)
    paths[:, :, [0, 2]] = flat
    if solid.shape == "ball" and moving and rng.random() < 0.3 * config.tumble:
        paths[:, :, 1] -= rng.uniform(0.2, 0.9) * np.abs(np.sin(np.pi * rng.uniform(1, 3) * np.linspace(0, 1, frames)))
    reach = _WALL_MARGIN + solid.radius
    free = ((flat > reach) & (flat < size[[0, 2]] - reach)).all((1, 2))
    for other in others:
        gap = np.linalg.norm(paths - other.centers, axis=2).min(1)
        free &= gap > solid.radius + other.radius + 0.03
    free &= np.linalg.norm(flat - camera.camera_to_world[:, [0, 2], 3], axis=2).min(1) > solid.radius + 0.7
    # In view for at least two thirds of the clip.
    local = np.einsum("tji,ntj->nti", camera.camera_to_world[:, :, :3], paths - camera.camera_to_world[:, :, 3])
    edge = np.array([camera.width, camera.height]) / 2 / camera.focal
    inside = (local[:, :, 2] > 0.3) & (np.abs(local[:, :, :2]) < edge * local[:, :, 2:]).all(2)
    free &= inside.sum(1) >= max(2, math.ceil(frames * 2 / 3))
    return paths[int(free.argmax())] if free.any() else None


def _spin(rng: Generator, shape: str, half: tuple, path: np.ndarray, tumble: float) -> np.ndarray:
    """f64[T, 3, 3]: balls roll along their path, the rest turns about the vertical; what stands still does not turn."""
    step = np.diff(path[:, [0, 2]], axis=0, prepend=path[:1, [0, 2]])
    rolled = np.cumsum(np.linalg.norm(step, axis=1)) * tumble
    start = rng.uniform(-np.pi, np.pi)
    if shape == "ball":
        course = math.atan2(*(path[-1] - path[0])[[0, 2]])
        turn = _about(1, course)
        return turn @ _about(0, rolled / half[0]) @ turn.T @ _about(1, start) @ _about(2, 0.5)
    return _about(1, start + rng.uniform(-1.0, 1.0) * tumble * (rolled > 0) * np.linspace(0, np.pi / 2, len(path)))


def _walls(rng: Generator, plain: bool) -> tuple[Material, ...]:
    """Materials of -x, +x, ceiling, floor, -z, +z."""
    if plain:
        sides = [_surface(rng, "plaster", np.full(3, rng.uniform(120, 230)), 2.4) for _ in range(4)]
        floor = _surface(rng, "checks", np.array([150.0, 140, 120]), 4.0)
        return (*sides[:2], _surface(rng, "plaster", np.array([226.0, 224, 218]), 2.4), floor, *sides[2:])
    paint = rng.uniform(150, 235, 3)
    walls = []
    main = str(rng.choice(["plaster", "plaster", "bricks", "fabric"]))
    for _ in range(4):
        rgb = np.clip(paint + rng.uniform(-18, 18, 3), 0, 255)
        pattern = main if rng.random() < 0.75 else str(rng.choice(["planks", "bricks", "tiles"]))
        walls.append(_surface(rng, pattern, rgb, float(rng.uniform(1.8, 2.8))))
    ground = np.array([[150, 108, 70], [128, 122, 116], [176, 160, 138], [108, 92, 96]], float)[rng.integers(4)]
    floor = _surface(rng, str(rng.choice(["planks", "tiles", "carpet", "wood"])), ground, float(rng.uniform(1.6, 2.6)))
    ceiling = _surface(rng, "plaster", np.array([226.0, 224, 218]), 2.4)
    return (walls[0], walls[1], ceiling, floor, walls[2], walls[3])


def _surface(rng: Generator, pattern: str, rgb: np.ndarray, tile: float) -> Material:
    offset = (float(rng.random()), float(rng.random()))
    return Material(PATTERNS.index(pattern), tile, offset, tuple(rgb * 0.5), tuple(np.minimum(rgb * 1.2, 255)))


def _furniture(rng: Generator, config: SyntheticConfig, size: np.ndarray, still: np.ndarray) -> list[Solid]:
    """Cabinets on the floor and pictures on the walls, all within the margin that objects keep from the walls."""
    solids = []
    for _ in range(int(rng.integers(config.furniture[0], config.furniture[1] + 1))):
        side, far = int(rng.integers(2)) * 2, bool(rng.integers(2))  # the wall's axis (x or z), and which of the two
        cabinet = rng.random() < 0.5
        depth = rng.uniform(0.15, 0.3) if cabinet else 0.025
        tall = rng.uniform(0.35, 0.9) if cabinet else rng.uniform(0.25, 0.5)
        wide = rng.uniform(0.3, 0.8)
        centre = np.zeros(3)
        centre[side] = size[side] - depth if far else depth
        centre[2 - side] = rng.uniform(wide + 0.1, size[2 - side] - wide - 0.1)
        centre[1] = size[1] - tall if cabinet else rng.uniform(1.0, 1.4)
        half = (depth, tall, wide) if side == 0 else (wide, tall, depth)
        rgb = rng.uniform(60, 190, 3) if not cabinet else np.array([142.0, 100, 62]) * rng.uniform(0.6, 1.3)
        if config.plain:
            rgb = np.full(3, rgb.mean())
        pattern = "wood" if cabinet else str(rng.choice(["plaster", "carpet", "checks", "dots", "stripes"]))
        material = _surface(rng, pattern, rgb, float(rng.uniform(0.8, 1.5)))
        centers = np.broadcast_to(centre, (config.frames, 3))
        solids.append(Solid("box", tuple(map(float, half)), centers, still, ROOM, material))
    return solids
