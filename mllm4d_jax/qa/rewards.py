"""The spatio-temporal reward of MLLM-4D (arXiv 2603.00515): answer, form, and the 3D states written in the thinking.

Plain Python without JAX, so that data preparation scores reasoning paths with the very same rules.

| component | is 1 when | share in `paper` | share in `release` |
|---|---|---|---|
| accuracy | the answer is the solution's letter | .5 | .6 |
| tags | a closed thinking block and a closed answer block exist | .2 x .5 | .2 x .5 |
| centers | both kinds of centre are written | .2 x .5 | .2 x .4 |
| length | the thinking has more than 20 characters | 0 | .2 x .1 |
| camera | exp(-mean distance in metres) of the camera centres | .3 x .5 | .1 |
| object | the same of the object centres | .3 x .5 | .1 |

`format` is the weighted sum of tags, centers and length.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mllm4d_jax.qa.reasoning import ParsedReasoning, Vec3, parse

__all__ = [
    "PRESETS",
    "ParsedReasoning",
    "RewardWeights",
    "Solution",
    "SolutionError",
    "parse",
    "resolve_weights",
    "score",
    "score_parsed",
]

_LETTER = re.compile(r"\(([A-Z])\).*|([A-Z])(?:[.:)].*)?", re.DOTALL)


class SolutionError(ValueError):
    """The solution of a record cannot be used."""


@dataclass(frozen=True)
class Solution:
    """Ground truth of one question.

    Attributes:
      answer: the text that `<answer>` must hold, as a rule one letter.
      camera_center: metres, one entry per state (start frame, end frame); None where the state has no camera centre.
        Empty: the question has none.
      object_center: likewise.
    """

    answer: str
    camera_center: tuple[Vec3 | None, ...] = ()
    object_center: tuple[Vec3 | None, ...] = ()

    @classmethod
    def from_record(cls, value: Mapping[str, Any] | Sequence[Any]) -> Self:
        """The `solution` field of a record: `{"answer", "camera_center", "object_center"}`, or a list of one such.

        `answer` is a capital letter, or begins with one as in "A. text", "A: text" or "(A) text". A field of centres is
        a list of `[x, y, z]` or null per state, a single `[x, y, z]`, null or missing.

        Raises:
          SolutionError: anything else; says which field and what it holds.
        """
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            if len(value) != 1:
                raise SolutionError(f"'solution' must be one object, or a list of one; it has {len(value)} entries")
            value = value[0]
        if not isinstance(value, Mapping):
            raise SolutionError(f"'solution' must be an object with 'answer', not {_shown(value)}")
        return cls(
            _letter(value.get("answer")),
            _states("camera_center", value.get("camera_center")),
            _states("object_center", value.get("object_center")),
        )


@dataclass(frozen=True)
class RewardWeights:
    """Shares of the components and the rules on which the two presets differ. Variants: `dataclasses.replace`.

    Attributes:
      accuracy, format, camera, object: shares in the total; they sum to at most 1.
      tags, centers, length: shares in `format`; they sum to at most 1.
      min_thinking_chars: `length` is earned by a thinking of more characters than this, stripped.
      null_counts: for `centers`, a kind that the question does not use counts as written if the completion says so
        with `null` alone. Without it, as in the release, only brackets count: then the best completion for such a
        question earns 1 - format x centers, because made-up centres would cost more.
      strict_tags: `tags` asks for thinking, then answer, once each, with nothing around them.
    """

    accuracy: float
    format: float
    camera: float
    object: float
    tags: float
    centers: float
    length: float = 0.0
    min_thinking_chars: int = 20
    null_counts: bool = True
    strict_tags: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for shares that would take the total out of [0, 1]."""
        for names in (("accuracy", "format", "camera", "object"), ("tags", "centers", "length")):
            shares = [getattr(self, name) for name in names]
            if not all(math.isfinite(s) and s >= 0 for s in shares) or math.fsum(shares) > 1 + 1e-9:
                shown = ", ".join(f"{n}={s}" for n, s in zip(names, shares, strict=True))
                raise ValueError(f"reward weights must not be negative and sum to at most 1: {shown}")


PRESETS: Mapping[str, RewardWeights] = {
    "paper": RewardWeights(accuracy=0.5, format=0.2, camera=0.15, object=0.15, tags=0.5, centers=0.5),
    "release": RewardWeights(
        accuracy=0.6, format=0.2, camera=0.1, object=0.1, tags=0.5, centers=0.4, length=0.1, null_counts=False
    ),
}


