"""Records as other programs write them, through the encoder: what the model is shown and what it learns.

The expectations follow LLaMA-Factory (`system`), ms-swift (`loss`), axolotl and OpenAI (`weight`), and
`calculate_video_frame_range` of qwen-vl-utils (`video_start`, `video_end`).
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import Questions, open_source
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.grids import patchify
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ResizeRule
from mllm4d_jax.media.video import read_video
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import as_prompt
from tests.encode.decoding import in_process

CASES = {r["tag"]: r for r in json.loads((Path(__file__).parents[1] / "cases/records/meaning.json").read_text())}
ASKED = CASES["system as a field (LLaMA-Factory sharegpt)"]["conversations"][0]["value"].removeprefix("<video>\n")
SPAN = CASES["video_start/video_end (qwen-vl-utils)"]
TWO = CASES["loss false (ms-swift)"]
FRAMES, FPS = 30, 10.0


@pytest.fixture(scope="module")
def root(tmp_path_factory, make_video):
    folder = tmp_path_factory.mktemp("meaning")
    (folder / "videos").mkdir()
    make_video(folder / "videos" / "a.mp4", FRAMES, fps=FPS)
    return folder


@pytest.fixture
def encoded(root, tmp_path, qwen3, tokenizer):
    """Return a function: records of one clip -> what came of each, encoded as one group."""

    def encode(*records, processor=qwen3, as_prompt=None, **options):
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        encoder = in_process(processor, tokenizer, VideoOptions(**{"num_frames": 8} | options))
        group = GroupEncoder([RecordFile(path, root)], encoder, as_prompt=as_prompt)
        return list(group(Questions(0, tuple(range(len(records))))).results.values())

    return encode


def learned(example, tokenizer):
    return tokenizer.decode(example.tokens[example.supervised])


def said_about(record, encode):
    (result,) = encode(record)
    assert isinstance(result, RecordError)
    return result.reason, result.message


@pytest.mark.parametrize(
    ("tag", "reason", "message"),
    [
        ("int answer", "bad_record", "must be an object with strings 'from' and 'value'"),
        ("empty gpt", "empty_answer", "empty turn of the assistant"),
        ("blank gpt", "empty_answer", "empty turn of the assistant"),
        ("no gpt", "no_target", "no text of the assistant"),
    ],
)
def test_records_that_teach_nothing(encoded, tag, reason, message):
    why, said = said_about(CASES[tag], encoded)
    assert why == reason and message in said


@pytest.mark.parametrize("tag", ["empty gpt", "blank gpt", "no gpt"])
def test_a_prompt_needs_no_answer(encoded, tag):
    (example,) = encoded(CASES[tag], as_prompt=as_prompt)
    assert example.text.endswith(f"{ASKED}<|im_end|>\n<|im_start|>assistant\n")


def test_a_system_field_is_the_systems_turn(encoded):
    record = CASES["system as a field (LLaMA-Factory sharegpt)"]
    turn = {"from": "system", "value": record["system"]}
    as_turn = {k: v for k, v in record.items() if k != "system"} | {"conversations": [turn, *record["conversations"]]}
    for example in encoded(record, as_turn, as_turn | {"system": record["system"]}):
        assert example.text.startswith(f"<|im_start|>system\n{record['system']}<|im_end|>\n<|im_start|>user\n")
    for nothing in (None, ""):
        assert encoded(record | {"system": nothing})[0].text.startswith("<|im_start|>user\n")


def test_the_configured_system_prompt_is_for_records_without_their_own(root, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(CASES["system as a field (LLaMA-Factory sharegpt)"]))
    systems = [m["content"] for m in RecordFile(path, root, "configured")[0].messages if m["role"] == "system"]
    assert systems == ["You answer with one letter only."]


@pytest.mark.parametrize("tag", ["loss false (ms-swift)", "weight 0 (FastChat/axolotl)"])
def test_a_turn_that_is_not_to_be_learned(encoded, tokenizer, tag):
    (example,) = encoded(CASES[tag])
    assert learned(example, tokenizer) == "B<|im_end|>\n"
    body = f"{ASKED}<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nAgain?<|im_end|>\n"
    assert example.text.endswith(f"{body}<|im_start|>assistant\nB<|im_end|>\n")


def two_turns(first=None, second=None, asked=None):
    """The record of two answers with other flags on its turns."""
    user, one, again, two = ({k: v for k, v in turn.items() if k != "loss"} for turn in TWO["messages"])
    return TWO | {"messages": [user | (asked or {}), one | (first or {}), again, two | (second or {})]}


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (({}, {}), "A<|im_end|>\nB<|im_end|>\n"),
        (({"loss": None}, {"weight": None}), "A<|im_end|>\nB<|im_end|>\n"),
        (({"weight": 1.0, "loss": True}, {"loss": 0}), "A<|im_end|>\n"),
        (({}, {}, {"loss": False}), "A<|im_end|>\nB<|im_end|>\n"),  # the user's is never learned
        (({}, {}, {"weight": 1}), "A<|im_end|>\nB<|im_end|>\n"),
        (({"content": "", "loss": False}, {}), "B<|im_end|>\n"),
    ],
)
def test_what_loss_and_weight_say(encoded, tokenizer, flags, wanted):
    assert learned(encoded(two_turns(*flags))[0], tokenizer) == wanted


@pytest.mark.parametrize(
    ("flags", "reason", "message"),
    [
        (({"weight": 0.5}, {}), "bad_record", "turn 1, has the weight 0.5; only true and false"),
        (({"loss": "false"}, {}), "bad_record", "turn 1, has the loss 'false'"),
        (({}, {"weight": [0]}), "bad_record", "turn 3, has the weight [0]"),
        (({}, {"weight": math.nan}), "bad_record", "turn 3, has the weight nan"),
        (({"loss": True, "weight": 0}, {}), "bad_record", "says in 'loss' and 'weight' that it is learned"),
        (({"loss": False}, {"weight": 0}), "no_target", "loss: false and weight: 0 say"),
    ],
)
def test_flags_that_are_refused(encoded, flags, reason, message):
    why, said = said_about(two_turns(*flags), encoded)
    assert why == reason and message in said


@pytest.mark.parametrize("system", [3, ["a"], "half \ud800"])
def test_a_system_field_that_is_no_text(encoded, system):
    assert said_about(SPAN | {"system": system}, encoded)[0] == "bad_record"


def test_two_systems_that_differ(encoded):
    turns = [{"from": "system", "value": "mine"}, *SPAN["conversations"]]
    assert "differ" in said_about(SPAN | {"conversations": turns, "system": "yours"}, encoded)[1]


def released_range(start, end, frames, fps):
    """Independent: first and last frame by seconds, as qwen-vl-utils works them out."""
    longest = frames / fps
    first = 0 if start is None else math.ceil(max(0.0, min(start, longest)) * fps)
    last = frames - 1 if end is None else min(math.floor(max(0.0, min(end, longest)) * fps), frames - 1)
    return first, last


@pytest.mark.parametrize("start, end", [(1.0, 2.0), (None, 1.25), (1.95, None), (-1, 99.5), (0, 0.1), (0.31, 0.69)])
def test_frames_come_from_the_range_and_are_dated_in_the_file(encoded, root, qwen3, qwen2_5, start, end):
    record = SPAN | {"video_start": start, "video_end": end}
    first, last = released_range(start, end, FRAMES, FPS)
    count = min(8, last - first + 1)
    wanted = np.linspace(first, last, count).round().astype(int)
    (example,) = encoded(record)
    pairs = np.concatenate([wanted, wanted[-1:]])[: count + count % 2].reshape(-1, 2)
    assert example.timestamps[0] == pytest.approx(pairs.mean(1) / FPS)
    resize = ResizeRule("per_frame", 32, 2, 784, 50176)
    everything = read_video(str(root / "videos" / "a.mp4"), SampleRule("uniform", FRAMES, None), resize).frames
    np.testing.assert_array_equal(example.patches, patchify(everything[wanted], qwen3)[0])
    # Qwen2.5-VL counts seconds of the range: a temporal patch of two frames lasts 2 / (sampled frames per second).
    (other,) = encoded(record, processor=qwen2_5)
    seconds = 2 / (count / (last - first + 1) * FPS)
    run = other.positions[0][other.tokens == qwen2_5.video_token_id].reshape(len(pairs), -1)
    steps = np.floor(np.arange(len(pairs)) * seconds * qwen2_5.tokens_per_second)
    np.testing.assert_array_equal(run - run[0, 0], np.tile(steps[:, None], run.shape[1]))


def test_questions_about_different_ranges_are_about_different_clips(encoded, tmp_path, root):
    whole = {k: v for k, v in SPAN.items() if not k.startswith("video_")}
    records = [SPAN, whole, SPAN | {"video_end": 2.5}, SPAN, whole]
    results = encoded(*records)
    patches = [id(example.patches) for example in results]
    assert patches[0] == patches[3] and patches[1] == patches[4] and len(set(patches)) == 3
    for record, example in zip(records, results, strict=True):
        np.testing.assert_array_equal(example.patches, encoded(record)[0].patches)
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert RecordFile(path, root).clips.tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("span", "reason", "message"),
    [
        ({"video_start": 2.0, "video_end": 1.0}, "bad_record", "must be before"),
        ({"video_start": 1.0, "video_end": 1.0}, "bad_record", "must be before"),
        ({"video_start": -2, "video_end": -1}, "bad_record", "must be before"),
        ({"video_start": "1.0"}, "bad_record", "must be a number of seconds"),
        ({"video_start": True}, "bad_record", "must be a number of seconds"),
        ({"video_end": math.nan}, "bad_record", "must be a number of seconds"),
        ({"video_end": math.inf}, "bad_record", "must be a number of seconds"),
        ({"video_start": [0, 1]}, "bad_record", "one for each of 1 videos"),
        ({"video_start": 3.5, "video_end": None}, "bad_range", "its 30 frames show from 0.00 to 2.90 s"),
        ({"video_start": 1.01, "video_end": 1.15}, "bad_range", "1 frames, at least 2"),
    ],
)
def test_ranges_that_are_refused(encoded, span, reason, message):
    why, said = said_about(SPAN | span, encoded)
    assert why == reason and message in said


def test_each_of_several_videos_has_its_range(encoded):
    turns = [{"from": "human", "value": "<video><video>?"}, {"from": "gpt", "value": "B"}]
    two = {"videos": ["videos/a.mp4"] * 2, "conversations": turns, "video_start": [None, 2.0], "video_end": [1.0, None]}
    (example,) = encoded(two)
    assert example.timestamps[0][-1] < 1.0 and example.timestamps[1][0] >= 2.0
    assert "one for each of 2 videos" in said_about(two | {"video_start": 1.0}, encoded)[1]


def test_fields_that_nothing_reads_are_named_once(root, tmp_path, caplog):
    odd = TWO | {"tools": "[]", "möbel": 1, "messages": [turn | {"tool_calls": []} for turn in TWO["messages"]]}
    path = tmp_path / "r.json"
    path.write_text(json.dumps([odd, odd | {"rejected": "x"}, SPAN, *CASES.values()], ensure_ascii=False))
    with caplog.at_level(logging.WARNING):
        source = open_source(path, root)
        assert [source[i].key for i in range(3)]
    (line,) = [r.getMessage() for r in caplog.records]
    assert (
        "'tools' (2 records)" in line and "'turn.tool_calls' (2 records)" in line and "'rejected' (1 records)" in line
    )
    assert "'möbel'" in line and "'tag'" in line and "loss" not in line and "system" not in line
    many = [{"conversations": [], **{f"{n}{'x' * 900}": 1 for n in range(3000)}}]
    path.write_text(json.dumps(many))
    with caplog.at_level(logging.WARNING):
        open_source(path, root)
    assert len(caplog.records) == 2 and len(caplog.records[-1].getMessage()) < 4000
