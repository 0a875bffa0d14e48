"""A batch that is wrong is refused with the place of the mistake."""

from __future__ import annotations

import numpy as np
import pytest

from mllm4d_jax.grpo.batch import RolloutBatch, check_batch
from tests.grpo.objective_cases import make_fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["rewards"].__setitem__(3, np.nan), r"rewards\[3\] is not finite"),
        (lambda f: f["mask"].__setitem__((2, 1), 0.5), r"mask\[2, 1\] is neither 0 nor 1"),
        (lambda f: f.update(old_logprobs=f["old_logprobs"][:, :3]), r"old_logprobs: shape \(16, 3\)"),
        (lambda f: f.update(advantages=np.zeros((16, 1), np.float32)), r"advantages: shape \(16, 1\)"),
        (lambda f: f["groups"].__setitem__(slice(None), -1), "is negative in a row with tokens"),
        (lambda f: f["old_logprobs"].__setitem__(f["mask"] > 0, np.inf), r"old_logprobs\[\d+, \d+\] is not finite"),
    ],
)
def test_a_bad_batch_is_refused(change, message):
    fields, _ = make_fields("paper")
    check_batch(RolloutBatch(**fields))
    change(fields)
    with pytest.raises(ValueError, match=message):
        check_batch(RolloutBatch(**fields))
