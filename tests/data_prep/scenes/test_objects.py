"""Sidecars: run lengths by the format's definition, clear errors for damaged ones, points in the right object."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.scenes.objects import (
    Caption,
    decode_rle,
    encode_rle,
    lift_tracks,
    objects_from_tracks,
    project,
    read_bootstap,
    read_captions,
    read_masks,
)
from data_prep.scenes.scene import Scene
from data_prep.store.untrusted import SceneError

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def compress(counts: list[int]) -> str:
    """The compressed string written from the format's definition: signed 5-bit groups, lowest first, after 48."""
    text = ""
    for n, count in enumerate(counts):
        value = count - counts[n - 2] if n > 2 else count
        while True:
            group, value = value & 31, value >> 5
            done = (value == 0 and not group & 16) or (value == -1 and bool(group & 16))
            text += chr(48 + (group if done else group | 32))
            if done:
                break
    return text


@FUZZ
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_run_lengths_both_ways(height, width, seed, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    rle = encode_rle(mask)
    json.dumps(rle)
    np.testing.assert_array_equal(decode_rle(rle), mask)
    np.testing.assert_array_equal(decode_rle(rle | {"counts": compress(rle["counts"])}), mask)


def test_run_lengths_by_hand():
    # Column-major: the first column down, then the second. Runs: one 0, two 1, one 0, two 1.
    expected = np.array([[0, 0], [1, 1], [1, 1]], bool)
    np.testing.assert_array_equal(decode_rle({"size": [3, 2], "counts": [1, 2, 1, 2]}), expected)
    # From the fourth run on a difference to the run two before: 1, 2, 1, 2 - 2 = 0.
    np.testing.assert_array_equal(decode_rle({"size": [3, 2], "counts": "1210"}), expected)
    # 100 = 3 * 32 + 4: group 4 with the continuation bit, then 3; the mask is empty.
    assert not decode_rle({"size": [10, 10], "counts": "T3"}).any()
    assert encode_rle(np.ones((2, 2), bool)) == {"size": [2, 2], "counts": [0, 4]}


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ([1], "expected"),
        ({"size": [3, 2]}, "expected"),
        ({"size": [3, 0], "counts": []}, "size must be"),
        ({"size": [True, 2], "counts": [2]}, "size must be"),
        ({"size": [1 << 20, 1 << 20], "counts": [1 << 40]}, "size must be"),
        ({"size": [3, 2], "counts": [5]}, "cover 5 pixels of 6"),
        ({"size": [3, 2], "counts": [7, -1]}, "whole numbers"),
        ({"size": [3, 2], "counts": [6.0]}, "whole numbers"),
        ({"size": [3, 2], "counts": "6\n"}, "character"),
        ({"size": [3, 2], "counts": "T"}, "in the middle"),
        ({"size": [3, 2], "counts": "o" * 12}, "40 bits"),
        ({"size": [3, 2], "counts": "O"}, "run 0 is -1"),
    ],
)
def test_bad_run_lengths(rle, message):
    with pytest.raises(SceneError, match=message):
        decode_rle(rle, "here")


@FUZZ
@given(
    st.fixed_dictionaries(
        {
            "size": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
            "counts": st.text(alphabet=[chr(c) for c in range(46, 114)], max_size=30)
            | st.lists(st.integers(-2, 50), max_size=9)
            | json_values,
        }
    )
    | json_values
)
def test_fuzzed_run_lengths(rle):
    try:
        mask = decode_rle(rle)
    except SceneError:
        return
    assert mask.dtype == bool and list(mask.shape) == list(rle["size"])


