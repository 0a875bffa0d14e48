"""Where a clip's files may lie: found wherever that is, never guessed where two could be meant."""

from __future__ import annotations

import errno
import json
import os
import shutil

import numpy as np
import pytest

from data_prep.scenes.objects import encode_rle
from data_prep.sources.layout import LEFT, LEFT_EYE, VIDEOS, clip_groups, clip_stems, find
from data_prep.sources.stereo import StereoSource
from data_prep.sources.stereo4d import Stereo4DSource
from data_prep.store.parts import ClipRejected, StoreError
from data_prep.store.untrusted import SceneError
from data_prep.synthetic.clip import make_clip, write_clip
from data_prep.synthetic.worlds import SyntheticConfig
from data_prep.teacher.describe import DescribeError, find_pending
from mllm4d_jax.media.decode_pool import DecodePool


@pytest.fixture(scope="module")
def pool():
    with DecodePool(20.0) as made:
        yield made


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """One clip in one folder, and its id."""
    folder = tmp_path_factory.mktemp("flat")
    clip = make_clip(3, 0, SyntheticConfig(height=64, width=64, frames=4, object_points=200, stereo=True))
    write_clip(clip, folder, codec="mpeg4")
    return folder, clip.scene.clip_id


def place(flat, root, where):
    """Copies the clip's files below `root`, each into the folder that `where` says of its name."""
    folder, clip_id = flat
    for path in folder.iterdir():
        target = root / where(path.name)
        target.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target / path.name)
    return clip_id


LAYOUTS = {
    "flat": lambda clip: lambda name: "",
    "a folder per clip": lambda clip: lambda name: clip,
    "splits of such folders": lambda clip: lambda name: f"data/train/{clip}",
    "a folder per video": lambda clip: lambda name: clip.rpartition("_")[0],
    "as the authors' scripts": lambda clip: lambda name: "npz" if name == f"{clip}.npz" else f"processed/{clip}",
    "a folder per kind": lambda clip: lambda name: name.removeprefix(clip).strip("-").partition(".")[0] or "poses",
    "a name that begins alike": lambda clip: lambda name: clip[:3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_clip_is_the_same_wherever_its_files_lie(tmp_path, flat, pool, layout):
    clip_id = place(flat, tmp_path, LAYOUTS[layout](flat[1]))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / f"{clip_id}.npz").write_bytes(b"")  # hidden
    source = Stereo4DSource(tmp_path, tmp_path, pool=pool)
    assert source.clip_ids() == [clip_id]
    made, plain = source.load(clip_id), Stereo4DSource(flat[0], flat[0], pool=pool).load(clip_id)
    assert made.video.is_relative_to(tmp_path) and made.video.name == plain.video.name
    assert [o.object_id for o in made.scene.objects] == [o.object_id for o in plain.scene.objects] != []
    np.testing.assert_array_equal(made.scene.camera_to_world, plain.scene.camera_to_world)
    pairs = StereoSource(tmp_path, tmp_path, tmp_path / "out", pool=pool)
    assert pairs.clip_ids() == [clip_id]
    names = [path.name for path in find(tmp_path, clip_id, [LEFT, ("-captions.json",)], pairs.groups)]
    assert names == [f"{clip_id}-left_rectified.mp4", f"{clip_id}-captions.json"]


def test_the_folders_looked_into_do_not_grow_with_the_clips(tmp_path):
    for n in range(30):
        for folder in (
            f"npz/a_{n}.npz",
            f"done/a_{n}/a_{n}-left.mov",
            f"done/a_{n}/flow.pkl",
            f"video{n}/video{n}_7.npz",
        ):
            (tmp_path / folder).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder).write_bytes(b"")
    assert clip_groups(tmp_path, (".npz",)) == ("", "done", "npz")
    assert len(clip_stems(tmp_path, (".npz",))) == 60


