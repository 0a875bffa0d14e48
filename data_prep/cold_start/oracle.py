"""A teacher without a model: writes spatio-temporal reasoning from what was measured. For data with exact truth.

Every figure in the text follows from the record: the two states are its centres as written, displacements and lengths
are computed from those, and what the states cannot give (distances to the nearest visible point, components in the axes
of the camera at the start frame) is the measured value, said to be an estimate. A record whose figures contradict each
other is refused rather than explained.
"""

from __future__ import annotations

import hashlib
import math

from data_prep.cold_start import oracle_wording as wording
from data_prep.cold_start.r1_items import R1Question
from data_prep.questions.scenarios import SCENARIOS
from data_prep.questions.wording import brief_reasoning, brief_state, found_text, state_block, vector_text
from data_prep.scenes.relations import CAMERA_DIRECTIONS, LABELS
from data_prep.store.parts import ClipRejected

Vec3 = tuple[float, float, float]

DECIMALS = 3  # of written centres; the curated solutions have as many
TOLERANCE = 0.01  # metres by which centres and measured value may differ, for rounding
STILL = 0.05  # metres; a shorter way is not worth a direction
_TOWARDS = (("right (+X)", "left (-X)"), ("down (+Y)", "up (-Y)"), ("forward (+Z)", "backward (-Z)"))


def missing_fields(item: R1Question) -> list[str]:
    """Return the keys of the record that `compose` needs and the item does not have."""
    needs_object = item.scenario.startswith("object_")
    needed = {
        "question_type": item.scenario in SCENARIOS,
        "frames": item.frames is not None,
        "value": item.value is not None,
        "label": bool(item.label) or not LABELS.get(item.scenario),
        "object_name": bool(item.object_name.strip()) or not needs_object,
        "messages (options)": item.solution.answer in item.options,
    }
    return [key for key, there in needed.items() if not there]


def compose(item: R1Question, path: int, seed: int) -> str:
    """Return a whole completion for an item: five steps in the thinking, then the answer.

    The text is a function of (item, path, seed). Two paths with numbers below 4^5 differ in at least one sentence, the
    first four in every sentence.

    Raises:
      ClipRejected: "oracle_fields" (something is not in the record), "oracle_centers" (a centre that the relation needs
        is null), "oracle_contradiction" (centres, value, label and answer do not fit together).
    """
    missing = missing_fields(item)
    if missing:
        raise ClipRejected("oracle_fields", f"the oracle needs {', '.join(missing)}", item.source_id)
    camera = _pair(item, "camera_center")
    thing = _pair(item, "object_center") if item.scenario.startswith("object_") else (None, None)
    fields = _fields(item, camera, thing)
    numbers = _choices(item.id, path, seed)
    tables = (
        wording.GOAL[item.scenario],
        wording.START,
        wording.EVIDENCE[item.scenario],
        wording.END,
        wording.SYNTHESIS[item.scenario],
        wording.CLOSING,
    )
    goal, start, evidence, end, synthesis, closing = (
        table[number].format_map(fields) for table, number in zip(tables, numbers, strict=True)
    )
    thinking = "\n\n".join(
        (
            _capital(goal),
            f"{start}\n{state_block('start frame', camera[0], thing[0], DECIMALS)}",
            _capital(evidence),
            f"{end}\n{state_block('end frame', camera[1], thing[1], DECIMALS)}",
            f"{_capital(synthesis)} {closing}",
        )
    )
    return f"<thinking>{thinking}</thinking><answer>{item.solution.answer}</answer>"


def compose_brief(item: R1Question) -> str:
    """Return the shortest completion with both spatial states: the states, what they come to, and the option.

    For models too small for sentences.

    Raises:
      ClipRejected: as `compose`.
    """
    missing = missing_fields(item)
    if missing:
        raise ClipRejected("oracle_fields", f"the oracle needs {', '.join(missing)}", item.source_id)
    camera = _pair(item, "camera_center")
    thing = _pair(item, "object_center") if item.scenario.startswith("object_") else (None, None)
    _fields(item, camera, thing)  # refuses figures that contradict each other
    states = [brief_state(*state) for state in zip(item.frames[:2], camera, thing, strict=True)]
    answer = item.solution.answer
    return brief_reasoning(states, found_text(item.label, item.value, item.options[answer]), answer)


def _pair(item: R1Question, kind: str) -> tuple[Vec3, Vec3]:
    """Return both centres of a kind, rounded as they are written: what is computed from them must fit what is read."""
    centers = getattr(item.solution, kind)
    if len(centers) != 2 or None in centers:
        raise ClipRejected("oracle_centers", f"'solution.{kind}' must have a centre at both states", item.source_id)
    start, end = (tuple(round(x, DECIMALS) + 0.0 for x in center) for center in centers)
    return start, end


