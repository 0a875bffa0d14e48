"""Scene -> questions with options and answers. Deterministic by (seed, clip), whatever the order or number of workers.

Seven scenarios make the six subtasks of the benchmark (the last has two). Distances and the camera's direction have
four options; where the relation knows three outcomes there are three, because a fourth would never be right.

Frames are named by their number in the clip as the model sees it (`frame_numbers`), counted from 0; the record's
`frames` maps them to frames of the source clip.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.questions.names import object_names
from data_prep.questions.options import LETTERS, SHAPES, label_options, numeric_options, shuffle
from data_prep.questions.scenarios import SCENARIOS
from data_prep.questions.states import Pair, agreeing, in_axes, stated
from data_prep.questions.wording import (
    ANCHORS,
    PHRASINGS,
    brief_reasoning,
    brief_state,
    found_text,
    question_text,
    short_reasoning,
)
from data_prep.scenes.relations import LABELS, Refused, RelationRules, classes_of, measure_camera, measure_object
from data_prep.scenes.scene import Scene
from data_prep.store.parts import LostObject, lost_object
from mllm4d_jax.media.frame_sampling import nearest_in_time, sample_indices
from mllm4d_jax.qa.benchmarks import SUBTASKS
from mllm4d_jax.qa.options import lettered, write_question

ANSWERS = ("letter", "measured", "states")
QuestionRow = Mapping[str, Any]  # as `Question.record` makes it


@dataclasses.dataclass(frozen=True)
class QuestionRules(RelationRules):
    """What is asked about a clip, and when it has a clear answer (`RelationRules`)."""

    num_frames: int = 32  # frames the model sees (32 at most in the paper); a shorter clip is seen whole
    per_clip: int = 28  # most questions proposed for one clip
    pairs: int = 24  # frame pairs tried per clip
    min_gap: float = 0.1  # the two frames are at least this share of the clip apart
    options: str = "exchangeable"  # how distances get their options, a key of `options.SHAPES`
    # scenario -> ratio of neighbouring distances on offer; others have them as wide as the paper's bounds allow
    spacing: Mapping[str, float] = dataclasses.field(default_factory=dict)
    draws: int = 1  # how often a distance may be asked about, with options drawn anew
    answers: str = "letter"  # what training answers with, one of `ANSWERS`
    # scenario -> how often it is asked about, relative to the others; one that is not there is not asked about
    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(SCENARIOS, 1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frames < 2 or min(self.per_clip, self.pairs, self.draws) < 1 or not 0 <= self.min_gap < 1:
            least = "num_frames >= 2, per_clip, pairs, draws >= 1 and 0 <= min_gap < 1"
            raise ValueError(f"question rules need {least}: {self}")
        if self.options not in SHAPES:
            raise ValueError(f"options must be of {', '.join(SHAPES)}: {self}")
        if self.answers not in ANSWERS:
            raise ValueError(f"answers must be of {', '.join(ANSWERS)}: {self}")
        if not self.weights or not self.weights.keys() <= LABELS.keys() or not min(self.weights.values()) > 0:
            raise ValueError(f"weights must be above 0, of scenarios: {self}")


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
      id: "<clip_id>:<number>".
      scale: how far the metres can be trusted, of the scene: see `scene.SCALES`.
      scenario: one of `SCENARIOS`.
      text: the question, without options.
      options: texts in the order of the letters.
      answer: letter.
      label: the true label; "" for a distance.
      rank: of the truth among the options in ascending order; -1 for labels.
      value: what was measured, metres.
      motion: metres that the camera or the object asked about moved between the frames, the larger of them.
      template: "<phrasing>.<anchor>".
      reply: what the answer that is trained on says, one of `ANSWERS`.
      frames: (i, j) in the clip as seen; source: the same as frame numbers of the scene.
      count: frames the model sees.
      object_id: "" for the camera's relations.
      object_name: what the text calls the object ("the red box"); "" for the camera's relations.
      camera_center, object_center: (at i, at j), metres, in the axes of the camera at the first frame, which a viewer
        can know.
    """

    id: str
    clip_id: str
    source_id: str
    scale: str
    scenario: str
    text: str
    options: tuple[str, ...]
    answer: str
    label: str
    rank: int
    value: float | tuple[float, ...]
    motion: float
    template: str
    reply: str
    frames: tuple[int, int]
    source: tuple[int, int]
    count: int
    object_id: str
    object_name: str
    camera_center: tuple
    object_center: tuple

    @property
    def spoken(self) -> str:
        """The answer that is trained on: the letter, or what was measured before it, or the states before that.

        Who says first what he sees, and then which option is nearest, learns from every question what the value is, and
        not only which of four letters it is called.
        """
        found = found_text(self.label, self.value, self.options[LETTERS.index(self.answer)])
        if self.reply == "states":
            return brief_reasoning(self.states, found, self.answer)
        return short_reasoning(found, self.answer) if self.reply == "measured" else self.answer

    @property
    def states(self) -> tuple[str, str]:
        """Both spatial states as texts, centres with one decimal."""
        seen = zip(self.frames, self.camera_center, self.object_center, strict=True)
        return tuple(brief_state(*state) for state in seen)

    def record(self, video: str) -> dict[str, Any]:
        """Return a released conversation record, plus fields that its readers skip.

        Args:
          video: path of the clip, relative to the data root.
        """
        options = lettered(self.options)
        prompt = f"<video>\n{write_question(self.text, options)}"
        centers = {"camera_center": list(self.camera_center), "object_center": list(self.object_center)}
        return {
            "id": self.id,
            "source_id": self.source_id,
            "clip_id": self.clip_id,
            "scale": self.scale,
            "video": video,
            "conversations": [{"from": "user", "value": prompt}, {"from": "gpt", "value": self.spoken}],
            "question_type": self.scenario,
            "subtask": SUBTASKS[self.scenario],
            "question": self.text,
            "options": options,
            "answer": self.answer,
            "label": self.label,
            "rank": self.rank,
            "value": self.value,
            "motion": self.motion,
            "template": self.template,
            "object_id": self.object_id,
            "object_name": self.object_name,
            "frames": {"seen": list(self.frames), "source": list(self.source), "count": self.count},
            "solution": {"answer": self.answer, **centers},
        }


