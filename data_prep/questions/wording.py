"""How questions are said, phrasings per relation, and what a short answer says before its letter.

No phrasing favours an answer: it names all the directions it asks about or none, and which phrasing is used has nothing
to do with the answer. Any anchor fits any phrasing, and no verb depends on the number of objects ("the two men").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from data_prep.scenes.relations import LABELS, NOT_MOVING, RelationRules

# {a}: between / from the two frames; {i}, {j}: their numbers in the clip as the model sees it; {o}: the object.
ANCHORS = (
    "between frame {i} and frame {j} of {last}",
    "from frame {i} to frame {j} of {last}",
    "between frame {i} and frame {j} (the last frame is {last})",
    "in the time from frame {i} to frame {j} of {last}",
)
PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "camera_absolute_distance": (
        "How far does the camera move {a}, in metres, measured in a straight line?",
        "By how many metres does the camera's position change {a}, measured in a straight line?",
        "What is the length of the camera's net displacement {a}, in metres?",
        "Estimate the camera's net displacement {a}, in metres.",
        "Counting only where it starts and where it ends, how many metres does the camera move {a}?",
    ),
    "camera_relative_direction": (
        "Seen from the camera's own pose at frame {i}, in which main direction does the camera move {a}?",
        "In which direction does the camera mainly move {a}, relative to how it is oriented at frame {i}?",
        "Taking the view at frame {i} as the reference, where does the camera mainly go {a}?",
        "Relative to its orientation at frame {i}, along which direction is the camera displaced most {a}?",
        "What is the main direction of the camera's own motion {a}, judged in the camera axes of frame {i}?",
    ),
    "object_absolute_distance": (
        "By how many metres does the position of {o} in the scene change {a}, measured in a straight line?",
        "What is the net displacement of {o} in the scene {a}, in metres?",
        "Leaving the camera's own motion aside, by how many metres does the position of {o} change {a}?",
        "Estimate in metres the straight-line displacement of {o} in the scene {a}.",
        "Relative to the static surroundings, by how many metres does the position of {o} shift {a}?",
    ),
    "object_camera_absolute_distance": (
        "How many metres is it from the camera's position at frame {i} to the nearest visible point of {o} at frame "
        "{j} (frames 0 to {last})?",
        "Measured from where the camera is at frame {i}, how far in metres is the nearest visible point of {o} at "
        "frame {j} of {last}?",
        "What is the distance in metres between the camera's position at frame {i} and the nearest visible point of "
        "{o} at frame {j} of {last}?",
        "If the camera had stayed where it was at frame {i}, how many metres away would the nearest visible point of "
        "{o} be at frame {j} of {last}?",
        "Estimate in metres how far the nearest visible point of {o} at frame {j} of {last} is from the camera's "
        "position at frame {i}.",
    ),
    "object_camera_relative_distance": (
        "How does the distance between the camera and the nearest visible point of {o} change {a}?",
        "With the motion of both taken into account, how does the distance from the camera to the nearest visible "
        "point of {o} change {a}?",
        "Measured to the nearest visible point, how does the distance of {o} from the camera change {a}?",
        "Compare the distance from the camera to the nearest visible point of {o} at both frames: how does it change "
        "{a}?",
        "What happens to the distance between the camera and the nearest visible point of {o} {a}?",
    ),
    "object_camera_lateral_direction": (
        "From the viewpoint of frame {i}, how does the position of {o} change sideways {a}?",
        "With the camera held as it is at frame {i}, what is the sideways motion of {o} {a}?",
        "Judged in the view of frame {i}, how does the position of {o} shift sideways {a}?",
        "Leaving the camera's own motion aside and keeping the view of frame {i}, what is the sideways displacement "
        "of {o} {a}?",
        "Along the horizontal axis of the camera at frame {i}, how does the position of {o} change {a}?",
    ),
    "object_camera_longitudinal_direction": (
        "From the viewpoint of frame {i}, how does the position of {o} along the viewing direction change {a}?",
        "With the camera held as it is at frame {i}, how does the depth of {o} change {a}?",
        "Judged in the view of frame {i}, how does the position of {o} shift in depth {a}?",
        "Leaving the camera's own motion aside and keeping the view of frame {i}, what is the displacement in depth "
        "of {o} {a}?",
        "Along the depth axis of the camera at frame {i}, how does the position of {o} change {a}?",
    ),
}
NUMBERING = "Frames are counted from 0."
# For relations that know "not moving"; names no answer, since it stands below each of their questions.
THRESHOLD = "A change of less than {tau} counts as no motion."


def question_text(
    relation: str, phrasing: int, anchor: int, i: int, j: int, last: int, name: str = "", tau: float = RelationRules.tau
) -> str:
    """One question. Frame numbers count the frames the model sees, from 0 to `last`.

    Args:
      phrasing: index into `PHRASINGS[relation]`; anchor: index into `ANCHORS`.
      name: what the object is called, '' for the camera's relations.
      tau: metres below which the rules take a change for "not moving".
    """
    where = ANCHORS[anchor].format(i=i, j=j, last=last)
    text = f"{PHRASINGS[relation][phrasing].format(a=where, i=i, j=j, last=last, o=name)} {NUMBERING}"
    return f"{text} {THRESHOLD.format(tau=_length(tau))}" if NOT_MOVING in LABELS[relation] else text


def found_text(label: str, value: float, option: str) -> str:
    """Return what was found: a label, or a figure, metres, and the option that is nearest to it.

    A reader that says the option first finds its letter by looking for the same text again. A label has no figure
    before it: a tiny model that cannot subtract says the wrong one behind a wrong figure (benchmarks/RESULTS.md).
    """
    return label or f"{value:.1f}: {option}"


def short_reasoning(found: str, letter: str) -> str:
    """Return the shortest response with its reason: what was found, the option that is nearest to it, the answer."""
    return f"<thinking>{found}: {letter}</thinking><answer>{letter}</answer>"


def brief_reasoning(states: Sequence[str], found: str, letter: str) -> str:
    """Return `short_reasoning` with the spatial states (`state_block`) from which it follows before it."""
    return short_reasoning("".join(f"{state}\n" for state in states) + found, letter)


def state_block(title: str, camera: Sequence[float] | None, thing: Sequence[float] | None, decimals: int) -> str:
    """Return a spatial state as the reasoning prompt demands it (`mllm4d_jax.qa.system_prompt.ST_COT`).

    Args:
      camera, thing: centres, metres; None is written as null.
    """
    camera_center, object_center = (vector_text(center, decimals) for center in (camera, thing))
    return f"**Spatial State ({title}):**\n- Camera Center: {camera_center}\n- Object Center: {object_center}"


def brief_state(frame: int, camera: Sequence[float] | None, thing: Sequence[float] | None) -> str:
    """Return a spatial state as models too small for sentences write it: its frame, centres with one decimal.

    The reward of reinforcement learning forgives what that rounds away.
    """
    return state_block(f"frame {frame}", camera, thing, 1)


def vector_text(values: Sequence[float] | None, decimals: int) -> str:
    """Return "[x, y, z]", or "null" for None; there is no negative zero."""
    if values is None:
        return "null"
    return "[" + ", ".join(f"{round(x, decimals) + 0.0:.{decimals}f}" for x in values) + "]"


def _length(metres: float) -> str:
    return f"{100 * metres:.6g} cm" if metres < 1 else f"{metres:.6g} m"
