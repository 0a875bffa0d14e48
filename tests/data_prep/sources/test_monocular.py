"""SpatialTrackerV2 + MoGe-2 files written from a synthetic clip in another unit come back as the clip in metres."""

from __future__ import annotations

import dataclasses
import json

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.scenes.objects import Caption, objects_from_tracks
from data_prep.sources.monocular import (
    MogeDepths,
    MonocularSource,
    metric_scale,
    monocular_scene,
    read_moge,
    read_spatialtracker,
)
from data_prep.store.parts import ClipRejected
from data_prep.store.untrusted import SceneError
from data_prep.synthetic.clip import SyntheticClip, make_clip, write_clip
from data_prep.synthetic.worlds import SyntheticConfig
from mllm4d_jax.media.decode_pool import DecodePool
from tests.data_prep.sources.test_exr import exr_bytes

UNIT = 2.5  # metres per unit of the tracker


@pytest.fixture(scope="module")
def clip() -> SyntheticClip:
    return make_clip(21, 0, SyntheticConfig(height=96, width=120, frames=5))


def tracker_arrays(clip: SyntheticClip) -> dict[str, np.ndarray]:
    scene = clip.scene
    tracks = np.concatenate([clip.background, *(o.points.swapaxes(0, 1) for o in scene.objects)]).swapaxes(0, 1)
    extrinsics = np.tile(np.eye(4), (scene.num_frames, 1, 1))
    extrinsics[:, :3] = scene.world_to_camera
    extrinsics[:, :3, 3] /= UNIT
    visible = ~np.isnan(tracks[..., 0])
    return {
        "coords": np.where(visible[..., None], tracks / UNIT, 7.0).astype(np.float32),
        "extrinsics": extrinsics.astype(np.float32),
        "intrinsics": scene.intrinsics.astype(np.float32),
        "visibs": visible[..., None],
    }


def moge_arrays(clip: SyntheticClip, frame: int) -> dict[str, np.ndarray]:
    """Twice the size, as MoGe may be run on the full picture."""
    depth = cv2.resize(clip.depth[frame], (240, 192), interpolation=cv2.INTER_NEAREST)
    k = clip.scene.intrinsics[frame] / np.array([[120], [96], [1]])
    mask = np.ones(depth.shape, bool)
    mask[:20] = False
    return {"depth": np.where(mask, depth, np.inf), "mask": mask, "intrinsics": k}


def write_moge_folder(folder, arrays):
    """The files of MoGe's command line (moge/scripts/infer.py, --maps) but for the picture and the pretty ones."""
    folder.mkdir(parents=True)
    depth, k = arrays["depth"].astype(np.float32), arrays["intrinsics"]
    (folder / "depth.exr").write_bytes(exr_bytes({"Y": depth}))
    points = {name: depth * n for n, name in enumerate("BGR", 1)}
    (folder / "points.exr").write_bytes(exr_bytes(points))
    cv2.imwrite(str(folder / "mask.png"), (arrays["mask"] * 255).astype(np.uint8))
    fov = {f"fov_{a}": round(float(np.degrees(2 * np.arctan(0.5 / k[n, n]))), 2) for n, a in enumerate("xy")}
    (folder / "fov.json").write_text(json.dumps(fov))
    return folder


def write(path, arrays):
    np.savez(path, **arrays)
    return path


def test_a_clip_comes_back_in_metres(tmp_path, clip):
    spatial = read_spatialtracker(write(tmp_path / "s.npz", tracker_arrays(clip)))
    depths = {t: read_moge(write(tmp_path / f"m{t}.npz", moge_arrays(clip, t))) for t in (0, 4)}
    assert depths[0].shape == (192, 240) and np.isnan(depths[0][:20]).all()
    scale = metric_scale(spatial, depths, (96, 120))
    assert scale.factor == pytest.approx(UNIT, rel=0.01) and scale.spread < 0.05 and scale.points > 60
    common = {"clip_id": "c", "source_id": "s"}
    times = clip.scene.timestamps
    bare, tracks = monocular_scene(spatial, (96, 120), times, scale=scale, **common)
    assert bare.scale == "metric" and bare.provenance["quality"]["points"] == scale.points
    np.testing.assert_allclose(bare.camera_centers, clip.scene.camera_centers, rtol=0.02)
    masks = {o.object_id: o.masks for o in clip.scene.objects}
    captions = {o.object_id: Caption(o.description, o.category) for o in clip.scene.objects}
    objects, _ = objects_from_tracks(bare, tracks, masks, captions, min_points=1, min_frames=1)
    scene = dataclasses.replace(bare, objects=objects)
    assert len(scene.objects) == len(clip.scene.objects)
    for got, want in zip(scene.objects, clip.scene.objects, strict=True):
        # Rounding to float32 may move a point over the border of its mask.
        both = got.seen().sum() / want.seen().sum()
        assert both > 0.95
        centre = [np.nanmean(o.points, axis=(0, 1)) for o in (got, want)]
        np.testing.assert_allclose(*centre, rtol=0.03)


