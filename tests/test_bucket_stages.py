"""All stages with everything in a bucket that answers one request in ten badly, killed again and again: the results,
bit for bit, of the same commands on a disk.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from configs import cold_start, curate, eval, export, grpo, report, sft
from mllm4d_jax.files import remote
from mllm4d_jax.run.watchdog import EXIT_CODE
from tests.bucket_runs import FAULTS, killed, killed_at_times, newest, rows, wait_for, whole
from tests.buckets import BUCKET, put_folder
from tests.grpo import grpo_cases
from tests.grpo.grpo_cases import final, same_bits
from tests.processes import Processes, write_config

pytestmark = pytest.mark.slow
ROOT = f"gs://{BUCKET}/stages"
HOWS = ("lost another process", "was ended from outside")
SHORT = {"train.steps": 16, "train.checkpoint_every": 2}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(autouse=True)
def environment(outputs, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(outputs / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(outputs / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def changed(presets, variant: str, **values):
    """A config with group__key=value."""
    config = presets(variant)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in values.items()})
    return config


def stage(presets, root: str, before: str, sample: str, **values):
    """A tiny stage after `before` in a folder of this machine or of the bucket."""
    world, records = f"{sample}/world", values.pop("records")
    places = dict(model__path=f"{sample}/model", data__path=f"{world}/{records}", data__root=world)
    if before:
        places["model__adapter"] = f"{root}/{before}"
    if "eval__path" in values:
        values["eval__path"] = f"{world}/{records}"
    short = {name.replace(".", "__"): value for name, value in SHORT.items()}
    return changed(presets, "tiny", **(short | places | values))


@pytest.fixture(scope="module")
def sample(outputs, _front):
    """(here, there): the sample world and model of sft.py:tiny, on the disk and in the bucket."""
    world = outputs / "made"
    config = changed(sft.get_config, "tiny", train__steps=1)
    whole(config, str(world), outputs, "made")
    return str(world / "sample"), put_folder(world / "sample", "stages/sample")


STAGES = {
    "sft": (sft.get_config, "", dict(records="records.json", data__questions_per_video=2)),
    "cold_start": (cold_start.get_config, "sft", dict(records="cold_start.json")),
    "grpo": (
        grpo.get_config,
        "cold_start",
        dict(
            records="r1.jsonl",
            rollout__prompts=2,
            rollout__completions=4,
            rollout__max_new_tokens=32,
            rollout__buckets=(32,),
            rollout__ahead=1,
            eval__path="as data.path",
            eval__every=6,
            eval__limit=2,
            # The release's reward is the same for most of what a random model writes, and then nothing is learned.
            reward__functions=("paper::0.5", f"{grpo_cases.__name__}:figures::0.5"),
        ),
    ),
}


def without_places(row: dict) -> dict:
    """A line of a log without what says where the clips are."""
    return {name: value for name, value in row.items() if name not in ("media", "config")}


@pytest.mark.parametrize(("name", "kills"), [("sft", 2), ("cold_start", 2), ("grpo", 3)])
def test_a_stage_of_training(front, sample, outputs, name, kills):
    presets, before, values = STAGES[name]
    here, there = f"{outputs}/here", ROOT
    config, moved = (
        stage(presets, root, before, at, **dict(values)) for root, at in zip((here, there), sample, strict=True)
    )
    whole(config, f"{here}/{name}", outputs, f"{name}-here")
    front.rate, front.kinds = 0.1, FAULTS
    said = killed(moved, f"{there}/{name}", outputs, f"{name}-there", kills)
    assert front.hit > 20 and "per 100 steps" in said
    front.reset()
    assert rows(f"{there}/{name}") == rows(f"{here}/{name}")
    same_bits(final(f"{there}/{name}"), final(f"{here}/{name}"))
    if name == "grpo":
        assert sum((row["grad_norm"] or 0) > 0 for row in rows(f"{here}/{name}")) > SHORT["train.steps"] / 2
        for log in ("completions.jsonl", "evals.jsonl"):
            found = [[without_places(row) for row in rows(f"{root}/{name}", log)] for root in (here, there)]
            assert found[0] == found[1] and found[0], log
    assert b"</html>" in remote.place(f"{there}/{name}/report.html").read_bytes()


def test_evaluation_export_and_report(front, sample, outputs):
    """After the stages of training."""
    here, there = f"{outputs}/here", ROOT
    places = {here: sample[0], there: sample[1]}
    for root, at in places.items():
        front.rate, front.kinds = 0.1, FAULTS
        asked = changed(
            eval.get_config,
            "jsonl",
            model__path=f"{at}/model",
            model__adapter=f"{root}/sft",
            data__path=f"{at}/world/records.json",
            data__root=f"{at}/world",
            max_new_tokens=4,
            video__num_frames=4,
            video__max_pixels=4096,
            limit=8,
        )
        how = (8.0, 10.0) if root == there else ()
        killed_at_times(asked, f"{root}/eval", outputs, "eval", how)
        for form in ("peft", "merged"):
            written = changed(export.get_config, form, model__adapter=f"{root}/sft", output=f"{root}/{form}")
            whole(written, f"{outputs}/export-{form}", outputs, f"export-{form}")
        whole(changed(report.get_config, "", run=f"{root}/cold_start"), f"{outputs}/report", outputs, "report")
    front.reset()
    predictions = [
        [
            without_places(json.loads(line))
            for file in sorted(folder.glob("predictions*.jsonl"))
            for line in file.read_bytes().splitlines()
        ]
        for folder in (Path(f"{here}/eval"), remote.place(f"{there}/eval"))
    ]
    assert predictions[0] == predictions[1] and predictions[0]
    for form in ("peft", "merged"):
        files = sorted(p.relative_to(f"{here}/{form}").as_posix() for p in Path(f"{here}/{form}").rglob("*.*"))
        assert files == sorted(remote.found(f"{there}/{form}"))
        for file in files:
            written = [
                place.read_bytes() for place in (Path(f"{here}/{form}/{file}"), remote.place(f"{there}/{form}/{file}"))
            ]
            if file.endswith(".safetensors"):  # whose header names what is told of the file in any order
                ours, theirs = map(safetensors.numpy.load, written)
                assert ours.keys() == theirs.keys() and ours, f"{form}/{file}"
                assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours), f"{form}/{file}"
            elif file.endswith("tokenizer.json") or file == "config.json":
                assert written[0] == written[1], f"{form}/{file}"
    assert b"</html>" in remote.place(f"{there}/cold_start/report.html").read_bytes()


def test_curation(front, outputs):
    config = changed(curate.get_config, "synthetic", preset="all", synthetic__clips=6)
    here, there = f"{outputs}/here/world", f"{ROOT}/world"
    whole(config, here, outputs, "curate-here")
    front.rate, front.kinds = 0.1, FAULTS
    killed_at_times(config, there, outputs, "curate-there", (3.0, 4.0, 5.0))
    front.reset()
    for name in ("train.json", "train_r1.jsonl", "rejected.jsonl", "run.json", "manifest.json", "chosen.json"):
        assert remote.place(f"{there}/{name}").read_bytes() == (Path(here) / name).read_bytes(), name


def test_a_clip_that_is_cached_is_not_asked_for(front, sample, outputs):
    """By a run that begins anew on a machine that has had all clips, whatever else it reads."""
    moved = stage(sft.get_config, ROOT, "", sample[1], records="records.json", train__steps=12)
    whole(moved, f"{ROOT}/warm", outputs, "warm")
    front.reset()
    whole(moved, f"{ROOT}/again", outputs, "again")
    assert not [name for name in front.requests if ".mp4" in name], "a cached clip was asked for"
    assert rows(f"{ROOT}/again") == rows(f"{ROOT}/warm")


def test_two_processes_with_everything_in_a_bucket(front, sample, outputs):
    """One of them is killed on the way, and both go on; against a single process on the disk with as many devices."""
    values = dict(records="records.json", data__questions_per_video=2, train__watchdog_s=300.0, data__max_tokens=512)
    config, moved = (stage(sft.get_config, ROOT, "", at, **values) for at in sample)
    here, there = outputs / "here" / "of-one", f"{ROOT}/of-two"
    with Processes(write_config(outputs / "of-one.py", config), here, 1, 2, outputs=outputs) as run:
        assert run.wait(3600) == [0], run.text()
    front.rate, front.kinds = 0.1, FAULTS
    file = write_config(outputs / "of-two.py", moved)
    with Processes(file, there, 2, outputs=outputs) as run:
        wait_for(lambda: newest(f"{there}/checkpoints") >= 6, run)
        run.running[1].send_signal(signal.SIGKILL)
        codes = run.wait(600)
        assert codes[1] == -signal.SIGKILL and codes[0] in (EXIT_CODE, -signal.SIGABRT), run.text()
        wait_for(lambda: "process 1 of 2 was ended from outside while" in run.text(), run)
    with Processes(file, there, 2, outputs=outputs) as run:
        assert run.wait(3600) == [0, 0], run.text()
    front.reset()
    for a, b in zip(rows(there), rows(here), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == pytest.approx(b[name], rel=1e-4 if name == "grad_norm" else 1e-5, abs=1e-7), (name, a, b)
    (step, ours), (last, theirs) = final(there), final(here)
    assert step == last == SHORT["train.steps"]
    for name, x in theirs.items():
        if name.startswith("trainable"):
            np.testing.assert_allclose(ours[name], x, atol=1e-5, err_msg=name)


def test_a_process_that_is_killed_while_the_run_is_set_up_is_named(front, sample, outputs):
    moved = stage(sft.get_config, ROOT, "", sample[1], records="records.json", train__watchdog_s=60.0)
    there = f"{ROOT}/lost-early"
    with Processes(write_config(outputs / "early.py", moved), there, 2, outputs=outputs) as run:
        wait_for(lambda: "trainable parameters" not in run.text() and remote.is_file(f"{there}/lock.json"), run)
        run.running[1].send_signal(signal.SIGKILL)
        codes = run.wait(600)
        assert codes[1] == -signal.SIGKILL and codes[0] in (EXIT_CODE, -signal.SIGABRT), run.text()
        wait_for(lambda: run.text().count(" of 2 ") >= 2, run)
        assert "process 1 of 2 was ended from outside while" in run.text()
        assert any(f"process 0 of 2 {how} while" in run.text() for how in HOWS), run.text()