def test_folders_of_images_hold_no_clips_and_a_folder_is_not_one_for_its_name(tmp_path):
    for name in ("pairs_left/a.npz", "b/b.npz", "b/b-left_rectified/0.png", "c_1/c_1-left/1.png", "c_1/c_1.npz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert clip_stems(tmp_path, (".npz",)) == ["a", "b", "c_1"]
    groups = clip_groups(tmp_path, (".npz",))
    assert groups == ("", "pairs_left")
    assert find(tmp_path, "c_1", [LEFT_EYE], groups) == [tmp_path / "c_1" / "c_1-left"]


def test_what_a_run_wrote_there_is_no_clip(tmp_path):
    written = ("scenes/a/scene.npz", "videos/a-left.mp4", "forms/a.mp4", "forms/a@mirrored.mp4")
    for name in ("run.json", *written, "a.npz", "a-truth/scene.npz", "a.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert clip_stems(tmp_path, (".npz",)) == ["a"] and clip_stems(tmp_path, VIDEOS) == ["a"]


@pytest.mark.parametrize("name", ["-left.mp4", "_left.mp4", "-left_rectified.mov", "_left_rectified.MP4", "-left.MOV"])
def test_names_of_a_left_view(tmp_path, flat, pool, name):
    clip_id = place(flat, tmp_path, lambda _: "")
    (tmp_path / f"{clip_id}-left_rectified.mp4").rename(tmp_path / f"{clip_id}{name}")
    (tmp_path / f"{clip_id}-right_rectified.mp4").rename(tmp_path / f"{clip_id}{name.replace('left', 'right')}")
    assert Stereo4DSource(tmp_path, tmp_path, pool=pool).load(clip_id).video.name == f"{clip_id}{name}"
    source = StereoSource(tmp_path, tmp_path, tmp_path / "scenes", pool=pool)
    assert source.clip_ids() == [clip_id]
    with pytest.raises(SceneError, match="4 frames, more than 2"):  # both views were found
        StereoSource(tmp_path, tmp_path, tmp_path / "scenes", max_frames=2, pool=pool).load(clip_id)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".npz", "train/{}.npz"),
        ("-left_rectified.mp4", "{}-left.mp4"),
        ("-left_rectified.mp4", "{}-left_rectified.mov"),
        ("-masks.npz", "masks/{}-masks.npz"),
        ("-masks.npz", "{}-masks.json"),
        ("-captions.json", "{0}/{0}-captions.json"),
    ],
)
def test_two_files_of_which_one_is_meant_are_both_named(tmp_path, flat, pool, old, new):
    clip_id = place(flat, tmp_path, lambda _: "")
    twin = tmp_path / new.format(clip_id)
    twin.parent.mkdir(exist_ok=True)
    shutil.copy(tmp_path / f"{clip_id}{old}", twin)
    source = Stereo4DSource(tmp_path, tmp_path, pool=pool)
    assert source.clip_ids() == [clip_id]
    with pytest.raises(ClipRejected) as caught:
        source.load(clip_id)
    assert caught.value.reason == "ambiguous_files"
    assert str(tmp_path / f"{clip_id}{old}") in caught.value.detail and str(twin) in caught.value.detail
    if "masks" in new:
        with pytest.raises(DescribeError, match="keep the one that is meant"):
            find_pending(tmp_path)


def test_masks_under_the_names_of_sa_v(tmp_path, flat, pool):
    clip_id = place(flat, tmp_path, lambda _: "")
    with np.load(tmp_path / f"{clip_id}-masks.npz") as masks:
        listed = [[encode_rle(masks[name][0]) for name in masks]]  # four frames: the first is annotated
        ids = dict(enumerate(masks))
    (tmp_path / f"{clip_id}-masks.npz").unlink()
    captions = json.loads((tmp_path / f"{clip_id}-captions.json").read_text())
    (tmp_path / f"{clip_id}-captions.json").write_text(json.dumps({str(n): captions[name] for n, name in ids.items()}))
    manual = tmp_path / f"{clip_id}_manual.json"
    manual.write_text(json.dumps({"masklet_id": list(ids), "masklet": listed}))
    made = Stereo4DSource(tmp_path, tmp_path, pool=pool).load(clip_id)
    assert not made.scene.objects and len(made.left_out) == len(ids)  # one frame shows no motion
    assert all("1 of at least 2 frames" in entry["detail"] for entry in made.left_out)
    with pytest.raises(SceneError, match="masks of 1 of 4 frames; the stereo stage"):
        StereoSource(tmp_path, tmp_path, tmp_path / "scenes", pool=pool).load(clip_id)
    shutil.copy(manual, tmp_path / f"{clip_id}_auto.json")
    with pytest.raises(ClipRejected, match="_manual.json and .*_auto.json"):
        Stereo4DSource(tmp_path, tmp_path, pool=pool).load(clip_id)


