"""One error for everything that is missing."""

from __future__ import annotations

import pytest

from configs import common
from configs import sft as sft_config
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.run import preflight
from mllm4d_jax.run.checkpoint import content_digests, model_digest
from mllm4d_jax.run.preflight import PreflightError
from mllm4d_jax.run.tiny import with_sample
from mllm4d_jax.sft.task import run


def complaints(config) -> str:
    with pytest.raises(PreflightError) as caught:
        preflight.check(config)
    return str(caught.value)


def complete(tiny_world):
    config = sft_config.get_config("tiny")
    folder, records = tiny_world
    config.data.sample = ""
    config.model.path, config.data.path, config.data.root = str(folder), str(records), str(records.parent)
    config.train.batch_size = 8
    return config


def test_nothing_given_lists_weights_records_and_root_with_their_flags(tmp_path):
    with pytest.raises(PreflightError) as caught:
        run(common.config("sft"), str(tmp_path / "w"))
    text = str(caught.value)
    assert "hf download Qwen/Qwen3-VL-8B-Instruct --local-dir" in text
    for flag in ("--config.model.path=", "--config.data.path=", "--config.data.root="):
        assert flag in text
    assert "configs/sft.py:tiny" in text


def test_a_complete_setting_passes(tiny_world):
    preflight.check(complete(tiny_world))


def test_every_problem_is_in_the_one_error(tiny_world, tmp_path):
    config = complete(tiny_world)
    (tmp_path / "half").mkdir()
    (tmp_path / "half/config.json").write_text("{}")
    config.model.path = str(tmp_path / "half")
    config.data.path = str(tmp_path / "absent.json")
    config.data.root = str(tmp_path / "absent")
    config.data.max_tokens = 10_000
    config.prompt.system = "Be brief and exact."
    config.prompt.system_file = "prompt.txt"
    config.train.batch_size = 12
    config.optim.clip_norm = 0.0
    text = complaints(config)
    for part in (
        "lacks tokenizer.json, *.safetensors",
        "absent.json is not a file",
        "absent is not a folder",
        "data.max_tokens lets through up to 10000",
        "not both",
        "train.batch_size = 12 cannot be split over 8 devices",
        "optim.clip_norm",
    ):
        assert part in text, part
    config = complete(tiny_world)
    config.mesh.data = 3
    config.data.prefix_buckets = config.data.branch_buckets = (512, 64)
    text = complaints(config)
    assert "data.branch_buckets = [512, 64] must be" in text and "data.prefix_buckets = [512, 64] must be" in text
    assert "mesh: " in text and "ascending" in text and "model.path" not in text


def test_a_mixture_and_the_division_of_questions_are_checked(tiny_world, tmp_path):
    _, path = tiny_world
    config = complete(tiny_world)
    config.data.path, config.data.root = "", ""
    with config.unlocked():
        config.data.mixture = (f"{path}::{path.parent}::1", f"{tmp_path}::{tmp_path}/no::1")
        config.data.questions_per_video = 3
    text = complaints(config)
    assert f"{tmp_path} is not a file of records" in text and f"{tmp_path}/no is not a folder" in text
    assert "data.path is not set" not in text and "data.questions_per_video = 3" in text
    config.data.questions_per_video = 2
    assert "it makes 4 rows" in complaints(config)
    config.data.mixture = ("records.json::videos",)
    assert "path::root::rate" in complaints(config)
    config.data.questions_per_video = 1
    config.data.mixture = (f"{path}::{path.parent}::1",)
    preflight.check(config)
    config.train.accumulation = 3
    assert "train.batch_size = 8 cannot be divided into train.accumulation = 3" in complaints(config)
    config.train.accumulation = 2
    assert "in 2 micro-batches cannot be split over 8 devices" in complaints(config)
    config.mesh.tensor = 2
    preflight.check(config)


def test_the_named_weights_follow_the_variant_and_a_starting_adapter_must_be_there(tiny_world, tmp_path):
    config = sft_config.get_config("qwen3_vl_30b_a3b")
    assert "hf download Qwen/Qwen3-VL-30B-A3B-Instruct" in complaints(config)
    config = complete(tiny_world)
    config.model.adapter, config.lora.dropout = str(tmp_path), 1.0
    text = complaints(config)
    assert f"model.adapter = {tmp_path} holds no checkpoint" in text and "lora.dropout = 1" in text
    (tmp_path / "checkpoints/12").mkdir(parents=True)
    assert "12 is not a checkpoint of a run" in complaints(config)
    # A run that goes on has what it needs of the adapter: the run it came from may be gone.
    config.model.adapter, config.lora.dropout, config.workdir = str(tmp_path / "gone"), 0.5, str(tmp_path)
    preflight.check(config)
    config.model.adapter, config.workdir = "", ""
    preflight.check(config)