def test_mask_files(tmp_path):
    masks = {"a": np.random.default_rng(0).random((3, 5, 7)) < 0.4, "b": np.zeros((3, 5, 7), bool)}
    np.savez(tmp_path / "m.npz", **masks)
    document = {k: [encode_rle(m) if m.any() else None for m in v] for k, v in masks.items()}
    (tmp_path / "m.json").write_text(json.dumps(document))
    for name in ("m.npz", "m.json"):
        read = read_masks(tmp_path / name, 3, (5, 7))
        assert list(read) == ["a", "b"]
        for key in masks:
            np.testing.assert_array_equal(read[key], masks[key])
        with pytest.raises(SceneError, match=f"{name}.*a"):
            read_masks(tmp_path / name, 4, (5, 7))
        with pytest.raises(SceneError, match=f"{name}.*a"):
            read_masks(tmp_path / name, 3, (7, 5))


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    path = tmp_path / "bomb.json"
    path.write_text(json.dumps({f"o{n}": [None] * 10 for n in range(1000)}))
    tracemalloc.start()
    with pytest.raises(SceneError, match="exceed"):
        read_masks(path, 10, (2048, 2048))
    path.write_text(json.dumps({"o": [{"size": [16384, 16384], "counts": [1 << 28]}] * 10}))
    with pytest.raises(SceneError, match="frame 0: size"):
        read_masks(path, 10, (64, 64))
    path.write_text("[" * 100_000)
    with pytest.raises(SceneError, match="not JSON"):
        read_masks(path, 10, (64, 64))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_captions(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"a": " the red box ", "b": {"caption": "the dog", "category": "animal"}}))
    assert read_captions(path) == {"a": Caption("the red box"), "b": Caption("the dog", "animal")}
    for bad in ({"a": ""}, {"a": 3}, {"a": {"text": "x"}}, {"a": {"caption": "x", "category": None}}, ["a"]):
        path.write_text(json.dumps(bad))
        with pytest.raises(SceneError, match=r"c\.json"):
            read_captions(path)
    for long in ({"a": "x" * 5_000_000}, {"a": {"caption": "x", "category": "y" * 1001}}, {"z" * 1001: "x"}):
        path.write_text(json.dumps(long))
        with pytest.raises(SceneError, match="name or caption of more than 1000 characters") as caught:
            read_captions(path)
        assert len(str(caught.value)) < 1000
    with pytest.raises(SceneError, match="cannot be read"):
        read_captions(tmp_path / "absent.json")


@FUZZ
@given(st.binary(max_size=60) | json_values.map(lambda v: json.dumps(v).encode()))
def test_fuzzed_json_sidecars(tmp_path, data):
    path = tmp_path / "fuzz.json"
    path.write_bytes(data)
    for read in (read_captions, lambda p: read_masks(p, 2, (4, 4))):
        try:
            read(path)
        except SceneError as error:
            assert "fuzz.json" in str(error)


def test_bootstap_files(tmp_path):
    path = tmp_path / "t.npz"
    tracks = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
    visibles = np.ones((4, 3), bool)
    visibles[1, 2] = False
    np.savez(path, tracks=tracks, visibles=visibles)
    read = read_bootstap(path, 3)
    assert np.isnan(read[1, 2]).all() and np.isnan(read).sum() == 2
    np.testing.assert_array_equal(read[visibles], tracks[visibles])
    bad = [
        ({"tracks": tracks}, "no 'visibles'"),
        ({"tracks": tracks[:, :2], "visibles": visibles}, "tracks is"),
        ({"tracks": tracks, "visibles": visibles[:3]}, "visibles is"),
        ({"tracks": tracks, "visibles": visibles * 2.5}, "visibles must be"),
        ({"tracks": tracks + np.inf, "visibles": visibles}, "NaN or infinite"),
    ]
    for arrays, message in bad:
        np.savez(path, **arrays)
        with pytest.raises(SceneError, match=message):
            read_bootstap(path, 3)


@FUZZ
@given(
    st.sampled_from(["tracks", "visibles"]),
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from(["i1", "u8", "f2", "f8", "c16", "b1", "S3", "U2", "M8[s]"]),
    st.booleans(),
)
def test_fuzzed_npz_sidecars(tmp_path, key, shape, dtype, ones):
    array = (np.ones if ones else np.zeros)(shape, dtype)
    path = tmp_path / "fuzz.npz"
    np.savez(path, **({"tracks": np.zeros((4, 3, 2)), "visibles": np.ones((4, 3))} | {key: array}))
    for read in (lambda p: read_bootstap(p, 3), lambda p: read_masks(p, 3, (4, 4))):
        try:
            read(path)
        except SceneError as error:
            assert "fuzz.npz" in str(error)


def make_scene(frames: int = 3) -> Scene:
    rng = np.random.default_rng(4)
    poses = []
    for _ in range(frames):
        q, r = np.linalg.qr(np.eye(3) + rng.uniform(-0.2, 0.2, (3, 3)))
        poses.append(np.concatenate([q * np.sign(np.diag(r)), rng.uniform(-0.3, 0.3, (3, 1))], 1))
    k = np.array([[50.0, 0, 32], [0, 60.0, 24], [0, 0, 1]])
    return Scene(
        clip_id="c",
        source_id="s",
        world_to_camera=np.array(poses),
        intrinsics=np.repeat(k[None], frames, 0),
        image_size=(48, 64),
        timestamps=np.arange(frames) / 10,
        objects=(),
        scale="metric",
        provenance={},
    )


def world_points(scene: Scene, pixels: list[tuple[float, float]], depth: float = 2.0) -> np.ndarray:
    """f64[N, T, 3]: points that show at the same pixels in every frame, by inverting each step in homogeneous form."""
    tracks = np.zeros((len(pixels), scene.num_frames, 3))
    for t in range(scene.num_frames):
        matrix = np.vstack([scene.world_to_camera[t], [0, 0, 0, 1]])
        for n, (x, y) in enumerate(pixels):
            local = depth * np.linalg.solve(scene.intrinsics[t], [x, y, 1.0])
            tracks[n, t] = np.linalg.solve(matrix, [*local, 1.0])[:3]
    return tracks


