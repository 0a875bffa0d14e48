"""Errors of the devices' memory: what the messages of compilers and runtimes say, and what is proposed."""

from __future__ import annotations

import importlib.util
import re
import types

import jax
import pytest

import run
from configs import common
from mllm4d_jax.parallel.mesh import mesh_shape
from mllm4d_jax.plan import memory, shortage
from mllm4d_jax.plan.job import GrpoJob, Lengths, PlanJob
from mllm4d_jax.run.build import loader_options
from mllm4d_jax.run.fitting import out_of_memory, wanted_bytes

GIB = 1 << 30
GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 58.50GiB."
STATS = {"bytes_limit": 40 * GIB, "bytes_in_use": 17 * GIB}


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (GPU, 58.5 * GIB),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1234567 bytes.", 1234567),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 2.0GiB (2147483648B) on device ordinal 0", 2 * GIB),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded", 24.5 * GIB),
        ("Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm.", 24.5 * GIB),
        ("RESOURCE_EXHAUSTED: Error loading program: Attempting to reserve 512.00M at the bottom of memory.", GIB / 2),
        ("RESOURCE_EXHAUSTED: something new", 0),
    ],
)
def test_bytes_that_messages_name(message, wanted):
    assert out_of_memory(jax.errors.JaxRuntimeError(message)) and wanted_bytes(message) == wanted


def test_other_errors_are_none_of_memory():
    assert not out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: a bug")) and not out_of_memory(RuntimeError(GPU))
    assert shortage.of_memory(jax.errors.JaxRuntimeError("INTERNAL: a bug"), common.config("sft")) is None


def sft(**settings):
    config = common.config("sft")
    many = {"model.published": "8b", "data.questions_per_video": 20, "train.batch_size": 160, "mesh.data": 1}
    config.update_from_flattened_dict(many | settings)
    return config


def changed(config, text: str):
    """(the config with what the text says to set, its settings)."""
    flags = dict(flag.split("=") for flag in re.findall(r"--config\.(\S+=\w+)", text))
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({k: int(v) if v.isdecimal() else v for k, v in flags.items()})
    return other, flags


def reckoned(config, devices: int, remat: str) -> float:
    job, shape = PlanJob.of(config, Lengths()), mesh_shape(dict(config.mesh), devices)
    rows = job.rows / shape["data"] / shape["fsdp"]
    return sum(memory.learning(job, job.sizes, rows, shape, remat, memory.parameter_table(job)).values())


@pytest.mark.parametrize(
    ("settings", "devices", "limit", "names"),
    [
        ({}, 1, 26, {"train.accumulation"}),
        ({"train.accumulation": 2}, 1, 23, {"train.accumulation"}),
        ({"model.remat": "dots"}, 1, 90, {"model.remat"}),
        ({"model.remat": "dots"}, 1, 24, {"model.remat", "train.accumulation"}),
        ({"mesh.data": 8}, 8, 16, {"mesh.data", "mesh.fsdp"}),
        ({"mesh.data": 8}, 8, None, {"mesh.data", "mesh.fsdp"}),
    ],
)
def test_fine_tuning_is_told_settings_that_are_reckoned_to_fit(settings, devices, limit, names):
    config, bytes_ = sft(**settings), None if limit is None else limit * GIB
    text = shortage.advice(config, "training", devices, bytes_)
    other, flags = changed(config, text)
    assert set(flags) == names, text
    before = reckoned(config, devices, "full" if config.model.remat == "auto" else config.model.remat)
    after = reckoned(other, devices, "full")
    assert after <= 0.85 * before and (limit is None or after <= bytes_)
    assert f"about {after / GIB:.1f} GiB are reckoned then, {before / GIB:.1f} now" in text
    loader_options(other)  # it can be divided


def test_fine_tuning_that_nothing_lets_fit_is_told_what_else_there_is():
    text = shortage.advice(sft(), "training", 1, 10 * GIB)
    assert "--config" not in text and "video.num_frames" in text and "more devices (mesh.fsdp)" in text


def grpo(**settings):
    config = common.config("grpo")
    config.update_from_flattened_dict({"model.published": "8b", "rollout.prompts": 8, "mesh.data": 1} | settings)
    return config


