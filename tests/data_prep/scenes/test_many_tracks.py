"""Tens of thousands of tracks, as released clips have: the objects of the plain formulas, without their memory."""

from __future__ import annotations

import tracemalloc

import numpy as np

from data_prep.scenes.objects import Caption, objects_from_tracks, project
from data_prep.scenes.scene import SceneObject
from tests.data_prep.scenes.test_objects import make_scene

CAPTIONS = {name: Caption(f"the {name}") for name in "abc"}


def ragged(scene, count: int, seed: int) -> np.ndarray:
    """f64[count, T, 3]: some in front of the camera, some behind it, some out of view; two thirds not visible."""
    rng = np.random.default_rng(seed)
    local = rng.uniform((-2, -2, -0.5), (2, 2, 4), (count, 1, 3)) + rng.normal(0, 0.05, (count, scene.num_frames, 3))
    tracks = np.einsum("tij,ntj->nti", scene.camera_to_world[:, :, :3], local) + scene.camera_to_world[:, :, 3]
    tracks[rng.random(tracks.shape[:2]) < 2 / 3] = np.nan
    return tracks


def dense_objects(scene, tracks, masks, min_points, min_share):
    """Object id -> points f64[T, M, 3], from the projection of every cell at once."""
    height, width = scene.image_size
    pixels, _ = project(tracks, scene.world_to_camera, scene.intrinsics)
    hits = {name: np.zeros(tracks.shape[:2], bool) for name in masks}
    for n, t in zip(*np.nonzero(~np.isnan(pixels[..., 0])), strict=True):
        x, y = pixels[n, t]
        for name, mask in masks.items():
            hits[name][n, t] = 0 <= x < width and 0 <= y < height and mask[t, int(y), int(x)]
    counts = np.stack([hits[name].sum(1) for name in masks])
    share = counts / np.maximum((~np.isnan(tracks[..., 0])).sum(1), 1)
    found = {}
    for n, name in enumerate(masks):
        mine = hits[name] & ((share.argmax(0) == n) & (share[n] >= min_share))[:, None]
        mine &= mine.sum(0) >= min_points
        keep = mine.any(1)
        found[name] = np.where(mine[keep][..., None], tracks[keep], np.nan).swapaxes(0, 1)
    return found


def test_the_objects_are_those_of_projecting_everything_to_the_bit():
    scene = make_scene(7)
    tracks = ragged(scene, 2600, 1)  # more than two blocks
    rng = np.random.default_rng(2)
    masks = {name: np.repeat(np.repeat(rng.random((7, 6, 8)) < 0.6, 8, 1), 8, 2) for name in "abc"}
    objects, dropped = objects_from_tracks(scene, tracks, masks, CAPTIONS)
    expected = dense_objects(scene, tracks, masks, 4, 0.5)
    assert not dropped and [o.object_id for o in objects] == list(expected)
    for found in objects:
        assert found.points.shape[1] > 50
        np.testing.assert_array_equal(found.points, expected[found.object_id])


def test_memory_stays_near_the_tracks_themselves():
    scene = make_scene(64)
    tracks = ragged(scene, 8000, 3)
    masks = {"a": np.ones((64, 48, 64), bool), "b": np.zeros((64, 48, 64), bool)}
    for mask in masks.values():
        mask.setflags(write=False)
    tracemalloc.start()
    objects, _ = objects_from_tracks(scene, tracks, masks, CAPTIONS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert objects[0].points.shape[1] > 200
    assert peak < 2.5 * tracks.nbytes, peak / tracks.nbytes


def test_an_object_shares_what_nobody_can_change_and_copies_the_rest():
    points, masks = np.zeros((2, 3, 3)), np.ones((2, 4, 4), bool)
    copied = SceneObject("a", "", "", points, masks)
    assert not np.shares_memory(copied.points, points) and not np.shares_memory(copied.masks, masks)
    points.setflags(write=False)
    masks.setflags(write=False)
    shared = SceneObject("a", "", "", points, masks)
    assert np.shares_memory(shared.points, points) and np.shares_memory(shared.masks, masks)
