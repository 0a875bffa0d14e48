"""Rendered worlds against independent geometry: a scalar float64 ray caster, epipolar shifts, determinism, names."""

from __future__ import annotations

import dataclasses
import time

import cv2
import numpy as np
import pytest

from data_prep.store.untrusted import SceneError
from data_prep.synthetic.clip import make_clip, write_clip
from data_prep.synthetic.render import ROOM, Camera, World, render
from data_prep.synthetic.solids import LEVELS, PATTERNS, Solid, atlas, surface_points
from data_prep.synthetic.worlds import COLOURS, SyntheticConfig, make_world

SMALL = SyntheticConfig(height=48, width=56, frames=4)


def rays_of(camera: Camera, frame: int, x: float, y: float) -> tuple[np.ndarray, np.ndarray]:
    """(origin, direction with camera z 1) f64[3] of pixel position (x, y)."""
    pose = camera.camera_to_world[frame]
    local = np.array([(x - camera.width / 2) / camera.focal, (y - camera.height / 2) / camera.focal, 1.0])
    return pose[:, 3], pose[:, :3] @ local


@np.errstate(divide="ignore", invalid="ignore")
def slow_hit(solid: Solid, frame: int, origin: np.ndarray, direction: np.ndarray) -> float:
    """Depth of the first crossing in float64 by other formulas than the renderer's: candidates, then inside tests."""
    rotation, half = solid.rotations[frame], solid.half
    o, d = rotation.T @ (origin - solid.centers[frame]), rotation.T @ direction
    found = []
    if solid.shape == "ball":
        found = [z.real for z in np.roots([d @ d, 2 * o @ d, o @ o - half[0] ** 2]) if abs(z.imag) < 1e-12]
    if solid.shape == "cylinder":
        p, q = o[[0, 2]], d[[0, 2]]
        sides = [z.real for z in np.roots([q @ q, 2 * p @ q, p @ p - half[0] ** 2]) if abs(z.imag) < 1e-12]
        found = [z for z in sides if abs(o[1] + z * d[1]) <= half[1]]
        caps = [(side * half[1] - o[1]) / d[1] for side in (-1, 1)]
        found += [z for z in caps if np.hypot(*(p + z * q)) <= half[0]]
    if solid.shape == "box":
        for axis in range(3):
            others = [a for a in range(3) if a != axis]
            for side in (-1, 1):
                z = (side * half[axis] - o[axis]) / d[axis]
                if all(abs(o[a] + z * d[a]) <= half[a] for a in others):
                    found.append(z)
    return min((z for z in found if z > 0), default=np.inf)


def room_hit(world: World, origin: np.ndarray, direction: np.ndarray) -> float:
    crossings = [(side - origin[a]) / direction[a] for a in range(3) for side in (0.0, world.size[a])]
    return min(z for z in crossings if z > 0)


@pytest.mark.parametrize("seed", range(4))
def test_depth_and_masks_equal_a_scalar_ray_caster(seed):
    rng = np.random.default_rng([11, seed])
    world, camera, _ = make_world(rng, SMALL)
    _, depth, surfaces = render(world, camera)
    wrong = 0
    for frame, y, x in zip(rng.integers(0, 4, 400), rng.integers(0, 48, 400), rng.integers(0, 56, 400), strict=True):
        origin, direction = rays_of(camera, frame, x + 0.5, y + 0.5)
        hits = [(slow_hit(s, frame, origin, direction), s.surface) for s in world.solids]
        expected, surface = min([*hits, (room_hit(world, origin, direction), ROOM)])
        same = abs(depth[frame, y, x] - expected) < 1e-4 * expected and surfaces[frame, y, x] == surface
        wrong += not same
    assert wrong <= 1  # float32 may decide a grazing ray otherwise
    assert len(np.unique(surfaces)) > 2


