"""Checkpoints: exact round trips, every layout, sharded placement, and errors that list everything."""

from __future__ import annotations

import json
import mmap
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mllm4d_jax.models import hf
from mllm4d_jax.models.hf import CheckpointError, load_model, save_model
from mllm4d_jax.models.split import attach_lora
from mllm4d_jax.models.tensor_files import TensorFiles
from mllm4d_jax.parallel.mesh import make_mesh

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MODELS = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl")


def tensors(folder) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in sorted(pathlib.Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes(), name


def checkpoint(tmp_path, name="qwen3_vl", change=lambda tensors: None, dtype=None) -> pathlib.Path:
    """A copy of a fixture whose tensors `change` edits in place."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(GOLDEN / name / "config.json", folder)
    values = load_file(GOLDEN / name / "model.safetensors")
    if dtype is not None:
        values = {k: v.astype(dtype) for k, v in values.items()}
    change(values)
    save_file({k: np.ascontiguousarray(v) for k, v in values.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 100_000])
def test_round_trip_is_bit_identical(tmp_path, name, shard_bytes):
    save_model(load_model(GOLDEN / name), tmp_path, max_shard_bytes=shard_bytes)
    assert_same(tensors(tmp_path), tensors(GOLDEN / name))
    files = list(tmp_path.glob("*.safetensors"))
    assert (tmp_path / "model.safetensors.index.json").exists() == (len(files) > 1) == (shard_bytes < 1 << 20)
    again = tmp_path / "again"
    save_model(load_model(tmp_path), again)
    assert_same(tensors(again), tensors(GOLDEN / name))


def test_bfloat16_round_trip_and_conversion(tmp_path):
    folder = checkpoint(tmp_path, dtype=ml_dtypes.bfloat16)
    out = tmp_path / "out"
    save_model(load_model(folder, dtype=jnp.bfloat16), out)
    assert_same(tensors(out), tensors(folder))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    upcast = load_model(folder, dtype=jnp.float32)
    stored = tensors(folder)["model.language_model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(upcast.text.embed[...], stored)


def test_transposed_experts_of_transformers_5_are_recognised(tmp_path):
    def transpose(values):
        for name in values:
            if ".experts." in name:
                values[name] = values[name].swapaxes(-1, -2)

    folder = checkpoint(tmp_path, "qwen3_vl_moe", transpose)
    assert tensors(folder)["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (8, 40, 32)
    out = tmp_path / "out"
    save_model(load_model(folder), out)
    assert_same(tensors(out), tensors(GOLDEN / "qwen3_vl_moe"))


def test_a_stored_head_wins_over_tying(tmp_path):
    head = np.random.default_rng(0).normal(size=(512, 48)).astype(np.float32)
    folder = checkpoint(tmp_path, change=lambda values: values.update({"lm_head.weight": head}))
    model = load_model(folder)
    np.testing.assert_array_equal(model.head_kernel(), head.T)
    tied = load_model(GOLDEN / "qwen3_vl")
    np.testing.assert_array_equal(tied.head_kernel(), tied.text.embed[...].T)


def test_a_saved_config_says_one_thing_of_the_head(tmp_path):
    """Older nested files say it in text_config; left as it was there, transformers 4 would tie the head again."""
    head = np.random.default_rng(0).normal(size=(512, 48)).astype(np.float32)
    folder = checkpoint(tmp_path, change=lambda values: values.update({"lm_head.weight": head}))
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["tie_word_embeddings"] = raw["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(raw))
    save_model(load_model(folder), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["tie_word_embeddings"], written["text_config"]["tie_word_embeddings"]) == (False, False)
    assert "tie_word_embeddings" not in written["vision_config"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [dict(data=1, fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2)])
def test_loads_straight_into_shards(name, sizes):
    mesh = make_mesh(sizes)
    sharded, whole = load_model(GOLDEN / name, mesh=mesh), load_model(GOLDEN / name)
    split = 0
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(sharded)), nnx.to_flat_state(nnx.state(whole)), strict=True
    ):
        a, b = a.get_value(), b.get_value()
        assert a.dtype == b.dtype and len(a.sharding.device_set) == 8
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))
        split += not a.sharding.is_fully_replicated
    assert split > 10
    kernel = sharded.text.stacks[0].attn.q_proj.kernel[...]
    spec = kernel.sharding.shard_shape(kernel.shape)
    assert spec == (kernel.shape[0], kernel.shape[1] // sizes["fsdp"], kernel.shape[2] // sizes["tensor"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("axis", ["fsdp", "tensor", "data"])
def test_every_row_is_read_once_for_all_devices_of_a_host(monkeypatch, name, axis):
    """In a bucket every reading is a download."""
    read, got = TensorFiles.read, []

    def counted(files, tensor, rows=slice(None)):
        got.append(read(files, tensor, rows))
        return got[-1]

    monkeypatch.setattr(TensorFiles, "read", counted)
    mesh = make_mesh(dict(data=1, fsdp=1, tensor=1) | {axis: 4}, jax.devices()[:4])
    split = load_model(GOLDEN / name, mesh=mesh)
    stored = sum(value.nbytes for value in tensors(GOLDEN / name).values())
    assert stored <= sum(value.nbytes for value in got) <= 1.05 * stored
    whole = load_model(GOLDEN / name)
    for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (split, whole)), strict=True):
        np.testing.assert_array_equal(np.asarray(a.get_value()), np.asarray(b.get_value()), err_msg=str(path))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_strips_of_any_height_make_the_same_matrices(monkeypatch, name, dtype):
    whole = load_model(GOLDEN / name, dtype=dtype)
    for height, mesh in ((7, None), (1, make_mesh(dict(data=1, fsdp=4, tensor=2)))):
        monkeypatch.setattr(hf, "_STRIP", height)
        strips = load_model(GOLDEN / name, dtype=dtype, mesh=mesh)
        for (path, a), (_, b) in zip(*(nnx.to_flat_state(nnx.state(m)) for m in (strips, whole)), strict=True):
            np.testing.assert_array_equal(np.asarray(a.get_value()), np.asarray(b.get_value()), err_msg=str(path))


def test_parameters_stay_where_they_were_assembled():
    parameters = jax.tree.leaves(nnx.state(load_model(GOLDEN / "qwen3_vl")))
    assert {x.unsafe_buffer_pointer() % mmap.PAGESIZE for x in parameters} == {0}, "JAX has made copies"


def test_one_error_lists_missing_unexpected_and_misshapen(tmp_path):
    def damage(values):
        del values["model.visual.pos_embed.weight"]
        values["model.language_model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        values["model.language_model.norm.weight"] = np.zeros(47, np.float32)

    with pytest.raises(CheckpointError) as error:
        load_model(checkpoint(tmp_path, change=damage))
    text = str(error.value)
    assert "1 missing: model.visual.pos_embed.weight" in text
    assert "1 unexpected: model.language_model.layers.9.mlp.up_proj.weight" in text
    assert "1 misshapen: model.language_model.norm.weight [47], expected [48]" in text


def test_untied_model_without_head_is_incomplete(tmp_path):
    folder = checkpoint(tmp_path, "qwen2_5_vl", lambda values: values.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="1 missing: lm_head.weight"):
        load_model(folder)


def test_absent_weights_say_what_is_needed(tmp_path):
    shutil.copy(GOLDEN / "qwen3_vl" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        load_model(tmp_path)


def test_truncated_file(tmp_path):
    folder = checkpoint(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged or cut short"):
        load_model(folder)


def sharded(tmp_path) -> pathlib.Path:
    save_model(load_model(GOLDEN / "qwen3_vl"), tmp_path, max_shard_bytes=300_000)
    return tmp_path


def test_missing_shard(tmp_path):
    folder = sharded(tmp_path)
    next(folder.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-.*is missing"):
        load_model(folder)


def test_index_that_disagrees_with_its_shards(tmp_path):
    folder = sharded(tmp_path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    moved = index["weight_map"].pop("model.visual.pos_embed.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="pos_embed.weight in .* is not in the index"):
        load_model(folder)
    index["weight_map"] |= {"model.visual.pos_embed.weight": moved, "model.visual.extra": moved}
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="model.visual.extra is not in"):
        load_model(folder)
    index["weight_map"]["model.visual.extra"] = "../outside.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names files outside the folder"):
        load_model(folder)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        load_model(folder)


def test_adapters_are_not_silently_dropped(tmp_path):
    model = load_model(GOLDEN / "qwen3_vl")
    attach_lora(model, rank=2, alpha=4.0, rngs=nnx.Rngs(0))
    with pytest.raises(CheckpointError, match="carries LoRA adapters"):
        save_model(model, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_replaces_older_shards(tmp_path):
    folder = sharded(tmp_path)
    model = jax.block_until_ready(load_model(folder))
    save_model(model, folder)
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert_same(tensors(folder), tensors(GOLDEN / "qwen3_vl"))
