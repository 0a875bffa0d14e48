"""Held-out groups: encoded once as far as they fit in memory, in one order every time."""

from __future__ import annotations

import pytest

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.kept import KeptGroups
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.sources import Questions
from tests.data.fakes import FakeEncoder, write_records


@pytest.fixture
def make_kept(tmp_path):
    source = RecordFile(write_records(tmp_path / "r.json", [("a.mp4", 5), ("b.mp4", -1), 6, ("c.mp4", 7)]), tmp_path)

    def make(**options):
        encoder = FakeEncoder()
        groups = [Questions(0, (i,)) for i in range(4)]
        return KeptGroups(groups, GroupEncoder([source], encoder), workers=0, ahead=2, **options), encoder

    return make


def seen(kept):
    return [{i: getattr(r, "key", "") for i, r in group.results.items()} for group in kept]


def test_the_second_time_encodes_nothing(make_kept):
    kept, encoder = make_kept()
    first = seen(kept)
    assert first == [{i: f"r.json#{i}"} for i in range(4)] and len(encoder.calls) == 4
    assert seen(kept) == first and len(encoder.calls) == 4


@pytest.mark.parametrize("room", [0, 1, 2])
def test_what_does_not_fit_is_encoded_each_time(make_kept, room):
    """Room for so many of the three examples; a bad record takes none, but is kept only if all before it are."""
    whole, _ = make_kept()
    sizes = [group.nbytes for group in whole]
    assert sizes[0] > 8 * 24 * 4 and sizes[1] == 0
    kept, encoder = make_kept(most=[sizes[0] - 1, sizes[0], sum(sizes[:3])][room])
    first, fitting = seen(kept), [0, 2, 3][room]
    encoder.calls.clear()
    assert seen(kept) == first
    assert encoder.calls == [f"r.json#{i}" for i in range(fitting, 4)]


def test_one_that_is_left_early_goes_on_from_what_it_has(make_kept):
    kept, encoder = make_kept()
    passes = iter(kept)
    next(passes)
    next(passes)
    passes.close()
    encoder.calls.clear()
    assert len(seen(kept)) == 4 and "r.json#0" not in encoder.calls and len(seen(kept)) == 4
