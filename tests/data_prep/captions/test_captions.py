"""Captions of rendered clips, and the text that is matched beside them."""

from __future__ import annotations

import dataclasses
import json
import random
import re

import numpy as np
import pytest

from configs import common
from data_prep.captions import matching, told, words
from data_prep.captions.captions import aspects, camera_told, captions, object_told, things_told
from data_prep.captions.placed import placed, placed_behind_questions
from data_prep.captions.task import FILES, phrases, rows_of, run_captions, without_clip
from data_prep.questions.propose import QuestionRules, propose
from data_prep.questions.wording import short_reasoning, state_block, vector_text
from data_prep.scenes.relations import CAMERA_DIRECTIONS, RULES, classes_of
from data_prep.synthetic.clip import make_clip
from data_prep.synthetic.worlds import SyntheticConfig
from mllm4d_jax.encode.tokenizer import build_byte_level_tokenizer
from mllm4d_jax.qa.options import split_question
from mllm4d_jax.qa.reasoning import parse

SMALL = SyntheticConfig(height=24, width=24, frames=4, objects=(1, 2))


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [1, -1])
def test_the_main_direction_is_that_of_the_relation_solver(axis, sign):
    move = np.full(3, 0.1)
    move[axis] = sign * 0.9
    label = CAMERA_DIRECTIONS[int(classes_of("camera_relative_direction", move[None], RULES)[0])]
    said = words.mainly(move)
    assert words.MAIN.index(said) == CAMERA_DIRECTIONS.index(label)
    assert list(camera_told(move, 0.91).items())[0] == ("mainly", said)


def test_sizes_grow_with_the_motion_and_do_not_know_its_sign():
    metres = np.geomspace(0.03, 5, 60)
    for tell, names in ((words.size_of, words.SIZES), (words.distance_of, words.DISTANCES)):
        steps = [names.index(tell(m)) for m in metres * (1 if names is words.SIZES else 3)]
        assert steps == sorted(steps) and set(steps) == set(range(len(names)))
    assert words.size_of(-0.7) == words.size_of(0.7)
    # One size further is 1.4 times as far.
    assert words.SIZES.index(words.size_of(0.7 * 1.4)) == words.SIZES.index(words.size_of(0.7)) + 1


def test_what_is_said_of_an_object():
    told = object_told(
        {
            "object_camera_lateral_direction": -0.6,
            "object_camera_longitudinal_direction": 0.02,
            "object_absolute_distance": 0.6,
            "object_camera_relative_distance": 0.3,
            "object_camera_absolute_distance": 2.0,
        }
    )
    assert told["sideways"].startswith("leftwards ") and told["in depth"] == "abreast barely"
    assert told["gap"].startswith("widening ") and set(told) <= set(words.ASPECTS)


def test_captions_name_every_object_they_describe_and_hold_no_figures():
    described = 0
    for n in range(3, 9):
        clip = make_clip(0, n, SMALL)
        told = things_told(clip.scene, random.Random(0), 2)
        found = dict(captions(told))
        asked = [text for text in found if text != "Describe the camera."]
        assert all(re.match(r"first .* last .* sideways .* distance ", found[text]) for text in asked)
        assert {re.sub(r"^\w+ |\.$", "", text) for text in asked} <= {o.description for o in clip.scene.objects}
        assert "Describe the camera." in found and not re.search(r"\d", json.dumps(found))
        described += len(asked)
        names, begins = "|".join(words.ASPECTS), set()
        for asked, answer in aspects(told, random.Random(n), 99):
            whole = next(text for question, text in found.items() if asked.startswith(question[:-1]))
            begin = next(q for q in found if asked.startswith(q[:-1]))[:-1]
            listed = re.findall(names, asked.removesuffix(".").removeprefix(begin))
            assert 1 <= len(set(listed)) == len(listed) <= 3
            assert re.findall(rf"(?:^| )({names}) ", answer) == listed, "in the order that was asked for"
            parts = re.split(rf"(?:^| )(?=(?:{names}) )", answer)
            assert all(part in whole for part in parts)
            begins.add((begin, listed[0]))
        assert begins == {(f"Describe {thing}", aspect) for thing, parts in told.items() for aspect in parts}
    assert described >= 3


