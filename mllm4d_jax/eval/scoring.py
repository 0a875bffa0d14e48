"""Predictions -> every figure of the results, as JSON values: what `tables` shows and `results.json` holds.

A figure is an object with n, clusters (videos), correct, accuracy (the mean of what answers are worth, which for
letters is the share of right ones), low and high (95 % interval), unparsed, blank (empty responses, which are unparsed
too), conflicts, truncated (stopped for length), chance and best_letter: what guessing, and always giving the letter, or
the number, that is right most often in these questions, would reach. A number is right where it has full marks.
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
from mllm4d_jax.qa.answers import EXTRACTORS, RULES, ExtractedAnswer
from mllm4d_jax.qa.judging import read_answer, worth
from mllm4d_jax.qa.numbers import mean_relative_accuracy

MACRO = ("mllm4d", "vsi")  # benchmarks whose headline is the mean over their subtasks
NESTED = ("vsi",)  # and a subtask's figure the mean over its categories
_ONE_DRAW = Bootstrap(1)  # for a figure of which the interval is not shown
_SHOWN_IDS = 20


class ScoringError(ValueError):
    """Predictions that cannot be scored or compared as asked."""


@dataclass(frozen=True)
class Scored:
    """A prediction with what an extractor found in it."""

    prediction: Prediction
    found: ExtractedAnswer

    @property
    def score(self) -> float:
        """What the answer is worth, 0 to 1: see `judging.worth`."""
        return worth(self.prediction, self.found)

    @property
    def correct(self) -> bool:
        return self.score == 1

    @property
    def parsed(self) -> bool:
        return not (self.found.letter is None and self.found.number is None)


def score(predictions: Iterable[Prediction], extractor: str = "strict") -> list[Scored]:
    """What an extractor makes of each prediction. Raises ValueError for an unknown extractor."""
    return [Scored(one, read_answer(one, one.response, extractor)) for one in predictions]


def figures(scored: Sequence[Scored], bootstrap: Bootstrap, parts: Sequence[str] = ()) -> dict[str, Any]:
    """The figure of a group of answers; see the module. `parts`: of which each counts the same; () = one."""
    asked = [s.prediction for s in scored]
    with_letters = all(one.true_number is None for one in asked)
    return {
        **_interval(statistics.accuracy(_scores(scored), _videos(scored), bootstrap, groups=parts)),
        "correct": sum(_right(scored)),
        "unparsed": sum(not s.parsed for s in scored),
        "blank": sum(not one.response.strip() for one in asked),
        "conflicts": sum(s.found.conflict for s in scored),
        "truncated": sum(one.finish == "length" for one in asked),
        "chance": _mean([len(one.truth) / len(one.choices) for one in asked]) if with_letters else None,
        "best_letter": _best_constant(asked),
    }


def _best_constant(asked: Sequence[Prediction]) -> float | None:
    """What always giving the most frequent true letter, or number, would reach; None where both are asked for."""
    numbers = [one.true_number for one in asked if one.true_number is not None]
    if not asked or 0 < len(numbers) < len(asked):
        return None
    if numbers:
        constant = Counter(numbers).most_common(1)[0][0]
        return _mean([mean_relative_accuracy(constant, number) for number in numbers])
    return Counter(letter for one in asked for letter in one.truth).most_common(1)[0][1] / len(asked)


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
    groups, benchmarks = [], sorted({one.benchmark for one in predictions})
    for table, name, group in grouped(scored):
        others = [_control(group, control) for control in beside]
        nested = table == "subtask" and set(benchmarks) <= set(NESTED)
        parts = [str(s.prediction.category) for s in group] if nested else ()
        groups.append({"table": table, "name": name, **figures(group, bootstrap, parts), "controls": others})
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
        before = [earlier[s.prediction.id] for s in group]
        a, b, videos = _scores(before), _scores(group), _videos(group)
        only_first, only_second, p = statistics.mcnemar(_right(before), _right(group))
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
    """The mean over the subtasks; of a benchmark out of `NESTED` over the means of their categories."""
    nested = all(s.prediction.benchmark in NESTED for s in scored)
    subtasks = [str(s.prediction.subtask) for s in scored]
    kinds = [str(s.prediction.category) for s in scored] if nested else subtasks
    inside = Counter(subtask for _, subtask in set(zip(kinds, subtasks, strict=True)))
    weights = {kind: 1 / inside[subtask] for kind, subtask in zip(kinds, subtasks, strict=True)}
    estimate = statistics.accuracy(_scores(scored), _videos(scored), bootstrap, groups=kinds, weights=weights)
    return {"subtasks": len(inside), **_interval(estimate)}


def _extractors(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Per split and extractor: right, worth of all answers, unparsed, worth if blank responses were credited; and where
    the extractors differ."""
    rows, benchmarks = [], {one.benchmark for one in predictions}
    for split in sorted({one.split for one in predictions}):
        part = [one for one in predictions if one.split == split]
        blank = sum(not one.response.strip() for one in part)
        by = {extractor: score(part, extractor) for extractor in EXTRACTORS}
        pairs = zip(*by.values(), strict=True)
        differ = [s.prediction.id for s, t in pairs if _given(s) != _given(t)]
        for extractor, scored in by.items():
            total, unparsed = sum(_scores(scored)), sum(not s.parsed for s in scored)
            row = {"split": split, "extractor": extractor, "n": len(part), "correct": sum(_right(scored))}
            row |= {"score": total, "unparsed": unparsed, "correct_with_blanks": total + blank}
            row |= {"macro": _macro(scored, _ONE_DRAW)["accuracy"] if benchmarks <= set(NESTED) else None}
            row |= {"differ": len(differ), "differ_ids": differ[:_SHOWN_IDS]}
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
    return {"control": control[0].prediction.control, "n": len(part), "accuracy": _mean(_scores(part))}


def _check_same(first: Prediction, second: Prediction) -> None:
    asked = [(one.question, dict(one.choices), one.truth, one.true_number) for one in (first, second)]
    if asked[0] != asked[1]:
        raise ScoringError(
            f"question {shown(first.id)} is not the same in both runs: {shown(first.question)} with "
            f"{shown(dict(first.choices))}, and {shown(second.question)} with {shown(dict(second.choices))}"
        )


def _interval(estimate: statistics.Estimate, name: str = "accuracy") -> dict[str, Any]:
    ends = {"low": _number(estimate.low), "high": _number(estimate.high)}
    return {"n": estimate.n, "clusters": estimate.clusters, name: _number(estimate.value), **ends}


def _given(scored: Scored) -> tuple[str | None, float | None]:
    return scored.found.letter, scored.found.number


def _scores(scored: Sequence[Scored]) -> list[float]:
    return [s.score for s in scored]


def _right(scored: Sequence[Scored]) -> list[bool]:
    return [s.correct for s in scored]


def _videos(scored: Sequence[Scored]) -> list[str]:
    return [s.prediction.video for s in scored]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _number(value: float) -> float | None:
    """JSON has no NaN: what is not known is null."""
    return None if math.isnan(value) else value