def frame_numbers(times: np.ndarray, num_frames: int) -> np.ndarray:
    """Return the scene frames that the model sees, i64[K], by the encoder's "uniform" rule: both ends included.

    Args:
      times: f64[T] seconds at which the frames of the clip show.
    """
    total = len(times)
    return nearest_in_time(times, sample_indices("uniform", total, 1.0, num_frames=min(total, num_frames)))


def propose(scene: Scene, rules: QuestionRules, seed: int) -> list[Question]:
    """Return the questions of `ask`."""
    return ask(scene, rules, seed)[0]


def asked_frames(times: np.ndarray, num_frames: int, min_gap: float) -> np.ndarray:
    """Return those of `frame_numbers` that a pair at least `min_gap` of the clip apart can have, i64[A], ascending.

    Args:
      times: f64[T] seconds. num_frames: that the model sees. min_gap: share of the clip, 0 to 1.
    """
    seen = frame_numbers(times, num_frames)
    gap, places = _gap(len(seen), min_gap), np.arange(len(seen))
    return seen[(places >= gap) | (places < len(seen) - gap)]


def _gap(count: int, min_gap: float) -> int:
    """Frames that both frames of a question are apart, at least, of `count` that the model sees."""
    return max(1, round(min_gap * (count - 1)))


def ask(scene: Scene, rules: QuestionRules, seed: int) -> tuple[list[Question], tuple[LostObject, ...]]:
    """Ask up to `rules.per_clip` questions, in turn over the scenarios and, within each, over the labels that occur.

    In each round the scenario of the largest weight is asked about once, others as often as their weight is of that.

    Only objects with a name that tells them apart are asked about, and both frames must show `min_points` of their
    points. No (scenario, object, frame pair) comes twice, but distances up to `rules.draws` times, with options drawn
    anew. The centres of a question's solution never point to another option than its answer (see `states`).

    Returns:
      (questions, an entry for each object that none is about, "object_unnamed" or "object_unasked").

    Raises:
      Refused: "relative_scale" (metres mean nothing there), "too_few_frames".
    """
    if scene.scale == "relative":
        raise Refused(f"clip {scene.clip_id}: its scale is relative, and the questions are in metres", "relative_scale")
    if scene.num_frames < 2:
        raise Refused(f"clip {scene.clip_id}: a single frame shows no motion", "too_few_frames")
    digest = hashlib.sha256(f"{seed}\0{scene.clip_id}".encode("utf-8", "surrogatepass")).digest()
    rng = random.Random(int.from_bytes(digest[:16], "big"))
    facts = _Facts.measure(scene, rules, rng)
    asked = {name: cases if LABELS[name] else cases * rules.draws for name, cases in facts.cases.items()}
    queues = {name: _in_turn(asked[name], rng) for name in SCENARIOS}
    order = [name for name in SCENARIOS if name in rules.weights]
    shuffle(order, rng)
    heaviest, due = max(rules.weights.values()), dict.fromkeys(order, 0.0)
    found: list[Question] = []
    while order and len(found) < rules.per_clip:
        for name in tuple(order):
            due[name] += rules.weights[name] / heaviest
            if due[name] < 1 - 1e-9:
                continue
            due[name] -= 1
            made = next(filter(None, (_ask(facts, name, case, rules, rng, len(found)) for case in queues[name])), None)
            if made is None:
                order.remove(name)
            elif len(found) < rules.per_clip:
                found.append(made)
    return found, _unasked(facts, found)


