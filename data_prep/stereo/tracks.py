"""Points followed through a clip and placed in the world by depth and pose; the points of each moving object."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from data_prep.stereo.disparity import check_array
from data_prep.stereo.features import (
    backproject,
    clear_of_edges,
    follow_points,
    grey_frames,
    patches,
    project,
    sample_depth,
    sample_mask,
    seed_points,
)

_MAX_STEP = 0.12  # depth may change by this fraction per frame; more is a slide onto another surface
_MIN_LIKENESS = 0.6  # correlation with the window where the point was seeded: what slides on a turning object loses it
_MASK_SLACK = 2  # pixels a point may lie outside its object's mask: masks are a pixel or two off
_MASK_BORDER = 3  # seeds keep this far inside the mask
_MIN_SIGHTINGS = 2
_BACKGROUND, _PER_OBJECT = 300, 120  # points kept in view per frame


@dataclasses.dataclass(frozen=True, eq=False)
class PointTracks:
    """N points followed through T frames.

    Attributes:
      image: f32[N,T,2] (column, row) array coordinates, NaN = not followed there.
      world: f64[N,T,3] metres, NaN = not followed, or no reliable depth there.
      labels: i32[N]; -1 = background, k = object k of the masks given.
    """

    image: np.ndarray
    world: np.ndarray
    labels: np.ndarray

    def of(self, label: int) -> np.ndarray:
        """Return the world points of one label, f64[T,M,3], in a scene object's layout."""
        return np.ascontiguousarray(self.world[self.labels == label].swapaxes(0, 1))


def track_points(
    frames: np.ndarray,
    depths: np.ndarray,
    intrinsics: np.ndarray,
    world_to_camera: np.ndarray,
    object_masks: Sequence[np.ndarray] = (),
    *,
    seed_every: int = 4,
) -> PointTracks:
    """Follow background and object points forward and backward through a clip.

    Every `seed_every` frames with depth each label is filled up to its number of points. A point is looked for where
    the camera's motion would take it if it stood still, plus what it moved besides in the step before. It ends where
    Lucas-Kanade does not find its way back, where it no longer looks as when seeded, where its depth jumps, or where it
    leaves its object's mask (background points: where they enter one). While an object's mask is empty its points go on
    unseen. Points with depth in fewer than two frames are left out.

    Args:
      frames: u8[T,H,W,3].
      depths: f32[T,H,W] metres, NaN = unknown.
      intrinsics: f64[3,3] pixels.
      world_to_camera: f64[T,3,4].
      object_masks: bool[T,H,W] each.
      seed_every: frames with depth from one seeding to the next.

    Raises:
      StereoError: shapes do not fit.
    """
    count = len(frames)
    check_array("depths", depths, None, frames.shape[:3])
    check_array("world_to_camera", world_to_camera, None, (count, 3, 4))
    for n, mask in enumerate(object_masks):
        check_array(f"object_masks[{n}]", mask, bool, frames.shape[:3])
    greys = grey_frames(frames)
    clear = np.full(depths.shape, np.nan, np.float32)
    known = np.flatnonzero(np.isfinite(depths).any((1, 2)))
    for frame in known:
        clear[frame] = clear_of_edges(depths[frame])
    wanted = [(-1, _BACKGROUND)] + [(n, _PER_OBJECT) for n in range(len(object_masks))]
    sweep = _Sweep(greys, clear, object_masks, intrinsics, world_to_camera)
    for frame in range(count):
        if frame:
            sweep.step(frame - 1, frame)
        if frame in known[::seed_every]:
            for label, number in wanted:
                sweep.seed(frame, label, number)
    sweep.turn_round()
    for frame in range(count - 1, 0, -1):
        sweep.step(frame, frame - 1)
    world = np.full((*sweep.depth.shape, 3), np.nan)
    for frame in range(count):
        seen = np.isfinite(sweep.depth[:, frame])
        image, depth = sweep.image[seen, frame], sweep.depth[seen, frame]
        world[seen, frame] = backproject(image, depth, intrinsics, world_to_camera[frame])
    keep = np.isfinite(sweep.depth).sum(1) >= _MIN_SIGHTINGS
    return PointTracks(sweep.image[keep], world[keep], sweep.labels[keep])


