"""A wider copy of a model: the same answers, new weights that can learn, and what it refuses."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from configs import common
from mllm4d_jax.export import check as export_check
from mllm4d_jax.export import task as export
from mllm4d_jax.export.merged import ModelExportError
from mllm4d_jax.models.hf import load_model
from tests.models.folders import copied

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MODELS = ("qwen3_vl", "qwen2_5_vl")


def widen(source, output, **values) -> int:
    values = {"form": "wider", "model.path": str(source), "output": str(output), **values}
    return export.run(common.config("export", values), "unused")


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_wider_copy_has_the_same_logits(tmp_path, capsys, name, factor):
    """Heads of queries are served by the heads of keys that served them: two of these share four of those."""
    assert widen(GOLDEN / name, tmp_path / "wide", factor=factor) == 0
    narrow, wide = (load_model(folder, dtype=jnp.float32) for folder in (GOLDEN / name, tmp_path / "wide"))
    before, now = narrow.config.text, wide.config.text
    heads = factor if name == "qwen3_vl" else 1
    assert (now.num_heads, now.intermediate_size) == (heads * before.num_heads, factor * before.intermediate_size)
    assert (now.num_kv_heads, now.head_dim, now.hidden_size) == (
        before.num_kv_heads,
        before.head_dim,
        before.hidden_size,
    )
    ours, theirs = export_check.logits(wide), export_check.logits(narrow)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    assert f"{now.num_heads} heads for {before.num_heads}" in capsys.readouterr().out


@pytest.mark.parametrize("name", MODELS)
def test_what_is_new_can_learn(tmp_path, name):
    """Every row that reads what is new has a gradient, and hence, from the next step on, what is new has one, too."""
    widen(GOLDEN / name, tmp_path / "wide")
    model = load_model(tmp_path / "wide", dtype=jnp.float32)
    graphdef, state = nnx.split(model)

    def loss(state):
        model = nnx.merge(graphdef, state)
        return jnp.square(model.logits(model(export_check.probe(model.config)))).mean()

    gradient = dict(nnx.to_flat_state(jax.grad(loss)(state)))
    for path, values in nnx.to_flat_state(state):
        readers = ("o_proj", "down_proj") if name == "qwen3_vl" else ("down_proj",)
        if path[0] == "text" and path[-2] in readers and path[-1] == "kernel":
            unread = (np.asarray(values.get_value()) == 0).all(-1)  # [layers, in]
            assert unread.mean() == pytest.approx(0.5)
            assert (np.abs(np.asarray(gradient[path].get_value())).sum(-1)[unread] > 0).all()


def test_a_copy_keeps_dtype_and_companions_and_follows_its_seed(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(GOLDEN / "qwen3_vl" / "config.json", base)
    half = {k: v.astype(jnp.bfloat16) for k, v in load_file(GOLDEN / "qwen3_vl" / "model.safetensors").items()}
    save_file(half, base / "model.safetensors")
    (base / "tokenizer.json").write_text("{}")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        widen(base, tmp_path / name, seed=seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert {x.dtype for x in a.values()} == {np.dtype(jnp.bfloat16)} and a.keys() == half.keys()
    assert all((a[k] == b[k]).all() for k in a) and any((a[k] != c[k]).any() for k in a)
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    written = json.loads((tmp_path / "a" / "config.json").read_text())["text_config"]
    assert written["num_attention_heads"] == 2 * load_model(base).config.text.num_heads


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("said", [None, True, False])
@pytest.mark.parametrize("head", ["none", "another", "the embedding"])
def test_a_copy_has_the_head_that_the_stored_tensors_decide(tmp_path, name, said, head):
    """The key of config.json may be left out, and a stored head that differs from the embedding wins over it."""
    if said is False and head == "none":
        return  # not a whole model
    base = copied(tmp_path / "base", name, lambda values: put_head(values, head), tie_word_embeddings=said)
    narrow = load_model(base, dtype=jnp.float32)
    assert widen(base, tmp_path / "wide") == 0
    wide = load_model(tmp_path / "wide", dtype=jnp.float32)
    tied = head == "none" or (said is True and head == "the embedding")
    written = json.loads((tmp_path / "wide" / "config.json").read_text())
    stored = "lm_head.weight" in load_file(tmp_path / "wide" / "model.safetensors")
    assert (written["tie_word_embeddings"], stored, wide.lm_head is None) == (tied, not tied, tied)
    np.testing.assert_array_equal(wide.head_kernel(), narrow.head_kernel())


def put_head(values, head: str) -> None:
    """Store the head that is asked for beside the other tensors, in place."""
    embedding = next(value for key, value in values.items() if key.endswith("embed_tokens.weight"))
    values.pop("lm_head.weight", None)
    if head != "none":
        values["lm_head.weight"] = embedding + (head == "another")


@pytest.mark.parametrize(
    ("source", "values", "message"),
    [
        (GOLDEN / "qwen3_vl_moe", {}, "cannot be made wider: supported are dense models"),
        (GOLDEN / "qwen3_vl", {"model.adapter": "runs/sft"}, "merge the adapter first"),
    ],
)
def test_what_cannot_be_made_wider_is_refused(tmp_path, source, values, message):
    with pytest.raises(ModelExportError, match=message):
        widen(source, tmp_path / "wide", **values)
    assert not (tmp_path / "wide").exists()
