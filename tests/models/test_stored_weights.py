"""What weights may be called and stored as: every spelling of names, floats, no integers, nothing quantised."""

from __future__ import annotations

import json
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mllm4d_jax.models.config import ModelConfigError
from mllm4d_jax.models.hf import load_model, save_model
from mllm4d_jax.models.weight_map import published_name
from tests.models.folders import GOLDEN, NORM, copied, refusal, whole


def respelled(vision: str, text: str, head: str):
    """A change of a fixture's names to other prefixes."""
    new = {"model.visual.": vision, "visual.": vision, "model.language_model.": text, "model.": text, "lm_head.": head}

    def change(values):
        for name in list(values):
            prefix = next(p for p in new if name.startswith(p))
            values[new[prefix] + name.removeprefix(prefix)] = values.pop(name)

    return change


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "prefixes",
    [
        ("model.visual.", "model.language_model.", "lm_head."),
        ("visual.", "model.", "lm_head."),
        ("visual.", "language_model.", "lm_head."),
        ("visual.", "language_model.model.", "language_model.lm_head."),
    ],
)
def test_every_spelling_of_names_is_the_same_model(tmp_path, name, prefixes):
    save_model(load_model(copied(tmp_path / "model", name, respelled(*prefixes))), tmp_path / "out")
    published, again = (load_file(f / "model.safetensors") for f in (GOLDEN / name, tmp_path / "out"))
    assert again.keys() == published.keys()
    assert all(again[key].tobytes() == published[key].tobytes() for key in published)


def test_names_of_nothing_are_left_as_they_are():
    for name in ("lm_heads.weight", "visuals.x", "xmodel.norm.weight", ""):
        assert published_name(name, "qwen3_vl") == name
    assert published_name("model.visual.x", "qwen2_5_vl") == "visual.x"


@pytest.mark.parametrize(
    "name, text",
    [
        ("qwen3_vl", "model.language_model."),
        ("qwen3_vl", "language_model."),  # the model without its head
        ("qwen2_5_vl", "model.language_model."),
        ("qwen2_5_vl", "language_model."),
        ("qwen2_5_vl", "model."),
    ],
)
def test_transformers_reads_the_spellings_of_its_own_versions(tmp_path, name, text):
    transformers = pytest.importorskip("transformers")
    vision = "model.visual." if text == "model.language_model." else "visual."
    folder = copied(tmp_path / "m", name, respelled(vision, text, "lm_head."))
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    ours = load_model(folder)
    kernel = ours.text.stacks[0].attn.q_proj.kernel[1].T
    np.testing.assert_array_equal(theirs["model.language_model.layers.1.self_attn.q_proj.weight"].numpy(), kernel)
    qkv = ours.vision.blocks.qkv.kernel[0].T
    np.testing.assert_array_equal(theirs["model.visual.blocks.0.attn.qkv.weight"].numpy(), qkv)


def test_a_tensor_under_two_names_is_refused_with_both(tmp_path):
    def twice(values):
        values["model.norm.weight"] = values[NORM] + 1

    text = refusal(copied(tmp_path / "model", change=twice))
    assert NORM in text and "model.norm.weight" in text and "the same tensor" in text


