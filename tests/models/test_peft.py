"""PEFT folders: names and shapes as published, the right product, both generations of names, and what is refused."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.peft import PeftError, adapted_linears, is_peft_folder, load_peft, save_peft
from mllm4d_jax.models.split import attach_lora
from mllm4d_jax.parallel.mesh import make_mesh
from tests.models.folders import whole

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LAYERS = {"qwen3_vl": 4, "qwen3_vl_moe": 3, "qwen2_5_vl": 3}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
CURRENT, OLDER = "base_model.model.model.language_model.", "base_model.model.model."


def adapted(name="qwen3_vl", targets=TARGETS, rank=3, alpha=6.0, mesh=None):
    """A model whose adapters hold random numbers."""
    model = load_model(GOLDEN / name, dtype=jnp.float32, mesh=mesh, attention="xla")
    attach_lora(model, rank=rank, alpha=alpha, targets=targets, rngs=nnx.Rngs(0), mesh=mesh)
    rng = np.random.default_rng(1)
    for linear in adapted_linears(model).values():
        value = jnp.asarray(rng.normal(size=linear.lora_b.shape) * 0.1, jnp.float32)
        linear.lora_b.set_value(jax.device_put(value, linear.lora_b.get_value().sharding))
    return model


def bare(name="qwen3_vl", mesh=None):
    return load_model(GOLDEN / name, dtype=jnp.float32, mesh=mesh, attention="xla")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    save_peft(adapted(), folder, base="Qwen/Some", dropout=0.05)
    return folder


@pytest.fixture
def edited(exported, tmp_path):
    """(a copy of an adapter folder, a function that changes its config and its tensors)."""
    folder = tmp_path / "adapter"
    shutil.copytree(exported, folder)

    def edit(tensors=None, **options):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))
        if tensors is not None:
            values = load_file(folder / "adapter_model.safetensors")
            save_file(tensors(values) or values, folder / "adapter_model.safetensors")
        return folder

    return edit


def assert_same_adapters(a, b):
    ours, theirs = adapted_linears(a), adapted_linears(b)
    assert ours.keys() == theirs.keys() and ours
    for path in ours:
        for side in ("lora_a", "lora_b"):
            x, y = (np.asarray(getattr(m[path], side)[...]) for m in (ours, theirs))
            assert x.dtype == np.float32
            np.testing.assert_array_equal(x, y, err_msg=str(path))
        assert ours[path].lora_scale == pytest.approx(theirs[path].lora_scale, rel=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_names_and_shapes_are_those_of_the_published_weights(name, tmp_path):
    model = adapted(name)
    assert save_peft(model, tmp_path, base="Qwen/Some", dropout=0.05) == LAYERS[name] * 4 * 2
    stored = load_file(tmp_path / "adapter_model.safetensors")
    weights = load_file(GOLDEN / name / "model.safetensors")
    prefix = "model." if name == "qwen2_5_vl" else "model.language_model."
    wanted = {}
    for i in range(LAYERS[name]):
        for p in TARGETS:
            d_out, d_in = weights[f"{prefix}layers.{i}.self_attn.{p}.weight"].shape
            wanted[f"{CURRENT}layers.{i}.self_attn.{p}.lora_A.weight"] = (3, d_in)
            wanted[f"{CURRENT}layers.{i}.self_attn.{p}.lora_B.weight"] = (d_out, 3)
    assert {k: v.shape for k, v in stored.items()} == wanted
    assert {v.dtype for v in stored.values()} == {np.dtype(np.float32)}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0.05)
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert config["target_modules"] == sorted(TARGETS) and config["base_model_name_or_path"] == "Qwen/Some"
    again = bare(name)
    adapter = load_peft(tmp_path, again)
    assert (adapter.rank, adapter.scale, adapter.targets) == (3, 2.0, tuple(sorted(TARGETS)))
    assert (adapter.dropout, adapter.base) == (0.05, "Qwen/Some")
    assert_same_adapters(again, model)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_a_loaded_adapter_equals_weights_merged_by_hand(name, tmp_path):
    rng = np.random.default_rng(0)
    save_peft(adapted(name, rank=5, alpha=7.5), tmp_path / "adapter", base="")
    tensors = {k: rng.normal(size=v.shape).astype(np.float32) * 0.2
               for k, v in load_file(tmp_path / "adapter/adapter_model.safetensors").items()}  # fmt: skip
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    weights = load_file(GOLDEN / name / "model.safetensors")
    prefix = "model." if name == "qwen2_5_vl" else "model.language_model."
    for key in tensors:
        if ".lora_A." in key:
            base = prefix + key.removeprefix(CURRENT).replace(".lora_A", "")
            weights[base] = weights[base] + np.float32(1.5) * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    (tmp_path / "merged").mkdir()
    save_file(weights, tmp_path / "merged/model.safetensors")
    shutil.copy(GOLDEN / name / "config.json", tmp_path / "merged")
    model = bare(name)
    load_peft(tmp_path / "adapter", model)
    merged, plain = (
        dict(nnx.iter_modules(load_model(f, dtype=jnp.float32))) for f in (tmp_path / "merged", GOLDEN / name)
    )
    linears = adapted_linears(model)
    assert len(linears) == 4
    for path, linear in linears.items():
        product = np.einsum("lir,lro->lio", linear.lora_a[...], linear.lora_b[...], dtype=np.float64)
        effective = linear.kernel[...] + linear.lora_scale * product
        np.testing.assert_allclose(effective, merged[path].kernel[...], atol=1e-5)
        assert np.abs(merged[path].kernel[...] - plain[path].kernel[...]).max() > 0.1


def test_older_names_and_16_bit_values(edited):
    def older(values):
        return {k.replace(CURRENT, OLDER): v.astype(ml_dtypes.bfloat16) for k, v in values.items()}

    model, want = bare(), adapted()
    load_peft(edited(older), model)
    for linear in adapted_linears(want).values():
        for variable in (linear.lora_a, linear.lora_b):
            variable.set_value(variable.get_value().astype(jnp.bfloat16).astype(jnp.float32))
    assert_same_adapters(model, want)


def test_rank_stabilised_scale(edited):
    adapter = load_peft(edited(use_rslora=True), bare())
    assert adapter.scale == pytest.approx(6 / 3**0.5)


def test_targets_that_the_vision_tower_has_too_are_written_as_a_pattern(tmp_path):
    model = adapted("qwen2_5_vl", targets=("q_proj", "down_proj"))
    save_peft(model, tmp_path, base="")
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert isinstance(pattern, str)
    again = bare("qwen2_5_vl")
    assert load_peft(tmp_path, again).targets == ("down_proj", "q_proj")
    assert_same_adapters(again, model)


def test_fills_the_adapter_of_a_run_where_it_lies(exported):
    mesh = make_mesh(dict(data=1, fsdp=4, tensor=2))
    model = bare(mesh=mesh)
    attach_lora(model, rank=3, alpha=6.0, rngs=nnx.Rngs(5), dropout=0.1, mesh=mesh)
    before = {path: m.lora_a.get_value().sharding for path, m in adapted_linears(model).items()}
    load_peft(exported, model)
    assert_same_adapters(model, adapted())
    for path, linear in adapted_linears(model).items():
        assert linear.lora_a.get_value().sharding == before[path] and linear.lora_dropout == 0.1
    fresh = bare(mesh=mesh)
    load_peft(exported, fresh)
    assert {p: m.lora_a.get_value().sharding for p, m in adapted_linears(fresh).items()} == before


def test_another_adapter_on_the_model_is_refused(exported):
    model = bare()
    attach_lora(model, rank=4, alpha=6.0, targets=("q_proj", "up_proj"), rngs=nnx.Rngs(0))
    with pytest.raises(PeftError) as caught:
        load_peft(exported, model)
    assert "lora.rank is 4 in this run and 3 in the folder" in str(caught.value)
    assert "lora.targets is ('q_proj', 'up_proj')" in str(caught.value) and "lora.alpha" not in str(caught.value)
    model = bare()
    attach_lora(model, rank=3, alpha=12.0, rngs=nnx.Rngs(0))
    with pytest.raises(PeftError, match="lora.alpha is 12.0 in this run and 6.0 in the folder"):
        load_peft(exported, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(peft_type="IA3"), "peft_type is 'IA3'"),
        (dict(r=0), "r is 0, not a positive whole number"),
        (dict(r=True), "r is True"),
        (dict(lora_alpha="16"), "lora_alpha is '16'"),
        (dict(lora_alpha=None), "lora_alpha is None"),
        (dict(lora_dropout=1.0), "lora_dropout is 1.0"),
        (dict(use_rslora="yes"), "use_rslora is 'yes'"),
        (dict(bias="all"), "bias is 'all'"),
        (dict(use_dora=True), "use_dora is True"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save is \['lm_head'\]"),
        (dict(rank_pattern={"q_proj": 8}), "rank_pattern is"),
        (dict(alpha_pattern={"q_proj": 8}), "alpha_pattern is"),
        (dict(layers_to_transform=[0, 1]), "layers_to_transform is"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa', which trains against changed base weights"),
        (dict(an_option_of_the_future="on"), "an_option_of_the_future is 'on'"),
    ],
)
def test_options_that_are_not_computed_exactly(edited, options, message):
    with pytest.raises(PeftError, match=message):
        load_peft(edited(**options), bare())


def test_all_options_at_fault_are_in_one_message(edited):
    with pytest.raises(PeftError, match="(?s)bias is 'all'.*fan_in_fan_out is True.*use_dora is True"):
        load_peft(edited(bias="all", use_dora=True, fan_in_fan_out=True), bare())


def test_all_tensors_at_fault_are_in_one_message(edited):
    name = f"{CURRENT}layers.{{}}.self_attn.{{}}.weight"

    def damage(values):
        del values[name.format(2, "k_proj.lora_B")]
        values[name.format(0, "q_proj.lora_A")] = np.zeros((4, 48), np.float32)
        values[name.format(1, "v_proj.lora_A")][0, 0] = np.nan
        values["base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight"] = np.zeros((3, 3), np.float32)
        values[name.format(9, "q_proj.lora_A")] = np.zeros((3, 48), np.float32)
        values["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 48), np.float32)
        values[name.format(0, "o_proj.lora_B").replace(CURRENT, OLDER)] = np.zeros((48, 3), np.float32)

    model = bare()
    with pytest.raises(PeftError) as caught:
        load_peft(edited(damage), model)
    text = str(caught.value)
    assert "1 tensors missing" in text and "layers.2.self_attn.k_proj.lora_B" in text
    assert "layers.0.self_attn.q_proj.lora_A [4, 48], expected [3, 48]" in text
    assert "not finite: layers.1.self_attn.v_proj.lora_A" in text
    assert "1 tensors of the vision tower" in text and "visual.blocks.0.attn.qkv" in text
    assert "2 tensors that name no linear layer" in text and "lm_head" in text and "layers.9" in text
    assert "1 tensors that are there under another name" in text and text.count("layers.0.self_attn.o_proj.lora_B") == 2
    assert not adapted_linears(model), "a refused adapter leaves the model as it was"


@pytest.mark.parametrize("prefix", ["language_model.model.", "language_model."])
def test_other_prefixes_of_the_decoder_are_read(exported, edited, prefix):
    folder = edited(lambda values: {k.replace(CURRENT, f"base_model.model.{prefix}"): v for k, v in values.items()})
    ours, theirs = bare(), bare()
    load_peft(folder, ours)
    load_peft(exported, theirs)
    assert_same_adapters(ours, theirs)


@pytest.mark.parametrize("dtype, kind", [(np.int32, "I32"), (np.bool_, "BOOL"), (np.uint8, "U8")])
def test_an_adapter_is_made_of_floats(edited, dtype, kind):
    name = f"{CURRENT}layers.0.self_attn.q_proj.lora_A.weight"
    with pytest.raises(PeftError, match=rf"1 tensors that are not stored as .*q_proj.lora_A.weight \({kind}\)"):
        load_peft(edited(lambda values: values | {name: values[name].astype(dtype)}), bare())


def test_an_adapter_in_eight_bits_is_refused(edited):
    folder = edited()
    file, entry = folder / "adapter_model.safetensors", {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}
    file.write_bytes(whole({f"{CURRENT}layers.0.self_attn.q_proj.lora_A.weight": entry}, b"\0" * 4))
    with pytest.raises(PeftError, match=r"q_proj.lora_A.weight \(F8_E4M3\)"):
        load_peft(folder, bare())
    file.write_bytes(whole({"a": entry}, b"\0" * 4, length=1 << 63))
    with pytest.raises(PeftError, match="damaged or cut short"):
        load_peft(folder, bare())


def test_which_folders_are_meant(exported, tmp_path, monkeypatch):
    assert is_peft_folder(exported) and is_peft_folder(str(exported)) and not is_peft_folder(tmp_path)
    monkeypatch.chdir(exported)
    assert is_peft_folder(".") and not is_peft_folder("")


def test_folders_that_hold_no_readable_adapter(edited, tmp_path):
    with pytest.raises(PeftError, match="there is no adapter_config.json"):
        load_peft(tmp_path / "nothing", bare())
    folder = edited()
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(PeftError, match="damaged or cut short"):
        load_peft(folder, bare())
    save_file({}, file)
    with pytest.raises(PeftError, match="holds no tensors"):
        load_peft(folder, bare())
    file.unlink()
    with pytest.raises(PeftError, match="adapter_model.safetensors is missing: is the download complete"):
        load_peft(folder, bare())
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(PeftError, match="adapter_model.bin, a pickle.*safe_serialization=True"):
        load_peft(folder, bare())
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(PeftError, match="adapter_config.json is not JSON"):
        load_peft(folder, bare())
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(PeftError, match="holds a list, not an object"):
        load_peft(folder, bare())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"r": 1, "r": 2}', '{"r": ' + "1" * 5000 + "}", "\ud800"])
def test_settings_that_are_no_json_object(edited, text):
    folder = edited()
    (folder / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(PeftError, match="adapter_config.json is not JSON"):
        load_peft(folder, bare())


def test_numbers_that_no_float_can_be(edited):
    with pytest.raises(PeftError) as caught:
        load_peft(edited(lora_alpha=10**400, r=10**400), bare())
    assert "not a finite number" in str(caught.value) and "not a positive whole number" in str(caught.value)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(PeftError, match="carries no adapter"):
        save_peft(bare(), tmp_path, base="")
    model = adapted()
    next(iter(adapted_linears(model).values())).lora_scale = 1.0
    with pytest.raises(PeftError, match=r"differ in \(rank, scale\)"):
        save_peft(model, tmp_path, base="")
    assert not list(tmp_path.iterdir())
