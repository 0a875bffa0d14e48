"""Frames of clips: a file that cannot be read costs a note and nothing else."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from data_prep.sources.frames import write_video
from mllm4d_jax.qa.media_paths import named_part
from mllm4d_jax.report import pictures
from mllm4d_jax.report.pictures import read_pictures

RULE = {"frames": 4, "max_bytes": 4000, "clip_s": 20.0, "total_s": 60.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    frames = np.zeros((16, 48, 64, 3), np.uint8)
    frames[:, :, :, 0] = (np.arange(16) * 16)[:, None, None]  # ever more red
    write_video(folder / "clip.mp4", frames, np.arange(16) / 8, "mpeg4")
    noise = np.random.default_rng(0).integers(0, 256, (6, 480, 640, 3), np.uint8)
    write_video(folder / "noise.mp4", noise, np.arange(6) / 8, "mpeg4")
    (folder / "cut.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:700])
    (folder / "text.mp4").write_text("no video", encoding="utf-8")
    (folder / "empty.mp4").touch()
    (folder / "bad.png").write_bytes(b"\x89PNG")
    cv2.imwrite(str(folder / "image.PNG"), np.full((20, 30, 3), (0, 0, 200), np.uint8))
    return folder


def decoded(jpeg: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def test_frames_are_spread_over_the_clip_and_dated(files):
    path = str(files / "clip.mp4")
    found = read_pictures([path, path], **RULE)
    assert list(found) == [path] and found[path].note == ""
    assert [caption for _, caption in found[path].frames] == ["0.0 s", "0.6 s", "1.2 s", "1.9 s"]
    reds = [decoded(jpeg)[..., 0].mean() for jpeg, _ in found[path].frames]
    assert np.allclose(reds, [0, 80, 160, 240], atol=16)
    assert decoded(found[path].frames[0][0]).shape == (48, 64, 3)


def test_of_a_part_of_a_video_only_that_part_is_shown(files):
    path = named_part(str(files / "clip.mp4"), (0.6, 1.25))
    found = read_pictures([path, named_part(path, (None, 2.0))], **RULE)
    assert [caption for _, caption in found[path].frames] == ["0.6 s", "0.9 s", "1.0 s", "1.2 s"]
    assert "does not exist" in found[f"{path}#t=,2.0"].note  # only the last fragment is one


def test_large_frames_are_made_small(files):
    path = str(files / "noise.mp4")
    for jpeg, _ in read_pictures([path], **RULE)[path].frames:
        assert len(jpeg) <= 4000 and max(decoded(jpeg).shape) <= 240


def test_images_are_shown_as_they_are(files):
    path = str(files / "image.PNG")
    ((jpeg, caption),) = read_pictures([path], **RULE)[path].frames
    assert caption == "image" and decoded(jpeg)[..., 0].mean() > 180


@pytest.mark.parametrize(
    ("name", "why"),
    [("none.mp4", "does not exist"), ("text.mp4", "not a video"), ("empty.mp4", "empty"), ("bad.png", "not an image"),
     (".", "not a regular file"), ("a\0b.mp4", ""), ("\ud800.mp4", ""), ("\ud800.png", "")],
)  # fmt: skip
def test_what_cannot_be_read_gives_a_note(files, name, why):
    path, good = f"{files}/{name}", str(files / "clip.mp4")
    found = read_pictures([path, good], **RULE)
    assert not found[path].frames and found[path].note and why in found[path].note
    assert len(found[good].frames) == 4  # and the decoder goes on


def test_a_damaged_clip_gives_a_note(files):
    path = str(files / "cut.mp4")
    assert "truncated" in read_pictures([path], **RULE)[path].note


def test_a_file_that_the_system_refuses_gives_a_note(files, monkeypatch):
    def refuse(path):
        raise PermissionError(f"{path}: not allowed")

    monkeypatch.setattr(pictures, "read_image", refuse)
    path = str(files / "image.PNG")
    assert "not allowed" in read_pictures([path], **RULE)[path].note


def test_when_the_time_is_up_no_further_clip_is_begun(files):
    path = str(files / "clip.mp4")
    found = read_pictures([path], **RULE | {"total_s": -1.0})
    assert not found[path].frames and "were used up" in found[path].note


def test_nothing_to_read_is_nothing():
    assert read_pictures([], **RULE) == {}