def test_where_there_are_images_too_the_run_says_which(tmp_path, flat, pool):
    clip_id = place(flat, tmp_path, lambda _: "")
    (tmp_path / f"{clip_id}-left_rectified").mkdir()
    video = Stereo4DSource(tmp_path, tmp_path, pool=pool).load(clip_id).video
    assert video.name == f"{clip_id}-left_rectified.mp4"
    with pytest.raises(SceneError, match="0 frames"):  # the folder of images, which is empty
        Stereo4DSource(tmp_path, tmp_path / "videos", pool=pool).load(clip_id)


@pytest.mark.parametrize("ending", [".npz", "-left_rectified.mp4", "-captions.json"])
def test_links_to_files_are_used(tmp_path, flat, pool, ending):
    clip_id = place(flat, tmp_path / "in", lambda _: "")
    path = tmp_path / "in" / f"{clip_id}{ending}"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / clip_id).mkdir()
    (tmp_path / "in" / clip_id / path.name).symlink_to(path)  # the same file again is not another one
    source = Stereo4DSource(tmp_path / "in", tmp_path / "in", pool=pool)
    made = source.load(clip_id)
    assert made.scene.objects and made.video.is_relative_to(tmp_path / "in")
    shutil.rmtree(tmp_path / "in" / clip_id)
    path.unlink()
    path.symlink_to(path)  # to itself
    with pytest.raises(ClipRejected, match="has no"):
        source.load(clip_id)


def test_a_link_to_a_folder_is_not_followed(tmp_path, flat):
    place(flat, tmp_path / "elsewhere", lambda _: "")
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "in" / "linked")
    os.symlink(tmp_path / "in", tmp_path / "in" / "loop")
    assert Stereo4DSource(tmp_path / "in", tmp_path / "in").clip_ids() == []


def test_names_too_long_for_a_sidecar_and_ids_that_climb(tmp_path):
    stem = "x" * 250
    (tmp_path / f"{stem}.npz").write_bytes(b"")
    with pytest.raises(ClipRejected, match="has no"):
        find(tmp_path, stem, [(".npz",), ("-captions.json",)])
    (tmp_path / "in").mkdir()
    for climbing in (f"../{stem}", f"in/../{stem}", str(tmp_path / stem)):
        with pytest.raises(ClipRejected, match="is a path") as caught:
            find(tmp_path / "in", climbing, [(".npz",)])
        assert caught.value.reason == "path_outside_root"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    for name in ("a.npz", "closed/b.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match="closed cannot be listed .*denied"):
        clip_stems(tmp_path, (".npz",))


def test_a_clip_whose_name_is_not_utf_8_is_named_and_other_files_may_be_called_anything(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb"):
        pass
    assert clip_stems(tmp_path, (".npz",)) == ["a"]
    with open(os.fsencode(tmp_path) + b"/caf\xe9.npz", "wb"):
        pass
    with pytest.raises(StoreError, match=r"caf\\udce9.npz' is not UTF-8.*rename it"):
        clip_stems(tmp_path, (".npz",))


def test_describe_takes_an_eye_for_one_only_where_something_says_so(tmp_path):
    for name in ("dance_right.mp4", "turn_left.mp4", "plain.mp4", "a-left.mp4", "a-right.mp4", "b-left_rectified.mp4"):
        (tmp_path / name).write_text("")
    assert [p.clip_id for p in find_pending(tmp_path)] == ["a", "b", "dance_right", "plain", "turn_left"]
    assert [p.clip_id for p in find_pending(tmp_path, "left_right")] == [
        *("a-left", "a-right", "b-left_rectified", "dance_right", "plain", "turn_left")
    ]


def test_describe_finds_videos_in_folders(tmp_path):
    for name in ("a/a-left.mov", "a/a-right.mov", "b/b.mp4", "b/b-entities.json", "c/c_left.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "c" / "c-masks.json").write_text(json.dumps({}))
    pending = find_pending(tmp_path)
    assert [(p.clip_id, p.output.relative_to(tmp_path).as_posix()) for p in pending] == [
        ("a", "a/a-entities.json"),
        ("c", "c/c-captions.json"),
    ]
