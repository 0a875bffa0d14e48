from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest

from data_prep.scenes.scene import (
    Scene,
    SceneError,
    SceneObject,
    invert_poses,
    load_scene,
    nearest_rigid,
    save_scene,
)
from data_prep.store.untrusted import read_npz
from tests.data_prep.scenes.random_scenes import random_scene


def small_scene(**changes) -> Scene:
    scene = random_scene(3, frames=5, objects=2, points=6)
    masks = np.random.default_rng(0).random((5, 7, 9)) < 0.4
    first = scene.objects[0]
    fields = {
        "clip_id": "clip",
        "source_id": "source",
        "world_to_camera": scene.world_to_camera,
        "intrinsics": scene.intrinsics,
        "image_size": (7, 9),
        "timestamps": scene.timestamps,
        "objects": (SceneObject("a", "the rote Würfel", "box", first.points, masks), scene.objects[1]),
        "scale": "assumed_baseline",
        "provenance": {"tool": "test", "figures": [1, 2.5, None]},
    }
    return Scene(**(fields | changes))


def test_round_trip_is_exact_and_bytes_depend_on_the_scene_alone(tmp_path):
    scene = small_scene()
    save_scene(scene, tmp_path / "one")
    save_scene(scene, tmp_path / "two")
    loaded = load_scene(tmp_path / "one")
    for name in ("world_to_camera", "camera_to_world", "intrinsics", "timestamps"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(scene, name))
    for ours, theirs in zip(loaded.objects, scene.objects, strict=True):
        np.testing.assert_array_equal(ours.points, theirs.points)
        assert (ours.object_id, ours.description, ours.category) == (
            theirs.object_id,
            theirs.description,
            theirs.category,
        )
    np.testing.assert_array_equal(loaded.objects[0].masks, scene.objects[0].masks)
    assert loaded.objects[1].masks is None
    assert loaded.provenance == scene.provenance and loaded.image_size == (7, 9) and loaded.scale == "assumed_baseline"
    for name in ("scene.npz", "scene.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["scene.json", "scene.npz"]


def test_both_directions_are_inverse_and_centres_are_where_the_camera_is():
    scene = small_scene()
    for forth, back in zip(scene.world_to_camera, scene.camera_to_world, strict=True):
        whole = np.vstack([forth, [0, 0, 0, 1]])
        np.testing.assert_allclose(np.linalg.inv(whole)[:3], back, atol=1e-12)
    # The camera's centre is the world point that its own extrinsics send to the origin.
    centers = scene.camera_centers
    np.testing.assert_allclose(
        np.einsum("tab,tb->ta", scene.world_to_camera[:, :, :3], centers) + scene.world_to_camera[:, :, 3],
        0,
        atol=1e-12,
    )
    again = Scene(
        camera_to_world=scene.camera_to_world,
        **{n: getattr(scene, n) for n in ("clip_id", "source_id", "intrinsics", "image_size", "timestamps", "objects")},
        scale="metric",
        provenance={},
    )
    np.testing.assert_allclose(again.world_to_camera, scene.world_to_camera, atol=1e-12)


def test_arrays_cannot_be_changed():
    scene = small_scene()
    for array in (scene.world_to_camera, scene.timestamps, scene.objects[0].points, scene.objects[0].masks):
        with pytest.raises(ValueError):
            array[...] = 0


def mirrored(poses):
    return poses * np.array([-1, 1, 1])[:, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": "feet"}, "scale is 'feet'"),
        ({"clip_id": " "}, "clip_id"),
        ({"timestamps": np.array([0, 1, 2, 2, 3.0])}, "strictly increasing"),
        ({"timestamps": np.array([0, 1, np.nan, 3, 4])}, "timestamps holds NaN"),
        ({"timestamps": np.arange(4.0)}, "world_to_camera must be"),
        ({"image_size": (7, 8)}, "masks of"),
        ({"image_size": (0, 9)}, "image_size"),
        ({"intrinsics": np.zeros((5, 3, 3))}, "fx and fy"),
        ({"provenance": {"a": float("nan")}}, "provenance"),
        ({"world_to_camera": mirrored(small_scene().world_to_camera)}, "no rotation"),
        ({"world_to_camera": 1.001 * small_scene().world_to_camera}, "no rotation"),
        ({"world_to_camera": np.full((5, 3, 4), np.nan)}, "no rotation"),
        ({"objects": small_scene().objects[:1] * 2}, "distinct"),
    ],
)
def test_wrong_scenes_are_refused_by_field(changes, message):
    with pytest.raises(SceneError, match=message):
        small_scene(**changes)


