"""Annotations of Segment Anything Video: the masks of the frames they are of, and nothing said of the others."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.scenes.objects import Caption, objects_from_tracks, read_masks
from data_prep.store.untrusted import SceneError
from tests.data_prep.scenes.test_objects import compress, make_scene, world_points

SIZE = (48, 64)


def column_runs(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask, pixel by pixel down its columns, zeros first."""
    runs, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def sav_document(masks: dict[int, np.ndarray], step: int = 4) -> dict:
    """The fields of `sav_000001_manual.json` for bool[T, H, W] masks; every `step`-th frame is annotated."""
    frames = len(next(iter(masks.values())))
    rles = [
        [{"size": list(m.shape[1:]), "counts": compress(column_runs(m[t]))} for m in masks.values()]
        for t in range(0, frames, step)
    ]
    return {
        "video_id": "sav_000001",
        "video_frame_count": float(frames),
        "video_height": float(SIZE[0]),
        "video_width": float(SIZE[1]),
        "masklet": rles,
        "masklet_id": list(masks),
        "masklet_frame_count": [len(rles)] * len(masks),
        "masklet_type": ["manual"] * len(masks),
        "masklet_num": len(masks),
    }


def moving(frames: int) -> dict[int, np.ndarray]:
    """Two objects; the second is out of view from the sixth frame on."""
    masks = {7: np.zeros((frames, *SIZE), bool), 2: np.zeros((frames, *SIZE), bool)}
    for t in range(frames):
        masks[7][t, 8:14, 8 + t : 16 + t] = True
        masks[2][t, 30:36, 40:50] = t < 6
    return masks


@pytest.mark.parametrize(("frames", "step"), [(9, 4), (8, 4), (10, 4), (5, 1), (1, 1), (4, 4)])
def test_masks_of_annotated_frames_and_none_between(tmp_path, frames, step):
    masks = moving(frames)
    path = tmp_path / "v_manual.json"
    path.write_text(json.dumps(sav_document(masks, step)))
    read = read_masks(path, frames, SIZE)
    known = np.arange(frames) % step == 0
    np.testing.assert_array_equal(read.annotated, known)
    assert list(read) == ["7", "2"]  # in the order of the file
    for name, mask in masks.items():
        np.testing.assert_array_equal(read[str(name)], mask & known[:, None, None])


def test_other_mask_files_are_of_every_frame(tmp_path):
    np.savez(tmp_path / "m.npz", a=np.zeros((3, *SIZE), bool))
    (tmp_path / "m.json").write_text(json.dumps({"masklet": [None] * 3}))  # an object of that name
    for name in ("m.npz", "m.json"):
        read = read_masks(tmp_path / name, 3, SIZE)
        assert read.annotated.all() and len(read) == 1 and not next(iter(read.values())).any()


def test_a_track_is_judged_by_the_annotated_frames_alone(tmp_path):
    frames = 9
    scene = make_scene(frames)
    tracks = np.concatenate([world_points(scene, [(12.5 + n, 10.5)]) for n in range(5)])
    for t in range(frames):  # they move with their mask
        moved = world_points(scene, [(9.5 + n + t, 10.5) for n in range(5)])
        tracks[:, t] = moved[:, t]
    path = tmp_path / "v_manual.json"
    path.write_text(json.dumps(sav_document(moving(frames))))
    read = read_masks(path, frames, scene.image_size)
    captions = {"7": Caption("the dog"), "2": Caption("the cat")}
    objects, dropped = objects_from_tracks(scene, tracks, read, captions, annotated=read.annotated)
    assert [o.object_id for o in objects] == ["7"] and dropped["2"].startswith("no tracked points")
    seen = np.zeros((frames, 5), bool)
    seen[::4] = True
    np.testing.assert_array_equal(objects[0].seen(), seen)
    # Taken for masks of every frame, the same file would say that the tracks left the object most of the time.
    assert not objects_from_tracks(scene, tracks, read, captions)[0]


def good() -> dict:
    return sav_document(moving(9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masklet": good()["masklet"][:2]}, "masklet has 2 annotated frames; a clip of 9 frames has 9, or 3"),
        ({"masklet": []}, "has 0 annotated frames"),
        ({"masklet": None}, "masklet must be a list"),
        ({"masklet": [[], [], []]}, r"masklet\[0\] must list one RLE for each of 2 objects"),
        ({"masklet": [{}, {}, {}]}, r"masklet\[0\] must list"),
        ({"masklet": [[3, None]] * 3}, "'7', frame 0: expected"),
        ({"masklet": [[{"size": [4, 4], "counts": [16]}] * 2] * 3}, r"frame 0: size is \[4, 4\]"),
        ({"masklet": [[{"size": list(SIZE), "counts": "P`]<"}] * 2] * 3}, "'7', frame 0"),
        ({"masklet_id": [1]}, "for each of 1 objects"),
        ({"masklet_id": [1, 1]}, "whole numbers that differ"),
        ({"masklet_id": [1.0, 2.0]}, "whole numbers that differ"),
        ({"masklet_id": [True, 2]}, "whole numbers that differ"),
        ({"masklet_id": "12"}, "whole numbers that differ"),
        ({"masklet_id": list(range(10**6))}, "for each of 1000000 objects"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    path = tmp_path / "v_auto.json"
    path.write_text(json.dumps(good() | change))
    with pytest.raises(SceneError, match=message) as caught:
        read_masks(path, 9, SIZE)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


json_values = st.recursive(
    st.none() | st.integers(-3, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=json_values, masklet=json_values)
def test_anything_in_its_place_is_masks_or_a_clear_error(tmp_path, ids, masklet):
    path = tmp_path / "fuzz_manual.json"
    path.write_text(json.dumps({"masklet_id": ids, "masklet": masklet}))
    try:
        read_masks(path, 2, (4, 4))
    except SceneError as error:
        assert "fuzz_manual.json" in str(error)
