"""Predictions -> every figure of the results, as JSON values: what `tables` shows and `results.json` holds.

A figure is an object with n, clusters (videos), correct, accuracy, low and high (95 % interval), unparsed, blank
(empty responses, which are unparsed too), conflicts, truncated (stopped for length), chance and best_letter: what
guessing, and always giving the letter that is right most often in these questions, would reach.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mllm4d_jax.eval import statistics
from mllm4d_jax.eval.predictions import Prediction
from mllm4d_jax.eval.statistics import Bootstrap
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.qa.answers import EXTRACTORS, RULES, ExtractedAnswer, extract_answer

MACRO = ("mllm4d",)  # benchmarks whose headline is the mean over their subtasks
_SHOWN_IDS = 20


class ScoringError(ValueError):
    """Predictions that cannot be scored or compared as asked."""


@dataclass(frozen=True)
class Scored:
    """A prediction with what an extractor found in it."""

    prediction: Prediction
    found: ExtractedAnswer

    @property
    def correct(self) -> bool:
        return self.found.letter in self.prediction.truth


def score(predictions: Iterable[Prediction], extractor: str = "strict") -> list[Scored]:
    """What an extractor makes of each prediction. Raises ValueError for an unknown extractor."""
    return [Scored(one, extract_answer(one.response, one.choices, extractor)) for one in predictions]


def figures(scored: Sequence[Scored], bootstrap: Bootstrap) -> dict[str, Any]:
    """The figure of a group of answers; see the module."""
    right = _right(scored)
    asked = [s.prediction for s in scored]
    letters = Counter(letter for one in asked for letter in one.truth)
    return {
        **_interval(statistics.accuracy(right, _videos(scored), bootstrap)),
        "correct": sum(right),
        "unparsed": sum(s.found.letter is None for s in scored),
        "blank": sum(not one.response.strip() for one in asked),
        "conflicts": sum(s.found.conflict for s in scored),
        "truncated": sum(one.finish == "length" for one in asked),
        "chance": _mean([len(one.truth) / len(one.choices) for one in asked]),
        "best_letter": max(letters.values(), default=0) / len(asked) if asked else None,
    }


def results(
    predictions: Sequence[Prediction],
    *,
    extractor: str = "strict",
    bootstrap: Bootstrap = statistics.DEFAULT,
    controls: Sequence[Sequence[Prediction]] = (),
    compare: Sequence[Prediction] = (),
) -> dict[str, Any]:
    """All figures of a run.

    Args:
      predictions: of one run.
      extractor: one of `answers.EXTRACTORS`; the official one's figures stand beside in any case.
      controls: predictions of runs without the video or with its frames shuffled, shown beside for the questions that
        both have.
      compare: predictions of another run, taken for the first of the two.

    Raises:
      ScoringError: no predictions, or ones that cannot be compared.
    """
    if not predictions:
        raise ScoringError("there are no predictions to score")
    scored = score(predictions, extractor)
    named = {s.prediction.id: s for s in scored}
    beside = [score(control, extractor) for control in controls]
    for control in beside:
        _check_control(named, control)
    groups = []
    for table, name, group in grouped(scored):
        others = [_control(group, control) for control in beside]
        groups.append({"table": table, "name": name, **figures(group, bootstrap), "controls": others})
    benchmarks = sorted({one.benchmark for one in predictions})
    return {
        "benchmark": ", ".join(benchmarks),
        "control": ", ".join(sorted({one.control for one in predictions})),
        "configs": sorted({one.config for one in predictions}),
        "prompt_modes": sorted({one.prompt_mode for one in predictions}),
        "extractor": extractor,
        "level": statistics.LEVEL,
        "bootstrap": {"samples": bootstrap.samples, "seed": bootstrap.seed},
        "groups": groups,
        "macro": _macro(scored, bootstrap) if set(benchmarks) <= set(MACRO) else None,
        "letters": _letters(scored),
        "rules": {rule: n for rule in RULES if (n := sum(s.found.rule == rule for s in scored))},
        "extractors": _extractors(predictions),
        "comparison": comparison(compare, predictions, extractor, bootstrap) if compare else None,
    }


def grouped(scored: Sequence[Scored]) -> list[tuple[str, str, list[Scored]]]:
    """(table, name, answers) of every row: all, then by split, category and subtask, as far as there are such.

    With several splits, the names of categories and subtasks begin with the split's. A table of one row that would
    repeat the row above it is left out.
    """
    several = len({s.prediction.split for s in scored}) > 1
    found = [("all", "all", list(scored))]
    for table in ("split", "category", "subtask"):
        parts: dict[str, list[Scored]] = {}
        for s in scored:
            if (name := getattr(s.prediction, table)) is not None:
                within = f"{s.prediction.split}: " if several and table != "split" else ""
                parts.setdefault(within + name, []).append(s)
        if len(parts) > 1 or sum(map(len, parts.values())) not in (0, len(scored)):
            found += [(table, name, parts[name]) for name in sorted(parts)]
    return found


def comparison(
    first: Sequence[Prediction], second: Sequence[Prediction], extractor: str, bootstrap: Bootstrap
) -> dict[str, Any]:
    """Two runs on the questions that both answered, per row of the tables: second less first.

    Raises:
      ScoringError: no question in common, or one id for different questions.
    """
    earlier = {s.prediction.id: s for s in score(first, extractor)}
    later = [s for s in score(second, extractor) if s.prediction.id in earlier]
    if not later:
        raise ScoringError("the two runs have no question in common (their ids differ): nothing can be compared")
    for s in later:
        _check_same(earlier[s.prediction.id].prediction, s.prediction)
    rows = []
    for table, name, group in grouped(later):
        a, b, videos = _right([earlier[s.prediction.id] for s in group]), _right(group), _videos(group)
        only_first, only_second, p = statistics.mcnemar(a, b)
        row = {"table": table, "name": name, "first": _mean(a), "second": _mean(b)}
        row |= _interval(statistics.paired_difference(a, b, videos, bootstrap), "difference")
        row |= {"only_first": only_first, "only_second": only_second, "mcnemar_p": p}
        rows.append(row | {"detectable": _number(statistics.detectable_difference(a, b, videos))})
    return {
        "configs": sorted({one.config for one in first}),
        "only_in_first": len(earlier) - len(later),
        "only_in_second": len(second) - len(later),
        "rows": rows,
    }


def _macro(scored: Sequence[Scored], bootstrap: Bootstrap) -> dict[str, Any]:
    subtasks = [str(s.prediction.subtask) for s in scored]
    estimate = statistics.accuracy(_right(scored), _videos(scored), bootstrap, groups=subtasks)
    return {"subtasks": len(set(subtasks)), **_interval(estimate)}


def _extractors(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Per split and extractor: right, unparsed, and right if blank responses were credited; and where they differ."""
    rows = []
    for split in sorted({one.split for one in predictions}):
        part = [one for one in predictions if one.split == split]
        blank = sum(not one.response.strip() for one in part)
        by = {extractor: score(part, extractor) for extractor in EXTRACTORS}
        pairs = zip(*by.values(), strict=True)
        differ = [s.prediction.id for s, t in pairs if s.found.letter != t.found.letter]
        for extractor, scored in by.items():
            right, unparsed = sum(_right(scored)), sum(s.found.letter is None for s in scored)
            row = {"split": split, "extractor": extractor, "n": len(part), "correct": right, "unparsed": unparsed}
            row |= {"correct_with_blanks": right + blank, "differ": len(differ), "differ_ids": differ[:_SHOWN_IDS]}
            rows.append(row)
    return rows


