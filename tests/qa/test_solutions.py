"""Solutions of records, as rewards read them."""

from __future__ import annotations

import math

import pytest

from mllm4d_jax.qa.rewards import (
    Solution,
    SolutionError,
    score,
)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"answer": "A"}, Solution("A")),
        ([{"answer": "A"}], Solution("A")),
        (({"answer": " C \n"},), Solution("C")),
        ({"answer": "A. 2.5"}, Solution("A")),
        ({"answer": "B: left"}, Solution("B")),
        ({"answer": "D) right\nor so"}, Solution("D")),
        ({"answer": "(A) text"}, Solution("A")),
        ({"answer": "A", "camera_center": None, "object_center": []}, Solution("A")),
        ({"answer": "A", "camera_center": [1, 2, 3]}, Solution("A", ((1.0, 2.0, 3.0),))),
        ({"answer": "A", "camera_center": [[1, 2, 3], None]}, Solution("A", ((1.0, 2.0, 3.0), None))),
        ({"answer": "A", "object_center": [None, None, None]}, Solution("A", (), (None, None, None))),
        ({"answer": "A", "question_type": "x", "object_center": ((1, 2, 3.5),)}, Solution("A", (), ((1, 2, 3.5),))),
    ],
)
def test_solutions_of_records(record, expected):
    found = Solution.from_record(record)
    assert found == expected
    assert all(type(x) is float for c in found.camera_center + found.object_center if c for x in c)
    assert score(f"<answer>{expected.answer}</answer>", record)["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "'solution' must be an object"),
        ("A", "'solution' must be an object"),
        ([], "it has 0 entries"),
        ([{"answer": "A"}] * 2, "it has 2 entries"),
        (["A"], "'solution' must be an object"),
        ({}, "'solution.answer' must be a capital letter .* not None"),
        ({"answer": "a"}, "'solution.answer'"),
        ({"answer": ""}, "'solution.answer'"),
        ({"answer": "Apple"}, "not 'Apple'"),
        ({"answer": "A car"}, "'solution.answer'"),
        ({"answer": 1}, "'solution.answer'"),
        ({"answer": "A", "camera_center": "[1, 2, 3]"}, "'solution.camera_center' must be a list"),
        ({"answer": "A", "camera_center": {"start": [1, 2, 3]}}, "'solution.camera_center' must be a list"),
        ({"answer": "A", "object_center": [[1, 2]]}, r"'solution.object_center' holds \[1, 2\]"),
        ({"answer": "A", "object_center": [[1, 2, 3, 4]]}, "'solution.object_center' holds"),
        ({"answer": "A", "object_center": [1, 2]}, "'solution.object_center' holds 1,"),
        ({"answer": "A", "object_center": [[1, 2, math.nan]]}, "neither null nor three finite numbers"),
        ({"answer": "A", "object_center": [[1, 2, math.inf]]}, "neither null nor three finite numbers"),
        ({"answer": "A", "object_center": [[1, 2, 10**400]]}, "neither null nor three finite numbers"),
        ({"answer": "A", "object_center": [[1, 2, True]]}, "neither null nor three finite numbers"),
        ({"answer": "A", "object_center": [["1", "2", "3"]]}, "neither null nor three finite numbers"),
        ({"answer": "A", "object_center": ["null"]}, "holds 'null'"),
    ],
)
def test_solutions_that_cannot_be_used(record, message):
    with pytest.raises(SolutionError, match=message) as caught:
        score("", record)
    assert len(str(caught.value)) < 250