class _Sweep:
    """Tracks being extended, frame after frame, first forward and then backward from their seeds."""

    def __init__(
        self,
        greys: np.ndarray,
        depths: np.ndarray,
        masks: Sequence[np.ndarray],
        intrinsics: np.ndarray,
        world_to_camera: np.ndarray,
    ):
        self.greys, self.depths, self.masks = greys, depths, masks
        self.intrinsics, self.poses = intrinsics, world_to_camera
        self.image = np.full((0, len(greys), 2), np.nan, np.float32)
        self.depth = np.full((0, len(greys)), np.nan)  # where seen
        self.labels = np.zeros(0, np.int32)
        self.born = np.zeros(0, np.int32)
        self.alive = np.zeros(0, bool)
        self.looks = patches(greys[0], np.zeros((0, 2), np.float32))  # where seeded
        self.last = np.zeros(0)  # last depth known
        self.moved = np.zeros((0, 2), np.float32)  # pixels moved in the last step, less what the camera's motion does
        self.age = np.zeros(0, np.int32)  # frames since then
        self.backward = False

    def seed(self, frame: int, label: int, number: int) -> None:
        """Fill `label` up to `number` points in `frame`."""
        here = self.alive & (self.labels == label)
        missing = number - int(here.sum())
        allowed = np.isfinite(self.depths[frame]) & self._inside(frame, label, -_MASK_BORDER)
        if missing <= 0 or not allowed.any():
            return
        points = seed_points(self.greys[frame], allowed, number, self.image[here, frame])[:missing]
        depth = sample_depth(self.depths[frame], points)
        points, depth = points[np.isfinite(depth)], depth[np.isfinite(depth)]
        n = len(points)
        image = np.full((n, len(self.greys), 2), np.nan, np.float32)
        image[:, frame] = points
        seen = np.full((n, len(self.greys)), np.nan)
        seen[:, frame] = depth
        self.image, self.depth = np.concatenate([self.image, image]), np.concatenate([self.depth, seen])
        self.labels = np.concatenate([self.labels, np.full(n, label, np.int32)])
        self.born = np.concatenate([self.born, np.full(n, frame, np.int32)])
        self.alive = np.concatenate([self.alive, np.ones(n, bool)])
        self.looks = np.concatenate([self.looks, patches(self.greys[frame], points)])
        self.last = np.concatenate([self.last, depth])
        self.moved = np.concatenate([self.moved, np.zeros((n, 2), np.float32)])
        self.age = np.concatenate([self.age, np.zeros(n, np.int32)])

    def turn_round(self) -> None:
        """Follow the points backward from where they were seeded, from now on."""
        self.backward = True
        self.alive[:] = False
        self.last = self.depth[np.arange(len(self.born)), self.born]
        self.age[:] = 0
        self.moved[:] = 0

    def step(self, source: int, target: int) -> None:
        """Follow the living points from one frame to its neighbour."""
        if self.backward:
            self.alive |= self.born == source
        index = np.flatnonzero(self.alive)
        image = self.image[index, source]
        world = backproject(image, self.last[index], self.intrinsics, self.poses[source])
        standing, ahead = project(world, self.poses[target], self.intrinsics)
        standing = np.where((ahead > 0)[:, None], standing, image).astype(np.float32)
        guess = standing + self.moved[index]
        moved, good = follow_points(self.greys[source], self.greys[target], image, guess)
        good &= (patches(self.greys[target], moved) * self.looks[index]).sum(1) >= _MIN_LIKENESS
        seen = np.zeros(len(index), bool)
        for label in np.unique(self.labels[index]):
            mine = self.labels[index] == label
            slack = _MASK_SLACK if label >= 0 else -_MASK_SLACK
            if label >= 0 and not self.masks[label][target].any():
                continue  # the object is hidden, or was missed: unseen here, not lost
            inside = sample_mask(self._inside(target, label, slack), moved)
            good &= inside | ~mine
            seen |= mine & inside
        depth = np.full(len(index), np.nan)
        depth[good] = sample_depth(self.depths[target], moved[good])
        known = np.isfinite(depth)
        age = self.age[index] + 1
        # Allowed change grows with the frames without depth, up to a third: after that it may be anything.
        limit = np.minimum(_MAX_STEP * age, 0.33) * self.last[index]
        good &= ~(known & (np.abs(depth - self.last[index]) > limit))
        use = good & known & seen
        self.alive[index] = good
        self.image[index[good], target] = moved[good]
        self.moved[index[good]] = (moved - standing)[good]
        self.depth[index[use], target] = depth[use]
        self.last[index[use]] = depth[use]
        self.age[index] = np.where(use, 0, age)

    def _inside(self, frame: int, label: int, slack: int) -> np.ndarray:
        """bool[H,W] where points of `label` may lie; slack > 0 widens the region, < 0 narrows it."""
        if label >= 0:
            region = self.masks[label][frame]
        else:
            region = np.ones(self.greys.shape[1:], bool)
            for mask in self.masks:
                region &= ~mask[frame]
        kernel = np.ones((2 * abs(slack) + 1,) * 2, np.uint8)
        change = cv2.dilate if slack > 0 else cv2.erode
        return change(region.astype(np.uint8), kernel) > 0


def reject_outliers(points: np.ndarray, spread: float = 5.0) -> np.ndarray:
    """Set sightings of object points f64[T,M,3] that are far from the frame's other points to NaN, in a copy.

    A sighting goes if its distance from the frame's median point exceeds `spread` times the median such distance: what
    leaked from the background through a mask's border lies metres behind.
    """
    result = points.copy()
    for frame in result:
        seen = np.isfinite(frame[:, 0])
        if seen.sum() < 4:
            continue
        distance = np.linalg.norm(frame[seen] - np.median(frame[seen], axis=0), axis=1)
        frame[np.flatnonzero(seen)[distance > spread * max(np.median(distance), 0.01)]] = np.nan
    return result
