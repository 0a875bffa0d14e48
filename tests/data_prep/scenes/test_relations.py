from __future__ import annotations

import math

import numpy as np
import pytest

from data_prep.scenes import relations as rel
from data_prep.scenes.relations import RelationRules
from data_prep.scenes.scene import Scene, SceneObject
from tests.data_prep.scenes.random_scenes import random_scene

SCENES = [random_scene(seed, frames=9, objects=2, points=20) for seed in range(25)]
PAIRS = [(0, 8), (1, 4), (3, 7), (6, 7)]


def cases():
    for scene in SCENES:
        for i, j in PAIRS:
            yield scene, i, j


def matrix(scene: Scene, frame: int) -> np.ndarray:
    """4x4 world->camera; the reference inverts it with a general solver and never uses the stored inverse."""
    return np.vstack([scene.world_to_camera[frame], [0, 0, 0, 1]])


def center(scene: Scene, frame: int) -> np.ndarray:
    return np.linalg.solve(matrix(scene, frame), np.array([0, 0, 0, 1.0]))[:3]


def in_camera(scene: Scene, frame: int, point: np.ndarray) -> np.ndarray:
    return (matrix(scene, frame) @ np.append(point, 1.0))[:3]


def common_centroids(obj: SceneObject, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
    both = [m for m in range(obj.points.shape[1]) if not np.isnan(obj.points[[i, j], m]).any()]
    return tuple(
        np.array([math.fsum(obj.points[f, m, axis] for m in both) / len(both) for axis in range(3)]) for f in (i, j)
    )


def nearest(obj: SceneObject, frame: int, place: np.ndarray) -> float:
    return min(math.dist(p, place) for p in obj.points[frame] if not np.isnan(p[0]))


def three_way(value: float, labels: tuple[str, ...]) -> str | None:
    if abs(abs(value) - rel.RULES.tau) < rel.RULES.margin:
        return None
    return labels[2] if abs(value) < rel.RULES.tau else labels[0] if value > 0 else labels[1]


def check(expected_value, expected_label, call) -> str:
    """Compares one relation with its closed form; an expected label of None means a refusal."""
    if expected_label is None:
        with pytest.raises(rel.Refused):
            call()
        return "refused"
    found = call()
    np.testing.assert_allclose(found.value, expected_value, rtol=0, atol=1e-9)
    assert found.label == expected_label
    return found.label


def test_camera_distance():
    for scene, i, j in cases():
        expected = math.dist(center(scene, i), center(scene, j))
        check(
            expected, f"{expected:.1f}", lambda s=scene, a=i, b=j: rel.solve("camera_absolute_distance", s, None, a, b)
        )


def test_camera_direction():
    seen = set()
    for scene, i, j in cases():
        move = in_camera(scene, i, center(scene, j))  # camera i sits at the origin of its own axes
        size = sorted(abs(move))
        axis = int(np.argmax(abs(move)))
        label = (("right", "left"), ("down", "up"), ("forward", "backward"))[axis][int(move[axis] < 0)]
        if size[2] < rel.RULES.dominance * size[1] or np.linalg.norm(move) < rel.RULES.min_motion:
            label = None
        seen.add(check(move, label, lambda s=scene, a=i, b=j: rel.solve("camera_relative_direction", s, None, a, b)))
    assert seen == {*rel.CAMERA_DIRECTIONS, "refused"}


def test_the_papers_mixed_convention_fails_on_rotated_cameras():
    wrong = 0
    for scene, i, j in cases():
        e_i, e_j = scene.world_to_camera[i], scene.world_to_camera[j]
        printed = e_i[:, :3].T @ (e_j[:, 3] - e_i[:, 3])
        right = rel.measure_camera(scene, np.array([i]), np.array([j]))["camera_relative_direction"][0]
        wrong += np.abs(printed - right).max() > 1e-2
        # Read as camera->world the same formula is right: the error is in the convention, not in its shape.
        g_i, g_j = scene.camera_to_world[i], scene.camera_to_world[j]
        np.testing.assert_allclose(g_i[:, :3].T @ (g_j[:, 3] - g_i[:, 3]), right, atol=1e-9)
    assert wrong == len(SCENES) * len(PAIRS)


def test_object_relations():
    seen: dict[str, set[str]] = {}
    for scene, i, j in cases():
        for obj in scene.objects:
            first, second = common_centroids(obj, i, j)
            across = nearest(obj, j, center(scene, i))
            change = nearest(obj, j, center(scene, j)) - nearest(obj, i, center(scene, i))
            shift = in_camera(scene, i, second) - in_camera(scene, i, first)
            moved = math.dist(first, second)
            expected = {
                "object_absolute_distance": (moved, f"{moved:.1f}"),
                "object_camera_absolute_distance": (across, f"{across:.1f}"),
                "object_camera_relative_distance": (change, three_way(change, ("farther", "closer", "not moving"))),
                "object_camera_lateral_direction": (shift[0], three_way(shift[0], ("right", "left", "not moving"))),
                "object_camera_longitudinal_direction": (
                    shift[2],
                    three_way(shift[2], ("farther", "closer", "not moving")),
                ),
            }
            for name, (value, label) in expected.items():
                got = check(value, label, lambda n=name, s=scene, o=obj, a=i, b=j: rel.solve(n, s, o, a, b))
                seen.setdefault(name, set()).add(got)
    for name, labels in rel.LABELS.items():
        if labels and name.startswith("object"):
            assert seen[name] == {*labels, "refused"}, name


def still_scene(points: np.ndarray, centers: np.ndarray) -> Scene:
    """Unrotated cameras at `centers` f64[T, 3], one object."""
    poses = np.concatenate([np.tile(np.eye(3), (len(centers), 1, 1)), centers[:, :, None]], axis=2)
    return Scene(
        camera_to_world=poses,
        clip_id="still",
        source_id="still",
        intrinsics=np.tile(np.eye(3), (len(centers), 1, 1)),
        image_size=(4, 4),
        timestamps=np.arange(float(len(centers))),
        objects=(SceneObject("o", "the box", "box", points),),
        scale="metric",
        provenance={},
    )


def test_a_half_hidden_still_object_does_not_move():
    points = np.tile(np.arange(30.0).reshape(10, 3), (2, 1, 1))
    points[1, 5:] = np.nan
    scene = still_scene(points, np.zeros((2, 3)))
    obj = scene.objects[0]
    assert rel.solve("object_absolute_distance", scene, obj, 0, 1).value == 0
    assert rel.solve("object_camera_lateral_direction", scene, obj, 0, 1).label == "not moving"
    assert rel.solve("object_absolute_distance", scene, obj, 0, 1, RelationRules(points="all")).value > 5
    with pytest.raises(ValueError, match="both, all"):
        rel.solve("object_absolute_distance", scene, obj, 0, 1, RelationRules(points="some"))


def test_unseen_objects_are_refused():
    points = np.ones((3, 6, 3))
    points[1, 2:] = np.nan
    points[2] = np.nan
    scene = still_scene(points, np.zeros((3, 3)))
    obj = scene.objects[0]
    for name, labels in rel.LABELS.items():
        if name.startswith("object"):
            for i, j in ((0, 1), (1, 2), (0, 2)):
                with pytest.raises(rel.Refused, match="points are seen") as error:
                    rel.solve(name, scene, obj, i, j)
                assert error.value.reason == "unseen", labels
    assert rel.solve(
        "object_camera_absolute_distance", scene, obj, 0, 1, RelationRules(min_points=2)
    ).value == pytest.approx(math.sqrt(3))
    with pytest.raises(rel.Refused):  # no point at all is never enough
        rel.solve("object_absolute_distance", scene, obj, 0, 2, RelationRules(min_points=0))


@pytest.mark.parametrize(
    ("move", "outcome"),
    [
        ((1, 0, 0), "right"),
        ((-1, 0.2, 0), "left"),
        ((0, 1, 0.3), "down"),
        ((0, -1, 0), "up"),
        ((0.1, 0, 0.9), "forward"),
        ((0, 0, -0.3), "backward"),
        ((1, 0.9, 0), "mixed_axes"),
        ((0.1, 0, 0), "no_motion"),
        ((0, 0, 0), "no_motion"),
    ],
)
def test_direction_words(move, outcome):
    scene = still_scene(np.ones((2, 6, 3)), np.array([(0, 0, 0), move], float))
    if outcome in rel.CAMERA_DIRECTIONS:
        assert rel.solve("camera_relative_direction", scene, None, 0, 1).label == outcome
    else:
        with pytest.raises(rel.Refused) as error:
            rel.solve("camera_relative_direction", scene, None, 0, 1)
        assert error.value.reason == outcome


@pytest.mark.parametrize(
    ("shift", "outcome"), [(0.1, "not moving"), (0.2, None), (0.25, None), (0.3, None), (0.4, "+"), (-0.4, "-")]
)
def test_thresholds(shift, outcome):
    points = np.full((2, 6, 3), 3.0)
    points[1, :, 0] += shift
    points[1, :, 2] += shift
    scene = still_scene(points, np.zeros((2, 3)))
    for name, plus, minus in (
        ("object_camera_lateral_direction", "right", "left"),
        ("object_camera_longitudinal_direction", "farther", "closer"),
    ):
        if outcome is None:
            with pytest.raises(rel.Refused) as error:
                rel.solve(name, scene, scene.objects[0], 0, 1)
            assert error.value.reason == "near_threshold"
        else:
            label = rel.solve(name, scene, scene.objects[0], 0, 1).label
            assert label == {"+": plus, "-": minus}.get(outcome, outcome)
    assert (
        rel.solve(
            "object_camera_lateral_direction", scene, scene.objects[0], 0, 1, RelationRules(tau=0.01, margin=0.0)
        ).label
        != "not moving"
    )


@pytest.mark.parametrize(("i", "j"), [(3, 3), (4, 2), (-1, 2), (0, 9), (0.0, 2), (True, 2)])
def test_wrong_frames(i, j):
    scene = SCENES[0]
    for name in rel.LABELS:
        obj = None if name.startswith("camera") else scene.objects[0]
        with pytest.raises(ValueError, match="frame") as error:
            rel.solve(name, scene, obj, i, j)
        assert not isinstance(error.value, rel.Refused)
