"""Models from a bucket: the same bits as from a folder, and no more bytes than are needed."""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.files import remote
from mllm4d_jax.models.hf import CheckpointError, load_model
from mllm4d_jax.models.peft import is_peft_folder, load_peft, save_peft
from mllm4d_jax.models.split import attach_lora
from mllm4d_jax.models.tensor_files import TensorFiles
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.run.checkpoint import folder_digest, model_digest
from tests.buckets import put_folder
from tests.models.folders import sharded

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def bits(model) -> dict[tuple, bytes]:
    return {path: np.asarray(v.get_value()).tobytes() for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_weights_have_the_same_bits(front):
    name = "qwen3_vl_moe"
    there = put_folder(GOLDEN / name, f"models/{name}")
    front.rate = 0.03
    assert bits(load_model(there)) == bits(load_model(GOLDEN / name))


def test_shards_on_a_mesh_have_the_same_bits(front, tmp_path):
    here = sharded(tmp_path / "model")
    mesh = make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
    assert bits(load_model(put_folder(here, "models/shards"), mesh=mesh)) == bits(load_model(here, mesh=mesh))


def test_rows_of_a_tensor_cost_their_bytes(front):
    there = put_folder(GOLDEN / "qwen3_vl", "models/rows")
    front.reset()
    files, here = TensorFiles.scan(there), TensorFiles.scan(GOLDEN / "qwen3_vl")
    size = (GOLDEN / "qwen3_vl" / "model.safetensors").stat().st_size
    name = "model.language_model.embed_tokens.weight"
    for rows in (slice(None), slice(3, 7), slice(5, 5), slice(90, None)):
        before = front.sent
        got, want = files.read(name, rows), here.read(name, rows)
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype and front.sent - before == want.nbytes
    assert front.requests["GET models/rows/model.safetensors"] < 10 and front.sent < size


def test_identity_does_not_depend_on_the_place(front, tmp_path, tiny_world):
    folder, _ = tiny_world
    there = put_folder(folder, "models/tiny")
    assert model_digest(there) == model_digest(folder)
    assert folder_digest(there) == folder_digest(folder)
    assert Tokenizer.from_folder(there).__getstate__()[0] == Tokenizer.from_folder(folder).__getstate__()[0]
    assert ProcessorConfig.from_folder(there) == ProcessorConfig.from_folder(folder)


def test_an_adapter_in_a_bucket(front, tmp_path):
    model = load_model(GOLDEN / "qwen3_vl")
    attach_lora(model, rank=2, alpha=4.0, targets=("q_proj",), rngs=nnx.Rngs(0))
    save_peft(model, tmp_path / "adapter", base="b")
    there = put_folder(tmp_path / "adapter", "adapters/a")
    assert is_peft_folder(there) and not is_peft_folder(f"{there}/no")
    other = load_model(GOLDEN / "qwen3_vl")
    load_peft(there, other)
    assert bits(other) == bits(model)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"), "model.safetensors is damaged or cut"),
        (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "model.safetensors is damaged or cut short"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
            "model.safetensors is damaged or cut short",
        ),
    ],
)
def test_bad_folders_are_refused_as_local_ones(front, tmp_path, break_it, said):
    shutil.copytree(GOLDEN / "qwen3_vl", tmp_path / "bad")
    break_it(tmp_path / "bad")
    there = put_folder(tmp_path / "bad", f"models/{tmp_path.name}")
    for folder in (tmp_path / "bad", there):
        with pytest.raises(CheckpointError, match=said):
            load_model(folder)


def test_a_refusal_is_not_a_damaged_file(front):
    there = put_folder(GOLDEN / "qwen3_vl", "models/refused")
    front.refuse = lambda method, name: 403 if name.endswith(".safetensors") else None
    with pytest.raises(Exception) as caught:  # noqa: B017 - the driver's own, or a RemoteError
        load_model(there)
    said = remote.trouble(caught.value) or str(caught.value)
    assert "permission denied" in said and "damaged" not in str(caught.value)
