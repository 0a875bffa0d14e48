from __future__ import annotations

import dataclasses
import json
import random
import re
from collections import Counter

import numpy as np
import pytest

from data_prep.questions.names import object_names
from data_prep.questions.options import LETTERS, label_options, numeric_options
from data_prep.questions.propose import QuestionRules, ask, asked_frames, frame_numbers, propose
from data_prep.questions.scenarios import SCENARIOS
from data_prep.questions.wording import ANCHORS, PHRASINGS, question_text
from data_prep.scenes import relations as rel
from data_prep.scenes.relations import LABELS
from data_prep.scenes.scene import Scene
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.qa.benchmarks import SUBTASKS
from tests.data_prep.scenes.random_scenes import random_scene

RULES = QuestionRules()
SCENES = [random_scene(seed, frames=50) for seed in range(30)]
ASKED = [(scene, question) for scene in SCENES for question in propose(scene, RULES, 7)]


def with_fields(scene: Scene, **changes) -> Scene:
    return dataclasses.replace(scene, **changes)


def renamed(scene: Scene, *names: tuple[str, str]) -> Scene:
    objects = [
        dataclasses.replace(o, description=d, category=c) for o, (d, c) in zip(scene.objects, names, strict=True)
    ]
    return with_fields(scene, objects=tuple(objects))


def test_every_scenario_and_label_is_asked():
    asked = {(q.scenario, q.label) for _, q in ASKED}
    assert asked == {(name, label) for name in SCENARIOS for label in (LABELS[name] or ("",))}
    assert set(SUBTASKS.values()) == {SUBTASKS[q.scenario] for _, q in ASKED} and len(set(SUBTASKS.values())) == 6
    assert Counter(q.clip_id for _, q in ASKED).most_common()[-1][1] == RULES.per_clip


def test_distances_may_be_asked_about_several_times_with_other_options():
    scene, wide = SCENES[0], {"per_clip": 10_000, "min_gap": 0.5, "pairs": 4}
    once, often = (propose(scene, QuestionRules(draws=draws, **wide), 7) for draws in (1, 5))
    fact = lambda q: (q.scenario, q.object_id, q.frames)  # noqa: E731
    assert set(Counter(map(fact, once)).values()) == {1}
    counts = Counter(map(fact, often))
    labelled = {counts[key] for key in counts if LABELS[key[0]]}
    distances = [key for key in counts if not LABELS[key[0]]]
    assert labelled == {1} and distances and max(counts[key] for key in distances) == 5
    for key in distances:
        asked = [q for q in often if fact(q) == key]
        assert len({q.value for q in asked}) == 1 and len({q.options for q in asked}) > len(asked) / 2
    assert {q.rank for q in often if not q.label} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="draws >= 1"):
        QuestionRules(draws=0)


def test_weights_say_how_often_each_scenario_is_asked_about():
    names = (
        "object_camera_relative_distance",
        "object_camera_lateral_direction",
        "object_camera_longitudinal_direction",
    )
    rules = QuestionRules(weights=dict(zip(names, (1.0, 0.5, 0.25), strict=True)), per_clip=14)
    asked = Counter(q.scenario for scene in SCENES for q in propose(scene, rules, 7))
    assert asked == dict(zip(names, (8 * len(SCENES), 4 * len(SCENES), 2 * len(SCENES)), strict=True))
    for wrong in ({}, {"camera": 1.0}, {"camera_relative_direction": 0.0}):
        with pytest.raises(ValueError, match="weights must be above 0, of scenarios"):
            QuestionRules(weights=wrong)


def test_answers_are_those_of_the_relations():
    for scene, q in ASKED:
        obj = scene.object(q.object_id) if q.object_id else None
        truth = rel.solve(q.scenario, scene, obj, *q.source)
        np.testing.assert_allclose(q.value, truth.value, atol=1e-6)
        assert q.options[LETTERS.index(q.answer)] == truth.label
        assert q.label == (truth.label if LABELS[q.scenario] else "")
        assert q.source == tuple(frame_numbers(scene.timestamps, 32)[list(q.frames)].tolist())


def test_frame_numbers_are_those_of_the_encoder():
    for total in (2, 7, 32, 33, 50, 301):
        np.testing.assert_array_equal(
            frame_numbers(np.arange(total) / 30, 32), SampleRule("uniform", 32, None).indices(total, 30.0)
        )


@pytest.mark.parametrize("min_gap", [0.0, 0.1, 0.6, 0.99])
def test_asked_frames_are_those_of_all_pairs_that_are_far_enough_apart(min_gap):
    for total, count in ((2, 8), (9, 4), (40, 8)):
        times = np.arange(total) / 30
        seen = frame_numbers(times, count)
        apart = max(1, round(min_gap * (len(seen) - 1)))
        paired = {f for i in range(len(seen)) for j in range(i + apart, len(seen)) for f in (seen[i], seen[j])}
        assert asked_frames(times, count, min_gap).tolist() == sorted(paired)


