"""The tiny model folder goes through the same readers as a download."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Piece, Tokenizer
from mllm4d_jax.files.made_folder import FolderError
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.run.tiny import write_tiny_model


def test_folder_is_read_by_the_ordinary_readers(tiny_world):
    folder, records = tiny_world
    config, tokenizer = ModelConfig.from_folder(folder), Tokenizer.from_folder(folder)
    tokenizer.check_config(ProcessorConfig.from_folder(folder))
    assert tokenizer.vocab_size <= config.text.vocab_size
    text = records.read_text()
    assert tokenizer.decode(tokenizer.encode_pieces([Piece(text)])[0]) == text
    names = set(load_file(folder / "model.safetensors"))
    assert "model.visual.deepstack_merger_list.1.norm.weight" in names and "lm_head.weight" in names


def test_same_seed_same_weights_and_an_existing_folder_is_kept(tiny_world, tmp_path):
    texts = ["a few words", "and more words"]
    assert write_tiny_model(tmp_path / "a", texts, seed=1)
    stamp = (tmp_path / "a/model.safetensors").stat().st_mtime_ns
    assert not write_tiny_model(tmp_path / "a", texts, seed=1)
    assert (tmp_path / "a/model.safetensors").stat().st_mtime_ns == stamp
    write_tiny_model(tmp_path / "b", texts, seed=1)
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in "ab")
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert write_tiny_model(tmp_path / "b", texts, seed=2)
    assert not np.array_equal(a["lm_head.weight"], load_file(tmp_path / "b/model.safetensors")["lm_head.weight"])
    (tmp_path / "a/model.safetensors").unlink()
    assert write_tiny_model(tmp_path / "a", texts, seed=1)


def test_a_folder_of_the_users_own_is_left_alone(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/model.safetensors").write_text("precious")
    with pytest.raises(FolderError, match="in the way"):
        write_tiny_model(tmp_path / "m", ["x"])
