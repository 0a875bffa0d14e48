"""The one parser of records: what training, evaluation and cold start read, and what none of them takes."""

from __future__ import annotations

import os

import pytest

from data_prep.cold_start.r1_items import parse_item
from mllm4d_jax.qa.benchmarks import record_question
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.media_paths import resolve_media
from mllm4d_jax.qa.records import Record, as_prompt, as_scored_prompt, parse_record

USER = {"from": "human", "value": "<video>\nWhich way?\nA. left\nB. right"}
ASKED = {"role": "user", "content": "<video>\nWhich way?\nOptions:\nA. left\nB. right"}
ONE = {"messages": [ASKED, {"role": "assistant", "content": "B"}], "videos": ["a.mp4"], "solution": {"answer": "B"}}


def reason(call):
    with pytest.raises(RecordError) as caught:
        call()
    return caught.value.reason, str(caught.value)


@pytest.mark.parametrize(
    ("name", "role"),
    [("user", "user"), ("human", "user"), ("system", "system"), ("gpt", "assistant"), ("assistant", "assistant")],
)
def test_roles(tmp_path, name, role):
    raw = {"conversations": [{"from": name, "value": "hello"}]}
    assert parse_record(raw, "k", tmp_path).messages[0]["role"] == role


def test_unknown_role_is_named(tmp_path):
    raw = {"conversations": [{"from": "observer", "value": "x"}]}
    why, text = reason(lambda: parse_record(raw, "f.json#3", tmp_path))
    assert why == "unknown_role" and "'observer'" in text and text.startswith("f.json#3: ")


def test_system_prompt_only_where_the_record_has_none(tmp_path):
    plain = {"conversations": [{"from": "user", "value": "q"}]}
    own = {"conversations": [{"from": "system", "value": "mine"}, {"from": "user", "value": "q"}]}
    assert [m["role"] for m in parse_record(plain, "k", tmp_path).messages] == ["user"]
    assert parse_record(plain, "k", tmp_path, "given").messages[0] == {"role": "system", "content": "given"}
    systems = [m["content"] for m in parse_record(own, "k", tmp_path, "given").messages if m["role"] == "system"]
    assert systems == ["mine"]


@pytest.mark.parametrize(
    "raw",
    [
        {"video": "a.mp4", "conversations": [{"from": "user", "value": "no mark"}]},
        {"conversations": [USER]},
        {"video": ["a.mp4"], "conversations": [{"from": "user", "value": "<video><video>"}]},
        {"image": "a.png", "conversations": [USER]},
        {"video": "a.mp4", "conversations": [{"from": "gpt", "value": "<video>"}]},
    ],
)
def test_placeholders_must_match_files(tmp_path, raw):
    why, text = reason(lambda: parse_record(raw, "k", tmp_path))
    assert why == "placeholder_mismatch" and "k: " in text


@pytest.mark.parametrize("name", ["\ud800.mp4", "\udc80.mp4", "v\udcff/a.mp4"])
def test_a_path_that_is_no_unicode_is_refused(tmp_path, name):
    """Python lets the second and third stand for bytes of a file's name; no message could be printed then."""
    why, text = reason(lambda: parse_record({"video": name, "conversations": [USER]}, "k", tmp_path))
    assert why == "bad_path" and text.encode()


def test_placeholders_do_not_reach_across_turns(tmp_path):
    turns = [{"from": "user", "value": "a <vid"}, {"from": "user", "value": "eo>"}]
    why, _ = reason(lambda: parse_record({"video": "a.mp4", "conversations": turns}, "k", tmp_path))
    assert why == "placeholder_mismatch"


@pytest.mark.parametrize("path", ["../a.mp4", "/etc/passwd", "v/../../a.mp4"])
def test_paths_stay_inside_the_root(tmp_path, path):
    why, text = reason(lambda: parse_record({"video": path, "conversations": [USER]}, "k#1", tmp_path / "root"))
    assert why == "path_outside_root" and text.startswith("k#1: ")


