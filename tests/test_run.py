"""The command line: what a newcomer sees, what is refused and how, and what reaches the task."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
import types

import pytest
from absl import flags

import run
from configs import common, reading
from configs.tables.training import SFT_KEYS

SFT = "--config=configs/sft.py"


@pytest.fixture
def task(monkeypatch, tmp_path):
    """Replaces the SFT task by one that records how it was called; `task.result` is what it returns or raises."""
    monkeypatch.chdir(tmp_path)
    fake = types.ModuleType("mllm4d_jax.sft.task")
    fake.calls, fake.result = [], 0

    def call(config, workdir):
        fake.calls.append((config, workdir))
        if isinstance(fake.result, Exception):
            raise fake.result
        return fake.result

    fake.run = call
    monkeypatch.setitem(sys.modules, "mllm4d_jax.sft.task", fake)
    return fake


def write(path, text):
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return f"--config={path.name}"


def test_overview_names_every_task_config_and_example(capsys):
    assert run.main(["run.py"]) == 2
    bare = capsys.readouterr().out
    assert run.main(["run.py", "--help"]) == 0
    assert capsys.readouterr().out == bare
    for word in (
        *common.TASKS,
        "configs/sft.py",
        "configs/infer.py",
        "configs/verify.py",
        "--config=configs/sft.py:tiny",
    ):
        assert word in bare
    assert not any(name in bare for name in ("schema.py", "common.py", "reading.py", "help.py", "published.py"))


def test_config_help_shows_docstring_variants_keys_and_values(capsys):
    assert run.main(["run.py", "--config=configs/sft.py:tiny", "--help", "--config.optim.lr=0.5"]) == 0
    text = capsys.readouterr().out
    assert "Supervised fine-tuning" in text and "sft.py:tiny" in text and "optim.lr = 0.5" in text
    assert "data.sample = 'tiny'" in text
    for key in SFT_KEYS:
        assert f"{key.name} = " in text


def test_help_is_quick_because_jax_is_not_imported():
    code = "import sys, run; code = run.main(['run.py', '--help']); sys.exit(code or ('jax' in sys.modules) * 9)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=reading.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 20  # about 0.2 s on an idle machine


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=configs/sft.py:tinny"], "did you mean 'configs/sft.py:tiny'?"),
        (["--config=configs/stf.py"], "did you mean 'configs/sft.py'?"),
        (["--config=sft"], "did you mean 'configs/sft.py'?"),
        (["configs/sft.py:tiny"], "did you mean --config=configs/sft.py:tiny?"),
        (["--confg=configs/sft.py"], "unknown flag '--confg=configs/sft.py' - did you mean '--config'?"),
        ([SFT, "--plam=v5e:4x4"], "did you mean '--plan'?"),
        (["--config=configs/infer.py", "--plan=v5e:4x4"], "--plan is for sft, grpo, not for 'infer'"),
        ([SFT, "--workdi=x"], "did you mean '--workdir'?"),
        ([SFT, "--config.optim.lrr=1"], "unknown key 'optim.lrr' - did you mean 'optim.lr'?"),
        ([SFT, "--config.steps=1"], "unknown key 'steps' - did you mean 'train.steps'?"),
        ([SFT, "--config.video=1"], "'video' is a group of keys"),
        ([SFT, "--config.train.steps=abc"], "train.steps must be a whole number, not 'abc'"),
        ([SFT, "--config.train.steps=1.5"], "train.steps must be a whole number, not '1.5'"),
        ([SFT, "--config.train.steps=0"], "train.steps must be at least 1, not 0"),
        ([SFT, "--config.train.resume=maybe"], "train.resume must be true or false, not 'maybe'"),
        ([SFT, "--config.optim.lr=inf"], "optim.lr must be a finite number"),
        ([SFT, "--config.lora.targets=(1,)"], "lora.targets must be a tuple of str values"),
        ([SFT, "--config.model.attention=aut"], "did you mean 'auto'?"),
        ([SFT, "--config.task=infer"], "task must be one of 'sft'"),
        ([SFT, "--config.seed"], "--config.seed"),
        ([SFT, "three", "words"], "unexpected argument 'three'"),
        (["--config.seed=3"], "needs --config=FILE as well"),
        (["--config"], "--config"),
        (["--config=run.py"], "no function get_config"),
    ],
)
def test_a_wrong_command_line_is_one_clean_message(task, capsys, args, message):
    assert run.main(["run.py", *args]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and message in err and "Traceback" not in err
    assert out == "" and not task.calls


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c = common.config('sft'); c.optim.lrr = 3; return c", "mine.py:4: unknown key 'lrr' - did you mean 'lr'?"),
        (
            "c = common.config('sft'); c.optimm.lr = 3; return c",
            "mine.py:4: unknown key 'optimm' - did you mean 'optim'?",
        ),
        ("c = common.config('sft'); c.train.steps = 'many'; return c", "mine.py:4: TypeError"),
        (
            "return {'task': 'sft', 'optim': {'lrr': 3.0}}",
            "mine.py: unknown key 'optim.lrr' - did you mean 'optim.lr'?",
        ),
        ("return {'task': 'sft', 'seed': 'x'}", "seed must be a whole number"),
        ("return {'task': 'stf'}", "did you mean 'sft'?"),
        ("return None", "must return a ConfigDict"),
        ("return (", "cannot be imported"),
    ],
)
def test_a_wrong_config_file_is_one_clean_message(task, tmp_path, capsys, body, message):
    flag = write(tmp_path / "mine.py", f"from configs import common\n\ndef get_config():\n    {body}\n")
    assert run.main(["run.py", flag]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not task.calls


def test_a_variant_of_a_file_without_variants_is_refused(task, tmp_path, capsys):
    flag = write(tmp_path / "mine.py", "def get_config():\n    return {'task': 'sft'}\n")
    assert run.main(["run.py", f"{flag}:x"]) == 2
    assert "has no variants" in capsys.readouterr().err


def test_overrides_reach_the_task_in_any_order(task, tmp_path):
    args = ["--config.seed", "7", "--config=configs/sft.py:tiny", "--config.lora.targets=('q_proj','v_proj')"]
    more = ["--config.optim.lr=1e-3", "--noconfig.train.resume", "--config.prompt.system=-- two words"]
    assert run.main(["run.py", *args, *more]) == 0
    (config, workdir), *rest = task.calls
    assert not rest and workdir == "runs/sft-tiny" == config.workdir
    assert (config.seed, config.optim.lr, config.train.resume) == (7, 1e-3, False)
    assert config.lora.targets == ("q_proj", "v_proj") and config.prompt.system == "-- two words"
    assert config.data.sample == "tiny" and config.is_locked
    assert not list(tmp_path.iterdir())  # what a run leaves is the task's affair


def test_a_plan_goes_to_the_planner_and_looks_for_no_accelerator(task, monkeypatch, tmp_path):
    planner = types.ModuleType("mllm4d_jax.plan.task")
    calls = []
    planner.run = lambda *args: calls.append((*args, os.environ["JAX_PLATFORMS"], os.environ["TPU_SKIP_MDS_QUERY"]))
    monkeypatch.setitem(sys.modules, planner.__name__, planner)
    monkeypatch.setattr(os, "environ", {**os.environ, "JAX_PLATFORMS": "tpu"})
    assert run.main(["run.py", SFT, "--plan=v5e:4x4,memory", "--config.distributed=auto"]) == 0
    ((config, workdir, targets, *environment),) = calls
    assert (targets, workdir, config.task) == ("v5e:4x4,memory", "runs/sft", "sft") and environment == ["cpu", "1"]
    assert not task.calls and not list(tmp_path.iterdir())


def test_own_file_and_workdir_flag(task, tmp_path):
    flag = write(
        tmp_path / "mine.py",
        "def get_config(variant='a'):\n    return {'task': 'sft', 'prompt': {'system': variant}}\n",
    )
    assert run.main(["run.py", f"{flag}:b", f"--workdir={tmp_path / 'w'}"]) == 0
    config, workdir = task.calls[0]
    assert config.prompt.system == "b" and workdir == config.workdir == str(tmp_path / "w")


def test_exit_codes(task, capsys):
    class OwnError(ValueError):
        __module__ = "mllm4d_jax.encode.encoder"

    task.result = None
    assert run.main(["run.py", SFT]) == 0
    task.result = 3
    assert run.main(["run.py", SFT]) == 3
    task.result = OwnError("clip.mp4 has no frames")
    assert run.main(["run.py", SFT]) == 1
    assert capsys.readouterr().err == "error: clip.mp4 has no frames\n"
    for unforeseen in (ValueError("x"), RuntimeError("y")):
        task.result = unforeseen
        with pytest.raises(type(unforeseen)):
            run.main(["run.py", SFT])


def test_global_flags_can_be_read_by_libraries(task):
    flags.FLAGS.unparse_flags()  # the tests have marked them as parsed
    assert run.main(["run.py", SFT]) == 0
    assert flags.FLAGS.is_parsed()


def test_explicit_processes_need_their_environment(task, monkeypatch, capsys):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert run.main(["run.py", SFT, "--config.distributed=explicit"]) == 2
    assert "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID" in capsys.readouterr().err


def test_explicit_processes_join(task, monkeypatch):
    import jax

    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: joined.append(args))
    for name, value in zip(("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"), ("h:1", "2", "1"), strict=True):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert run.main(["run.py", SFT, "--config.distributed=explicit"]) == 0
    assert run.main(["run.py", SFT, "--config.distributed=auto"]) == 0
    assert joined == [("h:1", 2, 1), ()]


@pytest.mark.parametrize(
    ("there", "after"),
    [
        ({}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}),  # JAX refuses both at once
    ],
)
def test_a_run_may_have_most_of_a_gpu(there, after, task, monkeypatch):
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if "MEM_FRACTION" not in k} | there)
    assert run.main(["run.py", SFT]) == 0
    assert {k: v for k, v in os.environ.items() if "MEM_FRACTION" in k} == after