def test_projection_and_lifting_are_inverse():
    scene = make_scene()
    pixels = [(10.5, 20.5), (63.9, 0.1), (32.0, 24.0)]
    tracks = world_points(scene, pixels, 2.0)
    found, z = project(tracks, scene.world_to_camera, scene.intrinsics)
    np.testing.assert_allclose(found, np.repeat(np.array(pixels)[:, None], 3, 1), atol=1e-9)
    np.testing.assert_allclose(z, 2.0)
    flat = np.repeat(np.array([*pixels, (64.0, 3.0), (np.nan, np.nan)])[:, None], 3, 1)
    depth = np.full((3, 48, 64), 2.0, np.float32)
    depth[1, 20, 10] = np.nan
    lifted = lift_tracks(flat, depth, scene.intrinsics, scene.camera_to_world)
    expected = np.concatenate([tracks, np.full((2, 3, 3), np.nan)])
    expected[0, 1] = np.nan
    np.testing.assert_allclose(lifted, expected, atol=1e-9)
    behind = project(world_points(scene, pixels, -2.0), scene.world_to_camera, scene.intrinsics)[0]
    assert np.isnan(behind).all()


def test_tracks_go_to_the_object_whose_mask_holds_them():
    scene = make_scene()
    tracks = world_points(scene, [(10 + n, 10.5) for n in range(5)] + [(40.5, 30.5), (41.5, 30.5), (63.0, 47.0)])
    tracks[4, 2] = np.nan  # not visible
    masks = {"a": np.zeros((3, 48, 64), bool), "b": np.zeros((3, 48, 64), bool)}
    masks["a"][:, 8:12, 8:16] = True
    masks["a"][2, :, :11] = False  # the first track slides off in the last frame
    masks["b"][:, 30, 40:42] = True
    captions = {"a": Caption("the red box", "box"), "b": Caption("the blue ball", "ball")}
    objects, dropped = objects_from_tracks(scene, tracks, masks, captions, min_points=3)
    assert [o.object_id for o in objects] == ["a"] and objects[0].description == "the red box"
    assert list(dropped.items()) == [("b", "too few points: 0 of at least 2 frames")] or (
        dropped["b"].startswith("no tracked points")
    )
    seen = np.ones((3, 5), bool)
    seen[2, [0, 4]] = False
    np.testing.assert_array_equal(objects[0].seen(), seen)
    np.testing.assert_allclose(objects[0].points[seen], tracks[:5].swapaxes(0, 1)[seen])
    more = objects_from_tracks(scene, tracks, masks, captions | {"c": Caption("a dog")}, min_points=3)[1]
    assert "c" not in dropped and more["c"] == "it has a caption and no masks"
    # Below the threshold a frame has no points at all, and a threshold that no frame meets drops the object.
    strict, _ = objects_from_tracks(scene, tracks, masks, captions, min_points=5)
    np.testing.assert_array_equal(strict[0].seen().sum(1), [5, 5, 0])
    assert len(objects_from_tracks(scene, tracks, masks, captions, min_points=2)[0]) == 2
    assert not objects_from_tracks(scene, tracks, masks, captions, min_points=6)[0]


def test_a_disputed_track_goes_to_the_mask_that_holds_it_longer():
    scene = make_scene()
    tracks = world_points(scene, [(10.5, 10.5)] * 2)
    masks = {"a": np.ones((3, 48, 64), bool), "b": np.ones((3, 48, 64), bool)}
    masks["a"][0] = False
    captions = {"a": Caption("x"), "b": Caption("y")}
    objects, _ = objects_from_tracks(scene, tracks, masks, captions, min_points=1)
    assert [o.object_id for o in objects] == ["b"]


def test_what_does_not_fit_is_refused():
    scene = make_scene()
    tracks = world_points(scene, [(10.5, 10.5)])
    masks = {"a": np.ones((3, 48, 64), bool)}
    with pytest.raises(SceneError, match="no caption"):
        objects_from_tracks(scene, tracks, masks, {})
    with pytest.raises(SceneError, match="does not fit"):
        objects_from_tracks(scene, tracks, {"a": masks["a"][:2]}, {"a": Caption("x")})
    with pytest.raises(SceneError, match="tracks are"):
        objects_from_tracks(scene, tracks[:, :2], masks, {"a": Caption("x")})
    assert objects_from_tracks(scene, tracks, {}, {}) == ((), {})