def test_texts_name_the_frames_and_the_object():
    for scene, q in ASKED:
        i, j = q.frames
        assert re.search(rf"\bframe {i}\b", q.text) and re.search(rf"\bframe {j}\b", q.text)
        numbers = {int(n) for n in re.findall(r"\d+", q.text)}
        assert numbers - {25} <= {i, j, 31, 0} and 31 in numbers
        assert ("less than 25 cm" in q.text) == ("not moving" in LABELS[q.scenario])
        assert ("nearest visible point" in q.text) == q.scenario.startswith("object_camera_") * q.scenario.endswith(
            "ce"
        )
        if q.object_id:
            assert object_names(scene)[0][q.object_id] in q.text
        assert "{" not in q.text and q.text == " ".join(q.text.split())


def test_a_question_does_not_depend_on_its_answer():
    """The same words are offered for every answer: no phrasing holds an answer, or only along with all the others."""
    for name, phrasings in PHRASINGS.items():
        for number in range(len(phrasings)):
            for anchor in range(len(ANCHORS)):
                text = question_text(name, number, anchor, 3, 26, 31, "the red box").lower()
                words = set(re.findall(r"[a-z]+", text))
                held = [label for label in LABELS[name] if set(label.split()) <= words]
                assert not held, (text, held)
        assert len(set(phrasings)) == len(phrasings) >= 5
    texts = Counter((q.scenario, q.template) for _, q in ASKED)
    assert len(texts) > 0.9 * sum(len(p) for p in PHRASINGS.values()) * len(ANCHORS)


@pytest.mark.parametrize(("tau", "said"), [(0.25, "25 cm"), (0.1, "10 cm"), (1.5, "1.5 m"), (0.125, "12.5 cm")])
def test_the_threshold_of_a_question_is_that_of_its_rules(tau, said):
    rules = QuestionRules(tau=tau)
    texts = [q.text for scene in SCENES[:4] for q in propose(scene, rules, 0) if "not moving" in LABELS[q.scenario]]
    assert texts and all(f"less than {said} " in text for text in texts)


def test_phrasings_fit_every_anchor_and_objects_of_any_number():
    """No doubled preposition, no sentence within brackets, no verb or pronoun that agrees with the object."""
    doubled = re.compile(r"\b(from|between|to|in|at|of|over|until|going|goes) (from|between|in the time|to|until)\b")
    agreeing = re.compile(r"\bTHINGS (is|are|has|was|does|do|moves|goes|starts|ends)\b|\b(is|are|does|do) THINGS")
    for name, phrasings in PHRASINGS.items():
        for number in range(len(phrasings)):
            for anchor in range(len(ANCHORS)):
                text = question_text(name, number, anchor, 3, 26, 31, "THINGS")
                assert not doubled.search(text) and not agreeing.search(text), text
                assert "THINGS" not in text or not re.search(r"\bits\b", text), text
                assert not re.search("until|going|develop|goes from", text) and text.count("frame 26") == 1, text


def test_what_is_not_asked_about_is_listed_with_its_reason():
    nameless = renamed(SCENES[0], ("walking", ""), ("<box>", "moving"), ("a ball", "ball"))
    found, lost = ask(nameless, RULES, 0)
    assert {q.object_id for q in found} == {"", "object2"}
    lines = {line["object_id"]: line for line in lost}
    assert set(lines) == {"object0", "object1"}
    assert all(line["reason"] == "object_unnamed" for line in lines.values())
    assert "names no thing" in lines["object0"]["detail"] and "angle brackets" in lines["object1"]["detail"]
    assert lines["object0"]["caption"] == "walking" and "'walking'" in lines["object0"]["detail"]
    far = dataclasses.replace(SCENES[0].objects[0], points=np.full_like(SCENES[0].objects[0].points, np.nan))
    scene = with_fields(SCENES[0], objects=(far, *SCENES[0].objects[1:]))
    (line,) = ask(scene, RULES, 0)[1]
    assert (line["object_id"], line["reason"]) == ("object0", "object_unasked") and "too few" in line["detail"]
    found, lost = ask(SCENES[0], QuestionRules(per_clip=1), 0)
    assert len({q.object_id for q in found} - {""}) + len(lost) == 3
    assert all("questions are about others" in line["detail"] for line in lost)