@pytest.mark.parametrize(
    "dtype, kind",
    [
        (np.int64, "I64"),
        (np.int32, "I32"),
        (np.int8, "I8"),
        (np.uint8, "U8"),
        (np.uint16, "U16"),
        (np.bool_, "BOOL"),
        (np.complex64, "C64"),
    ],
)
def test_what_is_no_float_is_no_weight(tmp_path, dtype, kind):
    text = refusal(copied(tmp_path / "m", change=lambda v: v.update({NORM: v[NORM].astype(dtype)})))
    assert f"{NORM} ({kind})" in text and "1 not stored as F64, F32, F16, BF16" in text


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("into", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_floats_are_rounded_once_or_not_at_all(tmp_path, dtype, into):
    stored = {}

    def change(values):
        for name in values:
            stored[name] = values[name] = values[name].astype(dtype)

    model = load_model(copied(tmp_path / "m", change=change), dtype=into)
    for name, ours in {
        NORM: model.text.norm.scale[...],
        "model.language_model.embed_tokens.weight": model.text.embed[...],
        "model.language_model.layers.1.self_attn.q_proj.weight": model.text.stacks[0].attn.q_proj.kernel[1].T,
    }.items():
        assert ours.dtype == into
        np.testing.assert_array_equal(np.asarray(ours), stored[name].astype(into))


def eight_bits(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Turn one matrix into float8 with the scales of its blocks, as published fp8 releases hold it."""
    values = load_file(folder / "model.safetensors")
    values[f"{name}_scale_inv"] = np.ones((1, 1), np.float32)
    data, header = b"", {}
    for key, value in values.items():
        raw = value.astype(ml_dtypes.float8_e4m3fn) if key == name else value
        header[key] = {
            "dtype": "F8_E4M3" if key == name else "F32",
            "shape": list(raw.shape),
            "data_offsets": [len(data), len(data) + raw.nbytes],
        }
        data += raw.tobytes()
    (folder / "model.safetensors").write_bytes(whole(header, data))
    return folder


def test_eight_bit_floats_are_refused_by_name(tmp_path):
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    text = refusal(eight_bits(copied(tmp_path / "m"), name))
    assert f"{name} (F8_E4M3)" in text and "are they quantised?" in text
    assert f"1 unexpected: {name}_scale_inv" in text
    tied = "model.language_model.embed_tokens.weight"  # compared with a stored head before anything else is looked at

    def head(values):
        values["lm_head.weight"] = values[tied]

    assert f"{tied} (F8_E4M3)" in refusal(eight_bits(copied(tmp_path / "tied", change=head), tied))


@pytest.mark.parametrize(
    "how, method",
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"load_in_4bit": True, "load_in_8bit": False}, "load_in_4bit"),
        ("int8", "int8"),
        (["odd"], "odd"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_quantised_checkpoints_are_refused_by_method(tmp_path, how, method, nested):
    settings = {"quantization_config": how}
    if nested:
        text = json.loads((GOLDEN / "qwen3_vl" / "config.json").read_text())["text_config"]
        settings = {"text_config": text | settings}
    text = refusal(copied(tmp_path / "m", **settings))
    assert "config.json: quantization_config = " in text and method in text and "tensors of F32" in text


def test_the_key_of_mlx_is_one_too(tmp_path):
    assert "config.json: quantization = " in refusal(copied(tmp_path / "m", quantization={"group_size": 64, "bits": 4}))


def test_a_key_without_content_says_nothing(tmp_path):
    load_model(copied(tmp_path / "m", quantization_config=None, transformers_weights=None))


def test_weights_under_another_name_are_not_passed_over(tmp_path):
    text = refusal(copied(tmp_path / "m", transformers_weights="other.safetensors"))
    assert "transformers_weights = 'other.safetensors'" in text


@pytest.mark.parametrize("named", ["auto", None])
@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float64])
def test_a_config_that_names_no_dtype_keeps_that_of_the_files(tmp_path, named, stored):
    def change(values):
        values |= {k: v.astype(stored) for k, v in values.items()}

    raw = json.loads((GOLDEN / "qwen3_vl" / "config.json").read_text())
    parts = {k: v | {"dtype": named} for k, v in raw.items() if k in ("text_config", "vision_config")}
    folder = copied(tmp_path / "m", change=change, dtype=named, torch_dtype=named, **parts)
    expected = jnp.bfloat16 if stored == ml_dtypes.bfloat16 else jnp.float32
    assert load_model(folder).text.embed[...].dtype == expected


def test_a_dtype_is_named_with_or_without_its_library(tmp_path):
    assert load_model(copied(tmp_path / "a", torch_dtype="torch.bfloat16")).dtype == jnp.bfloat16
    assert "torch_dtype = 'int8' is not supported" in refusal(
        copied(tmp_path / "b", torch_dtype="int8"), ModelConfigError
    )