@pytest.fixture
def cache(tmp_path):
    """Return a function: what a file of a snapshot links to -> (root, its repository)."""

    def make(target, name="datasets--owner--set", inside=""):
        repository = tmp_path / "hub" / name
        root = repository / "snapshots" / "0f3a" / inside
        root.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (repository / "blobs" / "abc").write_bytes(b"video")
        (tmp_path / "secret").write_bytes(b"secret")
        (root / "a.mp4").symlink_to(os.path.relpath(repository / target, root))
        return root, repository

    return make


@pytest.mark.parametrize("name", ["datasets--owner--set", "models--owner--set"])
@pytest.mark.parametrize("inside", ["", "videos/train"])
def test_links_of_a_hugging_face_cache_are_followed(cache, name, inside, tmp_path):
    root, repository = cache("blobs/abc", name, inside)
    assert resolve_media(root, "a.mp4") == str(repository / "blobs" / "abc")
    (tmp_path / "root").symlink_to(root)
    assert resolve_media(tmp_path / "root", "a.mp4") == str(repository / "blobs" / "abc")
    question = ONE | {"videos": ["a.mp4"]}
    assert record_question(question, "s", "k", str(root)).media == str(repository / "blobs" / "abc")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("../../secret", "datasets--owner--set"),  # outside of the cache
        ("../other/blobs/abc", "datasets--owner--set"),  # another repository
        ("refs/main", "datasets--owner--set"),  # not a blob
        ("blobs/abc", "set"),  # no cache's layout
    ],
)
def test_other_links_are_refused_and_named(cache, target, name):
    root, repository = cache(target, name)
    why, text = reason(lambda: resolve_media(root, "a.mp4"))
    leads_to = os.path.normpath(repository / target)
    assert why == "path_outside_root" and "through a link" in text and leads_to in text


def test_blobs_are_reached_through_links_only(cache):
    root, _ = cache("blobs/abc")
    why, text = reason(lambda: resolve_media(root, "../../blobs/abc"))
    assert why == "path_outside_root" and "leaves the media root" in text


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"conversations": []},
        {"conversations": None, "messages": None},
        {"conversations": "text"},
        {"conversations": [{"from": "user"}]},
        {"conversations": [{"from": "user", "value": 3}]},
        {"conversations": ["hello"]},
        {"messages": [{"from": "user", "value": "x"}]},
        {"video": 7, "conversations": [USER]},
        {"video": [None], "conversations": [USER]},
        {"video": {"path": "a"}, "conversations": [USER]},
        {"conversations": [{"from": "user", "value": "\ud800"}]},
    ],
)
def test_shapes_that_are_no_records(tmp_path, raw):
    assert reason(lambda: parse_record(raw, "k", tmp_path))[0] == "bad_record"


def record(*turns, solution=None):
    return Record("r#0", tuple({"role": role, "content": text} for role, text in turns), solution)


def test_the_answer_is_taken_off():
    prompt = as_prompt(record(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "q2"), ("assistant", "a2")))
    assert [m["content"] for m in prompt.messages] == ["s", "q", "a", "q2"]
    assert as_prompt(record(("user", "q"))).messages == record(("user", "q")).messages


@pytest.mark.parametrize("turns", [(("system", "s"),), (("assistant", "a"),)])
def test_nothing_asked(turns):
    with pytest.raises(RecordError) as error:
        as_prompt(record(*turns))
    assert error.value.reason == "no_question" and error.value.key == "r#0"


@pytest.mark.parametrize("solution", [None, [], [{"answer": "seven"}], [{"answer": "A", "camera_center": [1]}], "A"])
def test_a_solution_that_rewards_cannot_read(solution):
    with pytest.raises(RecordError) as error:
        as_scored_prompt(record(("user", "q"), solution=solution))
    assert error.value.reason == "bad_solution"