def test_the_right_eye_sees_everything_shifted_by_the_disparity():
    config = SyntheticConfig(height=192, width=192, frames=2, stereo=True, smooth=False)
    clip = make_clip(0, 3, config)
    disparity = config.focal * config.baseline / clip.depth
    x, y = np.meshgrid(np.arange(192, dtype=np.float32), np.arange(192, dtype=np.float32))
    for t in range(2):
        errors = []
        for sign in (-1, 0, 1):
            warped = cv2.remap(clip.right[t], x + sign * disparity[t].astype(np.float32), y, cv2.INTER_LINEAR)
            errors.append(np.median(np.abs(warped.astype(float) - clip.left[t]).mean(-1)[:, 40:-40]))
        assert errors[0] < 0.5 * errors[1] and errors[0] < 0.5 * errors[2], errors


def test_object_points_lie_on_their_object_and_move_with_it():
    clip = make_clip(2, 1, SyntheticConfig(height=96, width=96, frames=6))
    scene = clip.scene
    for entry in scene.objects:
        seen = entry.seen()
        assert seen.any(0).all() and seen.sum() > 10
        for t in range(scene.num_frames):
            points = entry.points[t][seen[t]]
            local = points @ scene.world_to_camera[t, :, :3].T + scene.world_to_camera[t, :, 3]
            pixel = local @ scene.intrinsics[t].T
            x, y = np.floor(pixel[:, :2] / pixel[:, 2:]).astype(int).T
            assert entry.masks[t, y, x].all()
            # The depth picture is of the pixel's centre; a slanted surface differs a little within a pixel.
            assert np.median(np.abs(clip.depth[t, y, x] - local[:, 2]) / local[:, 2]) < 0.01
        first, last = (np.flatnonzero(seen.all(1)) if seen.all(1).any() else np.arange(1))[[0, -1]]
        both = seen[first] & seen[last]
        a, b = entry.points[first][both], entry.points[last][both]
        gaps = [np.linalg.norm(p[:, None] - p[None], axis=-1) for p in (a, b)]
        np.testing.assert_allclose(gaps[0], gaps[1], atol=1e-9)  # rigid


PLAIN = SyntheticConfig(
    height=48, width=48, frames=4, objects=(1, 2), size_spread=0.0, tumble=0.0, turn=0.0, plain=True,
    camera_height=(1.5, 1.5), camera_tilt=(14.0, 14.0),
)  # fmt: skip


def test_in_plain_worlds_a_place_in_the_picture_is_a_place_in_the_room():
    halves, names = {}, set()
    for index in range(12):
        world, camera, named = make_world(np.random.default_rng([4, index]), PLAIN)
        names |= {entry.description for entry in named}
        for entry in named:
            halves.setdefault(entry.solid.shape, set()).add(tuple(np.round(entry.solid.half, 12)))
            assert np.ptp(entry.solid.rotations, axis=0).max() == 0  # it slides
            np.testing.assert_allclose(entry.solid.centers[:, 1] + entry.solid.half[1], world.size[1], atol=1e-12)
        poses = camera.camera_to_world
        assert np.ptp(poses[:, :, :3], axis=0).max() == 0  # it neither turns nor nods nor leans
        assert np.degrees(np.arcsin(poses[0, 1, 2])) == pytest.approx(14)
        assert world.size[1] - (poses[0, 1, 3] + poses[-1, 1, 3]) / 2 == pytest.approx(1.5)
    # The middle size of each: boxes are drawn as cubes or with three sides, whose middles differ by 10 %.
    assert {shape: len(sizes) for shape, sizes in halves.items()} == {"ball": 1, "cylinder": 1, "box": 2}, halves
    assert all(name.split()[1] in PLAIN.colours and len(name.split()) == 3 for name in names), names


