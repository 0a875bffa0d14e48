"""Each source on clips whose truth is known; damaged files give a clear error and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.questions.propose import frame_numbers
from data_prep.sources.base import read_card
from data_prep.sources.frames import read_all_frames, write_video, written_times
from data_prep.sources.monocular import MonocularSource
from data_prep.sources.stereo import StereoSource
from data_prep.sources.stereo4d import Stereo4DSource, SyntheticSource
from data_prep.stereo.quality import QualityLimits
from data_prep.store.export import check_result
from data_prep.store.parts import ClipRejected, ClipResult
from data_prep.store.untrusted import SceneError
from data_prep.synthetic.clip import make_clip, stereo4d_arrays, write_clip
from data_prep.synthetic.worlds import SyntheticConfig
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule

SIZE = 256


@pytest.fixture(scope="module")
def pool():
    with DecodePool(20.0) as made:
        yield made


@pytest.fixture(scope="module")
def clip():
    config = SyntheticConfig(height=SIZE, width=SIZE, frames=6, stereo=True, camera_still=0.0, object_still=0.0)
    return make_clip(5, 3, config)


@pytest.fixture
def folder(tmp_path, clip):
    write_clip(clip, tmp_path / "in")
    for name in ("-truth", ".npz"):  # the stereo source is to find these by itself
        path = tmp_path / "in" / f"{clip.scene.clip_id}{name}"
        path.rename(tmp_path / f"kept{name}")
    return tmp_path / "in"


def write_card(folder, clip_id, **fields):
    (folder / f"{clip_id}-clip.json").write_text(json.dumps(fields))


def check_like_truth(found, clip):
    """Camera path within 2 % of its length; objects where they are, but for which part of them was followed.

    How exact the stage is at its working size is measured by benchmarks/stereo_accuracy.py; here a wrong eye, scale,
    axis or order of frames must show.
    """
    pose = clip.scene.world_to_camera[0]

    def first_camera(points):
        return points @ pose[:, :3].T + pose[:, 3]

    centers = first_camera(clip.scene.camera_centers)
    length = np.linalg.norm(np.diff(centers, axis=0), axis=1).sum()
    assert np.abs(found.camera_centers - centers).max() <= 0.02 * length
    errors = []
    for obj in found.objects:
        true = first_camera(clip.scene.object(obj.object_id).points)
        frames = np.isfinite(obj.points[..., 0]).sum(1).clip(max=np.isfinite(true[..., 0]).sum(1)) >= 8
        middle = [np.nanmean(points[frames], axis=1) for points in (obj.points, true)]
        errors += np.linalg.norm(middle[0] - middle[1], axis=1).tolist()
    assert len(errors) >= 4 and max(errors) < 0.3


def test_a_stereo_pair_alone_gives_the_scene_and_it_is_kept(folder, tmp_path, clip, pool, monkeypatch):
    clip_id = clip.scene.clip_id
    write_card(folder, clip_id, source_id="trip", baseline=clip.baseline)
    source = StereoSource(folder, folder, tmp_path / "scenes", pool=pool)
    assert source.clip_ids() == [clip_id]
    made = source.load(clip_id)
    assert made.scene.source_id == "trip" and made.scene.scale == "metric"
    assert made.video == folder / f"{clip_id}-left_rectified.mp4"
    check_like_truth(made.scene, clip)
    monkeypatch.setattr("data_prep.sources.stereo.reconstruct_clip", None)  # a second time it is read back
    np.testing.assert_array_equal(source.load(clip_id).scene.camera_centers, made.scene.camera_centers)


@pytest.mark.parametrize("left", [(), ("scene.json",), ("scene.npz",)])
def test_a_scene_whose_saving_was_cut_off_is_made_again(folder, tmp_path, clip, pool, left):
    clip_id = clip.scene.clip_id
    write_card(folder, clip_id, baseline=clip.baseline)
    source = StereoSource(folder, folder, tmp_path / "scenes", pool=pool)
    made = source.load(clip_id).scene
    for name in {"scene.json", "scene.npz"} - set(left):
        (tmp_path / "scenes" / clip_id / name).unlink()
    np.testing.assert_array_equal(source.load(clip_id).scene.camera_centers, made.camera_centers)
    assert len(list((tmp_path / "scenes" / clip_id).iterdir())) == 2


def test_of_a_clip_without_masks_and_captions_the_camera_is_asked_about(folder, tmp_path, clip, pool):
    stem = clip.scene.clip_id
    write_card(folder, stem, baseline=clip.baseline)
    masks, captions = (folder / f"{stem}{ending}" for ending in ("-masks.npz", "-captions.json"))
    masks.unlink()
    source = StereoSource(folder, folder, tmp_path / "scenes", pool=pool)
    with pytest.raises(ClipRejected, match="-masks.npz") as caught:  # of both one: something went wrong
        source.load(stem)
    assert caught.value.reason == "missing_file" and caught.value.again
    captions.unlink()
    for _ in range(2):  # reconstructed, and kept
        made = source.load(stem)
        assert not made.scene.objects and [entry["reason"] for entry in made.left_out] == ["no_objects"]
    check_result(ClipResult(stem, stem, "", (), made.left_out))
    (tmp_path / "kept.npz").rename(folder / f"{stem}.npz")
    made = Stereo4DSource(folder, folder, pool=pool).load(stem)
    assert not made.scene.objects and [entry["reason"] for entry in made.left_out] == ["no_objects"]


def test_a_caption_without_masks_is_listed(folder, tmp_path, clip, pool):
    stem = clip.scene.clip_id
    said = json.loads((folder / f"{stem}-captions.json").read_text())
    (folder / f"{stem}-captions.json").write_text(json.dumps(said | {"ghost": "the pale ghost"}))
    made = StereoSource(folder, folder, tmp_path / "scenes", pool=pool).load(stem)
    (lost,) = (entry for entry in made.left_out if entry["object_id"] == "ghost")
    assert "no masks" in lost["detail"] and lost["caption"] == "the pale ghost"


def test_two_files_that_are_called_the_same_inside_are_two_clips(tmp_path, clip, pool):
    write_clip(clip, tmp_path)
    stem = clip.scene.clip_id
    for path in [path for path in tmp_path.iterdir() if path.is_file()]:
        shutil.copyfile(path, tmp_path / path.name.replace(stem, "copy"))
    source = Stereo4DSource(tmp_path, tmp_path, pool=pool)
    assert source.clip_ids() == sorted(["copy", stem])
    assert [source.load(name).scene.clip_id for name in source.clip_ids()] == source.clip_ids()


def test_a_written_video_shows_its_frames_when_it_is_said_to(tmp_path, pool):
    rng = np.random.default_rng(3)
    frames = np.zeros((12, 16, 16, 3), np.uint8)
    for n in range(20):
        times = 5.0 + np.cumsum(rng.uniform(0.01, 0.2, len(frames))) * (1 if n else 1e3)
        write_video(tmp_path / "a.mp4", frames, times, "mpeg4")
        np.testing.assert_array_equal(pool.probe(str(tmp_path / "a.mp4")).times, written_times(times))


@pytest.mark.parametrize(("layout", "axis", "swap"), [("right_left", 2, True), ("top_bottom", 1, False)])
def test_a_packed_video_is_split_and_its_left_view_written(folder, tmp_path, clip, pool, layout, axis, swap):
    packed = tmp_path / "packed"
    packed.mkdir()
    stem = clip.scene.clip_id
    views = [clip.right, clip.left] if swap else [clip.left, clip.right]
    times = np.array([0.0, 0.1, 0.15, 0.9, 1.0, 1.2])
    write_video(packed / f"{stem}.mp4", np.concatenate(views, axis=axis), times, "ffv1")
    for ending in ("-masks.npz", "-captions.json"):
        (folder / f"{stem}{ending}").rename(packed / f"{stem}{ending}")
    source = StereoSource(packed, tmp_path / "videos", tmp_path / "scenes", layout=layout, pool=pool)
    assert source.clip_ids() == [stem]
    made = source.load(stem)
    assert made.scene.scale == "assumed_baseline"  # nobody said how far apart the eyes are
    check_like_truth(made.scene, clip)
    written = read_all_frames(made.video, pool, 10)
    assert written.frames.shape == clip.left.shape
    np.testing.assert_allclose(written.times, times, atol=1e-4)
    np.testing.assert_allclose(made.scene.timestamps, times, atol=1e-4)


@pytest.fixture
def squeezed(folder, tmp_path, clip):
    """The clip as a half-width side-by-side video: each view pressed to half its width."""
    packed, stem = tmp_path / "squeezed", clip.scene.clip_id
    packed.mkdir()
    half = [np.stack([cv2.resize(f, (SIZE // 2, SIZE), interpolation=cv2.INTER_AREA) for f in view])
            for view in (clip.left, clip.right)]  # fmt: skip
    write_video(packed / f"{stem}.mp4", np.concatenate(half, axis=2), clip.scene.timestamps, "ffv1")
    masks = {o.object_id: o.masks[:, :, ::2] for o in clip.scene.objects}
    np.savez(packed / f"{stem}-masks.npz", **masks)
    (folder / f"{stem}-captions.json").rename(packed / f"{stem}-captions.json")
    return packed


def test_views_that_may_be_squeezed_are_asked_about(squeezed, tmp_path, clip, pool):
    stem = clip.scene.clip_id
    source = StereoSource(squeezed, tmp_path / "videos", tmp_path / "scenes", layout="left_right", pool=pool)
    with pytest.raises(ClipRejected, match=f'"squeezed": true or false into {stem}-clip.json') as caught:
        source.load(stem)
    assert caught.value.reason == "squeezed_views"
    write_card(squeezed, stem, squeezed=True, baseline=clip.baseline)
    made = source.load(stem)
    check_like_truth(made.scene, clip)
    assert made.scene.intrinsics[0, 1, 1] == 2 * made.scene.intrinsics[0, 0, 0]


def test_eyes_at_different_rates_are_refused(folder, tmp_path, clip, pool):
    stem = clip.scene.clip_id
    right = folder / f"{stem}-right_rectified.mp4"
    write_video(right, clip.right, np.arange(6) * 1.2 * np.diff(clip.scene.timestamps)[0], "mpeg4")
    with pytest.raises(ClipRejected, match="frame 5 is at .* same frame rate and start") as caught:
        StereoSource(folder, folder, tmp_path / "scenes", pool=pool).load(stem)
    assert caught.value.reason == "eyes_out_of_step"
    write_video(right, clip.right[:4], clip.scene.timestamps[:4], "mpeg4")
    with pytest.raises(SceneError, match="both eyes need the same size, frame rate and length"):
        StereoSource(folder, folder, tmp_path / "scenes", pool=pool).load(stem)


def test_questions_count_the_frames_that_a_model_is_shown_of_an_uneven_video(tmp_path, clip, pool):
    """The annotations tell other times than the video does; the model sees the video."""
    write_clip(clip, tmp_path)
    stem = clip.scene.clip_id
    write_video(tmp_path / f"{stem}-left_rectified.mp4", clip.left, np.array([0.0, 0.1, 0.2, 0.3, 0.4, 4.0]), "mpeg4")
    made = Stereo4DSource(tmp_path, tmp_path, pool=pool).load(stem)
    seen = pool.read(str(made.video), SampleRule("uniform", 3, None)).indices
    np.testing.assert_array_equal(frame_numbers(made.scene.timestamps, 3), seen)
    assert seen.tolist() != [0, 2, 5]


def test_only_frames_that_questions_can_be_about_get_points(folder, tmp_path, clip, pool):
    write_card(folder, clip.scene.clip_id, baseline=clip.baseline)
    counts = []
    for min_gap in (0.0, 0.99):
        source = StereoSource(folder, folder, tmp_path / f"scenes{min_gap}", num_frames=6, min_gap=min_gap, pool=pool)
        made = source.load(clip.scene.clip_id).scene
        placed = [frame for frame in range(made.num_frames) if any(o.seen()[frame].any() for o in made.objects)]
        assert {0, 5} <= set(placed)
        counts.append(len(placed))
    assert counts[0] == 6 > counts[1]  # keyframes of the camera's path have some, too


def test_bootstap_tracks_replace_the_stages_own(folder, tmp_path, clip, pool):
    stem, scene = clip.scene.clip_id, clip.scene
    points = np.concatenate([o.points for o in scene.objects], axis=1)  # T, M, 3
    local = np.einsum("tij,tmj->tmi", scene.world_to_camera[:, :, :3], points) + scene.world_to_camera[:, None, :, 3]
    pixels = np.einsum("ij,tmj->tmi", scene.intrinsics[0], local / local[..., 2:])[..., :2].swapaxes(0, 1)
    visible = np.isfinite(pixels[..., 0])
    tracks = np.where(visible[..., None], pixels, 0)
    np.savez(folder / f"{stem}-bootstap.npz", tracks=tracks.astype(np.float32), visibles=visible)
    write_card(folder, stem, baseline=clip.baseline)
    made = StereoSource(folder, folder, tmp_path / "scenes", pool=pool).load(stem).scene
    assert made.provenance["tracks"] == f"{stem}-bootstap.npz"
    check_like_truth(made, clip)


def test_a_clip_below_the_limits_or_without_its_files_is_rejected(folder, tmp_path, clip, pool):
    stem = clip.scene.clip_id
    strict = dataclasses.replace(QualityLimits(), min_valid_disparity=0.9999)
    source = StereoSource(folder, folder, tmp_path / "scenes", limits=strict, pool=pool)
    with pytest.raises(ClipRejected) as caught:
        source.load(stem)
    assert caught.value.reason != "missing_file" and not list((tmp_path / "scenes").glob("*"))
    (folder / f"{stem}-right_rectified.mp4").unlink()
    with pytest.raises(ClipRejected, match="-right.mp4 or"):
        source.load(stem)


def test_too_long_or_unequal_views_are_errors(folder, tmp_path, clip, pool):
    stem = clip.scene.clip_id
    with pytest.raises(SceneError, match="6 frames, more than 5"):
        StereoSource(folder, folder, tmp_path / "s", max_frames=5, pool=pool).load(stem)
    write_video(folder / f"{stem}-right_rectified.mp4", clip.right[:5], np.arange(5) / clip.fps, "ffv1")
    with pytest.raises(SceneError, match="right_rectified.mp4"):
        StereoSource(folder, folder, tmp_path / "s", pool=pool).load(stem)


def test_monocular_files_give_the_scene(tmp_path, clip, pool):
    stem, scene = "walk", clip.scene
    write_clip(clip, tmp_path)
    for ending in ("-masks.npz", "-captions.json"):
        (tmp_path / f"{scene.clip_id}{ending}").rename(tmp_path / f"{stem}{ending}")
    (tmp_path / f"{scene.clip_id}-left_rectified.mp4").rename(tmp_path / f"{stem}.mp4")
    arrays = stereo4d_arrays(clip)
    tracks = np.full((len(arrays["track_lengths"]), scene.num_frames, 3), np.nan)
    owner = np.repeat(np.arange(len(tracks)), arrays["track_lengths"])
    tracks[owner, arrays["track_indices"]] = arrays["track_coordinates"]
    visible = np.isfinite(tracks[..., 0])
    extrinsics = np.tile(np.eye(4), (scene.num_frames, 1, 1))
    extrinsics[:, :3] = scene.world_to_camera
    extrinsics[:, :3, 3] /= 3.0  # the tracker's unit is three metres
    np.savez(
        tmp_path / f"{stem}-spatialtracker.npz",
        coords=np.where(visible[..., None], tracks / 3.0, 0).swapaxes(0, 1),
        extrinsics=extrinsics,
        intrinsics=scene.intrinsics,
        visibs=visible.swapaxes(0, 1),
    )
    moge = tmp_path / f"{stem}-moge"
    moge.mkdir()
    k = scene.intrinsics[0] / np.array([[SIZE], [SIZE], [1.0]])
    for frame in (0, 5):
        depth = clip.depth[frame]
        np.savez(moge / f"{frame:06d}.npz", depth=depth, mask=np.ones(depth.shape, bool), intrinsics=k)
    source = MonocularSource(tmp_path, pool=pool)
    assert source.clip_ids() == [stem]
    made = source.load(stem)
    assert made.scene.scale == "metric" and made.video == tmp_path / "walk.mp4"
    np.testing.assert_allclose(made.scene.camera_centers, scene.camera_centers, rtol=0.02, atol=0.01)
    assert {o.object_id for o in made.scene.objects} <= {o.object_id for o in scene.objects} and made.scene.objects
    write_card(tmp_path, stem, frame_size=[SIZE // 2, SIZE // 2])
    with pytest.raises(SceneError, match="not near the middle of a 128 x 128 frame"):
        source.load(stem)
    (moge / "first.npz").write_bytes(b"")
    write_card(tmp_path, stem)
    with pytest.raises(SceneError, match="named by their frame's number"):
        source.load(stem)


def test_stereo4d_frames_as_images_become_a_video(folder, tmp_path, clip, pool):
    import cv2

    stem = clip.scene.clip_id
    (tmp_path / "kept.npz").rename(folder / f"{stem}.npz")
    (folder / f"{stem}-left_rectified.mp4").unlink()
    images = folder / f"{stem}-left_rectified"
    images.mkdir()
    for n, frame in enumerate(clip.left):
        cv2.imwrite(str(images / f"{n:05d}.png"), frame[..., ::-1])
    made = Stereo4DSource(folder, tmp_path / "videos").load(stem)
    seen = read_all_frames(made.video, pool, 10)
    assert seen.frames.shape == clip.left.shape and seen.source_fps == pytest.approx(clip.fps)
    assert np.abs(seen.frames.astype(int) - clip.left).mean() < 6  # mpeg4 is lossy
    with pytest.raises(SceneError, match="stereo4d.frames=images"):
        Stereo4DSource(folder, folder).load(stem)


def test_synthetic_clips_are_the_same_every_time(tmp_path):
    config = SyntheticConfig(frames=4)
    first, second = (SyntheticSource(tmp_path / n, config, 7, 2) for n in "ab")
    assert first.clip_ids() == ["synthetic-7-000000", "synthetic-7-000001"]
    made, again = (source.load("synthetic-7-000001") for source in (first, second))
    assert made.video.read_bytes() == again.video.read_bytes()
    np.testing.assert_array_equal(made.scene.camera_centers, again.scene.camera_centers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "JSON"),
        ('{"fov": 60}', "unknown field 'fov'"),
        ('{"source_id": ""}', "source_id"),
        ('{"fov_degrees": "60"}', "fov_degrees"),
        ('{"baseline": -1}', "baseline"),
        ('{"frame_size": [1.5, 2]}', "frame_size"),
        ('{"intrinsics": [[1, 0], [0, 1]]}', "intrinsics"),
        ('{"intrinsics": [[0, 0, 1], [0, 1, 1], [0, 0, 1]]}', "intrinsics"),
    ],
)
def test_a_bad_card_is_named(tmp_path, text, message):
    path = tmp_path / "a-clip.json"
    path.write_text(text)
    with pytest.raises(SceneError, match=message) as caught:
        read_card(path, "a")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ['{"source_id": "\\ud83d"}', '{"\\uDE00": 1}'])
def test_half_a_surrogate_pair_is_refused_where_it_is_read(tmp_path, text):
    path = tmp_path / "a-clip.json"
    path.write_text(text)
    with pytest.raises(SceneError, match="half a surrogate pair") as caught:
        read_card(path, "a")
    assert str(path) in str(caught.value)


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    path = tmp_path / "a-clip.json"
    path.write_text('{"source_id": "\\ud83d\\ude00"}')
    assert read_card(path, "a").source_id == "\U0001f600"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_video_gives_frames_or_a_clear_error(tmp_path, pool, data):
    whole = tmp_path / "whole.mp4"
    if not whole.exists():
        write_video(whole, np.arange(6 * 32 * 32 * 3, dtype=np.uint8).reshape(6, 32, 32, 3), np.arange(6) / 8, "mpeg4")
    content = bytearray(whole.read_bytes())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=12)):
        content[at] = value
    path = tmp_path / "damaged.mp4"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        clip = read_all_frames(path, pool, 50)
    except SceneError as error:
        assert str(path) in str(error)
    else:
        assert clip.frames.dtype == np.uint8 and len(clip.frames) <= 50