def refusals(raw, root) -> list[str]:
    """Return the messages with which training, evaluation and cold start refuse a record, '' for one that takes it."""
    readers = (
        lambda: parse_record(raw, "k", root),
        lambda: record_question(raw, "stem", "k", None),
        lambda: parse_item(raw, "k", "id"),
    )
    said = []
    for read in readers:
        try:
            read()
            said.append("")
        except RecordError as error:
            said.append(str(error).removeprefix("k: "))
    return said


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"video": "a.mp4"},  # both fields, the same file
        {"videos": "a.mp4"},
        {"video": ["a.mp4"], "videos": None},
        {"solution": [{"answer": "B. right"}]},
        {"solution": {"answer": "(B) right"}},
        {"messages": [{"role": "system", "content": "s"}, ASKED]},
        {"messages": [{"role": "human", "content": ASKED["content"]}, {"role": "gpt", "content": "B"}]},
        {"messages": [ASKED | {"content": "Which way?\nOptions:\n(A) left\nB) right\n<video>"}]},
        {"messages": [ASKED | {"content": "<video>Which way?\nA: left\nB.right"}]},
        {"conversations": None, "video": None, "system": None},
        {"question": None, "choices": None, "options": None, "answer": None},
        {"choices": {"A": None, "B": None, "C": None}},
        dict.fromkeys(("id", "question_type", "source_id", "scale", "label", "object_name", "category", "subtask")),
    ],
)
def test_what_all_readers_take(tmp_path, change):
    assert refusals(ONE | change, tmp_path) == ["", "", ""]
    assert dict(record_question(ONE | change, "s", "k", None).choices) == {"A": "left", "B": "right"}
    assert parse_item(ONE | change, "k", "id").options == {"A": "left", "B": "right"}
    assert record_question(ONE | change, "s", "k", None).truth == ("B",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video": "b.mp4"}, "'video' and 'videos' are two names of one field and differ"),
        ({"videos": [" "]}, "'videos' must be a path or a list of paths"),
        ({"conversations": [USER]}, "'conversations' or 'messages', one of them"),
        ({"messages": [ASKED | {"role": "observer"}]}, "turn 0, has the role 'observer'"),
        ({"messages": [ASKED | {"content": "Which way?"}]}, "0 <video> in the user's text for 1 video file(s)"),
        ({"messages": [ASKED | {"content": "<video><video>"}]}, "2 <video> in the user's text for 1 video file(s)"),
        ({"messages": [ASKED | {"content": "<video><image>"}]}, "1 <image> in the user's text for 0 image file(s)"),
        ({"messages": [ASKED | {"content": "<video>\ud800"}]}, "half a surrogate pair"),
        ({"messages": []}, "'messages' must be a list of turns"),
    ],
)
def test_what_no_reader_takes(tmp_path, change, message):
    said = refusals(ONE | change, tmp_path)
    assert message in said[0] and said == said[:1] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": [ASKED, ONE["messages"][1], {"role": "user", "content": "and?"}]}, "a question is one turn"),
        ({"messages": [{"role": "assistant", "content": "hi"}, ASKED]}, "a question is one turn of the user"),
        ({"solution": [{"answer": "A"}, {"answer": "B"}]}, "'solution' must be one object, or a list of one"),
        ({"solution": "B"}, "'solution' must be an object"),
        ({"messages": [ASKED | {"content": "<video>\nOptions:\nA. x\nC. y"}]}, "letters ['A', 'C'], not A, B"),
    ],
)
def test_training_takes_more_than_questions(tmp_path, change, message):
    said = refusals(ONE | change, tmp_path)
    assert said[0] == "" and message in said[1] and said[1] == said[2]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [("<answer>x < y</answer>", "x < y"), ("<thinking>left?</thinking> B", "B"), ("right", "right")],
)
def test_the_answer_is_found_as_in_a_response(reply, answer):
    raw = {"messages": [ASKED, {"role": "assistant", "content": reply}], "videos": ["a.mp4"]}
    raw |= {"choices": {"A": "x < y", "B": "right"}}
    assert record_question(raw, "stem", "k", None).answer == answer


def test_media_in_a_bucket_stay_below_their_root():
    assert resolve_media("gs://b/root/", "a//b/../c é%2F.mp4") == "gs://b/root/a/c é%2F.mp4"
    assert resolve_media("gs://b", "gs://other/x.mp4") == "gs://b/gs:/other/x.mp4"
    for name in ("../x.mp4", "a/../../x.mp4", "/x.mp4", "//x.mp4", ".", "a/.."):
        assert reason(lambda name=name: resolve_media("gs://b/root", name))[0] == "path_outside_root", name
    for name in ("", " ", "a\0b", "\ud800.mp4"):
        assert reason(lambda name=name: resolve_media("gs://b/root", name))[0] == "bad_path", name
