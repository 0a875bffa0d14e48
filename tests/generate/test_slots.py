"""Packing of branches that go on and the host's record of completions, without a model."""

from __future__ import annotations

import numpy as np
import pytest

from mllm4d_jax.generate.completions import CompletionRecord, first_stop
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.slots import Ladder, Packing


@pytest.mark.parametrize(("shards", "ratio", "compact"), [(1, 2, True), (4, 2, True), (1, 3, True), (8, 2, False)])
def test_every_branch_runs_once_through_any_history(shards, ratio, compact):
    """The device arrays are played by an array of (prompt, branch) numbers that moves as the caches do."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        prompts, branches, rows = (int(rng.integers(1, most)) for most in (20, 9, 8))
        width = int(rng.integers(1, branches + 1))
        ladder = Ladder(ratio=ratio, shards=shards, compact=compact)
        packing = Packing.empty(ladder.whole(rows), width, 5)
        device, waiting = np.full((*packing.branches.shape, 2), -1), list(range(prompts))
        unfinished, begun, shapes = {}, set(), set()
        while waiting or unfinished:
            arrived, free = waiting[: len(packing.free)], packing.free
            del waiting[: len(arrived)]
            packing = packing.placed(free[: len(arrived)], arrived, branches)
            unfinished |= {prompt: rng.random(branches) < 0.9 for prompt in arrived}  # some end with their first token
            packing = packing.refilled(unfinished)
            if not waiting:
                wanted = ladder.pack(packing, unfinished)
                if wanted is not packing:
                    moved, columns = packing.places(wanted)
                    device, packing = device[moved[:, None], columns], wanted
            running = {}
            for (row, entry), branch in np.ndenumerate(packing.branches):
                if packing.used[row, entry]:
                    one = int(packing.rows[row]), int(branch)
                    assert one not in running and unfinished[one[0]][one[1]]
                    running[one] = row, entry
                    if one in begun:
                        assert tuple(device[row, entry]) == one  # its cache is where it was or came along
                    device[row, entry] = one
                    begun.add(one)
            going = {(p, n) for p, left in unfinished.items() for n in np.flatnonzero(left).tolist()}
            assert {one for one in begun if one in going} == running.keys()  # what has begun goes on
            per_row = {p: sum(one[0] == p for one in running) for p in unfinished}
            assert all(per_row[p] == min(left.sum(), width) for p, left in unfinished.items())  # no entry is idle
            for place, left in unfinished.items():
                ends = [n for p, n in running if p == place and rng.random() < 0.2]
                left[ends] = False
            unfinished = {p: left for p, left in unfinished.items() if left.any()}
            packing = packing.refilled(unfinished)
            shapes.add(packing.shape)
            assert packing.shape[0] % shards == 0
        assert not packing.used.any() and len(shapes) <= (12 if compact else 1)


def test_sizes_follow_the_ladder():
    ladder, every = Ladder(first_slots=16), np.ones(12, bool)
    assert (ladder.slots(20, 50), ladder.slots(40, 50), ladder.slots(1, 50)) == (32, 50, 16)
    packing = Packing.empty(6, 12, 16).placed(range(6), range(6), 12)
    left = {1: np.arange(12) == 5, 4: np.isin(np.arange(12), (5, 7, 8))}
    small = ladder.pack(packing.refilled(left), left)
    assert small.shape == (2, 4, 16) and small.rows.tolist() == [1, 4]
    assert small.used.tolist() == [[True, False, False, False], [True, True, True, False]]
    assert ladder.pack(small, left) is small and ladder.pack(packing, dict.fromkeys(range(6), every)) is packing
    wide = packing.refilled(left)
    assert Ladder(first_slots=16, compact=False).pack(wide, left) is wide
    with pytest.raises(ValueError, match="are required"):
        Ladder(ratio=1)


def record(limits, **options):
    return CompletionRecord(np.array(limits), SamplingOptions(**options), lambda ids: "".join(f"[{i}]" for i in ids))


def add(book, tokens):
    tokens = np.array(tokens)
    book.add(np.arange(len(tokens)), tokens, -tokens.astype(np.float32))


def test_ends_of_completions():
    book = record([5, 5, 2, 5], eos_ids=(9, 8), pad_id=7, stop=("34][5",))
    add(book, [[9], [1], [1], [1]])
    assert book.finished.tolist() == [True, False, False, False]
    add(book, [[1, 1, 1], [2, 8, 1], [2, 2, 2], [34, 34, 56]])
    assert book.finished.all()
    out = book.result()
    assert out.tokens.tolist() == [[[9, 7, 7, 7, 7], [1, 2, 8, 7, 7], [1, 2, 7, 7, 7], [1, 34, 34, 56, 7]]]
    assert out.lengths.tolist() == [[1, 3, 2, 4]]
    assert out.finish_reason == (("stop", "stop", "length", "stop_string"),)
    assert out.logprobs.tolist() == [[[-9, 0, 0, 0, 0], [-1, -2, -8, 0, 0], [-1, -2, 0, 0, 0], [-1, -34, -34, -56, 0]]]
    assert out.texts(book._detokenize) == [["", "[1][2]", "[1][2]", "[1][34][34][56]"]]


def test_a_stop_text_across_chunks_cuts_what_follows():
    book = record([9], stop=("4][5", "never"))
    add(book, [[1]])
    add(book, [[2, 4]])
    assert not book.finished.any()
    add(book, [[5, 6, 6]])
    out = book.result()
    assert out.tokens[0, 0].tolist() == [1, 2, 4, 5, 0, 0, 0, 0, 0] and out.lengths.tolist() == [[4]]
    with pytest.raises(ValueError, match="need a detokenizer"):
        CompletionRecord(np.array([3]), SamplingOptions(stop=("x",)), None)


def test_stop_texts_are_found_in_bytes_of_characters():
    data = "aé中</answer>b".encode()

    def detokenize(ids):
        return bytes(ids).decode(errors="replace")

    for stop in ("é", "中", "</answer>", "é中<"):
        end = data.index(stop.encode()) + len(stop.encode())
        assert first_stop(list(data), 0, [stop], detokenize) == end
        assert first_stop(list(data), end - 1, [stop], detokenize) == end
        assert first_stop(list(data[: end - 1]), 0, [stop], detokenize) is None