def _letters(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """How often each letter is right and how often it was given."""
    right = Counter(letter for s in scored for letter in s.prediction.truth)
    given = Counter(s.found.letter for s in scored if s.found.letter is not None)
    letters = sorted({letter for s in scored for letter in s.prediction.choices})
    return [{"letter": letter, "right": right[letter], "given": given[letter]} for letter in letters]


def _check_control(named: Mapping[str, Scored], control: Sequence[Scored]) -> None:
    kinds = {s.prediction.control for s in control}
    if len(kinds) != 1 or "" in kinds:
        raise ScoringError(
            f"a control must be one run with control=blind or control=shuffled, not {sorted(kinds)}: another ordinary "
            "run goes into 'compare'"
        )
    for s in control:
        if s.prediction.id in named:
            _check_same(named[s.prediction.id].prediction, s.prediction)


def _control(group: Sequence[Scored], control: Sequence[Scored]) -> dict[str, Any]:
    """A control's accuracy on the questions of a group."""
    wanted = {s.prediction.id for s in group}
    part = [s for s in control if s.prediction.id in wanted]
    return {"control": control[0].prediction.control, "n": len(part), "accuracy": _mean(_right(part))}


def _check_same(first: Prediction, second: Prediction) -> None:
    if (first.question, dict(first.choices), first.truth) != (second.question, dict(second.choices), second.truth):
        raise ScoringError(
            f"question {shown(first.id)} is not the same in both runs: {shown(first.question)} with "
            f"{shown(dict(first.choices))}, and {shown(second.question)} with {shown(dict(second.choices))}"
        )


def _interval(estimate: statistics.Estimate, name: str = "accuracy") -> dict[str, Any]:
    ends = {"low": _number(estimate.low), "high": _number(estimate.high)}
    return {"n": estimate.n, "clusters": estimate.clusters, name: _number(estimate.value), **ends}


def _right(scored: Sequence[Scored]) -> list[bool]:
    return [s.correct for s in scored]


def _videos(scored: Sequence[Scored]) -> list[str]:
    return [s.prediction.video for s in scored]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _number(value: float) -> float | None:
    """JSON has no NaN: what is not known is null."""
    return None if math.isnan(value) else value