def phases(config) -> dict[str, float]:
    job, shape = GrpoJob.of(config, Lengths.parse([], config)), {"data": 1, "fsdp": 1, "tensor": 1}
    found = memory.rollout_memory(job, shape, "full", memory.parameter_table(job))
    return {phase: sum(kinds.values()) for phase, kinds in found.items()}


@pytest.mark.parametrize(("doing", "limit"), [("sampling", 75), ("training", 75), ("training", 45), ("", 75)])
def test_reinforcement_learning_is_told_settings_that_are_reckoned_to_fit(doing, limit):
    text = shortage.advice(grpo(), doing, 1, limit * GIB)
    other, flags = changed(grpo(), text)
    assert set(flags) <= {"rollout.prompts_at_once", "train.accumulation", "learner.completions_per_row"}
    before, after = phases(grpo()), phases(other)
    assert max(after.values()) <= limit * GIB < max(before.values()), text
    assert f"about {after['sampling'] / GIB:.1f} GiB for sampling and {after['learning'] / GIB:.1f} for" in text
    if limit == 75:  # no fewer prompts at a time than needed
        other.rollout.prompts_at_once *= 2
        assert phases(other)["sampling"] > limit * GIB


def test_settings_that_were_reckoned_to_fit_and_did_not_are_not_proposed_again():
    config = grpo(**{"rollout.prompts": 2})
    before = phases(config)
    assert max(before.values()) < 70 * GIB
    other, flags = changed(config, shortage.advice(config, "training", 1, 75 * GIB))
    assert flags and phases(other)["learning"] <= 0.85 * before["learning"]


def test_prompts_that_cannot_fit_are_said():
    assert "no mesh of 1 devices was found" in shortage.advice(grpo(), "training", 1, 17 * GIB)


def test_evaluation_and_inference_are_told_their_keys():
    text = shortage.advice(common.config("eval"), "sampling", 4, 70 * GIB)
    assert "--config.prompts_at_once=4, or --config.questions_per_video=4, or --config.mesh.tensor=4" in text
    assert "video.num_frames, video.max_pixels" in shortage.advice(common.config("infer"), "sampling", 1, None)
    assert "--config.mesh.tensor=4" in shortage.advice(common.config("eval"), "loading the model", 4, None)
    assert "more memory" in shortage.advice(common.config("export"), "loading the model", 1, None)


def fail():
    raise error  # noqa: F821 - a global of the module that it is put into


def raised(name: str) -> Exception:
    """An error raised in a module of that name, and caught further out."""
    work = types.FunctionType(fail.__code__, {"__name__": name, "error": jax.errors.JaxRuntimeError(GPU)})
    try:
        work()
    except jax.errors.JaxRuntimeError as error:
        return error


def test_what_was_done_is_read_from_the_traceback():
    for name, what in shortage._DOING.items():
        assert importlib.util.find_spec(name), name
        assert f"too little memory for {what}: 58.50" in str(shortage.of_memory(raised(name), sft(**{"mesh.data": 8})))
    assert "too little memory: 58.50" in str(shortage.of_memory(raised("elsewhere"), sft(**{"mesh.data": 8})))


def test_where_nothing_can_be_reckoned_keys_are_named_all_the_same():
    text = str(shortage.shortage(GPU, sft(**{"video.num_frames": 0, "video.fps": 1.0}), "training", 1, STATS))
    assert "train.accumulation" in text and "video.num_frames = 0 lets clips be of any length" in text


def test_bytes_wanted_and_there_are_said():
    text = str(shortage.shortage(GPU, sft(), "training", 1, STATS))
    assert "58.50 GiB were wanted and 17.00 of 40.00 GiB are in use on the fullest. Set --config.train" in text
    text = str(shortage.shortage("RESOURCE_EXHAUSTED: something new", sft(), "", 1, STATS))
    assert "memory: 17.00 of 40.00 GiB are in use on the fullest (RESOURCE_EXHAUSTED: something new)." in text


def test_the_command_says_it_without_a_traceback(monkeypatch, tmp_path, capsys):
    def fails(config, workdir):
        raise raised("mllm4d_jax.sft.step")

    monkeypatch.setattr("mllm4d_jax.sft.task.run", fails)
    argv = ["run.py", "--config=configs/sft.py", f"--workdir={tmp_path}", "--config.model.published=8b"]
    assert run.main([*argv, "--config.train.batch_size=64"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: the devices have too little memory for training: 58.50 GiB were wanted")
    assert "--config.train.accumulation=" in err and "Traceback" not in err
