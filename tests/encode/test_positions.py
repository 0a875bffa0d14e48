"""M-RoPE positions by hand-computed examples; the recorded ones are covered by the parity tests."""

from __future__ import annotations

import numpy as np
import pytest

from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.positions import RULES, PlaceholderError, mrope_positions
from mllm4d_jax.qa.errors import RecordError

IMAGE, VIDEO = 90, 91


def positions(tokens, grids, **kwargs):
    kwargs = {"family": "qwen3_vl", "image_token_id": IMAGE, "video_token_id": VIDEO, "merge_size": 2, **kwargs}
    found, delta = mrope_positions(np.array(tokens), grids, **kwargs)
    return found.tolist(), delta


def test_text_is_a_range():
    assert positions([5, 6, 7], []) == ([[0, 1, 2]] * 3, 0)
    assert positions([], []) == ([[]] * 3, 0)


def test_image_between_text():
    found, delta = positions([1, 2, *[IMAGE] * 6, 3], [Grid("image", 1, 4, 6)])
    assert found == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert delta == 6 - 9


def test_qwen3_video_frames_are_runs_of_their_own():
    found, delta = positions([1, VIDEO, VIDEO, 2, VIDEO, VIDEO, 3], [Grid("video", 2, 2, 4)])
    assert found == [[0, 1, 1, 3, 4, 4, 6], [0, 1, 1, 3, 4, 4, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert delta == 0


@pytest.mark.parametrize(
    ("rule", "seconds", "time", "after"),
    [
        ("release", 1.0, [0, 2, 4], 5),  # text follows the largest position of the run
        ("release", 0.7, [0, 1, 2], 3),  # floor(1.4), floor(2.8)
        ("hf517", 0.7, [0, 0, 0], 1),  # int(0.7) = 0
        ("hf517", 1.0, [0, 2, 4], 1),
        ("hf523", 0.7, [0, 1, 2], 1),
    ],
)
def test_qwen2_5_time_rules(rule, seconds, time, after):
    found, delta = positions(
        [1, VIDEO, VIDEO, VIDEO, 2],
        [Grid("video", 3, 2, 2)],
        family="qwen2_5_vl",
        second_per_grid=[seconds],
        tokens_per_second=2,
        rule=rule,
    )
    assert found[0] == [0, *(1 + t for t in time), 1 + after]
    assert found[1] == found[2] == [0, 1, 1, 1, 1 + after]
    assert delta == (1 + after) + 1 - 5  # one after the last token, though a clip may reach further in time


@pytest.mark.parametrize("rule", RULES)
def test_what_follows_stands_where_a_longer_text_would(rule):
    """A generated token gets the position that the same token has in training, also after a clip of 20 s."""
    clip = [1, *[VIDEO] * 4, 2, 3]
    how = dict(family="qwen2_5_vl", second_per_grid=[10.4], tokens_per_second=2, rule=rule)
    _, delta = positions(clip, [Grid("video", 2, 2, 4)], **how)
    longer, _ = positions([*clip, 4, 5], [Grid("video", 2, 2, 4)], **how)
    assert [axis[-2:] for axis in longer] == [[len(clip) + delta, len(clip) + delta + 1]] * 3
    assert (max(longer[0][:-2]) >= len(clip) + delta) == (rule != "release")


@pytest.mark.parametrize(
    ("tokens", "grids", "message"),
    [
        ([1, IMAGE, 2], [], "begins a visual run but all 0 of the grids are used"),
        ([1, 2], [Grid("image", 1, 2, 2)], "0 visual runs, the images and videos make 1"),
        ([IMAGE, IMAGE], [Grid("image", 1, 2, 2)], "2 image placeholders where the grids ask for 1 image"),
        ([VIDEO], [Grid("image", 1, 2, 2)], "1 video placeholders where the grids ask for 1 image"),
    ],
)
def test_mismatches_are_errors(tokens, grids, message):
    with pytest.raises(PlaceholderError, match=message) as error:
        positions(tokens, grids)
    assert isinstance(error.value, RecordError) and error.value.reason == "placeholder_mismatch"


@pytest.mark.parametrize("seconds", [[], [0.0], [float("nan")], [1.0, 1.0]])
def test_qwen2_5_needs_true_seconds(seconds):
    with pytest.raises(ValueError, match="seconds"):
        positions([VIDEO], [Grid("video", 1, 2, 2)], family="qwen2_5_vl", second_per_grid=seconds, tokens_per_second=2)


def test_unknown_rule():
    with pytest.raises(ValueError, match="known: release, hf517, hf523"):
        positions([1], [], rule="hf")