def test_poses_that_are_not_inverse_are_refused():
    scene = small_scene()
    fields = {n: getattr(scene, n) for n in ("clip_id", "source_id", "intrinsics", "image_size", "timestamps")}
    with pytest.raises(SceneError, match="not inverse"):
        Scene(
            world_to_camera=scene.world_to_camera,
            camera_to_world=scene.world_to_camera,
            objects=(),
            scale="metric",
            provenance={},
            **fields,
        )


def test_points_seen_in_part_or_infinite_are_refused():
    points = np.zeros((2, 3, 3))
    points[0, 0, 1] = np.nan
    with pytest.raises(SceneError, match="some NaN"):
        SceneObject("o", "", "", points)
    with pytest.raises(SceneError, match="infinite"):
        SceneObject("o", "", "", np.full((2, 3, 3), np.inf))


def test_nearest_rigid_repairs_rounding_only():
    exact = small_scene().world_to_camera
    rounded = exact.round(4)
    with pytest.raises(SceneError):
        invert_poses(rounded)
    np.testing.assert_allclose(nearest_rigid(rounded), exact, atol=1e-4)
    invert_poses(nearest_rigid(rounded))
    with pytest.raises(SceneError, match="no rigid motion"):
        nearest_rigid(1.1 * exact)


def test_damaged_scenes_are_clear_errors(tmp_path):
    save_scene(small_scene(), tmp_path)
    texts = {name: (tmp_path / name).read_bytes() for name in ("scene.npz", "scene.json")}
    rng = np.random.default_rng(1)
    for trial in range(120):
        name = ("scene.json", "scene.npz")[trial % 2]
        data = bytearray(texts[name])
        if trial % 3:
            data[rng.integers(len(data))] = rng.integers(256)
        else:
            del data[rng.integers(len(data)) :]
        (tmp_path / name).write_bytes(bytes(data))
        try:
            load_scene(tmp_path)
        except SceneError as error:
            assert str(tmp_path) in str(error)
        (tmp_path / name).write_bytes(texts[name])
    load_scene(tmp_path)
    document = json.loads(texts["scene.json"])
    for change in ({"version": 2}, {"objects": [{}]}, {"image_size": [10**6, 10**6]}, {"objects": 5}):
        (tmp_path / "scene.json").write_text(json.dumps(document | change))
        with pytest.raises(SceneError):
            load_scene(tmp_path)
    (tmp_path / "scene.json").unlink()
    with pytest.raises(SceneError, match="scene.json cannot be read"):
        load_scene(tmp_path)


def npz_bytes(header: bytes, body: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        padded = header + b" " * (-(10 + len(header) + 1) % 64) + b"\n"
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + body)
    return buffer.getvalue()


def test_npz_that_asks_for_too_much_or_for_pickle_is_refused_before_allocation():
    lie = npz_bytes(b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000, 100000, 30), }", b"\0" * 64)
    with pytest.raises(SceneError, match="a.npy declares"):
        read_npz(lie)
    pickled = npz_bytes(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\0" * 64)
    with pytest.raises(SceneError, match="not an array of numbers"):
        read_npz(pickled)
    honest = npz_bytes(b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000,), }", b"\0" * 800000)
    assert read_npz(honest)["a"].shape == (100000,)
    with pytest.raises(SceneError, match="than is allowed"):
        read_npz(honest, max_bytes=1000)
    with pytest.raises(SceneError, match="here.npz: not a readable npz"):
        read_npz(b"nothing", "here.npz")