def test_the_nearest_of_the_options_is_the_answer():
    rng = random.Random(0)
    letters = []
    for _ in range(300):
        asked, told = matching.nearest_number(rng)
        question, options = split_question(asked)
        given, nearest, letter = re.fullmatch(r"<thinking>(.*): (.*): .</thinking><answer>(.)</answer>", told).groups()
        assert question == f"Which is nearest to {given}?"
        off = {key: abs(float(value) - float(given)) for key, value in options.items()}
        assert off[letter] < min(v for key, v in off.items() if key != letter) and options[letter] == nearest
        letters.append(letter)
    assert all(50 < letters.count(letter) < 100 for letter in "ABCD")
    asked, told = matching.same_word(rng)
    assert told == short_reasoning(split_question(asked)[1][parse(told).answer], parse(told).answer)


def test_places_are_the_states_of_questions_in_another_unit():
    compared = 0
    for n in range(3, 9):
        scene = make_clip(0, n, SMALL).scene
        questions = propose(scene, QuestionRules(num_frames=scene.num_frames, min_gap=0.99), seed=0)
        named = {q.object_name or "the camera": q for q in questions}
        for thing, (asked, place) in zip(named, placed(scene, named, 1.5), strict=True):
            assert asked == f"State of {thing}."
            figures = [float(figure) for figure in re.findall(r"-?\d+\.\d", place)]
            pairs = zip(named[thing].camera_center, named[thing].object_center, strict=True)
            right = [x for camera, center in pairs for x in (*camera, *(center or ()))]
            np.testing.assert_allclose(figures, np.array(right) / 1.5, atol=0.0501)
            assert place.count("null") == (2 if thing == "the camera" else 0)
            compared += len(right)
    assert compared > 60


def test_states_behind_a_question_are_of_what_it_asks_about():
    places = {"the camera": "C", "the red ball": "R", "the blue drum": "B"}
    found = list(placed_behind_questions(places, 8, random.Random(2), 99))
    assert len(found) == 2 + 2 * 5 and len({asked for asked, _ in found}) == len(found)
    for asked, states in found:
        question, last = asked.split("\n")
        thing = next(thing for thing, text in places.items() if text == states)
        assert last == ("State of the camera." if thing == "the camera" else "State of the object.")
        assert thing == "the camera" or thing in question
        assert "frame 0" in question and "7" in question


def test_rows_that_are_too_many_take_turns():
    rows = [{"kind": "a", "n": n} for n in range(3)] + [{"kind": "b", "n": 9}]
    taken = [[row["n"] for row in rows_of(rows, {"b": 1, "a": 2}, number)] for number in range(3)]
    assert taken == [[0, 1, 9], [1, 2, 9], [0, 2, 9]]
    assert rows_of(rows, {"c": 4}, 0) == []


def test_the_same_bytes_for_any_number_of_workers(tmp_path):
    made = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        size = {"synthetic.height": 16, "synthetic.width": 16, "synthetic.frames": 3, "synthetic.clips": 3}
        config = common.config("curate", {"source": "captions", "workers": workers, "seed": 5, **size})
        assert run_captions(config, str(folder)) == 0
        made.append({f.relative_to(folder): f.read_bytes() for f in folder.rglob("*.json") if f.name != "run.json"})
        assert len(list((folder / "videos").iterdir())) == 3
    assert made[0] == made[1] and len(made[0]) == 3 + len(FILES) + 1
    found = {name: json.loads((folder / name).read_text()) for name in FILES}
    letters = found.pop("letters.json")
    assert letters == [without_clip(row) for row in found["matching.json"] if row["kind"] in FILES["letters.json"]]
    assert len(letters) == 12 and "<video>" not in json.dumps(letters) and not any("video" in row for row in letters)
    for name, kinds in FILES.items():
        assert {row["kind"] for row in found.get(name, letters)} <= set(kinds), name
    every = [row for _, row in sorted({row["id"]: row for rows in found.values() for row in rows}.items())]
    for name, kinds in ((name, FILES[name]) for name in found):
        for clip in {row["video"] for row in every}:
            told = {kind: [row for row in every if row["video"] == clip and row["kind"] == kind] for kind in kinds}
            kept = [row for row in found[name] if row["video"] == clip]
            assert len(kept) == sum(min(most, len(told[kind])) for kind, most in kinds.items())
            assert all(row in told[row["kind"]] for row in kept) and kept == sorted(kept, key=lambda row: row["id"])
    expected = {"caption": 3, "aspect": 3, "place": 3, "asked": 6, "matching": 6, "far": 6, "told": 3}
    expected |= {"reckoning": 12}
    for kind, number in expected.items():
        assert sum(row["kind"] == kind for row in every) >= number, kind
    for row in every:
        looked = re.search(r"\nDescribe [a-z ]*\.$", row["conversations"][0]["value"])
        assert bool(looked) == (row["kind"] in ("caption", "aspect"))


