"""The text of a completion that is scored and kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mllm4d_jax.grpo.actor import Actor


@pytest.mark.parametrize("ending, opened", [("assistant\n<think>\n", "<think>\n"), ("assistant\n", "")])
def test_it_begins_with_the_thought_that_the_prompt_opened(ending, opened):
    seen = []

    def rewards(text, solution, record):
        seen.append(text)
        return {"total": 0.0}

    actor = Actor(None, SimpleNamespace(decode=None), None, None, rewards, None, 2, 8, 0, 0)
    example, record = SimpleNamespace(text=f"<|im_start|>{ending}"), SimpleNamespace(solution=None)
    prompt = SimpleNamespace(example=example, record=record, described=dict)
    drawn = SimpleNamespace(texts=lambda decode: [["Left.</think>B", "C"]])
    scores = actor._score(prompt, drawn)
    assert [text for text, _ in scores] == seen == [f"{opened}Left.</think>B", f"{opened}C"]
