"""Rows of prompts and completions: who shares a row, where tokens are, and what cannot be laid out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mllm4d_jax.rows.completion_rows import (
    assign_rows,
    collate_prompts,
    completion_rows,
    needed_prompt_sizes,
)
from tests.grpo import learner_cases as cases


def test_similar_lengths_share_rows_and_parts():
    lengths = np.array([[1, 9, 2, 8], [3, 3, 7, 4]])
    parts = assign_rows(lengths, 2, 2)
    assert parts == [[(0, (1, 3)), (1, (6, 7))], [(1, (4, 5)), (0, (0, 2))]]
    assert assign_rows(lengths, 4, 1) == [[(0, (0, 1, 2, 3)), (1, (4, 5, 6, 7))]]


@pytest.mark.parametrize(
    ("per_row", "parts", "message"), [(3, 1, "3 to a row"), (2, 3, "into 3 micro"), (0, 1, "0 to")]
)
def test_what_cannot_be_divided(per_row, parts, message):
    with pytest.raises(ValueError, match=message):
        assign_rows(np.ones((2, 4), int), per_row, parts)


def test_every_token_is_where_its_row_says():
    examples, batch = cases.prompts("qwen3_vl", 3)
    rollouts = cases.completions(3, 4, 5)
    lengths = rollouts.mask.sum(1).astype(int)
    seen = set()
    for rows in assign_rows(lengths.reshape(3, 4), 2, 2):
        found = completion_rows(batch, rows, rollouts.tokens, lengths, slot=6, entries=11)
        prefix = batch.inputs.tokens.shape[1]
        for r, (prompt, numbers) in enumerate(rows):
            example = examples[prompt]
            text = found.inputs.tokens[r]
            np.testing.assert_array_equal(text[: len(example.tokens)], example.tokens)
            assert found.inputs.vision_index[r].max() < max(batch.features, 1)
            for slot, number in enumerate(numbers):
                seen.add(number)
                start, n = prefix + slot * 6, lengths[number]
                np.testing.assert_array_equal(text[start : start + n], rollouts.tokens[number, :n])
                assert (found.inputs.segment_ids[r, start : start + 6] == (np.arange(6) < n)).all()
                first = len(example.tokens) + example.rope_delta
                assert (found.inputs.positions[:, r, start : start + n] == first + np.arange(n)).all()
                places = found.places[r, slot]
                assert (places[n:] == 11).all()
                np.testing.assert_array_equal(found.loss_target[r, places[:n]], rollouts.tokens[number, :n])
                before = found.loss_index[r, places[:n]]
                assert before.tolist() == [len(example.tokens) - 1, *range(start, start + n - 1)]
    assert seen == set(range(12))


def test_features_stay_in_place_where_every_prompt_has_its_row():
    _, batch = cases.prompts("qwen3_vl", 2)
    rollouts = cases.completions(2, 4, 5)
    assert cases.laid_out(batch, rollouts, 2, 4)[0].prompts is None
    assert cases.laid_out(batch, rollouts, 2, 2)[0].prompts.tolist() == [0, 0, 1, 1]


def test_sizes_that_are_too_small():
    examples, batch = cases.prompts("qwen3_vl", 2)
    rollouts = cases.completions(2, 4, 5)
    rows = assign_rows(rollouts.mask.sum(1).astype(int).reshape(2, 4), 4, 1)[0]
    lengths = rollouts.mask.sum(1).astype(int)
    for slot, entries in ((4, 99), (5, 3)):
        with pytest.raises(ValueError, match=f"slots of {slot} and lists of {entries}"):
            completion_rows(batch, rows, rollouts.tokens, lengths, slot=slot, entries=entries)
    config, sizes = cases.parts("qwen3_vl")[0], needed_prompt_sizes(examples)
    with pytest.raises(ValueError, match="p[01]: .* tokens for rows of"):
        small = dataclasses.replace(sizes, prefix=sizes.prefix - 1)
        collate_prompts(examples, small, cases.vision_geometry(config), (config.video_token_id,))
