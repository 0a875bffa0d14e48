"""Reasoning paths written by a model: what it is sent over a real HTTP connection, and what is refused."""

from __future__ import annotations

import base64
import json

import cv2
import numpy as np
import pytest

from data_prep.cold_start.prompt import completion_of, path_problem, path_request, spread
from data_prep.cold_start.r1_items import parse_item
from data_prep.cold_start.task import run_cold_start
from data_prep.sources.frames import write_video
from data_prep.teacher.endpoint import KEY_VARIABLE, URL_VARIABLE, TeacherError
from mllm4d_jax.qa.system_prompt import ST_COT
from tests.data_prep.cold_start.test_cold_start import (
    BARE,
    GOLD,
    REWARD,
    WRONG,
    config,
    record,
    results,
    write_records,
)
from tests.data_prep.teacher.server import completion

LEAKS = (
    "ground truth",
    "ground-truth",
    "groundtruth",
    "answer key",
    "answer provided",
    "answer given",
    "answer is given",
    "answer is provided",
    "answer was given",
    "answer was provided",
    "expected answer",
    "given answer",
    "given the answer",
    "given the correct answer",
    "known answer",
    "provided answer",
    "provided correct answer",
    "reference answer",
    "supplied answer",
    "told the answer",
    "given facts",
    "known facts",
    "provided facts",
    "provided measurement",
    "provided value",
    "supplied value",
)
FRAMES = {"seen": [2, 7], "source": [2, 7], "count": 12}


def answer(text):
    return ("status", 200, {}, completion(json.dumps({"chain_of_thought": text})))


@pytest.fixture
def clip(tmp_path):
    """A root with one clip of 12 frames whose grey level tells their number."""
    (tmp_path / "root" / "clips").mkdir(parents=True)
    levels = (20 * np.arange(12, dtype=np.uint8))[:, None, None, None]
    frames = np.broadcast_to(levels, (12, 64, 96, 3))
    write_video(tmp_path / "root" / "clips" / "a.mp4", frames, np.arange(12) / 8, "mpeg4")
    return tmp_path / "root"


@pytest.fixture
def online(monkeypatch):
    def point(server):
        monkeypatch.setenv(URL_VARIABLE, server.url)
        monkeypatch.setenv(KEY_VARIABLE, "k")

    return point


def settings(tmp_path, root, records, **changes):
    path = write_records(tmp_path / "r1.jsonl", records)
    common = dict(root=str(root), kind="endpoint", model="m", concurrency=1, num_frames=5)
    return config(path, **(common | {"cache": str(tmp_path / "cache")} | changes))


def sent(server):
    """(grey levels of the frames, text, whole body) of every request."""
    for _, _, _, body in server.seen:
        *images, text = body["messages"][-1]["content"]
        data = [base64.b64decode(i["image_url"]["url"].partition("base64,")[2]) for i in images]
        frames = [cv2.imdecode(np.frombuffer(d, np.uint8), cv2.IMREAD_COLOR) for d in data]
        yield [round(float(frame.mean()) / 20) for frame in frames], text["text"], body


def test_the_model_sees_the_frames_and_the_facts_and_its_best_path_is_kept(tmp_path, clip, serve, online):
    server = serve(answer(WRONG), answer(GOLD), answer(BARE))
    online(server)
    item = record("q1", frames=FRAMES, value=1.0, question_type="camera_absolute_distance")
    run_cold_start(settings(tmp_path, clip, [item], temperature=0.7), str(tmp_path / "out"))
    kept, _, manifest = results(tmp_path / "out")
    assert [r["conversations"][-1]["value"] for r in kept] == [GOLD]
    written = (REWARD[WRONG] + REWARD[GOLD] + REWARD[BARE]) / 3
    assert manifest["scenarios"]["camera_absolute_distance"]["mean_reward"] == pytest.approx(written)
    requests = list(sent(server))
    assert len({body["seed"] for _, _, body in requests}) == 3
    for frames, text, body in requests:
        assert frames == [0, 2, 7, 8, 11]
        assert f"its frames {', '.join(map(str, frames))}." in text
        assert "<video>" not in text and "How far?" in text and ST_COT in text
        assert "- right option: A" in text and "- camera centre, end frame: [0.000, 0.000, 1.000]" in text
        assert "- object centre, start frame: null" in text and "two places: 1.000" in text
        assert (body["temperature"], body["model"]) == (0.7, "m") and body["response_format"] == {"type": "json_object"}


