"""The export task: exact files, exact refusals, and nothing left behind when an export is not what it should be."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import tracemalloc
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from configs import common
from mllm4d_jax.export import check as export_check
from mllm4d_jax.export import merged as export_merged
from mllm4d_jax.export import task as export
from mllm4d_jax.export.check import Difference
from mllm4d_jax.export.merged import ModelExportError
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.hf import TensorFiles, load_model
from mllm4d_jax.models.peft import adapted_linears, load_peft
from mllm4d_jax.models.split import attach_lora, needs_adapter, split_model
from mllm4d_jax.run.checkpoint import Checkpoints, Meta, model_digest
from mllm4d_jax.run.start import StartError, find_adapter, load_tuned

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ADAPTER = {"lora.rank": 2, "lora.alpha": 3.0, "lora.dropout": 0.05, "lora.targets": ["q_proj", "o_proj"]}
LAYER = "model.language_model.layers.{}.self_attn.{}.weight"


def base_folder(tmp_path, name="qwen3_vl", dtype=np.float32, change=lambda tensors: None, shards=2) -> pathlib.Path:
    """A copy of a fixture in another dtype, in shards, with some of the files that come along with a model."""
    folder = tmp_path / "base"
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / name / "config.json", folder)
    values = {k: v.astype(dtype) for k, v in load_file(GOLDEN / name / "model.safetensors").items()}
    change(values)
    names, where = sorted(values), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {k: np.ascontiguousarray(values[k]) for k in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.bin").write_bytes(b"not copied")
    return folder


def _moved(rng, scale, x):
    return x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)


def trained_run(tmp_path, base, patterns=("lora",), scale=0.1, steps=(3,), **options) -> pathlib.Path:
    """A workdir with checkpoints whose parameters have moved by random numbers, as a run would leave it."""
    model = load_model(base, dtype=jnp.float32)
    if needs_adapter(patterns):
        c = dict(rank=2, alpha=3.0, targets=("q_proj", "o_proj"))
        attach_lora(model, rngs=nnx.Rngs(0), **c)
    _, trainable, _ = split_model(model, patterns)
    rng = np.random.default_rng(7)
    config = {"seed": 0, "model.path": str(base), "model.adapter": "", "train.trainable": list(patterns)}
    config |= ADAPTER | options
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=5) as checkpoints:
        for step in steps:
            draw = partial(_moved, rng, scale * step)
            moved = jax.tree.map(draw, trainable)
            meta = Meta(step, 0, 0, config, {"model.path": model_digest(base)})
            checkpoints.save(moved, {"count": jnp.zeros(())}, meta, 1.0)
    return tmp_path / "run"


def run(form, source, output, **values) -> int:
    values = {"form": form, "model.adapter": str(source), "output": str(output), **values}
    return export.run(common.config("export", values), "unused")


def tensors(folder) -> dict[str, np.ndarray]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def left_behind(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in ("base", "run"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(base folder in bfloat16, workdir of an adapter trained on it at steps 3 and 5)."""
    tmp_path = tmp_path_factory.mktemp("world")
    base = base_folder(tmp_path, dtype=ml_dtypes.bfloat16)
    return base, trained_run(tmp_path, base, steps=(3, 5))


def stored_adapter(workdir, base, step=5):
    """Module path -> (A, B) of a checkpoint, read without the export."""
    model = load_model(base, dtype=jnp.float32)
    attach_lora(model, rank=2, alpha=3.0, targets=("q_proj", "o_proj"), rngs=nnx.Rngs(0))
    _, trainable, _ = split_model(model)
    with Checkpoints(workdir / "checkpoints", keep=5) as checkpoints:
        attention = checkpoints.restore_trainable(step, trainable)["text"]["stacks"][0]["attn"]
    return {p: tuple(np.asarray(attention[p][side]) for side in ("lora_a", "lora_b")) for p in ("q_proj", "o_proj")}