def test_with_a_doubtful_scale_metres_are_relative(tmp_path, clip):
    spatial = read_spatialtracker(write(tmp_path / "s.npz", tracker_arrays(clip)))
    common = {"clip_id": "c", "source_id": "s"}
    noisy = moge_arrays(clip, 0)
    noisy["depth"] = noisy["depth"] * np.random.default_rng(0).uniform(0.4, 1.6, noisy["depth"].shape)
    scale = metric_scale(spatial, {0: read_moge(write(tmp_path / "m.npz", noisy))}, (96, 120))
    assert scale.spread > 0.1
    scene, _ = monocular_scene(spatial, (96, 120), clip.scene.timestamps, scale=scale, **common)
    assert scene.scale == "relative"
    with pytest.raises(SceneError, match="0 points"):
        metric_scale(spatial, {}, (96, 120))
    with pytest.raises(SceneError, match="frame 9"):
        metric_scale(spatial, {9: read_moge(tmp_path / "m.npz")}, (96, 120))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("coords", None, "no 'coords'"),
        ("coords", np.zeros((4, 3, 3)), "coords is"),
        ("coords", np.full((5, 2, 3), np.nan), "visibs"),
        ("visibs", None, "visibs is"),
        ("visibs", np.full((5, 2), 1.5), "visibs"),
        ("extrinsics", np.zeros((5, 4, 4)), "extrinsics must"),
        ("extrinsics", np.tile(np.diag([1.0, 1, -1, 1]), (5, 1, 1)), "extrinsics"),
        ("intrinsics", np.full((5, 3, 3), np.inf), "intrinsics holds"),
    ],
)
def test_bad_tracker_files(tmp_path, clip, key, value, message):
    arrays = tracker_arrays(clip) | {key: value}
    if value is None:
        del arrays[key]
    with pytest.raises(SceneError, match=message) as caught:
        read_spatialtracker(write(tmp_path / "bad.npz", arrays))
    assert "bad.npz" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("depth", np.zeros((192, 240)), "above 0"),
        ("depth", np.ones((192, 240, 1)), "depth is"),
        ("mask", np.ones((3, 3), bool), "mask must"),
        ("intrinsics", np.diag([300.0, 300.0, 1]), "normalised"),
    ],
)
def test_bad_moge_files(tmp_path, clip, key, value, message):
    with pytest.raises(SceneError, match=message):
        read_moge(write(tmp_path / "bad.npz", moge_arrays(clip, 0) | {key: value}))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["coords", "visibs", "extrinsics", "intrinsics", "depth", "mask"]),
    shape=st.lists(st.integers(0, 6), max_size=3),
    dtype=st.sampled_from(["i1", "u8", "f2", "f8", "c16", "b1", "S3", "U2", "M8[s]"]),
)
def test_any_array_in_place_of_any_key(tmp_path, clip, key, shape, dtype):
    for read, arrays in ((read_spatialtracker, tracker_arrays(clip)), (read_moge, moge_arrays(clip, 0))):
        try:
            read(write(tmp_path / "fuzz.npz", arrays | {key: np.zeros(shape, dtype)}))
        except SceneError as error:
            assert "fuzz.npz" in str(error)


def test_what_moges_command_line_leaves_is_what_its_python_interface_returns(tmp_path, clip):
    arrays = moge_arrays(clip, 2)
    depth = read_moge(write_moge_folder(tmp_path / "a", arrays))
    np.testing.assert_array_equal(depth, read_moge(write(tmp_path / "a.npz", arrays)).astype(np.float32))
    assert np.isnan(depth[:20]).all() and np.isfinite(depth[20:]).all()
    (tmp_path / "a" / "fov.json").unlink()  # only checked
    np.testing.assert_array_equal(read_moge(tmp_path / "a"), depth)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("depth.exr", None, "has no depth.exr; run MoGe with --maps"),
        ("mask.png", None, "has no mask.png"),
        ("mask.png", b"", "mask.png"),
        ("mask.png", b"PNG?" * 9, "mask.png"),
        ("mask.png", cv2.imencode(".png", np.full((3, 3), 255, np.uint8))[1].tobytes(), "mask must be bool of depth's"),
        ("mask.png", cv2.imencode(".png", np.full((192, 240), 255, np.uint8))[1].tobytes(), "marked visible"),
        ("depth.exr", exr_bytes({"Y": np.zeros((192, 240), "f4")}), "above 0"),
        ("depth.exr", exr_bytes({"R": np.ones((192, 240), "f4"), "G": np.ones((192, 240), "f4")}), "channels G, R"),
        ("depth.exr", b"v/1\x01", "cut off"),
        ("fov.json", b'{"fov_x": 181}', "fov_x must be degrees"),
        ("fov.json", b'{"fov_y": "60"}', "fov_y must be degrees"),
        ("fov.json", b'{"fov_y": NaN}', "fov_y must be degrees"),
        ("fov.json", b"[60]", "JSON object"),
    ],
)
def test_bad_files_of_moges_command_line(tmp_path, clip, name, data, message):
    folder = write_moge_folder(tmp_path / "000000", moge_arrays(clip, 0))
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    with pytest.raises(SceneError, match=message) as caught:
        read_moge(folder)
    assert str(folder) in str(caught.value)