def test_replay_gives_the_same_records_without_a_network(tmp_path, clip, serve, online, monkeypatch):
    server = serve(answer(GOLD), answer(BARE), answer(WRONG))
    online(server)
    records = [record("q1", frames=FRAMES), record("q2", frames=FRAMES | {"seen": [0, 11]})]
    run_cold_start(settings(tmp_path, clip, records[:1]), str(tmp_path / "online"))
    asked = len(server.seen)
    monkeypatch.delenv(URL_VARIABLE)
    run_cold_start(settings(tmp_path, clip, records, kind="replay"), str(tmp_path / "offline"))
    assert len(server.seen) == asked == 3
    name = "cold_start.json"
    assert (tmp_path / "online" / name).read_bytes() == (tmp_path / "offline" / name).read_bytes()
    assert results(tmp_path / "offline")[1]["q2"]["reasons"] == ["no_reply"]
    online(server)
    run_cold_start(settings(tmp_path, clip, records), str(tmp_path / "more"))  # stores what was missing
    monkeypatch.delenv(URL_VARIABLE)
    run_cold_start(settings(tmp_path, clip, records, kind="replay"), str(tmp_path / "offline"))
    assert (
        len(server.seen) == 6 and (tmp_path / "more" / name).read_bytes() == (tmp_path / "offline" / name).read_bytes()
    )


