"""Questions of every layout, and every way in which one can be broken."""

from __future__ import annotations

import json

import pytest

from data_prep.questions.propose import SUBTASKS as CURATED_SUBTASKS
from data_prep.store.export import bench_record, conversation_record, r1_record
from mllm4d_jax.eval.benchmarks import SUBTASKS, BenchmarkError, load_items, question_files
from tests.eval.question_fixtures import vlm4d_rows

OPTIONS = {"A": "2.5", "B": "12.7", "C": "15.2", "D": "9.6"}
ROW = {
    "id": "clip:0",
    "source_id": "source",
    "video": "clips/a.mp4",
    "question": "How far does the camera move between frame 14 and frame 15 of 31?",
    "options": OPTIONS,
    "answer": "B",
    "question_type": "object_camera_lateral_direction",
    "conversations": [
        {
            "from": "human",
            "value": "<video>\nHow far does the camera move between frame 14 and frame 15 of 31?\nOptions:\n"
            "A. 2.5\nB. 12.7\nC. 15.2\nD. 9.6\nAnswer with the letter of the right option.",
        },
        {"from": "gpt", "value": "B"},
    ],
    "solution": {"camera_center": [], "object_center": []},
}


def write(folder, rows, name="questions.json"):
    path = folder / name
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def test_vlm4d(tmp_path):
    items = load_items("vlm4d", write(tmp_path, vlm4d_rows()), None)
    assert [one.id for one in items] == [
        *(f"real/validation_{n}" for n in (1, 2, 3, 633, 922, 923)),
        *(f"synthetic/validation_{n}" for n in (1, 2)),
    ]
    assert [one.category for one in items] == [
        *["exocentric"] * 5,
        "egocentric",
        "directional",
        "false positive",
    ]
    assert [one.subtask for one in items] == ["text", "text", "numeric", "text", "text", "text", None, None]
    assert [one.truth for one in items] == [("A",), ("B",), ("A",), ("C", "D"), ("A",), ("C",), ("C",), ("A",)]
    assert items[0].video == items[1].video == "videos_real/davis/bus.mp4"
    assert items[5].video == "videos_real/ego4d/clip.mp4" and items[2].choices["D"] == "0"
    assert {one.media for one in items} == {None} and items[4].answer == "By rolling it. "


@pytest.mark.parametrize("inner", ["videos_real", ""])
def test_vlm4d_videos_lie_under_the_root_with_or_without_their_folder(tmp_path, inner):
    videos = tmp_path / "media" / inner / "davis"
    videos.mkdir(parents=True)
    (videos / "bus.mp4").touch()
    path = write(tmp_path, vlm4d_rows()[:2])
    for one in load_items("vlm4d", path, str(tmp_path / "media")):
        assert one.media == str((videos / "bus.mp4").resolve())


def test_a_folder_is_all_its_files(tmp_path):
    rows = vlm4d_rows()
    write(tmp_path, rows[:6], "real.json")
    write(tmp_path, rows[6:], "synthetic.jsonl")
    (tmp_path / "readme.md").touch()
    assert [path.name for path in question_files(tmp_path)] == ["real.json", "synthetic.jsonl"]
    assert len(load_items("vlm4d", tmp_path, None)) == 8
    with pytest.raises(BenchmarkError, match="no such file"):
        question_files(tmp_path / "nothing")


def test_what_curation_writes(tmp_path):
    (one,) = load_items("mllm4d", write(tmp_path, [bench_record(ROW)]), None)
    assert (one.id, one.split, one.video, one.question) == ("clip:0", "bench", "clips/a.mp4", ROW["question"])
    assert (one.category, one.subtask) == ("object_camera_lateral_direction", "object_camera_relative_direction")
    assert (dict(one.choices), one.answer, one.truth) == (OPTIONS, "B", ("B",))
    assert one.prompt.startswith("How far") and one.prompt.endswith("right option.") and "<video>" not in one.prompt


@pytest.mark.parametrize("layout", [bench_record, conversation_record, r1_record])
def test_the_record_layouts_say_the_same(tmp_path, layout):
    (one,) = load_items("jsonl", write(tmp_path, [layout(ROW)], "own.jsonl"), None)
    assert (one.split, one.category, one.subtask) == ("own", ROW["question_type"], None)
    assert (one.question, dict(one.choices), one.truth) == (ROW["question"], OPTIONS, ("B",))
    assert one.video == "clips/a.mp4"
    (bench,) = load_items("mllm4d", tmp_path / "own.jsonl", None)
    assert one.system is None and bench.prompt == one.prompt
    assert bench.subtask == "object_camera_relative_direction"


def test_a_record_keeps_its_own_system_message(tmp_path):
    row = r1_record(ROW)
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    (one,) = load_items("jsonl", write(tmp_path, [row]), None)
    assert one.system == "Be brief." and one.prompt.startswith("How far")


def test_scenarios_are_those_of_curation():
    assert {name: SUBTASKS[name] for name in CURATED_SUBTASKS} == dict(CURATED_SUBTASKS)
    assert len(set(SUBTASKS.values())) == 6