def _unasked(facts: _Facts, found: Sequence[Question]) -> tuple[LostObject, ...]:
    """The lines of `ask` for the objects that no question is about."""
    asked, unnamed = {question.object_id for question in found}, object_names(facts.scene)[1]
    clear = {facts.names[case[1]][0] for cases in facts.cases.values() for case in cases if case[1] >= 0}
    lines = []
    for o in facts.scene.objects:
        if o.object_id in asked:
            continue
        reason = "object_unnamed" if o.object_id in unnamed else "object_unasked"
        seldom = "too few of its points are seen in both frames of a pair, or nothing about it is clear"
        why = unnamed.get(o.object_id, "the clip's questions are about others" if o.object_id in clear else seldom)
        lines.append(lost_object(reason, o.object_id, o.description, why))
    return tuple(lines)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """Everything measured on the candidate pairs. A case is (pair, object index or -1, class, value, stated value)."""

    scene: Scene
    seen: list[int]  # scene frame of each frame the model sees
    pairs: list[tuple[int, int]]  # in frames the model sees
    cases: Mapping[str, list[tuple]]
    names: list[tuple[str, str]]  # (object id, what it is called)
    camera_motion: list[float]
    object_motion: list[list[float]]  # [object][pair]
    cameras: list  # centre by scene frame
    starts: list  # [object][pair] centroid at i
    ends: list

    @classmethod
    def measure(cls, scene: Scene, rules: QuestionRules, rng: random.Random) -> _Facts:
        """Measure all seven relations on randomly drawn frame pairs."""
        seen = frame_numbers(scene.timestamps, rules.num_frames)
        pairs = _draw_pairs(len(seen), rules, rng)
        i, j = seen[[p[0] for p in pairs]], seen[[p[1] for p in pairs]]
        axes = scene.world_to_camera[int(seen[0])]
        names = sorted(object_names(scene)[0].items())
        travelled = measure_camera(scene, i, j)
        centers = in_axes(scene.camera_centers, axes)
        camera = Pair(centers[i], centers[j])
        said, always = stated(camera), np.ones(len(i), bool)
        cases = {name: _cases(name, -1, values, said[name], always, rules) for name, values in travelled.items()}
        cases |= {name: [] for name in SCENARIOS if name not in cases}
        motion, starts, ends = [], [], []
        for n, (object_id, _) in enumerate(names):
            middle, measured = measure_object(scene, scene.object(object_id), i, j, rules)
            motion.append(measured["object_absolute_distance"].tolist())
            thing = Pair(in_axes(middle.start, axes), in_axes(middle.end, axes))
            starts.append(thing.start.tolist())
            ends.append(thing.end.tolist())
            said = stated(camera, thing)
            for name, values in measured.items():
                cases[name] += _cases(name, n, values, said[name], middle.seen, rules)
        moved = travelled["camera_absolute_distance"].tolist()
        return cls(scene, seen.tolist(), pairs, cases, names, moved, motion, centers.tolist(), starts, ends)


