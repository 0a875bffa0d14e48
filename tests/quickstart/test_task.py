"""The quickstart's stages: done in order, passed over when done, refused when something changed, stopped, taken up."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import signal
import threading
import time

import pytest

import run
from configs import common
from configs.tables.quickstart import BENCH, NEW_SEED, TOGETHER
from configs.tables.quickstart import SECONDS as BY_SIZE
from mllm4d_jax.quickstart import process, task
from mllm4d_jax.quickstart.done import QuickstartError, StageRecords
from mllm4d_jax.quickstart.stages import WIDTH, in_groups, stages

SECONDS = BY_SIZE["smoke"]  # the size that is run
BASE = pathlib.Path(__file__).parents[1] / "golden" / "qwen3_vl"


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """Returns a function that runs the smoke size with `stand_in.py` for run.py; says which stages were started."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "program"
    program.mkdir()
    (program / "run.py").write_text((pathlib.Path(__file__).parent / "stand_in.py").read_text())
    monkeypatch.setattr(process, "ROOT", program)
    monkeypatch.setattr(process, "_LOOK_S", 0.01)
    monkeypatch.setattr(task, "read_results", lambda *_: None)
    monkeypatch.setattr(task, "text", lambda _: "THE TABLE")
    monkeypatch.setattr(task, "write_page", lambda *_: "THE PAGE")

    def start(trouble: str = "", **values) -> list[str]:
        monkeypatch.setenv("STAND_IN", trouble)
        started = tmp_path / "out" / "started.txt"
        started.unlink(missing_ok=True)
        try:
            assert task.run(common.config("quickstart", {"size": "smoke", "base": str(BASE), **values}), "out") == 0
        finally:
            start.stages = started.read_text().split() if started.exists() else []
        return start.stages

    return start


def test_every_stage_once_in_order_and_never_again(quickstart, capsys):
    assert quickstart() == list(SECONDS)
    said = capsys.readouterr().out
    assert "THE TABLE" in said and "THE PAGE" in said and f"[ 1/{len(SECONDS)}] rendering worlds" in said
    assert quickstart() == [] and "THE TABLE" in capsys.readouterr().out
    record = json.loads(pathlib.Path("out/stages.json").read_text())["sft"]
    assert record["seconds"] > 0 and record["peak_mib"] > 1 and record["settings"]["train.steps"] == 2


def test_printed_commands_are_what_runs_and_fit_the_terminal(quickstart, capsys):
    quickstart()
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= WIDTH
    config = common.config("quickstart", {"size": "smoke", "base": str(BASE), "seed": 3, "workers": 1})
    for stage in stages(config, "out"):
        command = shlex.split(stage.command().replace("\\\n", ""))
        assert command == ["python", "run.py", *stage.flags()]
        assert run.main([*command[1:], "--help"]) == 0, stage.name
        seeds = {"bench": BENCH["seed"], "worlds_rl": 3 + NEW_SEED, "questions_rl": 3 + NEW_SEED}
        if not stage.name.startswith("eval"):
            assert stage.config().seed == seeds.get(stage.name, 3)


def test_a_deleted_folder_is_made_anew_and_what_came_from_it_is_refused(quickstart):
    quickstart()
    os.remove("out/eval_sft/results.json")
    assert quickstart() == ["eval_sft"]
    os.remove("out/sft/checkpoints/2/digests.json")
    os.rmdir("out/sft/checkpoints/2")
    with pytest.raises(
        QuickstartError, match="stage 'cold_start' in out/cold_start was made with other results of 'sft'"
    ):
        quickstart()
    assert quickstart.stages == ["sft"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "laptop"}, "stage 'worlds' in out/worlds was made with synthetic.clips = 6, now"),
        ({"seed": 5}, "was made with seed = 0, now 5"),
    ],
)
def test_other_settings_are_refused_with_what_to_delete(quickstart, values, message):
    quickstart()
    with pytest.raises(QuickstartError, match=message) as caught:
        quickstart(**values)
    assert quickstart.stages == [] and "out/worlds out/questions" in str(caught.value)


def test_another_base_model_is_refused(quickstart, tmp_path):
    other = tmp_path / "base"
    other.mkdir()
    (other / "config.json").write_text("{}")
    quickstart(base=str(other))
    assert quickstart(base=str(other)) == []
    (other / "config.json").write_text("{ }")
    with pytest.raises(QuickstartError, match="stage 'wider' in out/wider was made with other results of 'model.path'"):
        quickstart(base=str(other))


