"""Random checkpoints: the published names, shapes and files, bounded shards, the same bytes for the same seed."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors

from configs.published import SIZES, published_config
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.weight_map import published_tensors
from tools import make_checkpoint


def small_config():
    """`tiny_config` with room for the real special ids but few merges and narrow everything."""
    config = make_checkpoint.tiny_config()
    config["text_config"] |= dict(hidden_size=8, intermediate_size=16)
    config["vision_config"] |= dict(hidden_size=16, intermediate_size=16, out_hidden_size=8, num_position_embeddings=16)
    return config


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    count = make_checkpoint.write_checkpoint(folder, small_config(), seed=3, shard_bytes=50_000)
    return folder, count


def read(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "np") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}
    return tensors


def test_names_shapes_and_values(sharded):
    folder, count = sharded
    tensors, shapes = read(folder), published_tensors(ModelConfig.from_dict(small_config()))
    assert {name: value.shape for name, value in tensors.items()} == shapes
    assert count == sum(value.size for value in tensors.values())
    assert {value.dtype for value in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    values = {name: value.astype(np.float32) for name, value in tensors.items()}
    embed = values["model.language_model.embed_tokens.weight"]
    assert abs(embed.std() - 0.02) < 2e-4 and abs(embed.mean()) < 1e-4
    for name in ("layers.0.input_layernorm", "layers.0.self_attn.q_norm", "layers.2.post_attention_layernorm", "norm"):
        assert (values[f"model.language_model.{name}.weight"] == 1).all()
    for name in ("blocks.0.norm1", "merger.norm", "deepstack_merger_list.1.norm"):
        assert (values[f"model.visual.{name}.weight"] == 1).all() and not values[f"model.visual.{name}.bias"].any()
    projections = [value for name, value in values.items() if "proj.weight" in name]
    assert len({value.tobytes() for value in projections}) == len(projections)  # no two tensors alike


def test_shards_are_bounded_and_indexed(sharded):
    folder, count = sharded
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == 2 * count
    for path in files:
        with safetensors.safe_open(path, "np") as file:
            names = list(file.keys())
        assert path.stat().st_size < 60_000 or len(names) == 1
        assert all(index["weight_map"][name] == path.name for name in names)


def test_the_project_loads_it(sharded):
    folder, _ = sharded
    load_model(folder)
    config, tokenizer = ProcessorConfig.from_folder(folder), Tokenizer.from_folder(folder)
    tokenizer.check_config(config)
    assert config.video_max_pixels == 24576 * 32 * 32 and config.image_min_pixels == 65536
    assert tokenizer.special_ids["<|im_end|>"] == 151645


def test_the_seed_decides_the_bytes(sharded):
    first = make_checkpoint.random_tensor("a.weight", (40, 30), 3)
    assert np.array_equal(first, make_checkpoint.random_tensor("a.weight", (40, 30), 3))
    assert not np.array_equal(first, make_checkpoint.random_tensor("a.weight", (40, 30), 4))
    assert not np.array_equal(first, make_checkpoint.random_tensor("b.weight", (40, 30), 3))


def test_a_tensor_of_many_blocks_is_filled(monkeypatch):
    monkeypatch.setattr(make_checkpoint, "BLOCK", 7)
    values = make_checkpoint.random_tensor("a.weight", (10, 10), 0).astype(np.float32)
    assert 0.01 < values.std() < 0.03 and len(np.unique(values)) > 50


def test_qwen2_5_files(tmp_path):
    make_checkpoint.write_settings(tmp_path, published_config("qwen2_5_vl_7b"))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "preprocessor_config.json"}
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert written["patch_size"] == 14 and (written["min_pixels"], written["max_pixels"]) == (3136, 12845056)


def test_command_line(tmp_path, capsys):
    assert make_checkpoint.main(["", "--size=tiny", f"--out={tmp_path / 'x'}"]) == 0
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= {path.name for path in (tmp_path / "x").iterdir()}
    (tmp_path / "file").touch()
    for args, message in (
        (["--size=9b", "--out=x"], "invalid choice"),
        (["--size=2b", f"--out={tmp_path}"], "not empty"),
        (["--size=2b", f"--out={tmp_path / 'file'}"], "a file is where a folder should be"),
        (["--size=2b", f"--out={tmp_path / 'file/below'}"], "a file is where a folder should be"),
    ):
        with pytest.raises(SystemExit) as stop:
            make_checkpoint.main(["", *args])
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert set(SIZES) > {"2b", "8b"}
