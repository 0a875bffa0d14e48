"""Algorithm 1: hand-computed rewards, both filters, balance, and what survives a kill -9."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import common
from configs.schema import build
from data_prep.cold_start import task
from data_prep.cold_start.selection import draw_order
from data_prep.cold_start.task import ColdStartError, run_cold_start
from data_prep.questions.propose import QuestionRules, propose
from data_prep.questions.scenarios import SCENARIOS
from data_prep.store.export import r1_record
from data_prep.store.parts import ClipRejected, StoreError
from data_prep.teacher.endpoint import TeacherError
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.qa.rewards import Solution, score
from mllm4d_jax.qa.system_prompt import ST_COT
from tests.data_prep.scenes.random_scenes import random_scene

ROOT = Path(__file__).resolve().parents[3]
TRUTH = [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def completion(answer="A", end_z=1.0, states=True):
    block = "**Spatial State ({}):**\n- Camera Center: [0, 0, {}]\n- Object Center: null\n"
    shown = block.format("start frame", end_z - 1) + block.format("end frame", end_z) if states else "I look and see."
    return f"<thinking>{shown}</thinking><answer>{answer}</answer>"


# Rewards by hand with the paper's shares .5 answer, .1 tags, .1 centres, .15 camera, .15 object.
GOLD = completion()  # 1
WRONG = completion("B")  # .1 + .1 + .15 + .15 = .5
BARE = completion(states=False)  # .5 + .1 + no centres + camera 0 + nothing to say about the object .15 = .75
SHIFTED = completion(end_z=1.1)  # both centres 0.1 m off: .85 + .15 exp(-.1)
WORST = "no idea"  # the object part alone: .15
LEAKY = GOLD.replace("</thinking>", "This is the ground\n  Truth.</thinking>")
TOKEN = GOLD.replace("</thinking>", "<|im_end|></thinking>")
REWARD = {GOLD: 1.0, WRONG: 0.5, BARE: 0.75, SHIFTED: 0.85 + 0.15 * math.exp(-0.1), WORST: 0.15}
SCRIPT = {
    # scenario s: best .75, 1, .5, .75 and one without a usable path -> threshold (.75 + 1 + .5 + .75) / 4 = .75
    "s1": [WRONG, BARE, BARE],
    "s2": [SHIFTED, GOLD, WRONG],
    "s3": [WRONG, LEAKY, WORST],
    "s4": [TOKEN, BARE, LEAKY],
    "s5": [LEAKY, TOKEN, LEAKY],
    # scenario t: best 1 and .15 -> threshold .575
    "t1": [GOLD, SHIFTED, WRONG],
    "t2": [WORST, WORST, WORST],
    "t3": None,
}


def record(key, **changes):
    found = {
        "id": key,
        "messages": [{"role": "user", "content": "<video>\nHow far?\nOptions:\nA. 1.0\nB. 2.0"}],
        "videos": ["clips/a.mp4"],
        "solution": [{"answer": "A", "camera_center": TRUTH, "object_center": [None, None]}],
        "question_type": key[0],
    }
    return found | changes


def write_records(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def config(records, /, *, seed=3, **changes):
    """The whole config; a change goes to the group that has the key."""
    values = {"source": "cold_start", "seed": seed, "cold_start.records": str(records), "cold_start.per_scenario": 100}
    values |= {"cold_start.total": 0, "teacher.num_frames": 8}
    known = {key.name for key in common.CURATE_KEYS}
    for name, value in changes.items():
        values[next(full for full in (f"cold_start.{name}", f"teacher.{name}") if full in known)] = value
    return build(common.CURATE_KEYS, values)


@pytest.fixture
def scripted(monkeypatch):
    """Stands in for the teacher: the paths of `SCRIPT` by question id."""

    def write(item):
        if SCRIPT[item.id] is None:
            raise ClipRejected("bad_reply", "path 0: not JSON")
        return SCRIPT[item.id]

    monkeypatch.setattr(task, "path_writer", lambda *_: write)


def results(folder):
    kept = json.loads((folder / "cold_start.json").read_bytes())
    rejected = [json.loads(line) for line in (folder / "cold_start_rejected.jsonl").read_bytes().splitlines()]
    return kept, {entry["id"]: entry for entry in rejected}, json.loads((folder / "manifest.json").read_bytes())


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_the_hand_computed_rewards_are_those_of_the_reward():
    solution = Solution.from_record(record("s1")["solution"])
    for text, reward in REWARD.items():
        assert score(text, solution)["total"] == pytest.approx(reward, abs=1e-12)


def test_a_file_says_the_system_prompt_of_records_that_bring_none(tmp_path, scripted):
    own = record("s2")
    own["messages"] = [{"role": "system", "content": "Its own."}, *own["messages"]]
    records = write_records(tmp_path / "r1.jsonl", [record("t1"), own])
    (tmp_path / "prompt.txt").write_text("Think, then answer.\n")
    settings = config(records)
    settings.cold_start.system_file = str(tmp_path / "prompt.txt")
    assert run_cold_start(settings, str(tmp_path / "out")) == 0
    said = {row["id"]: row["conversations"][0]["value"] for row in results(tmp_path / "out")[0]}
    assert said == {"t1": "Think, then answer.", "s2": "Its own."}
    (tmp_path / "prompt.txt").write_text("Another.")  # what is there was made with the first
    with pytest.raises(StoreError, match="another seed or config"):
        run_cold_start(settings, str(tmp_path / "out"))


def test_the_best_path_of_each_kept_sample(tmp_path, scripted):
    records = write_records(tmp_path / "r1.jsonl", map(record, SCRIPT))
    assert run_cold_start(config(records), str(tmp_path / "out")) == 0
    kept, rejected, manifest = results(tmp_path / "out")
    assert [(r["id"], r["conversations"][-1]["value"]) for r in kept] == [
        ("s1", BARE),
        ("s2", GOLD),
        ("s4", BARE),
        ("t1", GOLD),
    ]
    assert kept[0]["video"] == "clips/a.mp4" and kept[0]["question_type"] == "s"
    assert kept[0]["conversations"][:2] == [
        {"from": "system", "value": ST_COT},
        {"from": "user", "value": "<video>\nHow far?\nOptions:\nA. 1.0\nB. 2.0"},
    ]
    assert {key: entry["reasons"] for key, entry in rejected.items()} == {
        "s3": ["leak", "below_threshold"],
        "s5": ["leak", "special_token"],
        "t2": ["below_threshold"],
        "t3": ["bad_reply"],
    }
    assert rejected["s3"]["rewards"] == [[0, 0.5], [2, pytest.approx(0.15)]]
    assert rejected["t3"]["details"] == ["path 0: not JSON"] and rejected["t3"]["rewards"] == []
    s, t = manifest["scenarios"]["s"], manifest["scenarios"]["t"]
    assert (s["drawn"], s["answered"], s["passed"], s["kept"], s["tau"]) == (5, 4, 3, 3, pytest.approx(0.75))
    assert (t["drawn"], t["answered"], t["passed"], t["kept"], t["tau"]) == (3, 2, 1, 1, pytest.approx(0.575))
    written = [0.5, 0.75, 0.75, REWARD[SHIFTED], 1, 0.5, 0.5, 0.15, 0.75]
    assert s["mean_reward"] == pytest.approx(sum(written) / 9) and s["mean_reward_kept"] == pytest.approx(2.5 / 3)
    assert s["rejected"] == {"leak": 2, "below_threshold": 1, "special_token": 1}
    for name, entry in manifest["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert (entry["sha256"], entry["bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert manifest["files"]["cold_start.json"]["records"] == 4


def test_every_path_that_reaches_the_threshold(tmp_path, scripted):
    records = write_records(tmp_path / "r1.jsonl", map(record, SCRIPT))
    run_cold_start(config(records, filter="every_path"), str(tmp_path / "out"))
    kept, rejected, manifest = results(tmp_path / "out")
    assert [(r["id"], r["conversations"][-1]["value"]) for r in kept] == [
        ("s1/path1", BARE),
        ("s1/path2", BARE),
        ("s2/path0", SHIFTED),
        ("s2/path1", GOLD),
        ("s4/path1", BARE),
        ("t1/path0", GOLD),
        ("t1/path1", SHIFTED),
    ]
    assert set(rejected) == {"s3", "s5", "t2", "t3"} and manifest["scenarios"]["s"]["kept"] == 5


def test_another_filter_and_total_reuse_what_was_written(tmp_path, scripted, monkeypatch, capsys):
    records = write_records(tmp_path / "r1.jsonl", map(record, SCRIPT))
    run_cold_start(config(records), str(tmp_path / "out"))

    def refuse(*_):
        raise AssertionError("a question was asked again")

    monkeypatch.setattr(task, "path_writer", lambda *_: refuse)
    capsys.readouterr()
    run_cold_start(config(records, total=4), str(tmp_path / "out"))
    kept, rejected, manifest = results(tmp_path / "out")
    order = [key for key in draw_order([k for k in SCRIPT if k[0] == "s"], 3) if key in ("s1", "s2", "s4")]
    assert {r["id"] for r in kept} == {*order[:2], "t1"}
    assert rejected[order[2]]["reasons"][-1] == "not_needed"
    assert "short: 1 of 2 paths" in capsys.readouterr().out
    assert (manifest["scenarios"]["t"]["wanted"], manifest["scenarios"]["t"]["kept"]) == (2, 1)


def test_a_run_with_other_settings_needs_another_folder(tmp_path, scripted):
    records = write_records(tmp_path / "r1.jsonl", map(record, SCRIPT))
    run_cold_start(config(records), str(tmp_path / "out"))
    for changed in (config(records, reward="release"), config(records, seed=4), config(records, paths=2)):
        with pytest.raises(StoreError, match="another seed or config"):
            run_cold_start(changed, str(tmp_path / "out"))


def curated(count, scenes=range(60)):
    """R1 records of random scenes, at most `count` per scenario."""
    found = {name: [] for name in SCENARIOS}
    for seed in scenes:
        for question in propose(random_scene(seed), QuestionRules(), seed):
            found[question.scenario].append(r1_record(question.record(f"clips/{question.clip_id}.mp4")))
    return [r for records in found.values() for r in records[:count]]


@pytest.fixture(scope="module")
def curated_records():
    return curated(30)


def test_the_oracle_makes_a_balanced_set_with_the_same_bytes_whatever_the_order(tmp_path, curated_records):
    records = list(curated_records)
    first = write_records(tmp_path / "a.jsonl", records)
    settings = dict(per_scenario=20, total=74)
    run_cold_start(config(first, **settings), str(tmp_path / "a"))
    kept, rejected, manifest = results(tmp_path / "a")
    counts = {name: sum(r["question_type"] == name for r in kept) for name in SCENARIOS}
    assert sorted(counts.values()) == [10] * 3 + [11] * 4 and len(kept) == 74
    assert all(found["tau"] == 1.0 and found["passed"] == 20 for found in manifest["scenarios"].values())
    assert {tuple(e["reasons"]) for e in rejected.values()} == {("not_needed",)} and len(rejected) == 140 - 74
    solutions = {r["id"]: r["solution"] for r in records}
    for r in kept:
        assert score(r["conversations"][-1]["value"], solutions[r["id"]])["total"] == pytest.approx(1.0, abs=1e-12)
    random.Random(0).shuffle(records)
    second = write_records(tmp_path / "b.jsonl", [*records, *records[:5]])
    run_cold_start(config(second, **settings), str(tmp_path / "b"))
    for name in ("cold_start.json", "cold_start_rejected.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    run_cold_start(config(first, seed=4, **settings), str(tmp_path / "c"))
    assert {r["id"] for r in results(tmp_path / "c")[0]} != {r["id"] for r in kept}


def test_the_trainer_reads_the_records_without_conversion(tmp_path, curated_records):
    records = write_records(tmp_path / "r1.jsonl", curated_records[:20])
    run_cold_start(config(records), str(tmp_path / "out"))
    read = RecordFile(tmp_path / "out" / "cold_start.json", tmp_path)
    assert len(read) == 20
    for entry in read:
        system, user, assistant = entry.messages
        assert (system["role"], system["content"]) == ("system", ST_COT)
        assert user["content"][0]["type"] == "video" and assistant["content"].startswith("<thinking>")


def test_a_system_prompt_of_the_record_stays(tmp_path, scripted):
    turns = [{"role": "system", "content": "Think."}, *record("s1")["messages"]]
    records = write_records(tmp_path / "r1.jsonl", [record("s2", messages=turns)])
    run_cold_start(config(records), str(tmp_path / "out"))
    assert results(tmp_path / "out")[0][0]["conversations"][0]["value"] == "Think."


@pytest.mark.parametrize("path", ["../secret.mp4", "/etc/passwd", "a/../../b.mp4"])
def test_a_path_that_leaves_the_root_rejects_its_question(tmp_path, scripted, path):
    records = write_records(tmp_path / "r1.jsonl", [record("s1", videos=[path]), record("s2")])
    run_cold_start(config(records), str(tmp_path / "out"))
    kept, rejected, _ = results(tmp_path / "out")
    assert [r["id"] for r in kept] == ["s2"] and rejected["s1"]["reasons"] == ["path_outside_root"]


def test_nothing_that_passes_is_an_error_that_says_where_to_look(tmp_path, scripted):
    records = write_records(tmp_path / "r1.jsonl", [record("s5"), record("t3")])
    with pytest.raises(ColdStartError, match="cold_start_rejected.jsonl"):
        run_cold_start(config(records), str(tmp_path / "out"))
    assert set(results(tmp_path / "out")[1]) == {"s5", "t3"}


def test_a_teacher_whose_settings_are_wrong_stops_the_run_and_keeps_what_is_done(tmp_path, monkeypatch, scripted):
    records = write_records(tmp_path / "r1.jsonl", [record(key) for key in ("s1", "s2", "s3", "s4")])
    asked = []

    def write(item):
        asked.append(item.id)
        if len(asked) == 3:
            raise TeacherError("the teacher refuses the request (check the key)")
        return SCRIPT[item.id]

    monkeypatch.setattr(task, "path_writer", lambda *_: write)
    with pytest.raises(TeacherError, match="check the key"):
        run_cold_start(config(records), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "cold_start.json").exists()
    done = len(list((tmp_path / "out" / "parts").iterdir()))
    assert 2 <= done == len(asked) - 1
    run_cold_start(config(records), str(tmp_path / "out"))
    assert len(asked) == 5 and len(set(asked)) == 4
    assert [r["id"] for r in results(tmp_path / "out")[0]] == ["s1", "s2", "s4"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"reward": "papr"}, "did you mean 'paper'"),
        ({"records": ""}, "records is empty"),
        ({"kind": "endpoint"}, "model is empty"),
    ],
)
def test_settings_that_cannot_work(tmp_path, changes, match):
    records = write_records(tmp_path / "r1.jsonl", [record("s1")])
    with pytest.raises((ColdStartError, TeacherError), match=match):
        run_cold_start(config(records, **changes), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "cold_start.json").exists()


CHILD = """
import os, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from data_prep.cold_start import oracle, task
from test_cold_start import config

