"""Stereo4D files: a synthetic clip comes back as its exact truth; damaged files give errors that name file and key."""

from __future__ import annotations

import dataclasses
import io
import tracemalloc
import zipfile

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.scenes.objects import objects_from_tracks, read_captions, read_masks
from data_prep.scenes.scene import intrinsics_of, load_scene
from data_prep.sources.frames import probe_frames
from data_prep.sources.stereo4d import read_stereo4d
from data_prep.store.untrusted import SceneError
from data_prep.synthetic.clip import SyntheticClip, make_clip, stereo4d_arrays, write_clip
from data_prep.synthetic.worlds import SyntheticConfig
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.video import read_video

CONFIG = SyntheticConfig(height=96, width=128, frames=6, fps=30.0, stereo=True)


@pytest.fixture(scope="module")
def pool():
    with DecodePool(20.0) as made:
        yield made


@pytest.fixture(scope="module")
def clip() -> SyntheticClip:
    return make_clip(9, 4, CONFIG)


def write_npz(path, arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("masks", ["npz", "json"])
def test_round_trip_to_the_exact_scene(tmp_path, pool, index, masks):
    clip = make_clip(9, index, CONFIG)
    write_clip(clip, tmp_path, rle=masks == "json")
    stem = tmp_path / clip.scene.clip_id
    truth = load_scene(f"{stem}-truth")
    read = read_stereo4d(f"{stem}.npz")
    size, _ = probe_frames(f"{stem}-left_rectified.mp4", len(read.timestamps), pool)
    bare = read.scene(size, "assumed_baseline")
    objects, dropped = objects_from_tracks(
        bare,
        read.tracks,
        read_masks(f"{stem}-masks.{masks}", bare.num_frames, size),
        read_captions(f"{stem}-captions.json"),
        min_points=1,
        min_frames=1,
    )
    scene = dataclasses.replace(bare, objects=objects)
    assert not dropped
    assert (scene.clip_id, scene.source_id, scene.image_size) == (truth.clip_id, truth.source_id, truth.image_size)
    assert scene.scale == "assumed_baseline" and truth.scale == "metric"
    np.testing.assert_allclose(scene.world_to_camera, truth.world_to_camera, atol=1e-9)
    np.testing.assert_allclose(scene.camera_to_world, truth.camera_to_world, atol=1e-9)
    np.testing.assert_allclose(scene.intrinsics, truth.intrinsics, rtol=1e-12)
    np.testing.assert_allclose(scene.timestamps, truth.timestamps, atol=1e-9)
    assert [(o.object_id, o.description, o.category) for o in scene.objects] == [
        (o.object_id, o.description, o.category) for o in truth.objects
    ]
    for got, want in zip(scene.objects, truth.objects, strict=True):
        np.testing.assert_array_equal(got.masks, want.masks)
        np.testing.assert_array_equal(got.seen(), want.seen())
        np.testing.assert_allclose(got.points, want.points, atol=1e-5)


def test_the_videos_are_the_rendered_frames(tmp_path, clip):
    write_clip(clip, tmp_path)
    left, right = (tmp_path / f"{clip.scene.clip_id}-{eye}_rectified.mp4" for eye in ("left", "right"))
    everything = SampleRule("uniform", CONFIG.frames, None)
    for path, frames in ((left, clip.left), (right, clip.right)):
        read = read_video(str(path), everything)
        assert read.source_fps == pytest.approx(CONFIG.fps)
        np.testing.assert_array_equal(read.frames, frames)
    write_clip(clip, tmp_path / "lossy", codec="mpeg4")
    small = tmp_path / "lossy" / left.name
    difference = read_video(str(small), everything).frames.astype(float) - clip.left
    assert 0 < np.abs(difference).mean() < 12
    assert small.stat().st_size < left.stat().st_size


def test_frames_may_be_a_folder(tmp_path, pool, clip):
    for t, frame in enumerate(clip.left):
        cv2.imwrite(str(tmp_path / f"frame_{t}.png"), frame[..., ::-1])
    (tmp_path / "notes.txt").write_text("not a frame")
    assert probe_frames(tmp_path, 6, pool) == ((96, 128), None)
    with pytest.raises(SceneError, match="6 frames, its annotations 7"):
        probe_frames(tmp_path, 7, pool)
    with pytest.raises(SceneError, match="does not exist"):
        probe_frames(tmp_path / "gone.mp4", 6, pool)


def test_intrinsics_of_the_released_frames():
    np.testing.assert_allclose(
        intrinsics_of((512, 512), 60.0), [[443.405, 0, 256], [0, 443.405, 256], [0, 0, 1]], atol=1e-3
    )


def test_ragged_tracks_by_hand(tmp_path, clip):
    arrays = stereo4d_arrays(clip) | {
        "track_lengths": np.array([2, 0, 1]),
        "track_indices": np.array([4, 1, 5]),
        "track_coordinates": np.arange(9.0).reshape(3, 3),
    }
    tracks = read_stereo4d(write_npz(tmp_path / "a.npz", arrays)).tracks
    assert tracks.shape == (3, 6, 3)
    expected = np.full((3, 6, 3), np.nan)
    expected[0, 4], expected[0, 1], expected[2, 5] = [0, 1, 2], [3, 4, 5], [6, 7, 8]
    np.testing.assert_array_equal(tracks, expected)


def test_float32_and_bytes_as_released(tmp_path, clip):
    arrays = stereo4d_arrays(clip)
    arrays["camera2world"] = arrays["camera2world"].astype(np.float32)
    arrays["name"], arrays["video_id"] = np.array(b"abc_1"), np.array(["abc"])
    read = read_stereo4d(write_npz(tmp_path / "a.npz", arrays))
    assert (read.name, read.video_id) == ("abc_1", "abc")
    scene = read.scene((96, 128), "assumed_baseline")
    np.testing.assert_allclose(scene.camera_to_world, clip.scene.camera_to_world, atol=2e-6)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("timestamps", None, "no timestamps"),
        ("timestamps", np.zeros(6), "must increase"),
        ("timestamps", np.zeros(0), "0 frames"),
        ("timestamps", np.array(["a"] * 6), "timestamps is <U1"),
        ("camera2world", np.zeros((5, 3, 4)), r"camera2world is float64\[5, 3, 4\]"),
        ("camera2world", np.zeros((6, 3, 4)), "no rigid motion"),
        ("camera2world", np.full((6, 3, 4), np.nan), "camera2world holds NaN"),
        ("rectified2rig", np.ones((2, 3, 3)), "two rotations"),
        ("fov_bounds", np.ones(3), "fov_bounds"),
        ("name", np.array(3), "name is int64"),
        ("name", np.array("  "), "name must have"),
        ("name", np.array(b"\xff\xfe"), "name is not text"),
        ("track_lengths", np.array([7]), "track_lengths must be within"),
        ("track_lengths", np.array([-1]), "track_lengths must be within"),
        ("track_lengths", np.array([1.0]), "track_lengths is float64"),
        ("track_lengths", np.array([3]), "add up to 3"),
        ("track_coordinates", np.zeros((2, 2)), "track_coordinates"),
        ("track_indices", np.full(2, 6), "track_indices must be within"),
        ("track_indices", np.zeros(2, int), "twice within one track"),
        ("track_coordinates", np.full((2, 3), np.inf), "track_coordinates holds NaN"),
    ],
)
def test_errors_name_file_and_key(tmp_path, clip, key, value, message):
    arrays = stereo4d_arrays(clip) | {
        "track_lengths": np.array([2]),
        "track_indices": np.array([0, 1]),
        "track_coordinates": np.zeros((2, 3)),
    }
    read_stereo4d(write_npz(tmp_path / "good.npz", arrays))
    arrays[key] = value
    if value is None:
        del arrays[key]
    with pytest.raises(SceneError, match=message) as caught:
        read_stereo4d(write_npz(tmp_path / "bad.npz", arrays))
    assert "bad.npz" in str(caught.value)


