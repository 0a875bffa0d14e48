"""Packing of unfinished branches and the host's record of completions, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from mllm4d_jax.generate.completions import CompletionRecord, SamplingStatistics, first_stop
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.slots import Ladder, Packing

NOTHING = SamplingStatistics(0, 0, 0, 0, 0.0, ())


@pytest.mark.parametrize(("shards", "ratio"), [(1, 2), (4, 2), (1, 3), (8, 2)])
def test_every_unfinished_branch_is_kept_through_any_history(shards, ratio):
    """The device arrays are played by an array of (prompt, branch) numbers that moves as the caches do."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        prompts, branches, most = int(rng.integers(1, 12)), int(rng.integers(1, 9)), 100
        ladder = Ladder(ratio=ratio, shards=shards, first_slots=8)
        filled = -(-prompts // shards) * shards
        packing = Packing.whole(prompts, filled, branches, ladder.slots(4, most))
        unfinished, device, shapes = np.ones((prompts, branches), bool), None, set()
        device = np.stack([packing.row_grid, packing.branches], -1)
        for needed in range(4, most, 7):
            wanted = ladder.pack(packing, unfinished, needed, most)
            if wanted is not packing:
                rows, columns = packing.places(wanted)
                device, packing = device[rows[:, None], columns], wanted
            kept = device[packing.used].tolist()
            assert len({tuple(k) for k in kept}) == len(kept)
            assert {tuple(k) for k in kept} >= {tuple(k) for k in np.argwhere(unfinished).tolist()}
            np.testing.assert_array_equal(device[..., 0][packing.used], packing.row_grid[packing.used])
            np.testing.assert_array_equal(device[..., 1][packing.used], packing.branches[packing.used])
            assert packing.shape[0] % shards == 0 and packing.slots >= needed
            shapes.add(packing.shape)
            unfinished &= rng.random(unfinished.shape) < 0.8
            if not unfinished.any():
                break
        assert len(shapes) <= 12


def test_sizes_follow_the_ladder():
    ladder = Ladder(first_slots=16)
    packing = Packing.whole(6, 6, 12, 16)
    unfinished = np.zeros((6, 12), bool)
    unfinished[[1, 4], 5] = unfinished[4, 7:9] = True
    small = ladder.pack(packing, unfinished, 20, 50)
    assert small.shape == (2, 4, 32) and small.rows.tolist() == [1, 4]
    assert small.used.tolist() == [[True, False, False, False], [True, True, True, False]]
    assert ladder.pack(small, unfinished, 20, 50) is small
    assert ladder.pack(small, unfinished, 40, 50).shape == (2, 4, 50)
    assert Ladder(first_slots=16, compact=False).pack(packing, unfinished, 10, 50) is packing
    with pytest.raises(ValueError, match="are required"):
        Ladder(ratio=1)


def record(limits, **options):
    return CompletionRecord(np.array(limits), SamplingOptions(**options), lambda ids: "".join(f"[{i}]" for i in ids))


def add(book, tokens, step=0):
    tokens = np.array(tokens)
    prompts, branches = tokens.shape[:2]
    book.add(Packing.whole(prompts, prompts, branches, 0), tokens, -tokens.astype(np.float32), step)


def test_ends_of_completions():
    book = record([[5, 5, 2, 5]], eos_ids=(9, 8), pad_id=7, stop=("34][5",))
    add(book, [[[9], [1], [1], [1]]])
    assert book.finished.tolist() == [[True, False, False, False]]
    add(book, [[[1, 1, 1], [2, 8, 1], [2, 2, 2], [34, 34, 56]]], 1)
    assert book.finished.all()
    out = book.result(NOTHING)
    assert out.tokens.tolist() == [[[9, 7, 7, 7, 7], [1, 2, 8, 7, 7], [1, 2, 7, 7, 7], [1, 34, 34, 56, 7]]]
    assert out.lengths.tolist() == [[1, 3, 2, 4]]
    assert out.finish_reason == (("stop", "stop", "length", "stop_string"),)
    assert out.logprobs.tolist() == [[[-9, 0, 0, 0, 0], [-1, -2, -8, 0, 0], [-1, -2, 0, 0, 0], [-1, -34, -34, -56, 0]]]
    assert out.texts(book._detokenize) == [["", "[1][2]", "[1][2]", "[1][34][34][56]"]]


def test_a_stop_text_across_chunks_cuts_what_follows():
    book = record([[9]], stop=("4][5", "never"))
    add(book, [[[1]]])
    add(book, [[[2, 4]]], 1)
    assert not book.finished.any()
    add(book, [[[5, 6, 6]]], 3)
    out = book.result(NOTHING)
    assert out.tokens[0, 0].tolist() == [1, 2, 4, 5, 0, 0, 0, 0, 0] and out.lengths.tolist() == [[4]]
    with pytest.raises(ValueError, match="need a detokenizer"):
        CompletionRecord(np.array([[3]]), SamplingOptions(stop=("x",)), None)


def test_stop_texts_are_found_in_bytes_of_characters():
    data = "aé中</answer>b".encode()

    def detokenize(ids):
        return bytes(ids).decode(errors="replace")

    for stop in ("é", "中", "</answer>", "é中<"):
        end = data.index(stop.encode()) + len(stop.encode())
        assert first_stop(list(data), 0, [stop], detokenize) == end
        assert first_stop(list(data), end - 1, [stop], detokenize) == end
        assert first_stop(list(data[: end - 1]), 0, [stop], detokenize) is None