def test_an_adapter_is_written_and_found_equal(world, tmp_path, capsys):
    base, workdir = world
    assert run("peft", workdir, tmp_path / "out", base_name="Qwen/Qwen3-VL") == 0
    text = capsys.readouterr().out
    assert "PEFT adapter of rank 2, 16 tensors" in text and "step 5" in text and "WARNING" not in text
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 3, 0.05)
    assert config["base_model_name_or_path"] == "Qwen/Qwen3-VL"
    model = load_model(base, dtype=jnp.float32)
    load_peft(tmp_path / "out", model)
    wanted = stored_adapter(workdir, base)
    for path, linear in adapted_linears(model).items():
        np.testing.assert_array_equal(linear.lora_a[...], wanted[path[-1]][0])
        np.testing.assert_array_equal(linear.lora_b[...], wanted[path[-1]][1])
    assert left_behind(tmp_path) == ["out"]


def test_a_merged_checkpoint_has_the_sum_in_place_and_all_else_untouched(world, tmp_path, capsys):
    base, workdir = world
    assert run("merged", workdir / "checkpoints", tmp_path / "out", **{"model.step": 3}) == 0
    assert "8 of 115 tensors changed" in capsys.readouterr().out
    adapter, before, after = stored_adapter(workdir, base, 3), tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    touched = {LAYER.format(i, p): (i, p) for i in range(4) for p in adapter}
    for name in before:
        assert after[name].dtype == ml_dtypes.bfloat16
        if name not in touched:
            assert after[name].tobytes() == before[name].tobytes(), name
            continue
        layer, p = touched[name]
        a, b = (x[layer].astype(np.float64) for x in adapter[p])
        exact = before[name].astype(np.float64) + 1.5 * (a @ b).T
        ours, rounded = after[name].astype(np.float64), exact.astype(np.float32).astype(ml_dtypes.bfloat16)
        assert np.all(np.abs(ours - exact) <= np.abs(exact) * 2.0**-8 + 1e-7)  # half a step of bfloat16
        assert np.mean(ours != rounded) < 1e-3  # but for sums that lie between two steps: rounded once, not twice
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out/notes.bin").exists()


def test_a_peft_folder_is_merged_too(world, tmp_path, capsys):
    base, workdir = world
    run("peft", workdir, tmp_path / "adapter")
    run("merged", workdir, tmp_path / "a")
    with pytest.raises(StartError, match="is not a model folder.*: name the base model of"):
        run("merged", tmp_path / "adapter", tmp_path / "b")
    run("merged", tmp_path / "adapter", tmp_path / "b", **{"model.path": str(base)})
    assert "adapter_config.json" not in {p.name for p in (tmp_path / "b").iterdir()}
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(a[name].tobytes() == b[name].tobytes() for name in a | b)


@pytest.mark.slow  # compiles the model three times more
def test_comparing_in_bfloat16(world, tmp_path):
    run("merged", world[1], tmp_path / "merged", **{"model.dtype": "bfloat16"})
    run("peft", world[1], tmp_path / "peft", **{"model.dtype": "bfloat16"})
    assert left_behind(tmp_path) == ["merged", "peft"]


def test_full_fine_tuning_of_a_tied_model_that_stores_its_head(tmp_path):
    def store_head(values):
        values["lm_head.weight"] = values["model.language_model.embed_tokens.weight"]

    base = base_folder(tmp_path, change=store_head)
    workdir = trained_run(tmp_path, base, patterns=("full", "vision/merger/.*"), scale=1e-3)
    with pytest.raises(ModelExportError, match="base parameters were trained.*configs/export.py:merged"):
        run("peft", workdir, tmp_path / "out")
    assert left_behind(tmp_path) == []
    run("merged", workdir, tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    text = {n for n in before if n.startswith(("model.language_model", "model.visual.merger.", "lm_head"))}
    assert changed == text
    head = after["lm_head.weight"]
    np.testing.assert_array_equal(head, after["model.language_model.embed_tokens.weight"])


def test_experts_keep_the_layout_of_their_files(tmp_path):
    def transpose(values):
        for name in values:
            if ".experts." in name:
                values[name] = values[name].swapaxes(-1, -2)

    base = base_folder(tmp_path, "qwen3_vl_moe", change=transpose)
    workdir = trained_run(tmp_path, base, patterns=("lora", r"text/stacks/\d/mlp/(down|gate_up)"), scale=1e-2)
    tuned = load_tuned(load_model(base, dtype=jnp.float32), find_adapter(str(workdir)))
    files, out = TensorFiles.scan(base), tmp_path / "out"
    out.mkdir()
    export_merged.write_merged(files, out, export_merged.find_changes(tuned.model, tuned.trained, files))
    before, after = tensors(base), tensors(out)
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    kinds = (".experts.", "q_proj.weight", "o_proj.weight")
    assert changed == {n for n in before if "language_model" in n and any(k in n for k in kinds)}
    export_check.merge_in_memory(tuned.model, tuned.trained, files)
    ours, theirs = (nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (tuned.model, load_model(out)))
    for (path, x), (_, y) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x.get_value(), y.get_value(), atol=1e-6, err_msg=str(path))


