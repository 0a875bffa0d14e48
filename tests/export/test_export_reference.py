"""Exports against transformers and PEFT themselves: their files are ours, and the logits agree in both directions."""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from mllm4d_jax.export import check as export_check
from mllm4d_jax.export.task import export_merged
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.peft import adapted_linears, load_peft, save_peft
from mllm4d_jax.models.split import attach_lora
from mllm4d_jax.rows.batch import ModelInputs
from mllm4d_jax.run.start import ModelChoice, TunedModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = ("qwen3_vl", "qwen2_5_vl", pytest.param("qwen3_vl_moe", marks=pytest.mark.slow))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "down_proj")
TOLERANCE = 1e-4


def theirs(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def their_logits(model, name) -> np.ndarray:
    z = np.load(GOLDEN / name / "text.npz")
    ids, mask = (torch.from_numpy(z[key].astype(np.int64)) for key in ("input_ids", "attention_mask"))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.numpy()


def our_logits(model, name) -> np.ndarray:
    z = np.load(GOLDEN / name / "text.npz")
    nowhere = np.full(z["input_ids"].shape, -1, np.int32)
    inputs = ModelInputs(z["input_ids"], z["position_ids"][-3:], z["attention_mask"], nowhere, None)
    with jax.default_matmul_precision("highest"):
        return np.asarray(compiled(*nnx.split(model), inputs))


@functools.partial(jax.jit, static_argnums=0)  # adapters of one scale share a program
def compiled(graphdef, state, inputs):
    model = nnx.merge(graphdef, state)
    return model.logits(model(inputs))


def ours(name, targets=()):
    """Our model, with a random adapter on `targets`."""
    model = load_model(GOLDEN / name, dtype=jnp.float32, attention="xla")
    if targets:
        attach_lora(model, rank=4, alpha=10.0, targets=targets, rngs=nnx.Rngs(0))
        rng = np.random.default_rng(3)
        for linear in adapted_linears(model).values():
            linear.lora_b.set_value(jnp.asarray(rng.normal(size=linear.lora_b.shape) * 0.1, jnp.float32))
    return model


def with_their_adapter(name, targets, **options):
    """Their model with an adapter of random numbers."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(theirs(GOLDEN / name), config).eval()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_our_adapter_in_peft(name, tmp_path):
    # The vision tower of Qwen2.5-VL has projections of these names too, which must be left alone.
    targets = ATTENTION + MLP if name == "qwen2_5_vl" else ATTENTION
    model = ours(name, targets)
    save_peft(model, tmp_path / "ours", base=str(GOLDEN / name))
    base = theirs(GOLDEN / name)
    before = their_logits(base, name)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    after = their_logits(loaded, name)
    np.testing.assert_allclose(after, our_logits(model, name), atol=TOLERANCE)
    assert np.abs(after - before).max() > 0.05  # the adapter does something there
    # What PEFT writes for the adapter that it loaded is what it was given.
    loaded.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / x / "adapter_model.safetensors") for x in ("ours", "theirs"))
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    assert all(a[k].tobytes() == b[k].tobytes() for k in a)
    a, b = (json.loads((tmp_path / x / "adapter_config.json").read_text()) for x in ("ours", "theirs"))
    for options in (a, b):
        if isinstance(options["target_modules"], list):
            options["target_modules"].sort()
    assert a == {key: b[key] for key in a}


@pytest.mark.parametrize("name", FAMILIES)
def test_their_adapter_here(name, tmp_path):
    rslora = name == "qwen2_5_vl"
    model = with_their_adapter(name, list(ATTENTION), use_rslora=rslora)
    model.save_pretrained(tmp_path)
    loaded = ours(name)
    adapter = load_peft(tmp_path, loaded)
    assert adapter.targets == tuple(sorted(ATTENTION)) and adapter.scale == pytest.approx(5.0 if rslora else 2.5)
    logits = our_logits(loaded, name)
    np.testing.assert_allclose(logits, their_logits(model, name), atol=TOLERANCE)


def test_an_adapter_of_the_vision_tower_is_refused(tmp_path):
    with_their_adapter("qwen2_5_vl", ["q_proj", "down_proj"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tensors of the vision tower, which carries no adapter here"):
        load_peft(tmp_path, ours("qwen2_5_vl"))


@pytest.mark.parametrize("name", FAMILIES)
def test_our_merged_checkpoint_in_transformers(name, tmp_path):
    model = ours(name, ATTENTION)
    wanted = our_logits(model, name)
    source = ModelChoice(GOLDEN / name, None)
    export_merged(TunedModel(model, {}), export_check.logits(model), source, tmp_path, TOLERANCE, TOLERANCE)
    merged = their_logits(theirs(tmp_path), name)
    np.testing.assert_allclose(merged, wanted, atol=TOLERANCE)
    # The same weights as PEFT's own merge of the same adapter.
    save_peft(ours(name, ATTENTION), tmp_path / "adapter", base="")
    peft_merged = peft.PeftModel.from_pretrained(theirs(GOLDEN / name), tmp_path / "adapter").merge_and_unload()
    mine = dict(theirs(tmp_path).named_parameters())
    for key, parameter in peft_merged.named_parameters():
        torch.testing.assert_close(parameter, mine[key], atol=1e-6, rtol=0)