def test_several_questions_at_once_give_the_bytes_of_one_at_a_time(tmp_path, clip, serve, online):
    server = serve(("held", 200, {}, completion(json.dumps({"chain_of_thought": GOLD}))))
    online(server)
    records = [record(f"q{n}", frames=FRAMES | {"seen": [0, n + 1]}) for n in range(8)]
    run_cold_start(settings(tmp_path, clip, records, concurrency=4), str(tmp_path / "four"))
    assert len(server.seen) == 24 and 2 <= server.most_in_flight <= 4
    run_cold_start(settings(tmp_path, clip, records), str(tmp_path / "one"))
    assert len(server.seen) == 24
    for name in ("cold_start.json", "cold_start_rejected.jsonl", "manifest.json"):
        assert (tmp_path / "four" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_model_that_does_not_reply_in_the_form_costs_its_question_only(tmp_path, clip, serve, online):
    server = serve(answer(GOLD), ("status", 200, {}, completion('{"thoughts": 1}')))
    online(server)
    records = [record("q1", frames=FRAMES), record("q2", frames=FRAMES | {"seen": [0, 11]})]
    run_cold_start(settings(tmp_path, clip, records, paths=1), str(tmp_path / "out"))
    kept, rejected, _ = results(tmp_path / "out")
    assert len(kept) == 1 and [e["reasons"] for e in rejected.values()] == [["bad_reply"]]
    assert "'chain_of_thought' is a required property" in next(iter(rejected.values()))["details"][0]
    assert len(server.seen) == 3  # the second question was asked twice


def test_a_wrong_key_or_address_stops_the_run(tmp_path, clip, serve, online, monkeypatch):
    online(serve(("status", 401, {}, "no")))
    with pytest.raises(TeacherError, match=KEY_VARIABLE):
        run_cold_start(settings(tmp_path, clip, [record("q1", frames=FRAMES)]), str(tmp_path / "a"))
    monkeypatch.delenv(URL_VARIABLE)
    with pytest.raises(TeacherError, match=URL_VARIABLE):
        run_cold_start(settings(tmp_path, clip, [record("q1", frames=FRAMES)]), str(tmp_path / "b"))


def test_videos_that_cannot_be_used_reject_their_questions(tmp_path, clip, serve, online):
    online(serve(answer(GOLD)))
    records = [
        record("q1", frames=FRAMES),
        record("q2", videos=["clips/none.mp4"]),
        record("q3", videos=["../r1.jsonl"]),
        record("q4", frames=FRAMES | {"count": 13}),
    ]
    run_cold_start(settings(tmp_path, clip, records), str(tmp_path / "out"))
    kept, rejected, _ = results(tmp_path / "out")
    assert [r["id"] for r in kept] == ["q1"]
    reasons = {key: entry["reasons"] for key, entry in rejected.items()}
    assert reasons == {"q2": ["missing_file"], "q3": ["path_outside_root"], "q4": ["frame_count"]}
    (clip / "clips" / "none.mp4").symlink_to(clip / "clips" / "a.mp4")
    run_cold_start(settings(tmp_path, clip, records), str(tmp_path / "out"))
    kept, rejected, _ = results(tmp_path / "out")
    assert [r["id"] for r in kept] == ["q1", "q2"] and set(rejected) == {"q3", "q4"}


def test_a_released_record_without_frame_numbers_gets_evenly_spread_frames(tmp_path, clip, serve, online):
    server = serve(answer(GOLD))
    online(server)
    plain = {key: value for key, value in record("q").items() if key not in ("id", "question_type")}
    run_cold_start(settings(tmp_path, clip, [plain], num_frames=4, paths=1), str(tmp_path / "out"))
    frames, text, _ = next(sent(server))
    assert frames == [0, 4, 7, 11] and "4 frames of one video, in order of time, evenly spread over it." in text
    assert list(results(tmp_path / "out")[2]["scenarios"]) == ["unspecified"]


def test_a_system_prompt_of_the_record_is_the_form_that_is_asked_for():
    turns = [{"role": "system", "content": "Use {odd} braces."}, *record("q")["messages"]]
    item = parse_item(record("q", messages=turns), "x", "y")
    text = path_request(item, [], None, "m", 0.0, 1).messages[0]["content"][-1]["text"]
    assert "Use {odd} braces." in text and ST_COT not in text


def test_spread_keeps_the_frames_asked_about():
    assert spread(32, 32, (3, 26)) == list(range(32))
    assert spread(10, 2, (4, 5)) == [4, 5] and spread(10, 4) == [0, 3, 6, 9]
    for total in (2, 5, 31):
        for count in (2, 3, 8, 40):
            for i in range(total - 1):
                for j in range(i + 1, total):
                    found = spread(total, count, (i, j))
                    assert {i, j} <= set(found) and found == sorted(set(found)) and len(found) == min(total, count)


def test_a_text_without_tags_is_the_inside_of_the_thinking():
    assert completion_of({"chain_of_thought": " I look. "}, "C") == "<thinking>I look.</thinking><answer>C</answer>"
    assert completion_of({"chain_of_thought": f"\n{GOLD}\n"}, "C") == GOLD
    half = "<thinking>I look.</thinking>"  # no answer was written, so none is added: the reward takes it off
    assert completion_of({"chain_of_thought": half}, "C") == half


@pytest.mark.parametrize("phrase", LEAKS)
def test_a_text_that_gives_away_that_it_was_told_is_refused(phrase):
    first, *others = phrase.split()
    text = f"<thinking>As {'  '.join([first.upper(), *others])}, so.</thinking><answer>A</answer>"
    assert path_problem(text) == ("leak", f"it says {phrase!r}")


@pytest.mark.parametrize("token", ["<video>", "<image>", "<|im_end|>", "<|vision_start|>", "<tool_call>", "</think>"])
def test_a_text_with_a_placeholder_or_control_token_is_refused(token):
    assert path_problem(GOLD.replace("</thinking>", f"{token}</thinking>")) == ("special_token", f"it contains {token}")


def test_a_text_that_is_no_unicode_is_refused_and_a_good_one_is_not():
    assert path_problem("\ud800")[0] == "bad_text"
    assert path_problem(GOLD) is None
    assert path_problem("The answer is A, since the ground is level and the truth lies in the frames.") is None