def test_a_variant_is_not_run_on_the_model_of_another(tiny_world):
    config = sft_config.get_config("qwen3_vl_32b")
    config.model.path = str(tiny_world[0])
    text = complaints(config)
    assert f"model.path = {tiny_world[0]} is not the model of model.published = 32b (Qwen/" in text
    assert "num_layers" in text and "instead of 64" in text
    config.model.published = ""
    assert "is not the model" not in complaints(config)


def test_a_peft_adapter_needs_a_pattern_that_trains_it(tiny_world, tmp_path):
    config = complete(tiny_world)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    config.model.adapter = str(tmp_path)
    for patterns in (("lora",), (".*lora_[ab]",)):
        config.train.trainable = patterns
        preflight.check(config)
    config.train.trainable = ("full",)
    assert "does not train one" in complaints(config)


def test_every_place_of_records_needs_a_media_folder(tiny_world):
    _, path = tiny_world
    config = complete(tiny_world)
    config.data.eval_path = str(path)
    preflight.check(config)  # media of held-out records are where those of training are
    with config.unlocked():
        config.data.mixture = (f"{path}::{path.parent}::1",)
    config.data.root = ""
    assert f"data.eval_path = {path} has no media folder" in complaints(config)
    config.data.eval_path, config.data.mixture = "", (f"{path}::::1",)
    assert f"data.mixture: {path} has no media folder" in complaints(config)
    config.data.mixture = ()
    assert f"data.path = {path} has no media folder" in complaints(config)


def test_the_sample_gives_only_what_is_not_there(tiny_world, tmp_path):
    folder, path = tiny_world
    config = complete(tiny_world)
    config.data.sample = "tiny"
    assert with_sample(config, tmp_path) == config and not list(tmp_path.iterdir())
    config.model.path = ""
    filled = with_sample(config, tmp_path)
    assert filled.data.path == str(path) and filled.model.path == str(tmp_path / "sample" / "model")
    assert [p.name for p in (tmp_path / "sample").iterdir()] == ["model"]
    config.data.path = str(tmp_path / "absent.json")
    with pytest.raises(PreflightError, match="absent.json is not a file of records"):
        with_sample(config, tmp_path)


def test_a_workdir_that_cannot_be_made_is_an_error(tiny_world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PreflightError, match="file/x' cannot be written"):
        run(complete(tiny_world), str(tmp_path / "file" / "x"))


def test_the_sample_fills_in_the_paths_and_leaves_the_callers_config_alone(tmp_path):
    config = sft_config.get_config("tiny")
    filled = with_sample(config, tmp_path)
    assert config.model.path == "" and filled.model.path.startswith(str(tmp_path))
    filled.train.batch_size = 8
    preflight.check(filled)


def test_digests_follow_content_not_place(tiny_world, tmp_path):
    config = complete(tiny_world)
    folder, path = tiny_world
    first = content_digests(config.model.path, RecordFile(path, path.parent))
    moved = tmp_path / "moved.json"
    moved.write_bytes(path.read_bytes())
    assert content_digests(config.model.path, RecordFile(moved, tmp_path)) == first
    held_out = content_digests(config.model.path, RecordFile(path, path.parent), RecordFile(moved, tmp_path))
    assert held_out == first | {"data.eval_path": first["data.path"]}
    prompted = content_digests(config.model.path, RecordFile(moved, tmp_path, "Be brief."))
    assert {k for k in first if prompted[k] != first[k]} == {"prompt.system"}
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_digest(copy) == first["model.path"]
    settings = (copy / "config.json").read_bytes()
    (copy / "config.json").write_bytes(settings + b"\n")
    assert model_digest(copy) != first["model.path"]
    (copy / "config.json").write_bytes(settings)
    for name in ("chat_template.jinja", "processor_config.json"):
        (copy / name).write_text("{}")
        assert model_digest(copy) != first["model.path"]
        (copy / name).unlink()
    (copy / "model-00001-of-00002.safetensors").symlink_to("../../blobs/gone")
    assert model_digest(copy) == first["model.path"]
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert model_digest(copy) != first["model.path"]
    weights[-1] ^= 1
    for at in (len(weights) // 3, len(weights) // 2):  # it was the ends alone that were looked at
        changed = bytearray(weights)
        changed[at] ^= 1
        (copy / "model.safetensors").write_bytes(changed)
        assert model_digest(copy) != first["model.path"]
    (copy / "model.safetensors").write_bytes(weights)
    assert model_digest(copy) == first["model.path"]
