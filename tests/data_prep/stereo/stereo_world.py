"""A small ray-cast stereo world with exact depth, poses and object motion: the stereo stage's independent reference."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np


@dataclasses.dataclass(frozen=True)
class StereoClip:
    left: np.ndarray  # u8[T,H,W,3]
    right: np.ndarray  # u8[T,H,W,3]
    depth: np.ndarray  # f64[T,H,W] metres, of the left view
    masks: np.ndarray  # bool[T,H,W] the moving ball
    world_to_camera: np.ndarray  # f64[T,3,4]
    ball_centers: np.ndarray  # f64[T,3] world
    intrinsics: np.ndarray  # f64[3,3], pixel centres at +0.5
    baseline: float


def texture(seed: int, size: int = 512) -> np.ndarray:
    """Band-limited colour noise, f32[size,size,3] in 0..255."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size, size, 3), np.float32)
    for cells, gain in ((8, 0.8), (32, 1.0), (96, 1.0), (200, 0.8)):
        total += gain * cv2.resize(
            rng.normal(size=(cells, cells, 3)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC
        )
    return np.clip(128 + 36 * total, 0, 255).astype(np.float32)


def rotation(yaw: float, pitch: float) -> np.ndarray:
    """Camera-to-world rotation f64[3,3], radians."""
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    return np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]) @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])


def _sample(image: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    size = image.shape[0]
    wrapped = [np.mod(np.nan_to_num(x) * size, size).astype(np.float32) for x in (u, v)]
    return cv2.remap(image, *wrapped, interpolation=cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)


def render(size, fov, pose_c2w, ball, radius, room, seed, samples=2):
    """One view: u8[size,size,3], depth f64[size,size] at pixel centres, ball mask."""
    focal = 0.5 * size / np.tan(fov / 2)
    fine = size * samples

    def cast(n):
        centres = ((np.arange(n) + 0.5) / n * size - size / 2) / focal
        x, y = np.meshgrid(centres, centres)
        rays = np.stack([x, y, np.ones_like(x)], -1) @ pose_c2w[:, :3].T  # z = 1 in the camera: distance is depth
        origin = pose_c2w[:, 3]
        with np.errstate(divide="ignore"):
            hits = np.maximum((room[0] - origin) / rays, (room[1] - origin) / rays)  # leaving each slab
        face = hits.argmin(-1)
        depth = hits.min(-1)
        offset = origin - ball
        a, b = (rays**2).sum(-1), rays @ offset
        root = b**2 - a * (offset @ offset - radius**2)
        near = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
        is_ball = (near > 0) & (near < depth)
        depth = np.where(is_ball, near, depth)
        return origin + rays * depth[..., None], depth, face, is_ball

    points, _, face, is_ball = cast(fine)
    colour = np.zeros((fine, fine, 3), np.float32)
    for axis in range(3):
        u, v = (points[..., i] for i in range(3) if i != axis)
        colour = np.where((face == axis)[..., None], _sample(texture(seed + axis), u / 4, v / 4), colour)
    normal = points - ball
    painted = _sample(texture(seed + 9), normal[..., 0] / 1.5 + 0.3, normal[..., 1] / 1.5 + 0.1)
    colour = np.where(is_ball[..., None], painted, colour)
    image = cv2.resize(colour, (size, size), interpolation=cv2.INTER_AREA)
    _, depth, _, mask = cast(size)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), depth, mask


def make_clip(
    seed=0, frames=8, size=192, baseline=0.12, fov_degrees=60.0, step=0.05, ball_step=0.06, radius=0.35, drive=None
):
    """A camera strafing, advancing and turning in a room with one moving ball.

    `drive` = (metres, radians) makes it a fast drive: so far ahead and turning so much each frame, in a longer room.
    """
    fov = np.radians(fov_degrees)
    focal = 0.5 * size / np.tan(fov / 2)
    room = np.array([[-2.5, -1.5, -2.0], [2.5, 1.5, 5.0]])
    heading = np.random.default_rng(seed).uniform(-1, 1, 3)
    out = {name: [] for name in ("left", "right", "depth", "masks", "world_to_camera", "ball_centers")}
    for t in range(frames):
        turn = rotation(0.015 * t * np.sign(heading[0]), 0.006 * t)
        centre = t * step * np.array([np.sign(heading[0]) * 0.8, 0.15 * heading[1], 0.6])
        ball = np.array([-0.5, 0.2, 2.6]) + t * ball_step * np.array([0.9, -0.2, 0.3])
        if drive is not None:
            room[1, 2] = 12.0
            turn, centre = rotation(drive[1] * t, 0.0), np.array([0, 0, drive[0] * t])
        left_pose = np.column_stack([turn, centre])
        right_pose = np.column_stack([turn, centre + turn @ np.array([baseline, 0, 0])])
        left, depth, mask = render(size, fov, left_pose, ball, radius, room, 10 * seed)
        right, _, _ = render(size, fov, right_pose, ball, radius, room, 10 * seed)
        values = (left, right, depth, mask, np.column_stack([turn.T, -turn.T @ centre]), ball)
        for name, value in zip(out, values, strict=True):
            out[name].append(value)
    intrinsics = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    stacked = {name: np.stack(values) for name, values in out.items()}
    return StereoClip(**stacked, intrinsics=intrinsics, baseline=baseline)


def shift_right(clip: StereoClip, pixels: float) -> StereoClip:
    """The right eye's principal point `pixels` further right: every disparity is so much smaller."""
    height, width = clip.right.shape[1:3]
    move = np.array([[1, 0, pixels], [0, 1, 0]], np.float32)
    size, how = (width, height), {"flags": cv2.INTER_CUBIC, "borderMode": cv2.BORDER_REPLICATE}
    return dataclasses.replace(clip, right=np.stack([cv2.warpAffine(view, move, size, **how) for view in clip.right]))


def through_lens(clip: StereoClip, lens: str) -> StereoClip:
    """The views as an equidistant "fisheye" or an "equirectangular" projection of the same field of view shows them."""
    size = clip.left.shape[1]
    focal, centre = clip.intrinsics[0, 0], size / 2
    per_radian = centre / np.arctan(centre / focal)
    u, v = np.meshgrid(*[(np.arange(size) + 0.5 - centre) / per_radian] * 2)  # angles
    if lens == "fisheye":
        angle = np.hypot(u, v)
        x, y = (np.tan(angle) / np.maximum(angle, 1e-9) * side for side in (u, v))
    else:
        x, y = np.tan(u), np.tan(v) / np.cos(u)
    maps = [(focal * side + centre - 0.5).astype(np.float32) for side in (x, y)]
    views = {
        eye: np.stack([cv2.remap(f, *maps, cv2.INTER_CUBIC) for f in getattr(clip, eye)]) for eye in ("left", "right")
    }
    return dataclasses.replace(clip, **views)