def test_half_an_adapter_is_completed_from_the_seed_or_refused(world, tmp_path):
    base, _ = world
    half = trained_run(tmp_path / "half", base, patterns=(".*/lora_b",))
    model = load_tuned(load_model(base, dtype=jnp.float32), find_adapter(str(half))).model
    fresh = load_model(base, dtype=jnp.float32)
    attach_lora(fresh, rank=2, alpha=3.0, targets=("q_proj", "o_proj"), rngs=nnx.Rngs(0))
    for path, linear in adapted_linears(fresh).items():
        np.testing.assert_array_equal(linear.lora_a[...], adapted_linears(model)[path].lora_a[...])
        assert np.abs(adapted_linears(model)[path].lora_b[...]).max() > 0.1
    later = trained_run(tmp_path / "later", base, patterns=(".*/lora_b",), **{"model.adapter": "runs/first"})
    with pytest.raises(StartError, match="holds one part of an adapter and the other was kept as it is in runs/first"):
        run("peft", later, tmp_path / "out")
    assert left_behind(tmp_path) == ["half", "later"]


def test_merging_holds_one_tensor_at_a_time(tmp_path):
    base, out, count = tmp_path / "model", tmp_path / "out", 64
    for folder in (base, out):
        folder.mkdir()
    values = {f"t{i}": np.full((512, 512), i, np.float32) for i in range(count)}  # a MiB each
    save_file(values, base / "model.safetensors")
    files = TensorFiles.scan(base)
    changes = {name: (lambda stored: stored + 1) for name in values if name != "t7"}
    tracemalloc.start()
    try:
        export_merged.write_merged(files, out, changes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    after = load_file(out / "model.safetensors")
    assert all((after[name] == values[name] + (name != "t7")).all() for name in values)


def test_a_left_over_index_is_not_copied_beside_a_single_file(tmp_path):
    base, out = base_folder(tmp_path), tmp_path / "out"
    shutil.copy(GOLDEN / "qwen3_vl" / "model.safetensors", base)
    out.mkdir()
    assert export_merged.write_merged(TensorFiles.scan(base), out, {}) == 0
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_tensors_keep_the_names_of_their_files(tmp_path):
    def respell(values):
        for name in [n for n in values if n.startswith("model.")]:
            values[f"model.language_{name}"] = values.pop(name)

    base, out = base_folder(tmp_path, "qwen2_5_vl", change=respell), tmp_path / "out"
    out.mkdir()
    files = TensorFiles.scan(base, ModelConfig.from_folder(base))
    export_merged.write_merged(files, out, {"model.norm.weight": lambda stored: stored + 1})
    before, after, changed = tensors(base), tensors(out), "model.language_model.norm.weight"
    assert before.keys() == after.keys() and (after[changed] == before[changed] + 1).all()
    assert all(after[n].tobytes() == before[n].tobytes() for n in before if n != changed)


def test_an_adapter_that_does_nothing_is_called_that(world, tmp_path, capsys):
    base, _ = world
    workdir = trained_run(tmp_path, base, scale=0.0)
    run("peft", workdir, tmp_path / "out")
    text = capsys.readouterr().out
    assert "WARNING: this adapter changes nothing" in text and "by up to 0\n" in text


def test_weights_that_do_not_fit_the_dtype_of_the_files(tmp_path):
    base = base_folder(tmp_path, dtype=np.float16)
    workdir = trained_run(tmp_path, base, scale=1e4)
    with pytest.raises(ModelExportError, match="has values that are not finite in the float16"):
        run("merged", workdir, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_a_dtype_that_cannot_take_the_sum(world, tmp_path):
    files = TensorFiles.scan(world[0])
    name = LAYER.format(0, "q_proj")
    files = dataclasses.replace(files, dtypes=dict(files.dtypes) | {name: "F8_E4M3"})
    with pytest.raises(ModelExportError, match="stores weights that change as F8_E4M3: known are F32, F16, BF16"):
        export_merged.write_merged(files, tmp_path, {name: lambda stored: stored})
    assert not list(tmp_path.iterdir())


def test_a_merge_that_goes_wrong_is_caught_and_removed(world, tmp_path, monkeypatch):
    whole = export.find_changes

    def forgets_one(*args):
        changes = whole(*args)
        del changes[LAYER.format(2, "o_proj")]
        return changes

    monkeypatch.setattr(export, "find_changes", forgets_one)
    with pytest.raises(ModelExportError, match="the checkpoint read back is not the merged model: logits differ"):
        run("merged", world[1], tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_both_merges_wrong_in_the_same_way_is_caught(world, tmp_path, monkeypatch):
    right = export_merged.find_changes

    def changes_nothing(*args):
        return {name: lambda stored: stored.astype(np.float32) for name in right(*args)}

    monkeypatch.setattr(export, "find_changes", changes_nothing)
    monkeypatch.setattr(export.export_check, "_merged", lambda kernel, linear: kernel.astype(jnp.float32))
    with pytest.raises(ModelExportError, match="merging into BF16 changes the model"):
        run("merged", world[1], tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_an_adapter_that_comes_back_otherwise_is_caught_and_removed(world, tmp_path, monkeypatch):
    right = export.save_peft

    def swapped_layers(model, folder, **kwargs):
        count = right(model, folder, **kwargs)
        values = load_file(folder / "adapter_model.safetensors")
        a, b = (f"base_model.model.model.language_model.layers.{i}.self_attn.q_proj.lora_B.weight" for i in (0, 1))
        values[a], values[b] = values[b], values[a]
        save_file(values, folder / "adapter_model.safetensors")
        return count

    monkeypatch.setattr(export, "save_peft", swapped_layers)
    with pytest.raises(ModelExportError, match="the adapter read back is not the model's: logits differ"):
        run("peft", world[1], tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_what_was_left_by_a_killed_export_is_replaced(world, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    run("peft", world[1], tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert left_behind(tmp_path) == ["out"]


def test_not_a_number_is_no_agreement():
    with pytest.raises(ModelExportError, match="up to nan"):
        Difference(float("nan"), 1.0).require(1e-4, "x", "y")
    Difference(9e-5, 1.0).require(1e-4, "x", "y")
    with pytest.raises(ModelExportError):
        Difference(1.1e-4, 1.0).require(1e-4, "x", "y")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model.adapter": ""}, ModelExportError, "model.adapter is empty"),
        ({"model.adapter": "nowhere"}, StartError, "holds no checkpoint and no PEFT adapter"),
        (dict(output=""), ModelExportError, "config.output is empty"),
        (dict(output="."), ModelExportError, "exists already"),
        ({"model.step": 4}, StartError, "model.step = 4: .* holds the steps 3, 5"),
        ({"model.path": str(GOLDEN / "qwen2_5_vl")}, StartError, "is not the base model of"),
        ({"model.path": "nowhere"}, StartError, "model.path = 'nowhere' is not a model folder"),
    ],
)
def test_refusals(world, tmp_path, values, error, message):
    values = {"form": "peft", "model.adapter": str(world[1]), "output": str(tmp_path / "out"), **values}
    with pytest.raises(error, match=message):
        export.run(common.config("export", values), "unused")
    assert left_behind(tmp_path) == []
