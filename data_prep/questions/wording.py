"""How questions are said: phrasings per relation, and what an object may be called.

No phrasing favours an answer: it names all the directions it asks about or none, and which phrasing is used has nothing
to do with the answer. Names that give an answer away ("the man walking left") are not used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from data_prep.scenes.scene import Scene

MAX_NAME = 160

# {a}: between / from the two frames; {i}, {j}: their numbers in the clip as the model sees it; {o}: the object.
ANCHORS = (
    "between frame {i} and frame {j} of {last}",
    "from frame {i} to frame {j} of {last}",
    "going from frame {i} to frame {j} (the last frame is {last})",
    "over the stretch from frame {i} until frame {j} of {last}",
)
PHRASINGS: Mapping[str, tuple[str, ...]] = {
    "camera_absolute_distance": (
        "What is the straight-line distance in metres between the camera's first and last position {a}?",
        "By how many metres does the camera change its position {a}, measured in a straight line?",
        "Measured in a straight line, how many metres apart are the start and the end of the camera's path {a}?",
        "Estimate the camera's net displacement in metres {a}.",
        "Looking only at where the camera starts and ends {a}, how many metres lie between the two places?",
    ),
    "camera_relative_direction": (
        "Seen from the camera's own pose at frame {i}, in which main direction does the camera move {a}?",
        "Which direction describes the camera's movement {a} best, in terms of how it was oriented at frame {i}?",
        "Taking the view at frame {i} as reference, where does the camera mainly go {a}?",
        "Along which direction, relative to its orientation at frame {i}, is the camera displaced most {a}?",
        "What is the dominant direction of the camera's own motion {a}, judged in the axes of frame {i}?",
    ),
    "object_absolute_distance": (
        "How many metres is {o} displaced in the scene {a}, in a straight line?",
        "What is the straight-line distance, in metres, between the places where {o} is at both ends {a}?",
        "Leaving the camera's own motion aside, by how many metres does {o} change its position {a}?",
        "Estimate the net displacement of {o} in the scene, in metres, {a}.",
        "In the static surroundings, how many metres separate the first and the last position of {o} {a}?",
    ),
    "object_camera_absolute_distance": (
        "How many metres are there from the camera's position at frame {i} to {o} at frame {j} (frames 0 to {last})?",
        "Measured from where the camera is at frame {i}, how far in metres is {o} at frame {j} of {last}?",
        "What is the distance in metres between the camera's place at frame {i} and {o} at frame {j} of {last}?",
        "If the camera stayed where it was at frame {i}, how many metres from it would {o} be at frame {j} of {last}?",
        "Estimate, in metres, how far {o} at frame {j} of {last} is from the camera's place at frame {i}.",
    ),
    "object_camera_relative_distance": (
        "How does the distance between the camera and {o} change {a}?",
        "Considering the motion of both, what becomes of the distance from the camera to {o} {a}?",
        "Compare the distance of {o} to the camera at both frames: what happens to it {a}?",
        "As the camera sees it at both frames, how does the distance of {o} develop {a}?",
        "What is true of how far {o} is from the camera {a}?",
    ),
    "object_camera_lateral_direction": (
        "From the viewpoint of frame {i}, how does {o} move sideways {a}?",
        "Keeping the camera as it was at frame {i}, what is the sideways motion of {o} {a}?",
        "Judged in the view of frame {i}, which sideways displacement does {o} have {a}?",
        "Leaving the camera's own motion aside, how is {o} displaced across the view of frame {i} {a}?",
        "In the horizontal axis of the camera at frame {i}, where does {o} go {a}?",
    ),
    "object_camera_longitudinal_direction": (
        "From the viewpoint of frame {i}, how does {o} move along the viewing direction {a}?",
        "Keeping the camera as it was at frame {i}, how does the depth of {o} change {a}?",
        "Judged in the view of frame {i}, which displacement in depth does {o} have {a}?",
        "Leaving the camera's own motion aside, how is {o} displaced along the line of sight of frame {i} {a}?",
        "In the depth axis of the camera at frame {i}, where does {o} go {a}?",
    ),
}
NUMBERING = "Frames are counted from 0."

# Words of a description that tell, or seem to tell, how the object or the camera moves.
TELLING = frozenset(
    """left right up upward upwards down downward downwards forward forwards backward backwards ahead closer nearer
    farther further toward towards away approaching approaches receding leaving coming going moving moves motion
    stationary static still motionless unmoving parked standing sitting sits stands walking walks running runs
    driving drives riding rides flying flies rolling rolls sliding slides jumping dancing crossing turning metre
    metres meter meters""".split()
)
_WORD = re.compile(r"[^\W\d_]+")
_CONTROL = re.compile(r"[<>\x00-\x1f\x7f\u2028\u2029\ud800-\udfff]")
_ARTICLE = re.compile(r"^(?:the|an?)\s+", re.IGNORECASE)


def question_text(relation: str, phrasing: int, anchor: int, i: int, j: int, last: int, name: str = "") -> str:
    """One question. Frame numbers count the frames the model sees, from 0 to `last`.

    Args:
      phrasing: index into `PHRASINGS[relation]`; anchor: index into `ANCHORS`.
      name: what the object is called, '' for the camera's relations.
    """
    where = ANCHORS[anchor].format(i=i, j=j, last=last)
    return f"{PHRASINGS[relation][phrasing].format(a=where, i=i, j=j, last=last, o=name)} {NUMBERING}"


def spoken_name(text: str) -> str:
    """A description as it fits into a sentence ("A red box." -> "the red box"), '' if it must not be used.

    Refused: empty, longer than `MAX_NAME`, control characters or angle brackets (which could pass for a placeholder),
    and any word of `TELLING`.
    """
    text = " ".join(text.split()).rstrip(".,;:!? ")
    if not text or len(text) > MAX_NAME or _CONTROL.search(text):
        return ""
    if not TELLING.isdisjoint(word.lower() for word in _WORD.findall(text)):
        return ""
    return "the " + _ARTICLE.sub("", text)


def object_names(scene: Scene) -> dict[str, str]:
    """object_id -> what it is called; objects that cannot be told apart by a harmless name are left out.

    The description is preferred; the category stands in when the description gives answers away. A name that two
    objects of the clip could go by names neither.
    """
    choices = {o.object_id: (spoken_name(o.description), spoken_name(o.category)) for o in scene.objects}
    taken = Counter(name.lower() for pair in choices.values() for name in set(pair) if name)
    names = {i: next((n for n in pair if n and taken[n.lower()] == 1), "") for i, pair in choices.items()}
    return {object_id: name for object_id, name in names.items() if name}
