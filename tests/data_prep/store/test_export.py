"""Released files from clip results: their bytes and their checks."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import time
from pathlib import Path

import cv2
import pytest

from data_prep.questions.propose import QuestionRules, propose
from data_prep.store import parts
from data_prep.store.export import (
    MANIFEST,
    assemble,
    bench_record,
    check_result,
    check_row,
    conversation_record,
    r1_record,
)
from data_prep.store.parts import ClipRejected, ClipResult, PartStore, StoreError, process_clips
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.qa.errors import MediaError
from tests.data_prep.scenes.random_scenes import random_scene

ROOT = Path(__file__).resolve().parents[3]
OUTPUTS = {
    "train.json": ("train", conversation_record),
    "train.jsonl": ("train", conversation_record),
    "train_r1.jsonl": ("train", r1_record),
    "bench.json": ("bench", bench_record),
}
CLIPS = [f"clip {n:02d}/é" for n in range(12)]


def make_row(clip_id, n, source_id, **changes):
    question = f"How far does the camera move between frame {n} and frame {n + 3} of 7?"
    row = {
        "id": f"{clip_id}#{n}",
        "source_id": source_id,
        "video": f"videos/{source_id}.mp4",
        "conversations": [{"from": "user", "value": f"<video>\n{question}"}, {"from": "gpt", "value": "ABCD"[n % 4]}],
        "question": question,
        "options": {"A": "0.1 m", "B": "0.4 m", "C": "1.2 m", "D": "2.0 m"},
        "answer": "ABCD"[n % 4],
        "question_type": ["camera_absolute_distance", "object_absolute_distance"][n % 2],
        "solution": {"camera_center": [[0, 0, 0.5], [1, 2.25, 3]], "object_center": [None, [0.1, 0.2, n]]},
    }
    return row | changes


def make_result(clip_id):
    """A clip as a pure function of its id; every fifth is rejected, every fourth source is for the bench."""
    n = CLIPS.index(clip_id)
    if n % 5 == 4:
        raise ClipRejected("no_motion", "nothing moves", f"s{n}")
    source = f"s{n // 2}"
    rows = tuple(make_row(clip_id, i, source) for i in range(2 + n % 3))
    split = "bench" if n // 2 % 4 == 3 else "train"
    return ClipResult(clip_id, source, split, rows, ({"reason": "near_threshold", "detail": "0.3 m", "n": n},))


def write(folder, clips=None, workers=1, work=make_result, outputs=OUTPUTS, seed=5):
    clips = CLIPS if clips is None else clips
    with PartStore(folder / "work", seed=seed, config={"lr": 1.5, "name": "é"}) as store:
        process_clips(clips, work, store, workers=workers, check=check_result)
        return assemble(store, clips, folder / "out", outputs)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_files_hold_the_questions(tmp_path):
    manifest = write(tmp_path)
    out = tmp_path / "out"
    train = json.loads((out / "train.json").read_bytes())
    wanted = [r for c in CLIPS if CLIPS.index(c) % 5 != 4 for r in make_result(c).rows]
    bench_sources = {"s3"}
    assert [r["id"] for r in train] == [r["id"] for r in wanted if r["source_id"] not in bench_sources]
    assert train == [json.loads(line) for line in (out / "train.jsonl").read_bytes().splitlines()]
    first = train[0]
    assert first["conversations"][0]["value"] == (
        "<video>\nHow far does the camera move between frame 0 and frame 3 of 7?"
    )
    assert first["conversations"][1] == {"from": "gpt", "value": "A"}
    r1 = json.loads((out / "train_r1.jsonl").read_bytes().splitlines()[1])
    assert [m["role"] for m in r1["messages"]] == ["user"] and r1["videos"] == ["videos/s0.mp4"]
    centers = {"camera_center": [[0, 0, 0.5], [1, 2.25, 3]], "object_center": [None, [0.1, 0.2, 1]]}
    assert r1["solution"] == [{"answer": "B", **centers}]
    bench = json.loads((out / "bench.json").read_bytes())
    assert {r["source_id"] for r in bench} == bench_sources and bench[0]["choices"]["C"] == "1.2 m"
    assert {r["answer"] for r in bench} <= {"0.1 m", "0.4 m", "1.2 m", "2.0 m"}
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_bytes().splitlines()]
    assert {"clip_id": CLIPS[4], "source_id": "s4", "reason": "no_motion", "detail": "nothing moves"} in rejected
    assert manifest == json.loads((out / MANIFEST).read_bytes())
    assert manifest["clips"] == {"total": 12, "without_questions": 2}
    assert manifest["rejected"] == {"no_motion": 2, "near_threshold": 10}
    assert sum(manifest["questions"]["train"].values()) == len(train)
    assert manifest["proposed"] == manifest["questions"]  # all were kept
    assert manifest["questions"]["bench"]["camera_absolute_distance"] == sum(
        r["category"] == "camera_absolute_distance" for r in bench
    )
    assert manifest["seed"] == 5 and manifest["config"] == {"lr": 1.5, "name": "é"}
    for name, entry in manifest["files"].items():
        data = (out / name).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert manifest["files"]["train.json"]["records"] == len(train)
    assert set(os.listdir(out)) == {*OUTPUTS} | {"rejected.jsonl", MANIFEST}


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train_r1.jsonl", "bench.json"])
def test_the_trainer_reads_every_file_without_conversion(tmp_path, name):
    manifest = write(tmp_path)
    records = RecordFile(tmp_path / "out" / name, tmp_path)
    assert len(records) == manifest["files"][name]["records"] > 0
    roles = ["user"] if "r1" in name else ["user", "assistant"]
    for record in records:
        assert [m["role"] for m in record.messages] == roles
        assert record.messages[0]["content"][0]["type"] == "video"


def test_bytes_do_not_depend_on_workers_or_order(tmp_path):
    manifests = [
        write(tmp_path / "one"),
        write(tmp_path / "four", CLIPS[::-1], workers=4),
    ]
    assert manifests[0] == manifests[1]
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "four" / "out")
    assert contents(tmp_path / "one" / "work" / "parts") == contents(tmp_path / "four" / "work" / "parts")


def test_finished_clips_are_not_done_again(tmp_path):
    done = []

    def work(clip_id):
        done.append(clip_id)
        return make_result(clip_id)

    write(tmp_path, CLIPS[:5], work=work)
    write(tmp_path, work=work)
    assert sorted(done) == CLIPS


def test_rewards_see_every_turn_but_the_last():
    said = [("system", "Think."), ("user", "<video>One?"), ("gpt", "A"), ("human", "Two?"), ("gpt", "B")]
    row = make_row("c", 0, "s", conversations=[{"from": who, "value": what} for who, what in said])
    check_row(row, "s")
    roles = ["system", "user", "assistant", "user"]
    assert r1_record(row)["messages"] == [
        {"role": role, "content": what} for role, (_, what) in zip(roles, said, strict=False)
    ]


@pytest.mark.parametrize(
    ("given", "written"), [("human", "user"), ("user", "user"), ("assistant", "gpt"), ("gpt", "gpt")]
)
def test_speakers_are_written_as_the_release_reads_them(given, written):
    turns = [TURN, {"from": "gpt", "value": "A"}]
    turns[written == "gpt"] = turns[written == "gpt"] | {"from": given}
    row = make_row("c", 0, "s", conversations=turns)
    check_row(row, "s")
    for record in (conversation_record(row), bench_record(row)):
        assert [turn["from"] for turn in record["conversations"]] == ["user", "gpt"]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ([], []),
        (None, []),
        ([None, None], []),
        ([1, 2, 3], [[1.0, 2.0, 3.0]]),
        ([[0, 0, 0], [1, 2.5, 3]], [[0.0, 0.0, 0.0], [1.0, 2.5, 3.0]]),
        ([None, [1, 2, 3]], [None, [1.0, 2.0, 3.0]]),
    ],
)
def test_centres_are_written_in_one_form(given, written):
    row = make_row("c", 0, "s", solution={"camera_center": given, "object_center": given})
    check_row(row, "s")
    centers = {"camera_center": written, "object_center": written}
    for record in (r1_record(row), bench_record(row | {"solution": [row["solution"]]})):
        assert json.dumps(record["solution"]) == json.dumps([{"answer": "A"} | centers])  # floats, to the letter


@pytest.mark.parametrize(("given", "written"), [(2, "[2.0]"), (0.5, "[0.5]"), ((1, 0, -2.5), "[1.0, 0.0, -2.5]")])
def test_a_value_is_written_as_a_list(given, written):
    assert json.dumps(r1_record(make_row("c", 0, "s", value=given))["value"]) == written


def test_generated_questions_pass(tmp_path):
    """What the question generator makes goes through as it is."""
    scene = random_scene(3)
    rows = tuple(q.record("v.mp4") for q in propose(scene, QuestionRules(), seed=1))
    assert rows
    result = ClipResult(scene.clip_id, scene.source_id, "train", rows)
    check_result(result)
    with PartStore(tmp_path, seed=1, config={}) as store:
        store.write(result)
        assert assemble(store, [scene.clip_id], tmp_path / "out", OUTPUTS)["files"]["train.json"]["records"] == len(
            rows
        )


TURN = {"from": "user", "value": "<video>x"}
CENTERS = {"camera_center": [None], "object_center": [None]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"id": ""}, "'id' must be a text"),
        ({"question": "  "}, "'question' must be a text"),
        ({"source_id": "other"}, "'source_id' is 'other', its clip's is 's'"),
        ({"video": "/abs.mp4"}, "below the media root"),
        ({"video": "a/../../b.mp4"}, "below the media root"),
        ({"options": {"A": "a"}}, "2 to 26"),
        ({"options": ["a", "b"]}, "2 to 26"),
        ({"options": {"A": "a", "C": "b"}}, "letters from A on"),
        ({"options": {"A": "a", "B": "a"}}, "differ"),
        ({"options": {"A": "a", "B": 2}}, "differ"),
        ({"answer": "E"}, "letter of one of the 4 options"),
        ({"answer": "AB"}, "letter of one of the 4 options"),
        ({"conversations": []}, "list of turns"),
        ({"conversations": [TURN]}, "end with a turn of gpt"),
        (
            {"conversations": [TURN, TURN, {"from": "gpt", "value": "A"}]},
            "2 <video> in the user's text for 1",
        ),
        ({"conversations": [TURN, {"from": "bot", "value": "A"}]}, "has the role 'bot'"),
        ({"solution": None}, "'solution' must be an object"),
        ({"solution": CENTERS | {"answer": "C"}}, "'solution' says 'C', 'answer' 'A'"),
        ({"solution": CENTERS | {"camera_center": [[0, 1]]}}, "neither null nor three finite"),
        ({"solution": CENTERS | {"object_center": [[0, 1, float("nan")]]}}, "neither null nor three finite"),
        ({"solution": {"camera_center": []}}, "'solution' has no object_center"),
    ],
)
def test_bad_rows_are_named(changes, says):
    check_row(make_row("c", 0, "s"), "s")
    with pytest.raises(StoreError, match=says) as error:
        check_row(make_row("c", 0, "s") | changes, "s")
    assert repr(changes.get("id", "c#0")) in str(error.value)


def replace_part(folder, clip_id, change):
    path = PartStore(folder / "work", seed=5, config={}).path(clip_id)
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda v: v.update(split="bench"), "'s0' is in split 'train' and.*in 'bench'"),
        (lambda v: v["rows"][0].update(id=f"{CLIPS[0]}#1"), "occurs twice in the data set"),
        (lambda v: v["rows"][0].update(id=v["rows"][1]["id"]), "two questions have the id"),
        (lambda v: v.update(split="test", source_id="t", rows=[make_row("x", 9, "t")]), "'test', which no output"),
        (lambda v: v.update(clip_id="another"), "holds clip 'another'"),
        (lambda v: v.update(format=9), "another format version"),
        (lambda v: v.pop("rows"), "damaged"),
    ],
)
def test_assembling_refuses_what_does_not_fit_and_leaves_the_old_files(tmp_path, change, says):
    write(tmp_path)
    before = contents(tmp_path / "out")
    replace_part(tmp_path, CLIPS[1], change)
    with pytest.raises(StoreError, match=says):
        write(tmp_path)
    del before[MANIFEST]  # gone first: the files no longer are what the parts say
    assert contents(tmp_path / "out") == before


def test_missing_and_cut_parts_and_unusable_outputs(tmp_path):
    write(tmp_path)
    with PartStore(tmp_path / "work", seed=5, config={"lr": 1.5, "name": "é"}) as store:
        with pytest.raises(StoreError, match="is missing: run the clip first"):
            assemble(store, ["new"], tmp_path / "out", OUTPUTS)
        store.path(CLIPS[0]).write_bytes(store.path(CLIPS[0]).read_bytes()[:-9])
        with pytest.raises(StoreError, match="delete it and run again"):
            assemble(store, CLIPS, tmp_path / "out", OUTPUTS)
        with pytest.raises(StoreError, match="a .json or a .jsonl file"):
            assemble(store, CLIPS, tmp_path / "out", {"a.txt": ("train", r1_record)})
        with pytest.raises(StoreError, match="unique"):
            process_clips(["a", "a"], make_result, store)


def test_a_folder_belongs_to_one_config_and_one_run_at_a_time(tmp_path):
    write(tmp_path)
    with pytest.raises(StoreError, match="another seed or config"):
        write(tmp_path, seed=6)
    config = {"lr": 1.5, "name": "é"}
    with PartStore(tmp_path / "work", seed=5, config=config):
        with pytest.raises(StoreError, match="another run is writing"):
            write(tmp_path)
    write(tmp_path)
    (tmp_path / "work" / "run.json").unlink()
    with pytest.raises(StoreError, match="use an empty folder"):
        write(tmp_path)


def raising(clip_id):
    if clip_id == CLIPS[3]:
        raise MediaError("v.mp4 is truncated", "truncated_video")
    if clip_id == CLIPS[6]:
        raise KeyError("a bug")
    return make_result(clip_id)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_media_reject_a_clip_and_bugs_end_the_run(tmp_path, workers):
    with pytest.raises(KeyError, match="a bug"):
        write(tmp_path, workers=workers, work=raising)
    with PartStore(tmp_path / "work", seed=5, config={"lr": 1.5, "name": "é"}) as store:
        rejection = {"reason": "truncated_video", "detail": "v.mp4 is truncated", "again": True}
        assert store.read(CLIPS[3]).rejected == (rejection,)
        assert not store.settled(CLIPS[3]) and store.settled(CLIPS[0]) and not store.settled(CLIPS[6])
        assert not store.has(CLIPS[6])


def dying(clip_id):
    os._exit(3)


def test_a_worker_that_dies_is_reported_with_its_clip(tmp_path):
    with pytest.raises(StoreError, match=r"a worker process died.*clip 00"):
        write(tmp_path, CLIPS[:1], workers=2, work=dying)


class Sent:
    """Work that leaves a file for every copy of it that does clips in a process, with OpenCV's threads there."""

    def __init__(self, folder):
        self.folder = folder

    def __setstate__(self, state):
        self.__dict__ = state | {"copy": time.monotonic_ns()}

    def __call__(self, clip_id):
        (self.folder / f"{os.getpid()}-{self.copy}").write_text(str(cv2.getNumThreads()))
        return make_result(clip_id)