def test_objects_in_the_file_are_refused(tmp_path, clip):
    path = tmp_path / "pickled.npz"
    np.savez(path, **(stereo4d_arrays(clip) | {"name": np.array({"a": 1}, dtype=object)}))
    with pytest.raises(SceneError, match="name"):
        read_stereo4d(path)


def test_absurd_sizes_are_refused_before_allocation(tmp_path, clip):
    arrays = stereo4d_arrays(clip)
    # Ten million empty tracks: 80 MB of lengths that deflate to nothing, and 1.4 GB of dense tracks per ten frames.
    arrays["timestamps"] = np.arange(10_000) + 1
    arrays["camera2world"] = np.repeat(arrays["camera2world"][:1], 10_000, axis=0)
    arrays |= {"track_lengths": np.zeros(100_000, np.int8), "track_indices": np.zeros(0, np.int64)}
    arrays["track_coordinates"] = np.zeros((0, 3), np.float32)
    path = tmp_path / "wide.npz"
    np.savez_compressed(path, **arrays)
    tracemalloc.start()
    with pytest.raises(SceneError, match="100000 tracks over 10000 frames"):
        read_stereo4d(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("timestamps.npy", header.getvalue())
    with pytest.raises(SceneError, match="timestamps"):
        read_stereo4d(path)


FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
numbers = st.sampled_from([0, 1, -1, 2, 6, 2**31, 2**62, -(2**63)]) | st.integers(-10, 10)
shapes = st.lists(st.integers(0, 7), max_size=3)
keys = st.sampled_from(sorted(["name", "timestamps", "camera2world", "fov_bounds", "rectified2rig"]))
track_keys = st.sampled_from(["track_lengths", "track_indices", "track_coordinates"])
dtypes = st.sampled_from(["i1", "u8", "i8", "f2", "f8", "c16", "b1", "S3", "U2", "M8[s]", "V4"])


@FUZZ
@given(key=keys | track_keys, shape=shapes, dtype=dtypes, value=numbers)
def test_any_array_in_place_of_any_key(tmp_path, clip, key, shape, dtype, value):
    with np.errstate(all="ignore"):
        array = np.full(shape, value, object if dtype[0] not in "fiuc" else "f8")
        array = np.zeros(shape, dtype) if dtype[0] not in "fiuc" else array.astype(dtype)
    path = write_npz(tmp_path / "fuzz.npz", stereo4d_arrays(clip) | {key: array})
    try:
        read_stereo4d(path).scene((96, 128), "metric")
    except SceneError as error:
        # A wrong number of timestamps shows as poses that do not fit it.
        assert "fuzz.npz" in str(error) and (key in str(error) or key.startswith(("track", "timestamps")))


@FUZZ
@given(cut=st.integers(0, 20_000), flips=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 255)), max_size=4))
def test_damaged_bytes(tmp_path, clip, cut, flips):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **stereo4d_arrays(clip))
    data = bytearray(buffer.getvalue())
    for position, bits in flips:
        data[position % len(data)] ^= bits
    path = tmp_path / "damaged.npz"
    path.write_bytes(data[: len(data) - cut % len(data)] if cut % 2 else data)
    try:
        read_stereo4d(path)
    except SceneError as error:
        assert "damaged.npz" in str(error)
