"""Ray casting of simple rooms: exact depth, exact object masks, textured colours. NumPy and one texture look-up.

Rays are parametrised by depth: p = o + z * d with d = R^T (x, y, 1), so the parameter at a hit *is* the camera-frame z.
Frames are handled together in batches of a bounded number of rays, which keeps small clips fast and large ones small.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from data_prep.synthetic.solids import DEPTH, LEVELS, SIZE, SURFACE, Material, Solid, atlas

ROOM = 0  # surface id of the room and its furniture; object k (from 0) is k + 1
_BATCH_RAYS = 1 << 17
_SUBRAYS = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))  # pixels; where edges are resolved
_AMBIENT = 0.66
_EVERYWHERE = 1e6  # slope beyond any field of view


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """A room [0, size] (world y points down: the floor is y = size[1]) with solids in it.

    Attributes:
      size: (x, y, z) metres.
      walls: six materials: -x, +x, ceiling (-y), floor (+y), -z, +z.
      solids: in any order.
      light: unit vector towards the light, world.
    """

    size: tuple[float, float, float]
    walls: tuple[Material, ...]
    solids: tuple[Solid, ...]
    light: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Camera:
    """A moving pinhole camera; square pixels, principal point in the middle, pixel centres at +0.5.

    Attributes:
      camera_to_world: f64[T, 3, 4].
      focal: pixels.
      height, width: pixels.
    """

    camera_to_world: np.ndarray
    focal: float
    height: int
    width: int

    def shifted(self, offset: float) -> Camera:
        """Return the camera moved by `offset` metres along its own x axis (the right eye: the baseline)."""
        poses = self.camera_to_world.copy()
        poses[:, :, 3] += offset * poses[:, :, 0]
        return dataclasses.replace(self, camera_to_world=poses)


@dataclasses.dataclass(frozen=True, eq=False)
class Hits:
    """What n rays meet. depth f32[n] (camera z, metres), surface u8[n]; the rest describes the colour."""

    depth: np.ndarray
    surface: np.ndarray
    material: np.ndarray  # u8[n]: 0-5 the walls, 6 + k solid k
    u: np.ndarray  # f32[n] tiles
    v: np.ndarray
    slope: np.ndarray  # f32[n] cosine between ray and normal
    shade: np.ndarray  # f32[n] factor


@dataclasses.dataclass(frozen=True, eq=False)
class Rays:
    """n rays of one camera. `frames[k]` is the frame of `rays[:, starts[k]:starts[k + 1]]`.

    Attributes:
      rays: f32[3, n] in camera axes, z = 1.
      frames: frame numbers, one per segment.
      starts: i64[segments + 1].
      grid: whether each segment is a whole picture, row by row.
    """

    rays: np.ndarray
    frames: np.ndarray
    starts: np.ndarray
    grid: bool


def render(world: World, camera: Camera, smooth: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Render frames u8[T, H, W, 3] RGB, depth f32[T, H, W] (camera z, pixel centres, metres), surfaces u8[T, H, W].

    Args:
      smooth: resolve edges of the picture by four rays per pixel; depth and surfaces stay those of pixel centres.
    """
    count, shape = len(camera.camera_to_world), (camera.height, camera.width)
    frames = np.empty((count, *shape, 3), np.uint8)
    depth = np.empty((count, *shape), np.float32)
    surfaces = np.empty((count, *shape), np.uint8)
    y, x = np.mgrid[: camera.height, : camera.width].astype(np.float32)
    picture = camera_rays(camera, x.reshape(-1) + np.float32(0.5), y.reshape(-1) + np.float32(0.5))
    step = max(1, _BATCH_RAYS // math.prod(shape))
    for first in range(0, count, step):
        chunk = np.arange(first, min(first + step, count))
        starts = np.arange(len(chunk) + 1) * math.prod(shape)
        hits = cast(world, camera, Rays(np.tile(picture, len(chunk)), chunk, starts, True))
        colours = _colours(world, camera, hits)
        if smooth:
            _resolve_edges(world, camera, chunk, hits, colours)
        frames[chunk] = np.round(colours).astype(np.uint8).reshape(-1, *shape, 3)
        depth[chunk] = hits.depth.reshape(-1, *shape)
        surfaces[chunk] = hits.surface.reshape(-1, *shape)
    return frames, depth, surfaces


def camera_rays(camera: Camera, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return f32[3, n] camera-frame rays (z = 1) through pixel coordinates x, y [n] (centres at +0.5)."""
    rays = np.ones((3, len(x)), np.float32)
    rays[0] = (x - camera.width / 2) / camera.focal
    rays[1] = (y - camera.height / 2) / camera.focal
    return rays


def cast(world: World, camera: Camera, rays: Rays) -> Hits:
    """Find the first surface on each ray."""
    poses = camera.camera_to_world[rays.frames]
    counts = np.diff(rays.starts)
    directions = np.empty_like(rays.rays)
    for k, pose in enumerate(poses):
        part = slice(rays.starts[k], rays.starts[k + 1])
        directions[:, part] = pose[:, :3].astype(np.float32) @ rays.rays[:, part]
    origins = np.repeat(poses[:, :, 3].T.astype(np.float32), counts, axis=1)
    hits = _room(world, origins, directions)
    _shadows(world, rays, origins, directions, hits)
    for number, solid in enumerate(world.solids):
        index = _candidates(solid, camera, rays)
        if len(index):
            _solid(world, number, rays, poses, directions, index, hits)
    return hits


def _room(world: World, origins: np.ndarray, directions: np.ndarray) -> Hits:
    size = np.array(world.size, np.float32)[:, None]
    positive = directions > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        exits = (np.where(positive, size, np.float32(0)) - origins) / directions
    exits[~(exits > 0)] = np.inf
    axis = np.where(exits[0] < exits[1], np.where(exits[0] < exits[2], 0, 2), np.where(exits[1] < exits[2], 1, 2))
    axis = axis.astype(np.uint8)
    depth = np.minimum(np.minimum(exits[0], exits[1]), exits[2])
    points = origins + depth * directions
    along = np.where(axis == 0, directions[0], np.where(axis == 1, directions[1], directions[2]))
    face = (2 * axis + (along > 0)).astype(np.uint8)
    tile = np.array([m.tile for m in world.walls], np.float32)[face]
    offset = np.array([m.offset for m in world.walls], np.float32)[face]
    normals = np.repeat(np.eye(3), 2, axis=0) * np.array([1, -1] * 3)[:, None]  # pointing into the room
    shade = _lambert(normals @ world.light).astype(np.float32)[face]
    u = np.where(axis == 0, points[2], points[0]) / tile + offset[:, 0]
    v = np.where(axis == 1, points[2], points[1]) / tile + offset[:, 1]
    slope = np.abs(along) / np.sqrt(np.einsum("in,in->n", directions, directions))
    return Hits(depth, np.full(len(depth), ROOM, np.uint8), face, u, v, slope, shade)


def _lambert(cosine: np.ndarray) -> np.ndarray:
    return _AMBIENT + (1 - _AMBIENT) * np.maximum(cosine, 0)


def _shadows(world: World, rays: Rays, origins: np.ndarray, directions: np.ndarray, hits: Hits) -> None:
    """Darkens the floor softly under the solids that stand on it."""
    index = np.flatnonzero(hits.material == 3)
    if not len(index):
        return
    x, z = (origins[a, index] + hits.depth[index] * directions[a, index] for a in (0, 2))
    segment = np.searchsorted(rays.starts, index, side="right") - 1
    frame = rays.frames[segment]
    dark = np.zeros(len(index), np.float32)
    for solid in world.solids:
        if solid.surface == ROOM:  # furniture hides its own
            continue
        reach = max(solid.half[0], solid.half[2])
        gap = max(0.0, world.size[1] - float(solid.centers[:, 1].max()) - solid.half[1])
        if gap > 0.3:
            continue
        centre = solid.centers[:, [0, 2]].astype(np.float32)[frame]
        square = ((x - centre[:, 0]) ** 2 + (z - centre[:, 1]) ** 2) / np.float32((1.25 * reach) ** 2)
        dark = np.maximum(dark, np.float32(0.5) * np.exp(-square * square))
    hits.shade[index] *= 1 - dark


def _candidates(solid: Solid, camera: Camera, rays: Rays) -> np.ndarray:
    """Indices i64[m], ascending, of the rays that pass the rectangle around the solid's bounding sphere."""
    bounds = np.array([_bounds(solid, camera, frame) for frame in rays.frames])
    if not rays.grid:
        low_x, high_x, low_y, high_y = np.repeat(bounds, np.diff(rays.starts), axis=0).T
        x, y = rays.rays[0], rays.rays[1]
        return np.flatnonzero((x >= low_x) & (x <= high_x) & (y >= low_y) & (y <= high_y))
    found = []
    sides = np.repeat([camera.width, camera.height], 2)
    pixels = np.clip(bounds * camera.focal + sides / 2, 0, sides)
    for k, (low_x, high_x, low_y, high_y) in enumerate(pixels):
        columns = np.arange(math.floor(low_x), math.ceil(high_x))
        rows = np.arange(math.floor(low_y), math.ceil(high_y))
        if len(columns) and len(rows):
            found.append((rays.starts[k] + rows[:, None] * camera.width + columns).reshape(-1))
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _bounds(solid: Solid, camera: Camera, frame: int) -> tuple[float, float, float, float]:
    """Least and greatest x and y of the rays (z = 1) that can meet the bounding sphere; an empty interval if none."""
    pose = camera.camera_to_world[frame]
    x, y, z = (pose[:, :3].T @ (solid.centers[frame] - pose[:, 3])).tolist()
    radius = solid.radius
    near, far = z - radius, z + radius
    if far <= 0:
        return 1.0, -1.0, 1.0, -1.0
    if near < 1e-3:
        return -_EVERYWHERE, _EVERYWHERE, -_EVERYWHERE, _EVERYWHERE
    # The cube around the sphere: its extreme slopes are at its near face, or at the far one on the other side of 0.
    low_x, high_x, low_y, high_y = x - radius, x + radius, y - radius, y + radius
    return (
        low_x / (near if low_x < 0 else far),
        high_x / (near if high_x > 0 else far),
        low_y / (near if low_y < 0 else far),
        high_y / (near if high_y > 0 else far),
    )


def _solid(
    world: World, number: int, rays: Rays, poses: np.ndarray, directions: np.ndarray, index: np.ndarray, hits: Hits
) -> None:
    """Updates `hits` where solid `number` is nearer."""
    solid = world.solids[number]
    cuts = np.searchsorted(index, rays.starts)
    local = np.empty((3, len(index)), np.float32)
    origin = np.empty_like(local)
    lights = np.empty((3, len(rays.frames)), np.float32)
    for k, frame in enumerate(rays.frames):
        part = slice(cuts[k], cuts[k + 1])
        inward = solid.rotations[frame].T
        local[:, part] = inward.astype(np.float32) @ directions[:, index[part]]
        origin[:, part] = (inward @ (poses[k, :, 3] - solid.centers[frame]))[:, None]
        lights[:, k] = inward @ world.light
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = DEPTH[solid.shape](solid.half, origin, local)
    nearer = np.flatnonzero((depth > 1e-3) & (depth < hits.depth[index]))
    if not len(nearer):
        return
    light = lights[:, np.searchsorted(cuts, nearer, side="right") - 1]
    depth, local, origin, index = depth[nearer], local[:, nearer], origin[:, nearer], index[nearer]
    normal, u, v = SURFACE[solid.shape](solid.half, origin + depth * local)
    material = solid.material
    hits.depth[index] = depth
    hits.surface[index] = solid.surface
    hits.material[index] = 6 + number
    hits.u[index] = u / np.float32(material.tile) + np.float32(material.offset[0])
    hits.v[index] = v / np.float32(material.tile) + np.float32(material.offset[1])
    length = np.sqrt(np.einsum("in,in->n", local, local))
    hits.slope[index] = np.abs(np.einsum("in,in->n", normal, local)) / length
    hits.shade[index] = _lambert(np.einsum("in,in->n", normal, light))


def _colours(world: World, camera: Camera, hits: Hits) -> np.ndarray:
    """f32[n, 3] RGB in [0, 255]."""
    materials = [*world.walls, *(s.material for s in world.solids)]
    turns = [1.0] * 6 + [1.0 if s.shape == "box" else 2 * math.pi * s.half[0] for s in world.solids]
    texel = np.array([SIZE / (m.tile * turn) for m, turn in zip(materials, turns, strict=True)], np.float32)
    pattern = np.array([m.pattern for m in materials])[hits.material]
    footprint = hits.depth * texel[hits.material] / np.float32(camera.focal)
    # Squared, a pixel covers footprint^2 / slope texels; isotropic taps take a mean of the two directions.
    level = np.log2(footprint * footprint / np.maximum(hits.slope, np.float32(0.05))) * np.float32(0.5)
    level = np.clip(np.rint(level), 0, LEVELS - 1).astype(np.int64)
    grey = atlas().sample(pattern, level, hits.u, hits.v).astype(np.float32)
    dark = np.array([m.dark for m in materials], np.float32)
    span = (np.array([m.light for m in materials], np.float32) - dark) / 255
    colours = span[hits.material]
    colours *= grey[:, None]
    colours += dark[hits.material]
    colours *= hits.shade[:, None]
    return np.clip(colours, 0, 255, out=colours)


def _resolve_edges(world: World, camera: Camera, chunk: np.ndarray, hits: Hits, colours: np.ndarray) -> None:
    """Replaces the colour of pixels beside another surface by the mean of four rays."""
    label = hits.material.reshape(len(chunk), camera.height, camera.width)
    edge = np.zeros(label.shape, bool)
    across, down = label[:, :, 1:] != label[:, :, :-1], label[:, 1:] != label[:, :-1]
    edge[:, :, 1:] |= across
    edge[:, :, :-1] |= across
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    frame, y, x = np.nonzero(edge)
    if not len(frame):
        return
    many = len(_SUBRAYS)
    dx, dy = np.array(_SUBRAYS, np.float32).T
    rays = camera_rays(camera, (x[:, None] + (0.5 + dx)).reshape(-1), (y[:, None] + (0.5 + dy)).reshape(-1))
    starts = np.searchsorted(frame, np.arange(len(chunk) + 1)) * many
    fine = _colours(world, camera, cast(world, camera, Rays(rays, chunk, starts, False)))
    colours[np.flatnonzero(edge)] = fine.reshape(-1, many, 3).mean(1)
