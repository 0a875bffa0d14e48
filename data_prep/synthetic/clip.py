"""Synthetic clips: rendered rooms with exact 4D truth, and their files in Stereo4D's own layout.

A clip follows from (seed, index, config) alone. Its scene is exact: object points are points of the true surfaces, seen
where nothing stands before them and the pixel they fall on shows their object.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.random import Generator

from data_prep.scenes.objects import encode_rle
from data_prep.scenes.scene import Scene, SceneObject, intrinsics_of, invert_poses, move_tracks, save_scene
from data_prep.sources.frames import write_video
from data_prep.store.untrusted import npz_bytes
from data_prep.synthetic.render import ROOM, Camera, Rays, World, camera_rays, cast, render
from data_prep.synthetic.solids import surface_points
from data_prep.synthetic.worlds import Named, SyntheticConfig, make_world
from mllm4d_jax.files.atomic import write_atomic, write_json

_HIDDEN = 1e-3  # share of its depth by which something nearer hides a point


@dataclasses.dataclass(frozen=True, eq=False)
class SyntheticClip:
    """A rendered clip and its truth."""

    scene: Scene  # exact; scale "metric"
    left: np.ndarray  # u8[T, H, W, 3] RGB
    right: np.ndarray | None  # the same from `baseline` metres to the right, or None
    depth: np.ndarray  # f32[T, H, W] camera z of the left view at pixel centres, metres
    background: np.ndarray  # f64[B, T, 3] tracked points of the room and furniture, world, NaN = not seen
    baseline: float  # metres
    fps: float  # frames per second


def make_clip(seed: int, index: int, config: SyntheticConfig) -> SyntheticClip:
    """Render clip `index` of the set `seed`; the same arguments give the same clip, whatever was made before.

    Raises:
      SceneError: the config asks for what fits in no room.
    """
    rng = np.random.default_rng([seed, index])
    world, camera, named = make_world(rng, config)
    left, depth, surfaces = render(world, camera, config.smooth)
    right = render(world, camera.shifted(config.baseline), config.smooth)[0] if config.stereo else None
    points, background = _tracks(rng, world, camera, named, depth, surfaces, config)
    first = int(rng.integers(1_000_000, 600_000_000))
    microseconds = first + np.round(np.arange(config.frames) * 1e6 / config.fps).astype(np.int64)
    video = f"synthetic-{seed}-{index:06d}"
    objects = []
    for k, (entry, track) in enumerate(zip(named, points, strict=True)):
        if len(track):
            masks = surfaces == k + 1
            objects.append(SceneObject(f"object_{k}", entry.description, entry.category, track.swapaxes(0, 1), masks))
    size = (config.height, config.width)
    scene = Scene(
        clip_id=f"{video}_{first}",
        source_id=video,
        camera_to_world=camera.camera_to_world,
        intrinsics=np.broadcast_to(intrinsics_of(size, config.fov), (config.frames, 3, 3)),
        image_size=size,
        timestamps=microseconds / 1e6,
        objects=tuple(objects),
        scale="metric",
        provenance={"tool": "synthetic", "seed": seed, "index": index, "config": dataclasses.asdict(config)},
    )
    return SyntheticClip(scene, left, right, depth, background, config.baseline, config.fps)


def _tracks(
    rng: Generator,
    world: World,
    camera: Camera,
    named: tuple[Named, ...],
    depth: np.ndarray,
    surfaces: np.ndarray,
    config: SyntheticConfig,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Per object f64[M, T, 3], and f64[B, T, 3] of the background; without the points that are never seen."""
    centers = camera.camera_to_world[:, :, 3]
    tracks, facing = [], []
    for entry in named:
        local, normal = surface_points(rng, entry.solid.shape, entry.solid.half, config.object_points)
        track = np.einsum("tij,nj->nti", entry.solid.rotations, local) + entry.solid.centers
        outward = np.einsum("tij,nj->nti", entry.solid.rotations, normal)
        tracks.append(track)
        facing.append(np.einsum("nti,nti->nt", outward, centers - track) > 0)
    background = _background_points(rng, camera, depth, surfaces, config.background_points)
    tracks.append(np.repeat(background[:, None], config.frames, axis=1))
    facing.append(np.ones(tracks[-1].shape[:2], bool))
    owners = np.repeat([*range(1, len(named) + 1), ROOM], [len(t) for t in tracks])
    everything = np.concatenate(tracks)
    seen = _seen(world, camera, everything, np.concatenate(facing), owners, surfaces)
    everything[~seen] = np.nan
    cuts = np.cumsum([len(t) for t in tracks])[:-1]
    kept = [t[s.any(1)] for t, s in zip(np.split(everything, cuts), np.split(seen, cuts), strict=True)]
    return kept[:-1], kept[-1]