def test_plain_objects_look_like_the_colour_they_are_named_by():
    """The mean colour of an object's pixels is nearest to its own of all plain colours, in hue and saturation."""
    clips = [make_clip(6, index, PLAIN) for index in range(12)]
    plain = {name: np.array(COLOURS[name], float) / max(COLOURS[name]) for name in PLAIN.colours}
    for clip in clips:
        for entry in clip.scene.objects:
            if entry.masks.sum() > 60:
                seen = clip.left[entry.masks].astype(float).mean(0)
                distance = {name: np.abs(colour - seen / seen.max()).sum() for name, colour in plain.items()}
                assert min(distance, key=distance.get) == entry.description.split()[1], distance


@pytest.mark.parametrize(
    ("field", "value"),
    [("camera_height", (1.9, 1.2)), ("camera_height", (0.2, 1.0)), ("camera_tilt", (8, 80)), ("size_spread", 1.5),
     ("tumble", -0.1)],
)  # fmt: skip
def test_ranges_of_worlds_are_checked(field, value):
    with pytest.raises(SceneError, match=f"synthetic {field} is"):
        SyntheticConfig(**{field: value})


def test_plain_worlds_have_no_more_objects_than_colours():
    with pytest.raises(SceneError, match=r"synthetic objects is \(2, 7\).*\[1, 6\]"):
        SyntheticConfig(objects=(2, 7), plain=True)


@pytest.mark.parametrize("index", [0, 4, 5])
def test_a_point_is_seen_exactly_where_nothing_stands_before_it(index):
    """Every tracked point in every frame, carried along by its solid's motion, against the scalar ray caster."""
    config = SyntheticConfig(height=80, width=80, frames=4, object_points=24, objects=(3, 4))
    clip = make_clip(3, index, config)
    world, camera, named = make_world(np.random.default_rng([3, index]), config)
    wrong = checked = hidden = 0
    for entry in clip.scene.objects:
        solid = named[int(entry.object_id.removeprefix("object_"))].solid
        seen = entry.seen()
        for m in range(seen.shape[1]):
            first = int(seen[:, m].argmax())
            local = solid.rotations[first].T @ (entry.points[first, m] - solid.centers[first])
            for t in range(config.frames):
                point = solid.rotations[t] @ local + solid.centers[t]
                pose = clip.scene.world_to_camera[t]
                eye = pose[:, :3] @ point + pose[:, 3]
                x, y = camera.focal * eye[:2] / eye[2] + 40
                expected = eye[2] > 0 and 0 <= x < 80 and 0 <= y < 80
                if expected:
                    origin, direction = rays_of(camera, t, x, y)
                    nearest = min(slow_hit(s, t, origin, direction) for s in world.solids)
                    clear = nearest > eye[2] * (1 - 1e-4)
                    hidden += not clear
                    expected = clear and entry.masks[t, int(y), int(x)]
                wrong += bool(expected) != seen[t, m]
                checked += 1
                if seen[t, m]:
                    np.testing.assert_allclose(entry.points[t, m], point, atol=1e-9)
    assert hidden > 5 and wrong <= 0.01 * checked, (wrong, hidden, checked)


@pytest.mark.parametrize("shape", ["box", "ball", "cylinder"])
def test_surface_points_are_on_the_surface(shape):
    half = (0.2, 0.2, 0.2) if shape == "ball" else (0.2, 0.4, 0.2)
    points, normals = surface_points(np.random.default_rng(0), shape, half, 4000)
    rotation = np.eye(3)[None]
    solid = Solid(shape, half, np.zeros((1, 3)), rotation, 1, None)
    for point, normal in zip(points[:100], normals[:100], strict=True):
        assert slow_hit(solid, 0, point + normal + 1e-7, -normal) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)
    assert np.abs(points.mean(0)).max() < 0.02  # both ends and all sides alike
    if shape == "cylinder":
        ends = np.isclose(np.abs(points[:, 1]), 0.4).mean()
        assert ends == pytest.approx(0.2 / (0.2 + 0.8), abs=0.03)


