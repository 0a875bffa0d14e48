"""What a response to a question is worth: read by the strict rules, or by the benchmark's own."""

from __future__ import annotations

from mllm4d_jax.qa.answers import EXTRACTORS, ExtractedAnswer, extract_answer
from mllm4d_jax.qa.numbers import extract_number, mean_relative_accuracy
from mllm4d_jax.qa.published_rules import PUBLISHED
from mllm4d_jax.qa.questions import AskedQuestion


def read_answer(question: AskedQuestion, response: str, extractor: str = "strict") -> ExtractedAnswer:
    """Return what a response gives for a question: one of its letters, or the number that it asks for.

    Args:
      extractor: "strict" goes by the rules of `answers` and `numbers`, "official" by that of the benchmark: the one in
        `published_rules.PUBLISHED`, for any other benchmark the release's exact comparison (see `extract_answer`).

    Raises:
      ValueError: unknown extractor.
    """
    rule = PUBLISHED.get(question.benchmark)
    if extractor not in EXTRACTORS or extractor == "official" and rule is None:
        return extract_answer(response, question.choices, extractor)
    if question.true_number is not None:
        number, name = extract_number(response) if extractor == "strict" else (rule.number(response), "official")
        return ExtractedAnswer(None, "unparsed" if number is None else name, number=number)
    if extractor == "strict":
        return extract_answer(response, question.choices, extractor)
    letter = rule.letter(response)
    return ExtractedAnswer(letter, "official") if letter in question.choices else ExtractedAnswer(None, "unparsed")


def worth(question: AskedQuestion, found: ExtractedAnswer) -> float:
    """Return 0 to 1: 1.0 for a right letter, `mean_relative_accuracy` of a number, 0.0 for all that is unparsed."""
    if question.true_number is None:
        return float(found.letter in question.truth)
    return 0.0 if found.number is None else mean_relative_accuracy(found.number, question.true_number)