def test_questions_about_told_states_say_them_again_and_come_from_them():
    rules, seen = QuestionRules(num_frames=8), set()
    for n in range(20):
        scene = make_clip(3, n, dataclasses.replace(SMALL, height=32, width=32, frames=8)).scene
        several = list(told.told_questions(scene, rules, 3, random.Random(n), 4))
        assert len(several) <= 4
        for asked, answer in several:
            reasoning = parse(answer)
            assert reasoning.well_formed and len(reasoning.camera_centers) == len(reasoning.object_centers) == 2
            assert all(f"Camera Center: {vector_text(c, 1)}\n" in asked for c in reasoning.camera_centers)
            assert all(f"Object Center: {vector_text(c, 1)}\n" in asked for c in reasoning.object_centers)
            question, options = split_question(asked)
            *figure, said, letter = reasoning.thinking.rpartition("\n")[2].split(": ")
            assert options[reasoning.answer] == said and letter == reasoning.answer
            if said[0].isdigit():
                off = {letter: abs(float(value) - float(figure[0])) for letter, value in options.items()}
                assert min(off, key=off.get) == reasoning.answer
            assert bool(figure) == said[0].isdigit()
            seen.add(said)
    assert len(seen) > 8


def test_a_letter_behind_states_is_that_of_the_option_that_was_asked_for():
    rng, letters, said = random.Random(7), [], []
    for _ in range(300):
        asked, answer = told.letter_behind_states(rng, 8)
        letter = parse(answer).answer
        question, options = split_question(asked.partition("\n**")[0])
        found = question.removeprefix("Which says ").removesuffix("?")
        assert len(set(options.values())) == 4 and options[letter] == found and answer == short_reasoning(found, letter)
        states = parse(f"<thinking>{asked}</thinking>")
        assert len(states.camera_centers) == 2 and asked.index("Options:") < asked.index("Spatial State")
        assert ("Object Center: null" in asked) == (found in CAMERA_DIRECTIONS)
        letters.append(letter)
        said.append(found)
    assert all(50 < letters.count(letter) < 100 for letter in "ABCD")
    assert 100 < sum(found in CAMERA_DIRECTIONS for found in said) < 200