@pytest.mark.parametrize(("trouble", "code"), [("fail", 1), ("leave", 0)])
def test_a_stage_that_does_not_come_to_its_end_is_named_with_its_command(quickstart, trouble, code):
    with pytest.raises(QuickstartError) as caught:
        quickstart(f"reasoning={trouble}")
    said = str(caught.value)
    assert f"(reasoning, in out/reasoning) did not come to its end (exit code {code})" in said
    assert ("error: no such luck" in said) == (trouble == "fail")
    assert "python run.py --config=configs/curate.py:quickstart_reasoning" in said and "out/logs/reasoning.log" in said
    assert quickstart() == list(SECONDS)[list(SECONDS).index("reasoning") :]


@pytest.mark.parametrize("how", ["wait", "hang"])
def test_it_stops_when_asked_and_goes_on_inside_the_stage(quickstart, capsys, monkeypatch, how):
    monkeypatch.setattr(process, "GRACE_S", 20.0 if how == "wait" else 0.3)
    waiting = pathlib.Path("out/sft/waiting")

    def interrupt():
        while not waiting.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    number = list(SECONDS).index("sft") + 1
    assert quickstart(f"sft={how}") == list(SECONDS)[:number]
    helper.join()
    assert pathlib.Path("out/sft/interrupted").exists()
    assert f"stopped in stage {number} of" in capsys.readouterr().out
    before = StageRecords(pathlib.Path("out"))["sft"].seconds
    assert quickstart() == list(SECONDS)[number - 1 :]
    assert StageRecords(pathlib.Path("out"))["sft"].seconds > before > 0


def test_what_cannot_be_run_is_refused_first(quickstart, tmp_path):
    for values, message in (
        ({"seed": BENCH["seed"]}, "that of the worlds to be examined on"),
        ({"seed": BENCH["seed"] - NEW_SEED}, "would make those of reinforcement the same"),
        ({"base": str(tmp_path)}, "is no folder of a model"),
        ({"distributed": "auto"}, "one process"),
    ):
        with pytest.raises(QuickstartError, match=message):
            quickstart(**values)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def together(monkeypatch):
    """Examinations of the smoke size are made at the same time, as an accelerator's are."""
    names = tuple(name for name in SECONDS if name.startswith("eval_"))
    monkeypatch.setattr("mllm4d_jax.quickstart.stages.TOGETHER", {"smoke": (names,)})
    return names


def test_stages_of_a_group_are_done_at_the_same_time(quickstart, together, capsys):
    """None of them ends before all have begun; then they are done for good."""
    started = quickstart("*=meet")
    assert started[: -len(together)] == list(SECONDS)[: -len(together)]
    assert sorted(started[-len(together) :]) == sorted(together)
    said = capsys.readouterr().out
    assert all(f"] {name}: done, " in said for name in together) and "THE TABLE" in said
    assert quickstart() == []


def test_one_of_a_group_that_fails_ends_the_others(quickstart, together):
    with pytest.raises(QuickstartError, match=r"\(eval_sft, in out/eval_sft\) did not come to its end"):
        quickstart("eval_sft=fail,*=hang")
    done = {name for name, one in json.loads(pathlib.Path("out/stages.json").read_text()).items() if one["results"]}
    assert done == SECONDS.keys() - set(together)
    assert sorted(quickstart()) == sorted(together)


def test_a_group_stops_when_asked(quickstart, together, capsys):
    def interrupt():
        while not all(pathlib.Path("out", name, "waiting").exists() for name in together):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    helper = threading.Thread(target=interrupt)
    helper.start()
    quickstart("*=wait")
    helper.join()
    assert all(pathlib.Path("out", name, "interrupted").exists() for name in together)
    first = list(SECONDS).index(together[0]) + 1
    assert f"stopped in stage {first} of {len(SECONDS)}" in capsys.readouterr().out
    assert sorted(quickstart()) == sorted(together)


@pytest.mark.parametrize("size", list(BY_SIZE))
def test_times_and_groups_fit_the_stages(size):
    """A group's stages follow each other, and what a stage needs is there before its group begins."""
    listed = stages(common.config("quickstart", {"size": size, "base": str(BASE)}), "out")
    assert sorted(stage.name for stage in listed) == sorted(BY_SIZE[size])
    assert {name for group in TOGETHER.get(size, ()) for name in group} <= BY_SIZE[size].keys()
    assert [stage for group in in_groups(listed) for stage in group] == listed
    there = set()
    for group in in_groups(listed):
        assert {name for stage in group for name in stage.inputs} <= there
        there |= {stage.name for stage in group}
