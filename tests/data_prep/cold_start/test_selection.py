"""Which questions are drawn and which paths are kept, counted by hand."""

from __future__ import annotations

from data_prep.cold_start.selection import draw_order, passing, shares, take, threshold


def test_a_draw_depends_on_seed_and_ids_alone_and_grows_by_adding():
    ids = [f"q{n}" for n in range(500)]
    order = draw_order(ids, 1)
    assert order == draw_order(reversed(ids), 1) != draw_order(ids, 2) and sorted(order) == sorted(ids)
    without = [key for key in order if key != "q7"]
    assert draw_order([key for key in ids if key != "q7"], 1) == without
    places = [sum(order.index(f"q{n}") for n in range(k, 500, 5)) / 100 for k in range(5)]
    assert all(abs(place - 249.5) < 5 * 144 / 10 for place in places)


def test_filter_rules():
    def rewards(*values):
        return list(enumerate(values))

    assert threshold([[], []]) is None and threshold([]) is None
    # Three equal rewards whose floating-point mean is larger than each of them still pass.
    equal = [rewards(0.8)] * 3
    assert all(passing(r, threshold(equal), "best_of_sample") == [0] for r in equal)
    assert passing([(0, 0.0), (2, 0.0)], 0.0, "every_path") == [] == passing([], None, "every_path")
    tied = rewards(0.2, 0.9, 0.9, 0.95)
    assert threshold([tied, rewards(0.05)]) == 0.5
    assert passing(tied, 0.5, "every_path") == [3, 1, 2] and passing(tied, 0.5, "best_of_sample") == [3]
    assert passing(tied[:3], 0.5, "best_of_sample") == [1]
    assert passing(tied, 0.99, "no_filter") == [3, 1, 2, 0] and passing([(0, 0.0)], 0.0, "no_filter") == []
    assert shares("cab", 8) == {"a": 3, "b": 3, "c": 2} and shares("", 5) == {}
    kept = {"x": [4, 0], "y": [1], "z": [2, 3]}
    assert take(kept, 3) == {("x", 4), ("y", 1), ("z", 2)} and take(kept, 4) - take(kept, 3) == {("x", 0)}
    assert len(take(kept, None)) == 5 and take({}, 3) == set()
