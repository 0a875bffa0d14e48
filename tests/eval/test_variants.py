"""`verify` on models far from the committed fixtures, recorded here with transformers (see `variants.py`)."""

from __future__ import annotations

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mllm4d_jax.eval.verify import Target, verify_target  # noqa: E402
from mllm4d_jax.eval.verify_model import Tolerances  # noqa: E402
from mllm4d_jax.models.hf import load_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tests.eval.variants import VARIANTS, Variant  # noqa: E402
from tools import record_reference  # noqa: E402
from tools.reference import cases, gradients, tensors  # noqa: E402

CONFIGS = {"qwen3_vl": "Qwen3VLConfig", "qwen3_vl_moe": "Qwen3VLMoeConfig", "qwen2_5_vl": "Qwen2_5_VLConfig"}


def build(variant: Variant, folder, seed: int) -> None:
    """A random model whose every tensor matters, saved by transformers."""
    torch.manual_seed(seed)
    config = getattr(transformers, CONFIGS[variant.model_type])(**variant.config())
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                fan_in = p.shape[1:].numel() if p.ndim != 3 else p.shape[-1]
                p.normal_(0, 0.5 if "embed_tokens" in name or "pos_embed" in name else fan_in**-0.5)
            else:
                p.normal_(0, 0.1).add_(0.0 if name.endswith("bias") else 1.0)
    model.to(getattr(torch, variant.dtype)).save_pretrained(folder, max_shard_size=variant.shard)


def release(variant: Variant, saved, folder) -> None:
    """The same model as released: old spelling of config.json, published layout, shards kept."""
    folder.mkdir()
    raw = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(variant.released(raw)))
    files = sorted(saved.glob("model*.safetensors"))
    index = saved / "model.safetensors.index.json"
    weights = json.loads(index.read_text()) if index.is_file() else None
    for file in files:
        stored = load_file(file)
        for name in stored:
            if ".experts." in name and variant.experts == "in_out":
                stored[name] = stored[name].transpose(1, 2).contiguous()
        embedding = next((n for n in stored if n.endswith("embed_tokens.weight")), None)
        if variant.store_head and embedding:
            stored["lm_head.weight"] = stored[embedding].clone()
        save_file(stored, folder / file.name, metadata={"format": "pt"})
    if weights:
        (folder / index.name).write_text(json.dumps(weights))


def record(variant: Variant, saved, out, seed: int) -> None:
    """What `tools/record_reference.py` writes, for the rows of the variant."""
    out.mkdir()
    model, prompts = tensors.load(str(saved)), cases.Prompts.from_folder(saved, seed)
    rng = np.random.default_rng(seed)
    rows = [prompts.row(segments, rng) for segments in variant.rows]
    inputs = cases.batch(prompts, rows, "left")
    arrays = tensors.record(model, inputs, tensors.FULL) | tensors.generate(model, inputs, 4)
    np.savez(out / "mixed.npz", **arrays)
    margin = record_reference.summary(arrays, "left")
    assert margin["gen_margin"] > 1e-3 and margin.get("router_min_gap", 1) > 1e-5, "choose another seed"
    if variant.right:
        np.savez(out / "mixed_right.npz", **tensors.record(model, cases.batch(prompts, rows, "right"), tensors.OUTPUTS))
    if variant.grads:
        (out / "grads_mixed.json").write_text(json.dumps(gradients.record_gradients(model, inputs, "mixed")))
    manifest = {"rope_rule": record_reference.position_rule(model, prompts)}
    (out / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, tmp_path):
    variant, seed = VARIANTS[name], zlib.crc32(name.encode())
    saved, released, out = tmp_path / "saved", tmp_path / "released", tmp_path / name
    build(variant, saved, seed)
    release(variant, saved, released)
    record(variant, saved, out, seed)
    assert (len(list(released.glob("model-*.safetensors"))) > 1) == (variant.shard != "1GB")

    with jax.default_matmul_precision("highest"):
        checks = list(verify_target(Target(out, released), Tolerances(), attention="xla", rule="auto"))
    for check in checks:
        print(check.line(90))
    assert not [c.line(60) for c in checks if not c.passed]
    stages = {"positions", "patch embedding", "vision blocks", "vision features", "embeddings", "decoder layers"}
    stages |= {"final norm", "logits", "loss", "greedy ids", "greedy logits"}
    stages |= {"router", "router choice"} if variant.model_type == "qwen3_vl_moe" else set()
    stages |= {"gradients"} if variant.grads else set()
    assert {c.group for c in checks} == stages
    assert {c.case.split("/")[1].split("[")[0] for c in checks} >= {"mixed"} | (
        {"mixed_right"} if variant.right else set()
    )
    assert_same_model(saved, released)


def assert_same_model(a, b) -> None:
    """Both spellings and layouts load as the same numbers."""
    first, second = (load_model(p, dtype=jnp.float32, attention="xla") for p in (a, b))
    flat = [nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (first, second)]
    assert [p for p, _ in flat[0]] == [p for p, _ in flat[1]]
    for (path, x), (_, y) in zip(*flat, strict=True):
        np.testing.assert_array_equal(x.get_value(), y.get_value(), err_msg=str(path))