def _fields(item: R1Question, camera: tuple[Vec3, Vec3], thing: tuple[Vec3 | None, Vec3 | None]) -> dict[str, str]:
    """Return what the phrases are filled with; see `oracle_wording`."""
    travel = _minus(camera[1], camera[0])
    shift = _minus(thing[1], thing[0]) if thing[0] else None
    if item.scenario == "object_camera_absolute_distance":
        shown = _minus(thing[1], camera[0])
    else:
        shown = travel if item.scenario.startswith("camera_") else shift
    _check(item, shown)
    name = item.object_name
    sight, verdict = _outcome(item, travel)
    fields = {
        "i": str(item.frames[0]),
        "j": str(item.frames[1]),
        "o": name,
        "cam": _clause("the camera", travel, "hardly changes its place", "travels"),
        "d": vector_text(shown, DECIMALS),
        "n": f"{math.hypot(*shown):.2f}",
        "letter": item.solution.answer,
        "text": _option(item),
        "v": _value(item),
        "sight": sight.format(o=name),
        "verdict": verdict,
    }
    if shift is not None:
        fields["obj"] = _clause(f"the position of {name}", shift, "hardly changes", "shifts")
        fields["before"], fields["after"] = (f"{math.dist(c, o):.2f}" for c, o in zip(camera, thing, strict=True))
    return fields


def _check(item: R1Question, shown: Vec3) -> None:
    """Raises ClipRejected unless value, label, options and displacement tell the same story."""
    scenario, value, length = item.scenario, item.value, math.hypot(*shown)

    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise ClipRejected("oracle_contradiction", f"{what} (value {value}, displacement {shown})", item.source_id)

    demand(isinstance(value, tuple) == (scenario == "camera_relative_direction"), "the value has the wrong form")
    if isinstance(value, tuple):
        demand(abs(math.hypot(*value) - length) <= TOLERANCE, "the value's length is not that of the displacement")
        axis = max(range(3), key=lambda n: abs(value[n]))
        wanted = CAMERA_DIRECTIONS[2 * axis + (value[axis] < 0)]
        demand(item.label == wanted, f"the value's main direction is {wanted}, the label {item.label!r}")
    elif LABELS[scenario]:
        positive, negative, _ = LABELS[scenario]
        possible = {positive: value > 0, negative: value < 0}.get(item.label, item.label in LABELS[scenario])
        demand(possible, f"the label {item.label!r} does not fit the value")
    if scenario in ("object_camera_lateral_direction", "object_camera_longitudinal_direction"):
        demand(abs(value) <= length + TOLERANCE, "a component is longer than the displacement")
    if scenario in ("camera_absolute_distance", "object_absolute_distance"):
        demand(abs(value - length) <= TOLERANCE, "the value is not the length of the displacement")
    if LABELS[scenario]:
        demand(item.label == item.options[item.solution.answer], "the answer's option is not the label")
    else:
        demand(_nearest_option(item) == item.solution.answer, "the answer's option is not the nearest to the value")


def _nearest_option(item: R1Question) -> str:
    try:
        return min(item.options, key=lambda letter: abs(float(item.options[letter].split()[0]) - item.value))
    except ValueError:
        return ""


def _option(item: R1Question) -> str:
    text = item.options[item.solution.answer]
    return text if LABELS[item.scenario] or not text[-1:].isdigit() else f"{text} m"


def _value(item: R1Question) -> str:
    if isinstance(item.value, tuple):
        return vector_text(item.value, 2)
    signed = item.scenario != "object_camera_absolute_distance"
    return f"{round(item.value, 2) + 0.0:{'+' if signed else ''}.2f}"


def _outcome(item: R1Question, travel: Vec3) -> tuple[str, str]:
    """Return what is seen of the answer, and what the measured value means; '' where the scenario says neither."""
    if item.scenario == "camera_relative_direction":
        axis = CAMERA_DIRECTIONS.index(item.label) // 2
        verdict = f"the {'xyz'[axis]} component, {item.value[axis]:+.2f}, outweighs the others: {item.label}"
        return wording.CAMERA_SIGHT[item.label], verdict
    if item.scenario == "camera_absolute_distance":
        moved = math.hypot(*travel) >= STILL
        return "nearby surfaces shift against distant ones" if moved else "hardly any parallax shows", ""
    return wording.OBJECT_SIGHT.get(item.scenario, {}).get(item.label, ("", ""))


def _clause(who: str, displacement: Vec3, still: str, verb: str) -> str:
    """ "the camera travels mostly forward (+Z)": the main direction in the fixed axes, and a second if it is large."""
    if math.hypot(*displacement) < STILL:
        return f"{who} {still}"
    order = sorted(range(3), key=lambda n: -abs(displacement[n]))
    first, second = (_TOWARDS[n][displacement[n] < 0] for n in order[:2])
    if abs(displacement[order[1]]) >= 0.5 * abs(displacement[order[0]]):
        return f"{who} {verb} {first} and {second} in the fixed axes"
    return f"{who} {verb} mostly {first} in the fixed axes"


def _choices(item_id: str, path: int, seed: int) -> list[int]:
    """Return a phrasing per step, from a start of its own: the path's number and its digit s to base `VARIANTS` on."""
    base, steps = wording.VARIANTS, ("step 0", "step 1", "step 2", "step 3", "step 4", "closing")
    digits = [0, *(path // base**step for step in range(1, 5)), 0]
    starts = [_hash(item_id, seed, step) for step in steps]
    return [(start + path + digit) % base for start, digit in zip(starts, digits, strict=True)]


def _hash(item_id: str, seed: int, what: str) -> int:
    digest = hashlib.sha256(f"{seed}\0{item_id}\0{what}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def _minus(end: Vec3, start: Vec3) -> Vec3:
    x, y, z = (round(a - b, DECIMALS) + 0.0 for a, b in zip(end, start, strict=True))
    return x, y, z


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
