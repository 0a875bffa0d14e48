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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mllm4d_jax.files.quoting import shown
from mllm4d_jax.qa.errors import SolutionError, did_you_mean
from mllm4d_jax.qa.options import split_label
from mllm4d_jax.qa.reasoning import MAX_METRES, Vec3, parse

COMPONENTS = ("accuracy", "format", "camera", "object")  # of the total, by the names of their shares
FORMAT_PARTS = ("tags", "centers", "length")


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
        """Return the `solution` field of a record: `{"answer", "camera_center", "object_center"}`, or a list of one.

        `answer` is a capital letter, or begins with one as in "A. text", "A: text" or "(A) text". A field of centres is
        a list of `[x, y, z]` or null per state, a single `[x, y, z]`, null or missing.

        Raises:
          SolutionError: anything else; says which field and what it holds.
        """
        fields = solution_fields(value)
        answer = fields.get("answer")
        labelled = split_label(answer) if isinstance(answer, str) else None
        if labelled is None:
            raise SolutionError(
                f"'solution.answer' must be a capital letter or begin as in 'A. text', not {shown(answer)}"
            )
        return cls(labelled[0], _states(fields, "camera_center"), _states(fields, "object_center"))


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
        for names in (COMPONENTS, FORMAT_PARTS):
            shares = {name: getattr(self, name) for name in names}
            if not all(math.isfinite(s) and s >= 0 for s in shares.values()) or math.fsum(shares.values()) > 1 + 1e-9:
                listed = ", ".join(f"{name}={share}" for name, share in shares.items())
                raise ValueError(f"reward weights must not be negative and sum to at most 1: {listed}")


PRESETS: Mapping[str, RewardWeights] = {
    "paper": RewardWeights(accuracy=0.5, format=0.2, camera=0.15, object=0.15, tags=0.5, centers=0.5),
    "release": RewardWeights(
        accuracy=0.6, format=0.2, camera=0.1, object=0.1, tags=0.5, centers=0.4, length=0.1, null_counts=False
    ),
}


def resolve_weights(preset: str | RewardWeights) -> RewardWeights:
    """Return weights by the name of a preset; weights are passed through. Raises ValueError for an unknown name."""
    if isinstance(preset, RewardWeights):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"no reward preset {preset!r} (known: {', '.join(PRESETS)}){did_you_mean(preset, PRESETS)}")
    return PRESETS[preset]


def score(
    completion: str, solution: Solution | Mapping[str, Any] | Sequence[Any], preset: str | RewardWeights = "paper"
) -> dict[str, float]:
    """Return rewards in [0, 1]: accuracy, format, camera, object, total; tags, centers, length.

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
    parsed, weights = parse(completion), resolve_weights(preset)
    tags = parsed.well_formed if weights.strict_tags else None not in (parsed.thinking, parsed.answer)
    nulls = weights.null_counts
    camera, camera_written = _kind(parsed.camera_centers, parsed.malformed_cameras, solution.camera_center, nulls)
    objects, object_written = _kind(parsed.object_centers, parsed.malformed_objects, solution.object_center, nulls)
    parts = {
        "accuracy": float(parsed.answers_agree and parsed.answer == solution.answer),
        "camera": camera,
        "object": objects,
        "tags": float(tags),
        "centers": float(camera_written and object_written),
        "length": float(len(parsed.thinking or "") > weights.min_thinking_chars),
    }
    parts["format"] = _weighted(parts, weights, FORMAT_PARTS)
    parts["total"] = _weighted(parts, weights, COMPONENTS)
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


def solution_fields(value: Any) -> Mapping[str, Any]:
    """Return the object in a record's `solution`, which is it or a list of it. Raises SolutionError for others."""
    if _is_list(value):
        if len(value) != 1:
            raise SolutionError(f"'solution' must be one object, or a list of one; it has {len(value)} entries")
        value = value[0]
    if not isinstance(value, Mapping):
        raise SolutionError(f"'solution' must be an object with 'answer', not {shown(value)}")
    return value


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def is_metres(value: Any) -> bool:
    """Return whether a JSON value is a number of metres: finite, and of a place that can be in a video."""
    return is_number(value) and abs(value) <= MAX_METRES


def is_point(value: Any) -> bool:
    """Return whether a JSON value is a list of three numbers of metres."""
    return _is_list(value) and len(value) == 3 and all(map(is_metres, value))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _states(solution: Mapping[str, Any], field: str) -> tuple[Vec3 | None, ...]:
    centers = solution.get(field)
    if centers is None:
        return ()
    if not _is_list(centers):
        raise SolutionError(f"'solution.{field}' must be a list with one entry per state, not {shown(centers)}")
    if is_point(centers):
        centers = [centers]
    wrong = next((center for center in centers if center is not None and not is_point(center)), None)
    if wrong is not None:
        raise SolutionError(
            f"'solution.{field}' holds {shown(wrong)}, which is neither null nor three finite numbers of metres (of "
            f"{MAX_METRES:g} at most)"
        )
    return tuple(center if center is None else tuple(float(x) for x in center) for center in centers)
