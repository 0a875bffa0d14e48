"""One key of a real file at a time gets a value it should not have.

Either all that is made of it works, or the project's own error says what is wrong.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from configs.published import published_config
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.grids import normalised_levels
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.media.resize import RULES, SizeError
from mllm4d_jax.models import rope
from mllm4d_jax.models.config import ModelConfig, ModelConfigError
from mllm4d_jax.models.peft import _option_problems
from mllm4d_jax.models.qwen_vl import text_positions, vision_geometry
from mllm4d_jax.models.text import run_lengths
from mllm4d_jax.qa.errors import ProcessorError
from mllm4d_jax.run.build import BuildError, encoder_of

TESTS = pathlib.Path(__file__).parents[1]
GONE = object()
DEEP: list = []
for _ in range(50):
    DEEP = [DEEP]
NASTY = (
    GONE, None, True, False, 0, 1, -1, 3, 2.0, 2.5, -0.5, 1e308, 10**9, 10**30, -(10**400), math.nan, math.inf,
    -math.inf, "", "28", "nan", "\ud800", "x" * 10_000, [], [1], [0, 1, 2], [1, 2, 3, 4], [10**9] * 3, [True] * 3,
    [None], ["a"], [math.nan] * 3, [0.0] * 3, [[1]], {}, {"a": 1}, {"rope_theta": "x"}, DEEP,
)  # fmt: skip
CONFIGS = {
    **{
        name: json.loads((TESTS / "golden" / name / "config.json").read_text()) for name in ("qwen3_vl", "qwen3_vl_moe")
    },
    "qwen2_5_vl": json.loads((TESTS / "golden/qwen2_5_vl/config.json").read_text()),
    "4.49": json.loads((TESTS / "cases/config/tf_4_49_qwen2_5_vl.json").read_text()),
    "2b": published_config("2b"),
    "30b_a3b": published_config("30b_a3b"),
}
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768, beta_fast=32, beta_slow=1)
CONFIGS["yarn"] = copy.deepcopy(CONFIGS["2b"])
CONFIGS["yarn"]["text_config"]["rope_scaling"] |= YARN | dict(mscale=1.0, mscale_all_dim=1.0, truncate=True)
SETTINGS = dict(
    size={"shortest_edge": 65536, "longest_edge": 16777216}, min_pixels=3136, max_pixels=12845056, patch_size=16,
    temporal_patch_size=2, merge_size=2, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5],
)  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all keys of an object, those of objects inside it too."""
    for key in value if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def mutants(raw: dict) -> Iterator[tuple[str, dict]]:
    for path in places(raw):
        for value in NASTY:
            changed = copy.deepcopy(raw)
            node = changed
            for key in path[:-1]:
                node = node[key]
            if value is GONE:
                del node[path[-1]]
            else:
                node[path[-1]] = value
            yield f"{'.'.join(path)} = {'absent' if value is GONE else ascii(value)[:40]}", changed


def use_model(raw: dict, seen: set) -> None:
    config = ModelConfig.from_dict(raw)
    key = dataclasses.replace(config, source="", dtype="")
    if key in seen:
        return
    seen.add(key)
    text, vision = config.text, config.vision
    frequencies, scale = rope.inverse_frequencies(text.rope, text.head_dim)
    assert np.isfinite(frequencies).all() and math.isfinite(scale) and len(frequencies) == text.head_dim // 2
    assert len(rope.frequency_axes(text.rope.sections, text.rope.interleaved)) == text.head_dim // 2
    assert sum(count for _, count, _ in run_lengths(text)) == text.num_layers
    assert vision.head_dim % 4 == 0 and vision.patch_dim > 0 and vision_geometry(config).merge_size > 0
    assert text_positions(config, np.full(3, 2, np.int32), [])[1] == 0


def use_processor(config: dict, image: dict | None = None, video: dict | None = None) -> None:
    processor = ProcessorConfig.of(config, "folder", image, video)
    assert np.isfinite(normalised_levels(processor)).all()
    for resize in RULES:
        rule = VideoOptions(resize_rule=resize).resize_for(processor)
        for frames, h, w in ((2, 480, 854), (32, 64, 64), (8, 1080, 1920)):
            try:
                size = rule.size(frames, h, w)
            except SizeError:
                continue
            assert all(side > 0 and side % processor.factor == 0 for side in size)


def outcome(use, *args) -> str:
    """ "fine", or the error's text."""
    try:
        use(*args)
    except (ModelConfigError, ProcessorError) as problem:
        str(problem).encode()  # can be printed
        assert len(str(problem)) < 500, problem
        return str(problem)
    return "fine"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_read_or_refused(name):
    seen: set = set()
    assert outcome(use_model, CONFIGS[name], seen) == "fine"
    for what, raw in mutants(CONFIGS[name]):
        try:
            outcome(use_model, raw, seen)
        except Exception as error:
            raise AssertionError(what) from error


@pytest.mark.parametrize("name", CONFIGS)
def test_a_processor_is_made_or_refused(name):
    config = CONFIGS[name]
    keys = ("model_type", "vision_config", *(key for key in config if key.endswith("_token_id")))
    part = {key: config[key] for key in keys}
    for what, raw in mutants(part):
        try:
            outcome(use_processor, raw)
        except Exception as error:
            raise AssertionError(what) from error


@pytest.mark.parametrize("name", ["2b", "4.49"])
def test_settings_of_processors_are_used_or_refused(name):
    settings = {**SETTINGS, "patch_size": CONFIGS[name]["vision_config"].get("patch_size", 14)}
    assert outcome(use_processor, CONFIGS[name], settings, settings) == "fine"
    for what, changed in mutants(settings):
        for image, video in ((changed, settings), (settings, changed), (changed, None)):
            try:
                outcome(use_processor, CONFIGS[name], image, video)
            except Exception as error:
                raise AssertionError(what) from error


def test_options_of_an_adapter_are_read_or_refused():
    options = dict(
        peft_type="LORA", r=8, lora_alpha=16, lora_dropout=0.05, use_rslora=False, bias="none", init_lora_weights=True,
        target_modules=["q_proj"], base_model_name_or_path="base", rank_pattern={"a": 1}, modules_to_save=None,
    )  # fmt: skip
    for what, raw in mutants(options):
        try:
            if not list(_option_problems(raw)):
                assert 0 < raw["r"] < 1 << 20 and math.isfinite(float(raw["lora_alpha"]) / raw["r"])
                assert 0 <= float(raw.get("lora_dropout") or 0.0) < 1
        except Exception as error:
            raise AssertionError(what) from error


@pytest.mark.parametrize(
    "content", [b"[1]", b"{", b"\xff\xfe", b'{"a": 1' + b"0" * 5000 + b"}", b'{"a": ' + b"[" * 100_000]
)
def test_what_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for read, problem in ((ModelConfig.from_folder, ModelConfigError), (ProcessorConfig.from_folder, ProcessorError)):
        with pytest.raises(problem, match="not valid JSON|expected a JSON object"):
            read(tmp_path)


def test_a_slip_of_the_layers_is_refused_before_they_are_counted():
    raw = published_config("30b_a3b")
    raw["text_config"]["num_hidden_layers"] = 10**9
    with pytest.raises(ModelConfigError, match="num_hidden_layers.* from 1 to 1000, got 1000000000"):
        ModelConfig.from_dict(raw)


def test_a_tower_of_other_channels_gets_no_frames(tmp_path):
    raw = published_config("2b")
    raw["vision_config"]["in_channels"] = 1
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BuildError, match="in_channels is 1, and frames and images are made into 3"):
        encoder_of(tmp_path, {})