def test_pictures_are_found_by_the_one_number_in_their_names_and_read_one_at_a_time(tmp_path, clip, monkeypatch):
    for name in ("000000", "frame_0003"):
        write_moge_folder(tmp_path / name, moge_arrays(clip, 0))
    write(tmp_path / "4.npz", moge_arrays(clip, 4))
    (tmp_path / "notes.txt").write_text("5")
    read = []
    monkeypatch.setattr("data_prep.sources.monocular.read_moge", lambda path: read.append(path.name))
    depths = MogeDepths(tmp_path)
    assert list(depths) == [0, 3, 4] and len(depths) == 3 and not read
    for frame, _ in depths.items():
        assert len(read) == [0, 3, 4].index(frame) + 1
    (tmp_path / "4").mkdir()
    with pytest.raises(SceneError, match=r"/4 and .*/4\.npz are of the same frame"):
        MogeDepths(tmp_path)


@pytest.mark.parametrize("name", ["first", "000012_v2", "clip7_000012", "٣", "1" * 10])
def test_a_name_that_tells_no_frame_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(SceneError, match="named by their frame's number"):
        MogeDepths(tmp_path)


def test_a_folder_that_is_empty_or_a_file_holds_no_moge(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("file", "empty"):
        with pytest.raises(SceneError, match="holds no MoGe files"):
            MogeDepths(tmp_path / name)


def demo_clip(folder, clip, tracked, **more):
    """A clip as the tools' own programs leave it; the tracker was given frames of half the size."""
    write_clip(clip, folder, codec="mpeg4", truth=False)
    stem, half = clip.scene.clip_id, clip.depth[:, ::2, ::2].shape
    (folder / f"{stem}-left_rectified.mp4").rename(folder / f"{stem}.mov")
    masks = {o.object_id: o.masks[:, ::2, ::2] for o in clip.scene.objects}
    np.savez_compressed(folder / f"{stem}-masks.npz", **masks)
    arrays = tracker_arrays(clip)
    arrays["intrinsics"][:, :2] /= 2
    (folder / tracked).parent.mkdir(exist_ok=True)
    np.savez(folder / tracked.format(stem), **arrays, video=np.zeros((half[0], 3, *half[1:]), np.float32), **more)
    for frame in (0, 4):
        write_moge_folder(folder / f"{stem}-moge" / f"{frame:06d}", moge_arrays(clip, frame))
    return stem


@pytest.mark.parametrize("tracked", ["{}_result.npz", "results/{}_result.npz", "{}-spatialtracker.npz"])
def test_files_of_the_tools_own_programs_give_the_scene(tmp_path, clip, tracked):
    stem = demo_clip(tmp_path, clip, tracked)
    with DecodePool(20.0) as pool:
        source = MonocularSource(tmp_path, pool=pool)
        assert source.clip_ids() == [stem]
        made = source.load(stem)
        assert made.scene.image_size == (48, 60) and made.scene.scale == "metric" and made.video.suffix == ".mov"
        np.testing.assert_allclose(made.scene.camera_centers, clip.scene.camera_centers, rtol=0.02, atol=0.01)
        assert made.scene.objects
        (tmp_path / f"{stem}-clip.json").write_text(json.dumps({"frame_size": [96, 120]}))
        with pytest.raises(SceneError, match=r"frames of \[48, 60\], <clip>-clip.json says frame_size \[96, 120\]"):
            source.load(stem)
        if "result" in tracked:
            np.savez(tmp_path / f"{stem}-spatialtracker.npz", **tracker_arrays(clip))
            with pytest.raises(ClipRejected, match=r"spatialtracker.npz and .*_result.npz"):
                source.load(stem)


@pytest.mark.parametrize("shape", [(5, 48, 60), (4, 3, 48, 60), (5, 3, 0, 60), (5, 48, 60, 3)])
def test_frames_of_another_form_beside_the_tracks_are_refused(tmp_path, clip, shape):
    path = write(tmp_path / "a_result.npz", tracker_arrays(clip) | {"video": np.zeros(shape, np.float32)})
    with pytest.raises(SceneError, match=r"a_result.npz: video is"):
        read_spatialtracker(path)
