"""The oracle's narratives: worth the full reward, true to the record, and worded differently each time."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import string

import numpy as np
import pytest

from data_prep.cold_start import oracle_wording as wording
from data_prep.cold_start.oracle import compose, compose_brief, missing_fields
from data_prep.cold_start.prompt import path_problem
from data_prep.cold_start.r1_items import parse_item
from data_prep.questions.propose import QuestionRules, propose
from data_prep.questions.scenarios import SCENARIOS
from data_prep.store.export import r1_record
from data_prep.store.parts import ClipRejected
from mllm4d_jax.qa.rewards import parse, score
from mllm4d_jax.qa.system_prompt import ST_COT
from tests.data_prep.scenes.random_scenes import random_scene

RULES = (QuestionRules(), QuestionRules(num_frames=9, per_clip=14))


def asked(seeds=range(40)):
    for seed in seeds:
        for question in propose(random_scene(seed), RULES[seed % 2], seed):
            raw = json.loads(json.dumps(r1_record(question.record("v.mp4"))))
            yield question, parse_item(raw, "record", "none")


ITEMS = [item for _, item in asked()]
OF = {name: [item for item in ITEMS if item.scenario == name] for name in SCENARIOS}
TOWARDS = {"right (+X)": (0, 1), "left (-X)": (0, -1), "down (+Y)": (1, 1), "up (-Y)": (1, -1)} | {
    "forward (+Z)": (2, 1),
    "backward (-Z)": (2, -1),
}
CLAUSE = r" (?:travels|shifts) (?:mostly )?((?:right|left|down|up|forward|backward) \([+-][XYZ]\))"


def test_every_path_earns_the_full_reward_and_may_be_trained_on():
    assert all(len(found) >= 60 for found in OF.values())
    for item in ITEMS:
        texts = [compose(item, path, seed=7) for path in range(5)]
        assert len(set(texts)) == 5
        for text in texts:
            assert score(text, item.solution)["total"] == pytest.approx(1.0, abs=1e-12)
            assert parse(text).well_formed and path_problem(text) is None


def test_the_brief_path_states_both_centres_and_what_they_come_to():
    """Worth all but what one decimal costs: half a decimetre an axis at most, so exp(-0.05 sqrt 3) of a centre."""
    for item in ITEMS:
        text = compose_brief(item)
        rewards, read = score(text, item.solution), parse(text)
        assert rewards["total"] >= 0.7 + 0.3 * math.exp(-0.05 * 3**0.5) and read.well_formed
        assert path_problem(text) is None and read.answer == item.solution.answer
        kinds = len(read.camera_centers), len(read.object_centers), read.malformed_cameras + read.malformed_objects
        assert kinds == (2, 2, 0) and (None in read.object_centers) == item.scenario.startswith("camera_")
        said = item.label or f"{item.value:.1f}: {item.options[read.answer]}"
        assert text.endswith(f"\n{said}: {read.answer}</thinking><answer>{read.answer}</answer>")
    with pytest.raises(ClipRejected, match="oracle_contradiction"):
        compose_brief(dataclasses.replace(OF["object_absolute_distance"][0], value=9.0))
    with pytest.raises(ClipRejected, match="oracle_fields"):
        compose_brief(dataclasses.replace(OF["object_absolute_distance"][0], options={}))


def test_the_brief_path_is_the_answer_that_a_curation_gives_through_states():
    for question, item in asked(range(12)):
        assert dataclasses.replace(question, reply="states").spoken == compose_brief(item)


def test_the_states_are_in_the_form_that_the_prompt_demands():
    block = "**Spatial State (start frame):**\n- Camera Center: {}\n- Object Center: {}"
    assert block.format("[x, y, z]", "[x, y, z]") in ST_COT
    for name, items in OF.items():
        item = items[0]
        text = compose(item, 0, 0)
        for number, title in enumerate(("start frame", "end frame")):
            shown = ["[" + ", ".join(f"{x:.3f}" for x in item.solution.camera_center[number]) + "]", "null"]
            if name.startswith("object_"):
                shown[1] = "[" + ", ".join(f"{x:.3f}" for x in item.solution.object_center[number]) + "]"
            assert block.replace("start frame", title).format(*shown) in text
        assert text.count("**Spatial State") == 2


def test_displacements_and_lengths_can_be_recomputed_from_the_written_states():
    vector = re.compile(r"\[(-?[\d.]+), (-?[\d.]+), (-?[\d.]+)\]")
    for item in ITEMS:
        text = compose(item, 1, 3)
        states = parse(text)
        cameras, things = states.camera_centers, states.object_centers
        conclusion = text.split("\n\n")[-1]
        if item.scenario == "object_camera_relative_distance":
            before, after = (f"{math.dist(c, o):.2f} m" for c, o in zip(cameras, things, strict=True))
            assert before in conclusion and after in conclusion
            continue
        pairs = {"c": cameras, "object_camera_absolute_distance": (cameras[0], things[1])}
        start, end = pairs.get(item.scenario, pairs["c"] if item.scenario.startswith("camera_") else things)
        shown = [float(x) for x in vector.search(conclusion).groups()]
        np.testing.assert_allclose(shown, np.subtract(end, start), atol=1e-9)
        if item.scenario.endswith("absolute_distance"):
            assert f"{np.linalg.norm(shown):.2f} m" in conclusion


def test_a_distance_to_the_nearest_point_is_never_said_to_be_that_of_the_centres():
    differing = 0
    for item in OF["object_camera_absolute_distance"]:
        for path in range(4):
            conclusion = compose(item, path, 0).split("\n\n")[-1]
            centres = math.dist(item.solution.camera_center[0], item.solution.object_center[1])
            assert f"{item.value:.2f} m" in conclusion
            assert re.search("nearest|closest", conclusion) and re.search("middle|centre", conclusion)
            differing += f"{centres:.2f}" != f"{item.value:.2f}"
            assert f"{centres:.2f}" in conclusion
    assert differing > 100
    for item in OF["object_camera_relative_distance"]:
        assert all(re.search("nearest|closest", compose(item, path, 0).split("\n\n")[-1]) for path in range(4))


def test_the_evidence_agrees_with_the_physics():
    opposite = {"right": "left", "left": "right", "down": "rise", "up": "sink", "forward": "grow", "backward": "shrink"}
    checked = {"the camera": 0, "the object": 0}
    for item in ITEMS:
        for path in range(4):
            evidence = compose(item, path, 1).split("\n\n")[2]
            if item.scenario == "camera_relative_direction":
                assert opposite[item.label] in evidence
                assert not any(word in evidence for word in set(opposite.values()) - {opposite[item.label]})
                continue
            for who, kind in (("the camera", "camera_center"), ("the object", "object_center")):
                name = who if who == "the camera" else item.object_name
                found = re.search(re.escape(name) + CLAUSE, evidence, re.IGNORECASE) if name else None
                if not found:
                    continue
                start, end = getattr(item.solution, kind)
                move = np.subtract(end, start)
                axis, sign = TOWARDS[found[1]]
                assert abs(move[axis]) == pytest.approx(abs(move).max(), abs=2e-3) and np.sign(move[axis]) == sign
                assert np.linalg.norm(move) >= 0.049
                checked[who] += 1
            if item.label:
                table = wording.OBJECT_SIGHT[item.scenario]
                said = {
                    label for label, (sight, _) in table.items() if sight.format(o=item.object_name) in evidence.lower()
                }
                assert said == {item.label}
    assert min(checked.values()) > 500


def test_the_answer_is_drawn_from_the_value():
    for item in ITEMS:
        conclusion = compose(item, 2, 5).split("\n\n")[-1]
        option = item.options[item.solution.answer]
        assert re.search(rf"\b{item.solution.answer}\b", conclusion.split("</thinking>")[0]) and option in conclusion
        assert conclusion.endswith(f"</thinking><answer>{item.solution.answer}</answer>")


def test_paths_of_a_question_differ_in_every_step_and_depend_on_question_and_seed_alone():
    item = ITEMS[0]
    steps = [compose(item, path, 0).split("\n\n") for path in range(4)]
    for number in range(5):
        first_lines = {step[number].split("\n")[0] for step in steps}
        assert len(first_lines) == 4
    assert compose(item, 1, 0) == compose(dataclasses.replace(item), 1, 0) != compose(item, 1, 1)
    assert len({compose(item, path, 0) for path in range(1024)}) == 1024


def test_openings_are_spread_over_all_phrasings():
    starts = {}
    for item in ITEMS:
        second = compose(item, 0, 0).split("\n\n")[1].split("\n")[0]
        key = re.sub(r"\d+", "#", second)
        starts[key] = starts.get(key, 0) + 1
    assert len(starts) == 4 and min(starts.values()) > len(ITEMS) / 6


def test_the_tables_are_complete():
    for table in (wording.GOAL, wording.EVIDENCE, wording.SYNTHESIS):
        assert set(table) == set(SCENARIOS)
    phrases = [*wording.GOAL.values(), *wording.EVIDENCE.values(), *wording.SYNTHESIS.values()]
    for variants in (*phrases, wording.START, wording.END, wording.CLOSING):
        assert len(set(variants)) == wording.VARIANTS >= 4
        assert all("Center" not in text and "<" not in text and "**" not in text for text in variants)
    known = {"i", "j", "o", "cam", "obj", "sight", "d", "n", "v", "before", "after", "verdict"}
    used = {f for variants in phrases for text in variants for _, f, _, _ in string.Formatter().parse(text) if f}
    assert used == known


@pytest.mark.parametrize(
    ("scenario", "changes", "reason"),
    [
        ("camera_absolute_distance", {"frames": None}, "oracle_fields"),
        ("camera_absolute_distance", {"value": None}, "oracle_fields"),
        ("camera_absolute_distance", {"options": {}}, "oracle_fields"),
        ("camera_absolute_distance", {"scenario": "unspecified"}, "oracle_fields"),
        ("object_absolute_distance", {"object_name": ""}, "oracle_fields"),
        ("object_camera_lateral_direction", {"label": ""}, "oracle_fields"),
        ("camera_absolute_distance", {"value": 99.0}, "oracle_contradiction"),
        ("camera_absolute_distance", {"value": (1.0, 0.0, 0.0)}, "oracle_contradiction"),
        ("camera_relative_direction", {"value": 1.0}, "oracle_contradiction"),
        ("camera_relative_direction", {"label": "nowhere"}, "oracle_contradiction"),
        ("object_camera_lateral_direction", {"value": 1e6}, "oracle_contradiction"),
        ("object_camera_longitudinal_direction", {"label": "sideways"}, "oracle_contradiction"),
    ],
)
def test_what_does_not_fit_together_is_refused(scenario, changes, reason):
    item = dataclasses.replace(OF[scenario][0], **changes)
    with pytest.raises(ClipRejected) as caught:
        compose(item, 0, 0)
    assert caught.value.reason == reason
    assert bool(missing_fields(item)) == (reason == "oracle_fields")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_wrong_answer_or_a_missing_centre_is_refused(scenario):
    item = OF[scenario][0]
    wrong = next(letter for letter in item.options if letter != item.solution.answer)
    for reason, change in (
        ("oracle_contradiction", {"answer": wrong}),
        ("oracle_centers", {"camera_center": (None, item.solution.camera_center[1])}),
    ):
        broken = dataclasses.replace(item, solution=dataclasses.replace(item.solution, **change))
        with pytest.raises(ClipRejected) as caught:
            compose(broken, 0, 0)
        assert caught.value.reason == reason


def test_the_text_fits_objects_of_any_number():
    agreeing = re.compile(r"(?<!of )\bTHINGS (?:is|are|has|was|gets|goes|keeps|ends|moves|shifts|comes|stands)\b")
    for name in SCENARIOS[2:]:
        for item in OF[name][:12]:
            for path in range(4):
                text = compose(dataclasses.replace(item, object_name="THINGS"), path, 0)
                assert "THINGS" in text and not agreeing.search(text), text
                if "distance" in name and name.startswith("object_camera"):
                    assert re.search("nearest visible", text.split("\n\n")[0]), text