def test_a_clip_follows_from_seed_and_index():
    a, b, other = make_clip(5, 7, SMALL), make_clip(5, 7, SMALL), make_clip(5, 8, SMALL)
    make_clip(5, 0, SMALL)
    assert np.array_equal(a.left, b.left) and np.array_equal(a.depth, b.depth)
    assert a.scene.clip_id == b.scene.clip_id != other.scene.clip_id
    for x, y in zip(a.scene.objects, b.scene.objects, strict=True):
        assert x.description == y.description and np.array_equal(x.points, y.points, equal_nan=True)
    assert not np.array_equal(a.left, other.left)


def test_batches_of_frames_do_not_change_the_picture(monkeypatch):
    together = make_clip(5, 1, SMALL)
    monkeypatch.setattr("data_prep.synthetic.render._BATCH_RAYS", 1)
    alone = make_clip(5, 1, SMALL)
    np.testing.assert_allclose(together.depth, alone.depth, rtol=1e-5)
    assert (together.left != alone.left).mean() < 1e-3


def test_worlds_are_varied_and_named_apart():
    directions, moved, still, turned = set(), 0, 0, 0
    for index in range(40):
        scene = make_clip(1, index, SMALL).scene
        names = [o.description for o in scene.objects]
        assert len({name.split()[1] for name in names}) == len(names)
        assert all(name.startswith("the ") and len(name.split()) == 4 for name in names)
        step = scene.world_to_camera[0, :, :3] @ (scene.camera_centers[-1] - scene.camera_centers[0])
        if np.linalg.norm(step) > 0.1:
            axis = int(np.abs(step).argmax())
            directions.add((axis, step[axis] > 0))
        else:
            still += 1
        turned += np.abs(scene.world_to_camera[0, :, :3] - scene.world_to_camera[-1, :, :3]).max() > 0.05
        for entry in scene.objects:
            middles = np.nanmean(entry.points[entry.seen().any(1)], axis=1)
            moved += len(middles) > 1 and np.linalg.norm(middles[-1] - middles[0]) > 0.2
    assert len(directions) == 6 and 0 < still < 15 and moved > 40 and turned > 20


def test_textures_are_periodic_and_their_levels_agree():
    found = atlas()
    rng = np.random.default_rng(0)
    u, v = rng.uniform(0, 1, (2, 5000)).astype(np.float32)
    for pattern in range(len(PATTERNS)):
        which = np.full(5000, pattern)
        zero = np.zeros(5000, np.int64)
        base = found.sample(which, zero, u, v).astype(float)
        shifted = found.sample(which, zero, u + 3, v - 2).astype(float)
        assert np.abs(base - shifted).mean() < 0.5
        assert base.std() > 15, PATTERNS[pattern]
        coarse = found.sample(which, np.full(5000, LEVELS - 1), u, v).astype(float)
        assert abs(coarse.mean() - base.mean()) < 4 and coarse.std() < base.std()
    # Across the seam the texture goes on.
    ends = [
        found.sample(np.zeros(64, int), np.zeros(64, int), np.full(64, e, np.float32), v[:64]) for e in (0.9999, 1e-4)
    ]
    assert np.abs(ends[0].astype(float) - ends[1]).max() < 12


def test_impossible_configs_say_so():
    for change in ({"frames": 1}, {"objects": (0, 2)}, {"fov": 200.0}, {"camera_travel": (0.0, 1.0)}):
        with pytest.raises(SceneError, match="synthetic"):
            dataclasses.replace(SMALL, **change)
    with pytest.raises(SceneError, match="no room fits"):
        make_clip(0, 0, dataclasses.replace(SMALL, object_travel=(40.0, 41.0), object_still=0.0))


def test_unknown_codec_is_refused(tmp_path):
    with pytest.raises(SceneError, match="codec"):
        write_clip(make_clip(0, 0, SMALL), tmp_path, codec="h266")


def test_rate_at_64():
    """Far below the measured rate, so that only a lost vectorisation fails."""
    make_clip(0, 0, SyntheticConfig())
    start = time.process_time()
    for index in range(8):
        make_clip(0, index, SyntheticConfig())
    assert 8 / (time.process_time() - start) > 8
