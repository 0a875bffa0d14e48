"""SpatialTrackerV2 + MoGe-2 files written from a synthetic clip in another unit come back as the clip in metres."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.scenes.objects import Caption, objects_from_tracks
from data_prep.sources.monocular import metric_scale, monocular_scene, read_moge, read_spatialtracker
from data_prep.store.untrusted import SceneError
from data_prep.synthetic.clip import SyntheticClip, make_clip
from data_prep.synthetic.worlds import SyntheticConfig

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
