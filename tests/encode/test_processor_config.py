"""Processor numbers from the folders that exist in the wild."""

from __future__ import annotations

import importlib.util
import json

import pytest

from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.qa.errors import ProcessorError

IDS = {"image_token_id": 7, "video_token_id": 8, "vision_start_token_id": 5, "vision_end_token_id": 6}


def write(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_published_defaults(tmp_path):
    write(tmp_path, config={"model_type": "qwen3_vl_moe", **IDS, "vision_config": {}})
    c = ProcessorConfig.from_folder(tmp_path)
    assert (c.family, c.patch_size, c.temporal_patch_size, c.merge_size, c.factor) == ("qwen3_vl", 16, 2, 2, 32)
    assert (c.image_min_pixels, c.image_max_pixels) == (65536, 16777216)
    assert (c.video_min_pixels, c.video_max_pixels) == (4096, 25165824)
    assert c.image_mean == c.image_std == (0.5, 0.5, 0.5) and c.tokens_per_second == 0
    assert (c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id) == (7, 8, 5, 6)
    write(tmp_path, config={"model_type": "qwen2_5_vl", **IDS, "vision_config": {"tokens_per_second": 2}})
    c = ProcessorConfig.from_folder(tmp_path)
    assert (c.family, c.factor, c.tokens_per_second) == ("qwen2_5_vl", 28, 2.0)
    assert c.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert (c.video_min_pixels, c.video_max_pixels) == (3136, 12845056)


def test_vocabulary_size(tmp_path):
    """Under text_config, at the top in early Qwen2.5-VL folders, or not said."""
    for found, config in (
        (9, {"text_config": {"vocab_size": 9}, "vocab_size": 8}),
        (8, {"vocab_size": 8}),
        (8, {"text_config": {}, "vocab_size": 8}),
        (None, {}),
    ):
        c = ProcessorConfig.of({"model_type": "qwen3_vl", **IDS, "vision_config": {}, **config}, tmp_path)
        assert c.vocab_size == found


def test_files_win_over_defaults(tmp_path):
    vision = {"patch_size": 4, "spatial_merge_size": 3, "temporal_patch_size": 1}
    write(
        tmp_path,
        config={"model_type": "qwen3_vl", **IDS, "vision_config": vision, "text_config": {"hidden_size": 8}},
        preprocessor_config={"size": {"shortest_edge": 100, "longest_edge": 2000}, "image_mean": [0.1, 0.2, 0.3]},
        video_preprocessor_config={"size": {"shortest_edge": 300, "longest_edge": 4000}, "merge_size": 3},
    )
    c = ProcessorConfig.from_folder(tmp_path)
    assert (c.patch_size, c.merge_size, c.temporal_patch_size, c.factor) == (4, 3, 1, 12)
    assert (c.image_min_pixels, c.image_max_pixels, c.video_min_pixels, c.video_max_pixels) == (100, 2000, 300, 4000)
    assert c.image_mean == (0.1, 0.2, 0.3) and c.image_std == (0.5, 0.5, 0.5)


def test_one_file_for_both_processors(tmp_path):
    """transformers 5 nests both; Qwen2.5-VL shipped one flat file with min_pixels and max_pixels."""
    write(
        tmp_path,
        config={"model_type": "qwen3_vl", **IDS, "vision_config": {}},
        processor_config={
            "image_processor": {"size": {"shortest_edge": 1, "longest_edge": 2}},
            "video_processor": {"size": {"shortest_edge": 3, "longest_edge": 4}},
        },
    )
    c = ProcessorConfig.from_folder(tmp_path)
    assert (c.image_min_pixels, c.image_max_pixels, c.video_min_pixels, c.video_max_pixels) == (1, 2, 3, 4)
    other = tmp_path / "qwen2_5"
    other.mkdir()
    write(
        other,
        config={"model_type": "qwen2_5_vl", **IDS, "vision_config": {"tokens_per_second": 2}},
        preprocessor_config={"min_pixels": 10, "max_pixels": 20},
    )
    c = ProcessorConfig.from_folder(other)
    assert (c.image_min_pixels, c.image_max_pixels, c.video_min_pixels, c.video_max_pixels) == (10, 20, 10, 20)


def size(low, high):
    return {"size": {"shortest_edge": low, "longest_edge": high}}


NESTED, OLD, OLD_VIDEO = "processor_config", "preprocessor_config", "video_preprocessor_config"
BOTH = {"image_processor": size(1, 2), "video_processor": size(3, 4)}
WHICH = (  # files, budget of images, budget of videos
    ({NESTED: BOTH, OLD: size(10, 20), OLD_VIDEO: size(30, 40)}, (1, 2), (3, 4)),
    ({NESTED: {"image_processor": size(1, 2)}, OLD: size(10, 20), OLD_VIDEO: size(30, 40)}, (1, 2), (30, 40)),
    ({NESTED: {"video_processor": size(3, 4)}, OLD: size(10, 20), OLD_VIDEO: size(30, 40)}, (10, 20), (3, 4)),
    ({NESTED: {"processor_class": "Processor"}, OLD: size(10, 20), OLD_VIDEO: size(30, 40)}, (10, 20), (30, 40)),
    ({NESTED: BOTH | {"video_processor": None}, OLD: size(10, 20)}, (1, 2), (10, 20)),
    ({OLD: size(10, 20), OLD_VIDEO: size(30, 40)}, (10, 20), (30, 40)),
    ({OLD: size(10, 20)}, (10, 20), (10, 20)),
    ({NESTED: BOTH, OLD: size(10, 20) | {"patch_size": 99, "image_mean": [0, 0, 0]}}, (1, 2), (3, 4)),
)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(("files", "image", "video"), WHICH)
def test_which_file_counts(files, image, video, family, tmp_path):
    """As `AutoImageProcessor` and `AutoVideoProcessor` of transformers 5 read the same folder, where they are there."""
    write(tmp_path, config={"model_type": family, **IDS, "vision_config": {"tokens_per_second": 2}}, **files)
    c = ProcessorConfig.from_folder(tmp_path)
    assert (c.image_min_pixels, c.image_max_pixels) == image
    assert (c.video_min_pixels, c.video_max_pixels) == video
    assert c.patch_size in (14, 16)
    assert_as_transformers(c, tmp_path)


def assert_as_transformers(c, folder):
    if not (importlib.util.find_spec("torchvision") and importlib.util.find_spec("transformers")):
        return
    import transformers

    for kind, low, high in (
        ("Image", c.image_min_pixels, c.image_max_pixels),
        ("Video", c.video_min_pixels, c.video_max_pixels),
    ):
        theirs = getattr(transformers, f"Auto{kind}Processor").from_pretrained(folder)
        assert (theirs.size["shortest_edge"], theirs.size["longest_edge"]) == (low, high), kind


def test_min_and_max_pixels_beside_size(tmp_path):
    """They replace `size` in the processors of Qwen2.5-VL; Qwen3-VL's video processor looks at `size` alone."""
    files = {name: size(10, 20) | {"min_pixels": 5, "max_pixels": 6} for name in (OLD, OLD_VIDEO)}
    for family, video in (("qwen3_vl", (10, 20)), ("qwen2_5_vl", (5, 6))):
        folder = tmp_path / family
        folder.mkdir()
        write(folder, config={"model_type": family, **IDS, "vision_config": {"tokens_per_second": 2}}, **files)
        c = ProcessorConfig.from_folder(folder)
        assert (c.image_min_pixels, c.image_max_pixels) == (5, 6)
        assert (c.video_min_pixels, c.video_max_pixels) == video
        assert_as_transformers(c, folder)


def test_a_file_that_does_not_count_is_not_read(tmp_path):
    write(tmp_path, config={"model_type": "qwen3_vl", **IDS, "vision_config": {}}, processor_config=BOTH)
    for name in (OLD, OLD_VIDEO):
        (tmp_path / f"{name}.json").write_text("{")
    assert ProcessorConfig.from_folder(tmp_path).video_max_pixels == 4


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "config.json not found"),
        ({"config": {"model_type": "llama"}}, "model_type 'llama'"),
        ({"config": [1]}, "JSON object"),
        ({"config": {"model_type": "qwen3_vl", **IDS}}, "vision_config"),
        ({"config": {"model_type": "qwen3_vl", "vision_config": {}}}, "image_token_id"),
        ({"config": {"model_type": "qwen2_5_vl", **IDS, "vision_config": {}}}, "tokens_per_second"),
        (
            {
                "config": {"model_type": "qwen3_vl", **IDS, "vision_config": {"patch_size": 14}},
                "preprocessor_config": {"patch_size": 16},
            },
            "patch_size differs",
        ),
        (
            {
                "config": {"model_type": "qwen3_vl", **IDS, "vision_config": {}},
                "preprocessor_config": {"size": {"shortest_edge": 20, "longest_edge": 10}},
            },
            "0 < min <= max",
        ),
    ],
)
def test_bad_folders(files, message, tmp_path):
    write(tmp_path, **files)
    with pytest.raises(ProcessorError, match=message):
        ProcessorConfig.from_folder(tmp_path)


def test_broken_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ProcessorError, match="not valid JSON"):
        ProcessorConfig.from_folder(tmp_path)
