"""Questions of every layout, and every way in which one can be broken."""

from __future__ import annotations

import pytest

from data_prep.questions.scenarios import SCENARIOS
from data_prep.store.export import bench_record, conversation_record, r1_record
from mllm4d_jax.qa.benchmarks import PARSERS, SUBTASKS, BenchmarkQuestion
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.options import write_question
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
            "A. 2.5\nB. 12.7\nC. 15.2\nD. 9.6\nAnswer with the letter of the correct option.",
        },
        {"from": "gpt", "value": "B"},
    ],
    "solution": {"camera_center": [], "object_center": []},
}


def parse(benchmark, raw, root=None) -> BenchmarkQuestion:
    return PARSERS[benchmark](raw, "own", "own.jsonl#0", root)


@pytest.mark.parametrize("field", ["id", "question", "category", "subtask", "question_type", "answer", "options"])
def test_half_a_surrogate_pair_is_no_text(field):
    value = {"A": "2.5\ud800", "B": "12.7"} if field == "options" else "12.7\ud800"
    with pytest.raises(RecordError) as caught:
        parse("jsonl", ROW | {field: value})
    assert str(caught.value).encode()


@pytest.mark.parametrize("name", ["validation_" + "9" * 5000, "validation_" + "9" * 19])
def test_an_id_without_a_number_that_can_be_read(name):
    with pytest.raises(RecordError, match="'id' must be a text or|does not end in a number that"):
        parse("vlm4d", vlm4d_rows()[0] | {"id": name})


@pytest.mark.parametrize("name", [["a"], {"a": 1}, 1.5, " "])
def test_an_id_that_is_none(name):
    with pytest.raises(RecordError, match="'id' must be a text or a whole number"):
        parse("jsonl", ROW | {"id": name})
    assert parse("jsonl", ROW | {"id": None}).id == "own.jsonl#0" and parse("jsonl", ROW | {"id": 7}).id == "7"


def test_vlm4d():
    items = [parse("vlm4d", row) for row in vlm4d_rows()]
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
    for row in vlm4d_rows()[:2]:
        one = parse("vlm4d", row, str(tmp_path / "media"))
        assert one.media == str((videos / "bus.mp4").resolve())


def test_what_curation_writes():
    one = parse("mllm4d", bench_record(ROW))
    assert (one.id, one.split, one.video, one.question) == ("clip:0", "bench", "clips/a.mp4", ROW["question"])
    assert (one.category, one.subtask) == ("object_camera_lateral_direction", "object_camera_relative_direction")
    assert (dict(one.choices), one.answer, one.truth) == (OPTIONS, "12.7", ("B",))
    assert one.prompt == "<video>\n" + write_question(ROW["question"], OPTIONS)


@pytest.mark.parametrize("layout", [bench_record, conversation_record, r1_record])
def test_the_record_layouts_say_the_same(layout):
    one = parse("jsonl", layout(ROW))
    assert (one.split, one.category, one.subtask) == ("own", ROW["question_type"], None)
    assert (one.question, dict(one.choices), one.truth) == (ROW["question"], OPTIONS, ("B",))
    assert one.video == "clips/a.mp4"
    bench = parse("mllm4d", layout(ROW))
    assert one.system is None and bench.prompt == one.prompt
    assert bench.subtask == "object_camera_relative_direction"


def test_a_record_keeps_its_own_system_message():
    row = r1_record(ROW)
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    one = parse("jsonl", row)
    assert one.system == "Be brief." and one.prompt.startswith("<video>\nHow far")


def test_scenarios_are_those_of_curation():
    assert set(SCENARIOS) < set(SUBTASKS) and len({SUBTASKS[name] for name in SCENARIOS}) == 6


@pytest.mark.parametrize(
    ("answer", "truth"), [("B", "B"), ("B. 12.7", "B"), ("(B)", "B"), ("12.7", "B"), (12.7, "B"), ("C.", "C")]
)
def test_answers_as_letter_or_text(answer, truth):
    row = bench_record(ROW)
    assert parse("jsonl", row | {"answer": answer}).truth == (truth,)
    twins = row | {"answer": answer, "choices": {truth: OPTIONS[truth], "E": OPTIONS[truth]}}
    assert parse("jsonl", twins).truth == (truth, "E")


def test_an_answer_behind_its_reasoning():
    row = conversation_record(ROW)
    row["conversations"][1]["value"] = "<thinking>A. 2.5 is short</thinking><answer>D</answer>"
    one = parse("jsonl", row)
    assert one.truth == ("D",) and one.id == "clip:0"
    del row["id"]
    one = parse("jsonl", row)
    assert one.id == "own.jsonl#0"


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
        ({"choices": {"A": "left", "B": None}}, "two options or more"),
        ({"choices": {"A": None, "B": None}}, "two options or more"),
        ({"choices": {"A": "left", "B": True}}, "option B must be"),
        ({"choices": {"A": "left", "B": " "}}, "option B must be"),
        ({"answer": "sideways"}, "'answer' is 'sideways', which is none of the options"),
        ({"answer": None}, "'answer' is None"),
        ({"answer": "B"}, "'answer' is 'B'"),
    ],
)
def test_broken_vlm4d_questions_are_named(change, message):
    with pytest.raises(RecordError) as caught:
        parse("vlm4d", GOOD | change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": "colour"}, "'category' must be one of camera_absolute_distance"),
        ({"category": None}, "'category' must be one of camera_absolute_distance"),
        ({"question_type": "colour"}, "'question_type' must be one of camera_absolute_distance"),
        ({"answer": "E"}, "'answer' is 'E'"),
        ({"answer": "B. 2.5"}, "'answer' is 'B. 2.5'"),
        ({"video": None}, "'video' must be the path of one video, not None"),
        ({"image": "a.png"}, "it has images"),
        (
            {"conversations": [*ROW["conversations"][:1], {"from": "user", "value": "?"}]},
            "'conversations' asks in the turns ['user', 'user']",
        ),
        ({"video": ["a.mp4", "b.mp4"]}, "'video' must be the path of one video"),
        ({"subtask": 3}, "'subtask' must be a text"),
        ({"conversations": "hi"}, "'conversations' must be a list of turns"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 0, has the role 'robot'"),
    ],
)
def test_broken_records_are_named(change, message):
    with pytest.raises(RecordError) as caught:
        parse("mllm4d", bench_record(ROW) | change)
    assert message in str(caught.value)


def test_records_without_parts_must_spell_them_out():
    row = conversation_record(ROW)
    row["conversations"][0]["value"] = "<video>\nWhere?\nOptions:\nA. left\nC. right"
    with pytest.raises(RecordError, match=r"letters \['A', 'C'\], not A, B"):
        parse("jsonl", row)
    row["conversations"] = row["conversations"][:1]
    row["conversations"][0]["value"] = "<video>\nWhere?\nOptions:\nA. left\nB. right"
    with pytest.raises(RecordError, match="no 'answer', no 'solution'"):
        parse("jsonl", row)