def resolve_weights(preset: str | RewardWeights) -> RewardWeights:
    """Weights by the name of a preset; weights are passed through. Raises ValueError for an unknown name."""
    if isinstance(preset, RewardWeights):
        return preset
    if preset not in PRESETS:
        near = difflib.get_close_matches(str(preset), PRESETS, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no reward preset {preset!r} (known: {', '.join(PRESETS)}){hint}")
    return PRESETS[preset]


def score(
    completion: str,
    solution: Solution | Mapping[str, Any] | Sequence[Any],
    preset: str | RewardWeights = "paper",
) -> dict[str, float]:
    """Reward of a completion, each value in [0, 1]: accuracy, format, camera, object, total; tags, centers, length.

    - accuracy: the stripped text of `<answer>` equals the solution's answer, character by character, in both presets:
      "A.", "(A)", "a" and "A. left" are wrong for "A", since the prompt asks for the letter only. Several answer
      blocks count only if all say the same; otherwise listing every letter would always be right.
    - camera, object: exp(-mean ||p - g||) over the centres in the order written, nulls skipped. Where as many
      centres are written as the solution has states, null must also stand against null. 1 if there is nothing to
      predict and nothing is predicted, 0 for another number of centres or if one of the kind is malformed.
    - centers: camera and object are both written: at least one in brackets, none malformed (see `null_counts`).

    Raises:
      SolutionError, ValueError: the solution or the preset is wrong; never because of the completion.
    """
    solution = solution if isinstance(solution, Solution) else Solution.from_record(solution)
    return score_parsed(parse(completion), solution, resolve_weights(preset))


def score_parsed(parsed: ParsedReasoning, solution: Solution, weights: RewardWeights) -> dict[str, float]:
    """`score` for a completion that is already taken apart."""
    tags = parsed.well_formed if weights.strict_tags else parsed.has_thinking and parsed.has_answer
    nulls = weights.null_counts
    camera, camera_written = _kind(parsed.camera_centers, parsed.malformed_cameras, solution.camera_center, nulls)
    objects, object_written = _kind(parsed.object_centers, parsed.malformed_objects, solution.object_center, nulls)
    parts = {
        "accuracy": float(parsed.has_answer and parsed.answers_agree and parsed.answer == solution.answer),
        "camera": camera,
        "object": objects,
        "tags": float(tags),
        "centers": float(camera_written and object_written),
        "length": float(len(parsed.thinking or "") > weights.min_thinking_chars),
    }
    parts["format"] = _weighted(parts, weights, ("tags", "centers", "length"))
    parts["total"] = _weighted(parts, weights, ("accuracy", "format", "camera", "object"))
    return parts


def _weighted(parts: Mapping[str, float], weights: RewardWeights, names: Sequence[str]) -> float:
    # Shares sum to 1 only up to rounding.
    return min(1.0, math.fsum(getattr(weights, name) * parts[name] for name in names))


def _kind(
    written: Sequence[Vec3 | None], malformed: int, truth: Sequence[Vec3 | None], null_counts: bool
) -> tuple[float, bool]:
    """Closeness of one kind of centre, and whether it earns the `centers` credit."""
    if malformed:
        return 0.0, False
    rightly_null = bool(written) and not _values(written) and not _values(truth)
    return _closeness(written, truth), bool(_values(written)) or (null_counts and rightly_null)


def _closeness(written: Sequence[Vec3 | None], truth: Sequence[Vec3 | None]) -> float:
    """exp(-mean distance) of centres in order; 0 if they cannot be matched one to one."""
    if len(written) == len(truth) and any((p is None) != (g is None) for p, g in zip(written, truth, strict=True)):
        return 0.0
    predicted, wanted = _values(written), _values(truth)
    if len(predicted) != len(wanted):
        return 0.0
    if not wanted:
        return 1.0
    distances = [math.dist(p, g) for p, g in zip(predicted, wanted, strict=True)]
    return math.exp(-math.fsum(distances) / len(distances))


def _values(centers: Sequence[Vec3 | None]) -> list[Vec3]:
    return [center for center in centers if center is not None]


def _letter(answer: Any) -> str:
    match = _LETTER.fullmatch(answer.strip()) if isinstance(answer, str) else None
    if not match:
        raise SolutionError(
            f"'solution.answer' must be a capital letter or begin as in 'A. text', not {_shown(answer)}"
        )
    return match[1] or match[2]


def _states(field: str, centers: Any) -> tuple[Vec3 | None, ...]:
    if centers is None:
        return ()
    if not isinstance(centers, Sequence) or isinstance(centers, str | bytes):
        raise SolutionError(f"'solution.{field}' must be a list with one entry per state, not {_shown(centers)}")
    if _is_point(centers):
        centers = [centers]
    for center in centers:
        if center is not None and not _is_point(center):
            raise SolutionError(
                f"'solution.{field}' holds {_shown(center)}, which is neither null nor three finite numbers"
            )
    return tuple(center if center is None else tuple(float(x) for x in center) for center in centers)


def _is_point(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != 3:
        return False
    try:
        return all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _shown(value: Any) -> str:
    """A value for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
