"""Answers a question again from another scene of the same clip: from exact truth where it was asked of an estimate.

`propose` asks only where its own scene is clear. The other scene has to answer whatever it says, so here nothing is
refused for being near a threshold: a label is the class the measurement falls into, a distance the nearest option.
"""

from __future__ import annotations

import numpy as np

from data_prep.questions.options import LETTERS
from data_prep.questions.propose import Question, QuestionRules
from data_prep.scenes import measure
from data_prep.scenes.relations import LABELS
from data_prep.scenes.scene import Scene, SceneError


def letter_from(scene: Scene, question: Question, rules: QuestionRules) -> str | None:
    """The letter of the option that is right by `scene`; None if no option is.

    None means that the object is not there or not seen enough at the two frames, that the true label is not among the
    options, or that two options are equally near.

    Args:
      scene: of the same clip and frames as the one that was asked about; object ids must be the same.
      question: as `propose` made it from the other scene.
      rules: those it was made with.
    """
    i, j = (np.array([frame]) for frame in question.source)
    name = question.scenario
    value = _camera(scene, name, i, j) if name.startswith("camera_") else _object(scene, question, i, j, rules)
    if value is None or np.isnan(value).any():
        return None
    if not LABELS[name]:
        return _nearest(question.options, float(value[0]))
    if name == "camera_relative_direction":
        kind = measure.axis_classes(value[None], min_motion=0.0, dominance=1.0)[0]
    else:
        kind = measure.change_classes(value, tau=rules.tau, margin=0.0)[0]
    label = LABELS[name][kind]
    return LETTERS[question.options.index(label)] if label in question.options else None


def _camera(scene: Scene, name: str, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """f64[3] displacement, or f64[1] metres."""
    move = measure.camera_displacements(scene, i, j)[0]
    return move if name == "camera_relative_direction" else np.linalg.norm(move, keepdims=True)


def _object(scene: Scene, question: Question, i: np.ndarray, j: np.ndarray, rules: QuestionRules) -> np.ndarray | None:
    """f64[1] metres of an object's relation; None for an object that the scene does not have or show."""
    try:
        obj = scene.object(question.object_id)
    except SceneError:
        return None
    name, needed = question.scenario, {"min_points": rules.min_points}
    if name == "object_camera_absolute_distance":
        return measure.nearest_distances(scene, obj, j, i, **needed)
    if name == "object_camera_relative_distance":
        own = [measure.nearest_distances(scene, obj, frame, frame, **needed) for frame in (i, j)]
        return own[1] - own[0]
    middle = measure.centroids(obj, i, j, points=rules.points, **needed)
    if not middle.seen[0]:
        return None
    shift = measure.object_shifts(scene, middle, i)[0]
    if name == "object_absolute_distance":
        return np.linalg.norm(shift, keepdims=True)
    return shift[:1] if name == "object_camera_lateral_direction" else shift[2:]


def _nearest(options: tuple[str, ...], metres: float) -> str | None:
    gaps = np.abs(np.array([float(text) for text in options]) - metres)
    best = int(gaps.argmin())
    return None if (gaps == gaps[best]).sum() > 1 else LETTERS[best]
