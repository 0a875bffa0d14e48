"""Naming what moves and describing segmented objects, over a real HTTP server on the loopback interface."""

from __future__ import annotations

import base64
import json

import cv2
import numpy as np
import pytest

from configs import common
from data_prep.scenes.objects import read_captions
from data_prep.sources.frames import write_video
from data_prep.teacher.describe import DescribeError, caption_request, describe, find_pending
from data_prep.teacher.endpoint import KEY_VARIABLE, URL_VARIABLE, TeacherError
from tests.data_prep.teacher.server import completion

FRAMES, SIZE = 4, 64


def answer(**fields):
    return ("status", 200, {}, completion(json.dumps(fields)))


@pytest.fixture
def folder(tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    frames = np.full((FRAMES, SIZE, SIZE, 3), 90, np.uint8)
    for name in ("walk", "trip-left_rectified", "trip-right_rectified"):
        write_video(clips / f"{name}.mp4", frames, np.arange(len(frames)) / 8, "mpeg4")
    masks = np.zeros((FRAMES, SIZE, SIZE), bool)
    masks[2, 10:30, 20:50] = True
    np.savez(clips / "trip-masks.npz", first=masks, never=np.zeros_like(masks))
    return clips


def run(folder, monkeypatch, server, **changes):
    monkeypatch.setenv(URL_VARIABLE, server.url)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    values = {"source": "describe", "input": str(folder), "teacher.kind": "endpoint", "teacher.model": "m"}
    return describe(common.config("curate", values | changes), str(folder.parent / "work"))


def pictures(request):
    content = request["messages"][0]["content"]
    data = [base64.b64decode(c["image_url"]["url"].partition("base64,")[2]) for c in content if c["type"] != "text"]
    return [cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for d in data]


def test_each_clip_gets_its_next_file_once(folder, monkeypatch, serve):
    assert [(p.clip_id, p.output.name) for p in find_pending(folder)] == [
        ("trip", "trip-captions.json"),
        ("walk", "walk-entities.json"),
    ]
    caption = answer(caption="the  red box", category="Box")
    server = serve(caption, answer(entities=[{"en": "brown dog", "cat": "animal"}]))
    assert run(folder, monkeypatch, server, **{"teacher.concurrency": 1, "teacher.num_frames": 3}) == 0
    captions = read_captions(folder / "trip-captions.json")
    assert captions["first"].description == "the red box" and set(captions) == {"first", "never"}
    assert json.loads((folder / "walk-entities.json").read_text()) == {
        "entities": [{"en": "brown dog", "cat": "animal"}]
    }
    first, second = (body for _, _, _, body in server.seen)
    assert len(pictures(first)) == 2 and len(pictures(second)) == 3
    assert run(folder, monkeypatch, server) == 0 and len(server.seen) == 2  # nothing is asked or written again
    (folder / "walk-entities.json").unlink()
    assert run(folder, monkeypatch, server, **{"teacher.kind": "replay", "teacher.num_frames": 3}) == 0
    assert (folder / "walk-entities.json").exists() and len(server.seen) == 2


def test_masks_of_the_left_view_and_of_smaller_frames_fit(tmp_path, monkeypatch, serve):
    """A packed video is shown by its left view; masks in the size of an external tool's frames by frames of that."""
    clips = tmp_path / "clips"
    clips.mkdir()
    frames = np.full((FRAMES, SIZE, 2 * SIZE, 3), 90, np.uint8)
    frames[:, :, SIZE:] = 200
    write_video(clips / "both.mp4", frames, np.arange(FRAMES) / 8, "mpeg4")
    masks = np.zeros((FRAMES, SIZE, SIZE), bool)
    masks[2, 10:30, 20:50] = True
    np.savez(clips / "both-masks.npz", first=masks)
    server = serve(answer(caption="the red box", category="box"))
    assert run(clips, monkeypatch, server, **{"stereo.layout": "left_right"}) == 0
    whole, _ = pictures(server.seen[0][3])
    assert whole.shape == (SIZE, SIZE, 3) and 80 < np.median(whole) < 100
    (clips / "both-captions.json").unlink()
    (clips / "both-clip.json").write_text(json.dumps({"frame_size": [SIZE, SIZE]}))
    assert run(clips, monkeypatch, serve(answer(caption="the red box", category="box")), **{"teacher.cache": "x"}) == 0
    assert (clips / "both-captions.json").exists()


def test_a_clip_that_fails_is_named_and_the_others_are_written(folder, monkeypatch, serve, capsys):
    (folder / "walk.mp4").write_bytes(b"no video")
    assert run(folder, monkeypatch, serve(answer(caption="the red box", category="box"))) == 1
    assert "walk" in capsys.readouterr().out
    assert (folder / "trip-captions.json").exists() and not (folder / "walk-entities.json").exists()


def test_half_a_surrogate_pair_in_a_reply_ends_nothing(folder, monkeypatch, serve):
    server = serve(answer(caption="box \ud83d", category="box"), answer(entities=[{"en": "dog", "cat": "animal"}]))
    assert run(folder, monkeypatch, server, **{"teacher.concurrency": 1}) == 0
    assert (folder / "trip-captions.json").exists() and (folder / "walk-entities.json").exists()


def test_the_object_is_outlined_in_its_largest_frame_and_cut_out():
    frames = np.stack([np.full((SIZE, SIZE, 3), 40 * t, np.uint8) for t in range(FRAMES)])
    masks = np.zeros((FRAMES, SIZE, SIZE), bool)
    masks[1, 5:8, 5:8] = True
    masks[2, 10:30, 20:50] = True
    whole, cut = pictures(caption_request("m", frames, masks).payload())
    assert whole.shape == (SIZE, SIZE, 3) and cut.shape == (36, 46, 3)  # 20 x 30 and a margin of 8
    assert abs(int(cut.mean()) - 80) < 3
    green = (whole[..., 1] > 150) & (whole[..., 0] < 120)
    rows, columns = np.flatnonzero(green.any(1)), np.flatnonzero(green.any(0))
    assert abs(rows[[0, -1]] - [10, 29]).max() <= 1 and abs(columns[[0, -1]] - [20, 49]).max() <= 1


def test_what_is_missing_is_said(tmp_path, monkeypatch, serve):
    with pytest.raises(DescribeError, match="holds no"):
        run(tmp_path, monkeypatch, serve(answer()))
    with pytest.raises(DescribeError, match="input is not set"):
        describe(common.config("curate", {"source": "describe"}), str(tmp_path))
    write_video(tmp_path / "a.mp4", np.zeros((3, 16, 16, 3), np.uint8), np.arange(3) / 8, "mpeg4")
    for changes, message in (({"teacher.kind": "oracle"}, "cannot look"), ({"teacher.model": ""}, "model is empty")):
        with pytest.raises(TeacherError, match=message):
            run(tmp_path, monkeypatch, serve(answer()), **changes)