def _draw_pairs(count: int, rules: QuestionRules, rng: random.Random) -> list[tuple[int, int]]:
    """Distinct frame pairs at least `min_gap` apart: uniform first frame and gap, drawn until `pairs` or 4x tries."""
    gap = _gap(count, rules.min_gap)
    pairs: dict[tuple[int, int], None] = {}
    for _ in range(4 * rules.pairs):
        first, second = int(rng.random() * count), int(rng.random() * count)
        if abs(first - second) >= gap:
            pairs[min(first, second), max(first, second)] = None
            if len(pairs) == rules.pairs:
                break
    return list(pairs) or [(0, count - 1)]


def _cases(
    name: str, obj: int, values: np.ndarray, said: np.ndarray, usable: np.ndarray, rules: QuestionRules
) -> list[tuple]:
    """The usable pairs for which relation `name` has a clear label that the stated values `said` agree with."""
    classes = classes_of(name, values, rules)
    pairs = np.flatnonzero(usable & (classes >= 0) & agreeing(name, said, classes, rules))
    columns = (column.tolist() for column in (pairs, classes[pairs], values[pairs], said[pairs]))
    return [(pair, obj, *rest) for pair, *rest in zip(*columns, strict=True)]


def _in_turn(cases: list[tuple], rng: random.Random) -> Iterator[tuple]:
    """The cases in random order, taking one of each class in turn."""
    by_class: dict[int, list[tuple]] = {}
    for case in cases:
        by_class.setdefault(case[2], []).append(case)
    queues = [by_class[kind] for kind in sorted(by_class)]
    shuffle(queues, rng)
    while queues:
        for queue in tuple(queues):
            at = int(rng.random() * len(queue))
            queue[at], queue[-1] = queue[-1], queue[at]
            yield queue.pop()
            if not queue:
                queues.remove(queue)


def _ask(
    facts: _Facts, scenario: str, case: tuple, rules: QuestionRules, rng: random.Random, number: int
) -> Question | None:
    """The question of one case; None when no fair options exist for it."""
    pair, obj, kind, value, said = case
    labels = LABELS[scenario]
    if labels:
        label, rank, truth = labels[kind], -1, labels[kind]
        texts = label_options(labels, label, rng)
    else:
        made = numeric_options(value, rules.options, rng, said, rules.spacing.get(scenario, 0.0))
        if made is None:
            return None
        texts, rank = made
        label, truth = "", texts[rank]
        shuffle(texts, rng)
    phrasing, anchor = int(rng.random() * len(PHRASINGS[scenario])), int(rng.random() * len(ANCHORS))
    i, j = facts.pairs[pair]
    object_id, name = facts.names[obj] if obj >= 0 else ("", "")
    motion = facts.camera_motion[pair]
    centers = (None, None)
    if obj >= 0:
        motion = max(motion, facts.object_motion[obj][pair])
        centers = (facts.starts[obj][pair], facts.ends[obj][pair])
    return Question(
        id=f"{facts.scene.clip_id}:{number:03d}",
        clip_id=facts.scene.clip_id,
        source_id=facts.scene.source_id,
        scale=facts.scene.scale,
        scenario=scenario,
        text=question_text(scenario, phrasing, anchor, i, j, len(facts.seen) - 1, name, rules.tau),
        options=tuple(texts),
        answer=LETTERS[texts.index(truth)],
        label=label,
        rank=rank,
        value=round(value, 6) if obj >= 0 or not labels else tuple(round(v, 6) for v in value),
        motion=round(motion, 6),
        template=f"{phrasing}.{anchor}",
        reply=rules.answers,
        frames=(i, j),
        source=(facts.seen[i], facts.seen[j]),
        count=len(facts.seen),
        object_id=object_id,
        object_name=name,
        camera_center=(facts.cameras[facts.seen[i]], facts.cameras[facts.seen[j]]),
        object_center=centers,
    )