def test_a_worker_uses_one_copy_of_its_work_and_its_share_of_the_cores(tmp_path):
    """What the work has started, a decoder for one, serves all clips of a worker."""
    sent = tmp_path / "sent"
    sent.mkdir()
    write(tmp_path, workers=2, work=Sent(sent))
    files = {path.name: path.read_text() for path in sent.iterdir()}
    assert len(files) == len({name.partition("-")[0] for name in files}) > 0
    assert set(files.values()) == {str(max(1, os.cpu_count() // 2))}


def test_clip_ids_become_safe_and_different_file_names():
    ids = ["a", "A/b", "..", ".", "a/../b", "é" * 100, "é" * 101, "x" * 300, "x" * 301, "a b", "a%20b", "\0"]
    names = [parts.clip_file_name(i) for i in ids]
    assert len(set(names)) == len(ids)
    assert all("/" not in n and "\0" not in n and len(f"{n}.json") < 200 for n in names)


def test_a_row_that_is_no_json_is_named(tmp_path):
    with PartStore(tmp_path, seed=0, config={}) as store:
        for value in (float("inf"), object(), "\ud800"):
            with pytest.raises(StoreError, match="clip 'c': cannot be written as JSON"):
                store.write(ClipResult("c", "s", "train", (copy.copy(make_row("c", 0, "s")) | {"extra": value},)))
        assert not store.has("c")
