"""config.json: both spellings read, nothing guessed, refusals that name the key."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib

import pytest

from configs.published import published_config
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.models.config import ModelConfig, ModelConfigError, VisionConfig

WRITTEN_BY_4_49 = pathlib.Path(__file__).parents[1] / "cases/config/tf_4_49_qwen2_5_vl.json"


def parse(raw) -> ModelConfig:
    return dataclasses.replace(ModelConfig.from_dict(raw), source="")


def respelled(raw: dict) -> dict:
    """The spelling transformers 5 writes."""
    raw = copy.deepcopy(raw)
    text = raw.get("text_config")
    if text is None:
        keep = ("model_type", "vision_config", "tie_word_embeddings", "architectures")
        ids = [k for k in raw if k.endswith("_token_id") and k.split("_")[0] in ("image", "video", "vision")]
        text = {k: raw.pop(k) for k in list(raw) if k not in (*keep, *ids)}
        raw["text_config"] = text
    scaling = text.pop("rope_scaling")
    text["rope_parameters"] = {**scaling, "rope_type": "default", "rope_theta": text.pop("rope_theta")}
    text["dtype"] = text.pop("torch_dtype", text.get("dtype"))
    if "num_experts" in text:
        text["num_local_experts"] = text.pop("num_experts")
    raw["vision_config"]["model_type"] = raw["model_type"] + "_vision"
    raw["vision_config"]["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "axial"}
    return raw


@pytest.mark.parametrize("size", ["2b", "8b", "30b_a3b", "qwen2_5_vl_7b"])
def test_both_spellings_mean_the_same(size):
    raw = published_config(size)
    assert parse(raw) == parse(respelled(raw))


def test_values_come_from_the_file():
    config = parse(published_config("8b"))
    assert config.text.rope.theta == 5e6 and config.text.rope.sections == (24, 20, 20)
    assert config.vision.position_side == 48 and config.vision.deepstack == (8, 16, 24)
    assert config.tied is False
    assert parse(published_config("2b")).tied is True
    assert parse(published_config("qwen2_5_vl_7b")).text.head_dim == 128


def test_values_that_transformers_4_49_left_out():
    """It wrote of a nested config what differs from the class: the tower of this 7B is the released one."""
    raw = json.loads(WRITTEN_BY_4_49.read_text())
    config = parse(raw)
    assert config.text == parse(published_config("qwen2_5_vl_7b")).text
    assert config.vision == VisionConfig(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=3584,
        in_channels=3,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        window=112,
        full_blocks=(7, 15, 23, 31),
        tokens_per_second=2.0,
    )
    assert config.vision == parse(published_config("qwen2_5_vl_7b")).vision
    processor = ProcessorConfig.of(raw, "folder")
    assert (processor.patch_size, processor.merge_size, processor.tokens_per_second) == (14, 2, 2.0)


def test_left_out_values_are_those_of_the_class():
    transformers = pytest.importorskip("transformers")
    raw = json.loads(WRITTEN_BY_4_49.read_text())
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(raw)).vision_config
    ours = parse(raw).vision
    for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size", "patch_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    windows = (theirs.window_size, tuple(theirs.fullatt_block_indexes), theirs.tokens_per_second)
    assert (ours.window, ours.full_blocks, ours.tokens_per_second) == windows


def changed(path: str, value, size: str = "2b") -> dict:
    raw = published_config(size)
    *parents, key = path.split(".")
    node = raw
    for p in parents:
        node = node[p]
    if value is None:
        node.pop(key)
    else:
        node[key] = value
    return raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed("vision_config.tokens_per_second", None, "qwen2_5_vl_7b"), "'tokens_per_second' is missing"),
        (changed("vision_config.depth", None), "'depth' is missing"),
        (changed("text_config.num_hidden_layers", 10**9), "'num_hidden_layers' must be .* 1 to 1000, got 1000000000"),
        (changed("text_config.rms_norm_eps", float("nan")), "'rms_norm_eps' must be a number .* got nan"),
        (changed("text_config.head_dim", 127), "head_dim 127 .*must be even"),
        (changed("text_config.attention_bias", "no"), "'attention_bias' must be true or false, got 'no'"),
        (changed("vision_config.num_position_embeddings", 0), "must be an integer from 1"),
        (changed("video_token_id", 151936), "'video_token_id' must be an integer from 0 to 151935"),
        (changed("video_token_id", 151655), "must differ.*image_token_id 151655, video_token_id 151655"),
        (changed("text_config.rope_scaling", ["a"]), "rope_scaling: expected a JSON object"),
        (changed("text_config.rope_theta", None), "rope_theta is absent.*5000000"),
        (changed("rope_theta", None, "qwen2_5_vl_7b"), "rope_theta is absent"),
        (changed("text_config.rope_scaling.mrope_section", [24, 20]), "3 numbers summing to head_dim/2 = 64"),
        (changed("text_config.rope_scaling.mrope_section", None), "mrope_section is missing"),
        (changed("text_config.rope_scaling.rope_type", "longrope"), "'longrope' is not supported"),
        (changed("text_config.hidden_act", "gelu"), "hidden_act = 'gelu' is not supported"),
        (changed("vision_config.hidden_act", "gelu"), "hidden_act = 'gelu' is not supported"),
        (changed("vision_config.deepstack_visual_indexes", [5, 24]), "distinct block indices"),
        (changed("vision_config.num_position_embeddings", 2305), "not a square"),
        (changed("vision_config.out_hidden_size", 1024), "out_hidden_size 1024 differs"),
        (changed("text_config.num_hidden_layers", None), "'num_hidden_layers' is missing"),
        (changed("text_config.num_hidden_layers", "28"), "must be an integer"),
        (changed("image_token_id", None), "'image_token_id' is missing"),
        (changed("model_type", "qwen4_vl"), "'qwen4_vl' is not supported.*qwen3_vl_moe"),
        (changed("use_sliding_window", True, "qwen2_5_vl_7b"), "use_sliding_window"),
        (changed("text_config.num_key_value_heads", 3), "not a multiple of 3"),
    ],
)
def test_refusals_say_what_and_where(raw, message):
    with pytest.raises(ModelConfigError, match=message) as error:
        ModelConfig.from_dict(raw, where="folder/config.json")
    assert "folder/config.json" in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ModelConfigError, match="does not exist"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelConfigError, match="not valid JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(published_config("2b")))
    assert ModelConfig.from_folder(tmp_path).model_type == "qwen3_vl"