FOLDER = Path(sys.argv[1])
compose = oracle.compose


def slow(item, path, seed):
    if path == 0:
        with open(FOLDER / "log", "a") as log:
            log.write(f"{{item.id}}\\n")
        time.sleep(0.01)
    return compose(item, path, seed)


oracle.compose = slow
task.run_cold_start(config({records!r}, per_scenario=20, total=70), str(FOLDER / "out"))
"""


def start(tmp_path, folder):
    folder.mkdir(exist_ok=True)
    script = tmp_path / "child.py"
    tests = str(ROOT / "tests" / "data_prep" / "cold_start")
    script.write_text(CHILD.format(root=str(ROOT), tests=tests, records=str(tmp_path / "r1.jsonl")))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, str(script), str(folder)], **quiet)


def test_kill_nine_loses_no_question_and_asks_none_twice(tmp_path, curated_records):
    write_records(tmp_path / "r1.jsonl", curated_records)
    folder, rng = tmp_path / "killed", random.Random(0)
    parts = folder / "out" / "parts"

    def finished():
        return {json.loads(p.read_bytes())["clip_id"] for p in parts.glob("*.json")} if parts.exists() else set()

    for _ in range(3):
        before = finished()
        (folder / "log").unlink(missing_ok=True)
        child = start(tmp_path, folder)
        target, end = len(before) + rng.randint(5, 25), time.monotonic() + 60
        while len(list(parts.glob("*.json")) if parts.exists() else ()) < target:
            assert time.monotonic() < end and child.poll() is None, "the child made no progress"
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        asked = (folder / "log").read_text().splitlines()
        assert before <= finished() and not before & set(asked) and len(asked) == len(set(asked))
    assert len(finished()) < 140
    assert start(tmp_path, folder).wait() == 0
    assert start(tmp_path, tmp_path / "clean").wait() == 0
    assert finished() and contents(folder / "out") == contents(tmp_path / "clean" / "out")
    assert len(results(folder / "out")[0]) == 70