def test_same_seed_same_questions_whatever_came_before():
    for scene, again in ((SCENES[5], random_scene(5, frames=50)), (SCENES[2], random_scene(2, frames=50))):
        assert propose(scene, RULES, 7) == propose(again, RULES, 7)
        assert propose(scene, RULES, 7) != propose(scene, RULES, 8)
    other = with_fields(SCENES[5], clip_id="another clip")
    assert [q.text for q in propose(other, RULES, 7)] != [q.text for q in propose(SCENES[5], RULES, 7)]
    assert len({q.id for _, q in ASKED}) == len(ASKED)


def test_clips_that_cannot_be_asked_about_are_refused():
    with pytest.raises(rel.Refused) as error:
        propose(with_fields(SCENES[0], scale="relative"), RULES, 0)
    assert error.value.reason == "relative_scale"
    with pytest.raises(rel.Refused) as error:
        propose(random_scene(0, frames=1), RULES, 0)
    assert error.value.reason == "too_few_frames"
    assert all(q.frames == (0, 1) for q in propose(random_scene(0, frames=2), RULES, 0))


def test_states_are_in_the_axes_of_the_first_frame_or_the_world():
    checked = 0
    for scene, q in ASKED:
        start, end = (np.array(c) for c in q.camera_center)
        np.testing.assert_allclose(np.linalg.norm(end - start), np.linalg.norm(_move(scene, q)), atol=2e-3)
        if q.source[0] == 0:
            np.testing.assert_allclose(start, 0, atol=1e-3)
            checked += 1
        if q.scenario == "object_absolute_distance":
            first, last = (np.array(c) for c in q.object_center)
            np.testing.assert_allclose(np.linalg.norm(last - first), q.value, atol=2e-3)
        assert (q.object_center == (None, None)) == (q.object_id == "")
    assert checked


def _move(scene, q):
    return scene.camera_centers[q.source[1]] - scene.camera_centers[q.source[0]]


@pytest.mark.parametrize("shape", ["exchangeable", "independent"])
def test_numeric_options(shape):
    rng = random.Random(1)
    made = 0
    for _ in range(20_000):
        truth = 10 ** rng.uniform(-1.5, 2)
        found = numeric_options(truth, shape, rng)
        if found is None:
            continue
        made += 1
        texts, rank = found
        values = [float(text) for text in texts]
        assert values == sorted(set(values)) and len(values) == 4
        assert texts[rank] == f"{truth:.1f}" or abs(values[rank] - truth) <= 0.05 + 1e-9
        for n, value in enumerate(values):
            if n != rank:
                assert 0.25 * truth - 1e-9 <= value <= 1.75 * truth + 1e-9
        if shape == "exchangeable":  # each could be the truth, up to the rounding of two tenths
            assert 10 * values[3] - 0.5 <= 1.75 * (10 * values[0] + 0.5)
    assert made > 8_000


@pytest.mark.parametrize("shape", ["exchangeable", "independent"])
def test_ranks_are_uniform_for_large_truths(shape):
    rng = random.Random(2)
    ranks = Counter(numeric_options(rng.uniform(3, 30), shape, rng)[1] for _ in range(8_000))
    assert all(abs(ranks[rank] / 8_000 - 0.25) < 0.02 for rank in range(4))


def test_an_unknown_shape_of_options_is_refused():
    with pytest.raises(ValueError, match="options must be of exchangeable, independent"):
        QuestionRules(options="odd")


def test_label_options_do_not_single_out_pairs():
    rng = random.Random(4)
    partners, letters = Counter(), Counter()
    for _ in range(6_000):
        options = label_options(rel.CAMERA_DIRECTIONS, "left", rng)
        assert len(set(options)) == 4 and "left" in options
        partners.update(options)
        letters[options.index("left")] += 1
    for label in rel.CAMERA_DIRECTIONS:
        if label != "left":
            assert abs(partners[label] / 6_000 - 0.6) < 0.03
    assert all(abs(letters[n] / 6_000 - 0.25) < 0.03 for n in range(4))
    labels = LABELS["object_camera_relative_distance"]
    assert sorted(label_options(labels, "closer", rng)) == sorted(labels)


def test_records_are_read_by_the_released_format_reader(tmp_path):
    rows = [q.record("clips/a.mp4") for _, q in ASKED]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows))
    records = RecordFile(path, tmp_path)
    assert len(records) == len(rows)
    for n, (row, (_, q)) in enumerate(zip(rows, ASKED, strict=True)):
        user, assistant = records[n].messages
        video, text = user["content"]
        assert (video["type"], video["path"]) == ("video", str(tmp_path / "clips/a.mp4"))
        assert text["text"].startswith(q.text) and f"\n{q.answer}. {row['options'][q.answer]}\n" in text["text"]
        assert assistant == {"role": "assistant", "content": q.answer}
        assert row["solution"]["answer"] == q.answer and len(row["solution"]["camera_center"]) == 2
        assert json.loads(json.dumps(row, allow_nan=False)) == records.raw(n)