def test_what_two_states_come_to_follows_from_the_centres_as_they_are_written():
    rng, seen = random.Random(5), set()
    named = "|".join(sorted(set(matching.ASPECT.values()), key=len, reverse=True))
    for _ in range(300):
        asked, answer = told.derived(rng, 8)
        states = parse(f"<thinking>{asked}</thinking>")
        (start, end), (first, last) = states.camera_centers, states.object_centers
        thing, aspects = re.search(r"\n(the camera|the object) ([a-z ]+)$", asked).groups()
        move = np.subtract(end, start)
        if thing == "the camera":
            assert first is last is None
            true = {"in all": np.linalg.norm(move)}
        else:
            gap = np.linalg.norm(np.subtract(last, end)) - np.linalg.norm(np.subtract(first, start))
            sideways, _, depth = shift = np.subtract(last, first)
            true = {"sideways": sideways, "in depth": depth, "gap": gap, "in all": np.linalg.norm(shift)}
            true["distance"] = np.linalg.norm(np.subtract(last, start))
        said = re.findall(rf"({named}) (?:(-?\d+\.\d)(?:: )?)?(not moving|[a-z]+(?= |$))?", answer)
        said = [(name, figure, "" if label in true or label == "in" else label) for name, figure, label in said]
        assert [name for name, *_ in said] == re.findall(named, aspects)
        assert len(said) == len(true) + (thing == "the camera")
        for name, figure, label in said:
            seen.add((thing, name, label))
            if name == "mainly":
                axis = CAMERA_DIRECTIONS.index(label) // 2
                assert abs(move[axis]) == abs(move).max() and (move[axis] < 0) == CAMERA_DIRECTIONS.index(label) % 2
                continue
            assert abs(float(figure) - true[name]) < 0.051
            if name in ("sideways", "in depth", "gap"):
                above, below = ("right", "left") if name == "sideways" else ("farther", "closer")
                still = abs(float(figure)) < RULES.tau
                assert label == ("not moving" if still else above if float(figure) > 0 else below)
    assert {name for name in seen if name[2]} >= {
        ("the object", n, "not moving") for n in ("sideways", "in depth", "gap")
    }


def test_phrases_are_tokens_of_their_own_and_figures_only_whole_ones():
    found = phrases()
    assert len(found) == len(set(found))
    backend = build_byte_level_tokenizer(["the red box"], 420 + len(found), phrases=found)
    pieces = lambda text: [backend.decode([i]) for i in backend.encode(text, add_special_tokens=False).ids]  # noqa: E731
    assert pieces("Describe the camera.") == ["Describe the camera."]
    assert pieces("<thinking>0.5: B</thinking><answer>B</answer>") == [
        *("<thinking>", "0.5", ": ", "B", "</thinking><answer>", "B", "</answer>")
    ]
    assert "0.8" not in pieces("[0.81, 10.8]") and "-0.8" in pieces("[-0.8]") and "-0.8" not in pieces("3-0.8")
    state = state_block("frame 3", (0.1, -0.2, 1.0), (0.0, 0.3, -4.1), 1) + "\n"
    assert pieces(state) == [
        *("**Spatial State (frame ", "3", "):**\n- Camera Center: [", "0.1", ", ", "-0.2", ", ", "1.0"),
        *("]\n- Object Center: [", "0.0", ", ", "0.3", ", ", "-4.1", "]\n"),
    ]
    assert pieces("the white wooden barrel") == ["the white", " wooden", " barrel"]
    assert backend.decode(backend.encode("far 0.81 of\n").ids) == "far 0.81 of\n"


def test_pre_training_writes_every_token_that_the_stages_to_come_write():
    """An adapter leaves the rows of the vocabulary as they are: one that was never trained is never said."""
    found = phrases()
    backend = build_byte_level_tokenizer(["the red box"], 420 + len(found), phrases=found)
    tokens = lambda text: set(backend.encode(text, add_special_tokens=False).tokens)  # noqa: E731
    rules, rng = QuestionRules(num_frames=8, answers="states", options="independent"), random.Random(0)
    size = dataclasses.replace(SMALL, height=32, width=32, frames=8, camera_still=0.3, object_still=0.4)
    scenes = [make_clip(4, n, size).scene for n in range(60)]
    trained = set()
    for scene in scenes[:40]:
        trained |= {t for _, text in placed(scene, things_told(scene, rng, 2), 1.5) for t in tokens(text)}
        trained |= {t for _, answer in told.told_questions(scene, rules, 4, rng, 7) for t in tokens(answer)}
    written = {t for scene in scenes[40:] for question in propose(scene, rules, 4) for t in tokens(question.spoken)}
    figures = {t for t in written if t.lstrip("-")[:1].isdigit() and abs(float(t)) > 2}
    assert len(written) > 60 and written - figures <= trained, written - figures - trained