def _seen(
    world: World, camera: Camera, tracks: np.ndarray, facing: np.ndarray, owners: np.ndarray, surfaces: np.ndarray
) -> np.ndarray:
    """bool[N, T]: the point faces the camera, lies on a pixel that shows its surface, and nothing is before it."""
    local = move_tracks(invert_poses(camera.camera_to_world), tracks)
    z = local[:, :, 2]
    ahead = facing & (z > 0.05)
    safe = np.where(ahead, z, 1.0)
    x = camera.focal * local[:, :, 0] / safe + camera.width / 2
    y = camera.focal * local[:, :, 1] / safe + camera.height / 2
    inside = ahead & (x >= 0) & (x < camera.width) & (y >= 0) & (y < camera.height)
    # Rays of a batch are ordered by frame.
    frame, point = np.nonzero(inside.T)
    at = (point, frame)
    shown = surfaces[frame, y[at].astype(np.int64), x[at].astype(np.int64)] == owners[point]
    frame, point = frame[shown], point[shown]
    at = (point, frame)
    starts = np.searchsorted(frame, np.arange(tracks.shape[1] + 1))
    hits = cast(world, camera, Rays(camera_rays(camera, x[at], y[at]), np.arange(tracks.shape[1]), starts, False))
    seen = np.zeros(inside.shape, bool)
    seen[at] = hits.depth > z[at] * (1 - _HIDDEN)
    return seen


def _background_points(
    rng: Generator, camera: Camera, depth: np.ndarray, surfaces: np.ndarray, count: int
) -> np.ndarray:
    """f64[<= count, 3] world points under random pixels of random frames that show room or furniture."""
    frame = np.sort(rng.integers(0, len(depth), count))
    y, x = rng.integers(0, camera.height, count), rng.integers(0, camera.width, count)
    keep = surfaces[frame, y, x] == ROOM
    frame, y, x = frame[keep], y[keep], x[keep]
    rays = np.stack([(x + 0.5 - camera.width / 2) / camera.focal, (y + 0.5 - camera.height / 2) / camera.focal])
    local = np.concatenate([rays, np.ones((1, len(x)))]) * depth[frame, y, x].astype(np.float64)
    poses = camera.camera_to_world[frame]
    return np.einsum("nij,jn->ni", poses[:, :, :3], local) + poses[:, :, 3]


def write_clip(
    clip: SyntheticClip, folder: str | Path, codec: str = "ffv1", *, rle: bool = False, truth: bool = True
) -> None:
    """Write a clip as Stereo4D is laid out, with the sidecars that other tools would leave beside it.

    In `folder`, all names starting with the clip id: `.npz` (Stereo4D's keys), `-left_rectified.mp4`,
    `-right_rectified.mp4` and `-clip.json` (stereo clips: what the `stereo` source is told of the camera), `-masks.npz`
    or `-masks.json`, `-captions.json`, and `-truth/` (the exact scene). The annotations come last, so that a clip that
    has them is complete.

    Args:
      codec: "ffv1" (lossless) or "mpeg4" (lossy, some ten times smaller).
      rle: writes masks as COCO run lengths per frame (JSON) instead of bool[T, H, W] per object (npz).
      truth: whether the exact scene is written.

    Raises:
      SceneError: unknown codec, or this OpenCV cannot write the video.
    """
    scene, stem = clip.scene, Path(folder) / clip.scene.clip_id
    stem.parent.mkdir(parents=True, exist_ok=True)
    for eye, frames in (("left", clip.left), ("right", clip.right)):
        if frames is not None:
            write_video(f"{stem}-{eye}_rectified.mp4", frames, scene.timestamps, codec)
    sidecars = {"captions": {o.object_id: {"caption": o.description, "category": o.category} for o in scene.objects}}
    if rle:
        sidecars["masks"] = {o.object_id: [encode_rle(m) for m in o.masks] for o in scene.objects}
    else:
        write_atomic(f"{stem}-masks.npz", npz_bytes({o.object_id: o.masks for o in scene.objects}))
    if clip.right is not None:  # what the stereo stage cannot see in the two views
        camera = {"intrinsics": scene.intrinsics[0].tolist(), "baseline": clip.baseline}
        sidecars["clip"] = {"source_id": scene.source_id, **camera}
    for name, document in sidecars.items():
        write_json(f"{stem}-{name}.json", document)
    if truth:
        save_scene(scene, f"{stem}-truth")
    write_atomic(f"{stem}.npz", npz_bytes(stereo4d_arrays(clip)))


def stereo4d_arrays(clip: SyntheticClip) -> dict[str, np.ndarray]:
    """Return the arrays of a Stereo4D annotation file (data layout of github.com/Stereo4d/stereo4d-code).

    Tracks are the background's, then each object's in the scene's order; float32, as metres of a room need no more.
    """
    scene = clip.scene
    tracks = np.concatenate([clip.background, *(o.points.swapaxes(0, 1) for o in scene.objects)])
    seen = ~np.isnan(tracks[:, :, 0])
    half_fov = np.degrees(np.arctan(np.array(scene.image_size)[::-1] / 2 / scene.intrinsics[0, [0, 1], [0, 1]]))
    return {
        "name": np.array(scene.clip_id),
        "video_id": np.array(scene.source_id),
        "timestamps": np.round(scene.timestamps * 1e6).astype(np.int64),
        "camera2world": scene.camera_to_world,
        "rectified2rig": np.repeat(np.eye(3)[None], 2, axis=0),
        "fov_bounds": np.array([-half_fov[0], half_fov[0], -half_fov[1], half_fov[1]]),
        "track_lengths": seen.sum(1).astype(np.int64),
        "track_indices": np.nonzero(seen)[1].astype(np.int64),
        "track_coordinates": tracks[seen].astype(np.float32),
    }