@pytest.mark.parametrize(
    ("answer", "truth"), [("B", "B"), ("B. 12.7", "B"), ("(B)", "B"), ("12.7", "B"), (12.7, "B"), ("C.", "C")]
)
def test_answers_as_letter_or_text(tmp_path, answer, truth):
    (one,) = load_items("jsonl", write(tmp_path, [{**bench_record(ROW), "answer": answer}]), None)
    assert one.truth == (truth,)


def test_an_answer_behind_its_reasoning(tmp_path):
    row = conversation_record(ROW)
    row["conversations"][1]["value"] = "<thinking>A. 2.5 is short</thinking><answer>D</answer>"
    (one,) = load_items("jsonl", write(tmp_path, [row]), None)
    assert one.truth == ("D",) and one.id == "clip:0"
    del row["id"]
    (one,) = load_items("jsonl", write(tmp_path, [row]), None)
    assert one.id == "questions.json#0"


GOOD = vlm4d_rows()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": "davis/bus.mp4"}, "without videos_real/ or videos_synthetic/"),
        ({"video": 3}, "'video' must be a text"),
        ({"question": " "}, "'question' must be a text"),
        ({"id": ""}, "'id' must be a text"),
        ({"id": "last"}, "does not end in a number"),
        ({"choices": {"A": "left"}}, "two options or more"),
        ({"choices": None}, "two options or more"),
        ({"choices": {"a": "left", "B": "right"}}, "capital letters as keys, not 'a'"),
        ({"choices": {"A": "left", "B": None}}, "option B must be a text or a number, not None"),
        ({"choices": {"A": "left", "B": True}}, "option B must be"),
        ({"choices": {"A": "left", "B": " "}}, "option B must be"),
        ({"answer": "sideways"}, "'answer' is 'sideways', which is none of the options"),
        ({"answer": None}, "'answer' is None"),
        ({"answer": "B"}, "'answer' is 'B'"),
    ],
)
def test_broken_vlm4d_questions_are_named(tmp_path, change, message):
    path = write(tmp_path, [GOOD | {"id": "validation_7"}, GOOD | change])
    with pytest.raises(BenchmarkError) as caught:
        load_items("vlm4d", path, None)
    name = change.get("id", GOOD["id"])
    assert message in str(caught.value) and f"questions.json#1 (id {name!r})" in str(caught.value)
    assert "1 of 2 questions are unusable" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_type": "colour"}, "'question_type' must be one of camera_absolute_distance"),
        ({"answer": "E"}, "'answer' is 'E'"),
        ({"answer": "B. 2.5"}, "'answer' is 'B. 2.5'"),
        ({"video": None}, "'video' must be the path of one video, not None"),
        ({"image": "a.png"}, "it has images"),
        ({"conversations": ROW["conversations"][:1] * 2}, "2 turns of the user"),
        ({"video": ["a.mp4", "b.mp4"]}, "'video' must be the path of one video"),
        ({"subtask": 3}, "'subtask' must be a text"),
        ({"conversations": "hi"}, "must be a list of turns"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "a turn must have 'from'"),
    ],
)
def test_broken_records_are_named(tmp_path, change, message):
    with pytest.raises(BenchmarkError) as caught:
        load_items("mllm4d", write(tmp_path, [bench_record(ROW) | change]), None)
    assert message in str(caught.value) and "questions.json#0 (id 'clip:0')" in str(caught.value)


def test_records_without_parts_must_spell_them_out(tmp_path):
    row = conversation_record(ROW)
    row["conversations"][0]["value"] = "<video>\nWhere?\nOptions:\nA. left\nC. right"
    with pytest.raises(BenchmarkError, match=r"letters \['A', 'C'\], not A, B"):
        load_items("jsonl", write(tmp_path, [row]), None)
    row["conversations"] = row["conversations"][:1]
    row["conversations"][0]["value"] = "<video>\nWhere?\nOptions:\nA. left\nB. right"
    with pytest.raises(BenchmarkError, match="no 'answer', no 'solution'"):
        load_items("jsonl", write(tmp_path, [row]), None)


def test_all_problems_are_reported_together(tmp_path):
    rows = [*vlm4d_rows(), GOOD, *({} for _ in range(25))]
    path = write(tmp_path, rows)
    with pytest.raises(BenchmarkError) as caught:
        load_items("vlm4d", path, None)
    text = str(caught.value)
    assert "26 of 34 questions" in text and "and 6 more" in text
    assert "id 'real/validation_1' is also that of questions.json#0" in text
    path.write_text('{"id": "validation_1"\n', encoding="utf-8")
    with pytest.raises(BenchmarkError, match="not valid JSON at line 1"):
        load_items("vlm4d", path, None)


def test_videos_must_be_there_and_inside(tmp_path):
    path = write(tmp_path, [GOOD, GOOD | {"id": "validation_2", "video": "videos_real/../../../secret.mp4"}])
    with pytest.raises(BenchmarkError) as caught:
        load_items("vlm4d", path, str(tmp_path))
    assert "there is no video" in str(caught.value) and "leaves the media root" in str(caught.value)


def test_an_unknown_benchmark(tmp_path):
    with pytest.raises(BenchmarkError, match="vlm4d, mllm4d, jsonl"):
        load_items("vlm", write(tmp_path, []), None)
