"""What a tiny run needs and the user did not give: a sample world, and a tiny random Qwen3-VL that knows its words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from configs.published import Size, Tower, hugging_face_config
from mllm4d_jax.data.samples import build_folder, write_sample_world
from mllm4d_jax.data.sources import Mixture
from mllm4d_jax.encode.tokenizer import build_byte_level_tokenizer
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.hf import save_model
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.weight_map import abstract_model
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.run import preflight
from mllm4d_jax.run.build import open_records

VOCABULARY = 512
_RECORDS = 1000  # the tokenizer is learned from at most so many of a source
# What a prompt holds besides the records' own text.
_SCAFFOLD = ("system\nuser\nassistant\n", *(f"<{t / 10:.1f} seconds>" for t in range(40)))


def tiny_config(special_ids: Mapping[str, int]) -> dict[str, Any]:
    """Return config.json of the tiny model, in the spelling of the released checkpoints.

    Args:
      special_ids: ids of the tokenizer's special tokens, by content.
    """
    size = Size("", 128, 3, 4, 2, 256, Tower(depth=3, width=64, inner=128, taps=(0, 1)))
    config = hugging_face_config(size)
    config["text_config"] |= dict(
        bos_token_id=special_ids["<|endoftext|>"],
        dtype="float32",
        eos_token_id=special_ids["<|im_end|>"],
        head_dim=32,
        max_position_embeddings=4096,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[6, 5, 5], rope_type="default"),
        vocab_size=VOCABULARY,
    )
    config["vision_config"] |= dict(num_heads=2, num_position_embeddings=64)
    names = dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>")
    names |= dict(vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")
    return config | {key: special_ids[name] for key, name in names.items()} | dict(torch_dtype="float32")


def write_tiny_model(folder: str | Path, texts: Sequence[str], seed: int = 0) -> bool:
    """Writes config.json, tokenizer.json, the preprocessor files and model.safetensors.

    An existing complete folder made from the same arguments is kept.

    Args:
      folder: where to.
      texts: what the tokenizer's merges are learned from.
      seed: of the weights.

    Returns:
      True when it was written, False when it was there.

    Raises:
      SampleError: the folder has something else in it.
    """

    def write(target: Path) -> None:
        tokenizer = build_byte_level_tokenizer([*texts, *_SCAFFOLD], VOCABULARY)
        tokenizer.save(str(target / "tokenizer.json"))
        special_ids = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        config = tiny_config(special_ids)
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            (target / name).write_text(json.dumps(_preprocessor(), indent=1) + "\n")
        save_model(_random_model(ModelConfig.from_dict(config), seed), target)

    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    spec = {"kind": "tiny model", "version": 1, "seed": seed, "texts": digest}
    return build_folder(Path(folder), spec, write)


def _preprocessor() -> dict[str, Any]:
    return dict(
        size=dict(shortest_edge=4096, longest_edge=65536),
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def _random_model(config: ModelConfig, seed: int) -> QwenVL:
    """A model with random weights: every matrix keeps activations of unit size, embedding tables have unit variance.

    At the usual 0.02 a model this narrow passes on almost nothing and adapters on attention have nothing to work with.
    Drawn with NumPy: compiling a random generator for each shape would take longer than everything else.
    """
    rng = np.random.default_rng(seed)
    model = abstract_model(config, dtype=jnp.float32, attention="xla", remat="none")
    graphdef, state = nnx.split(model)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        shape, kind = variable.get_value().shape, path[-1]
        if kind == "kernel":
            value = rng.normal(size=shape) * shape[-2] ** -0.5
        elif kind in ("embed", "pos_embed"):
            value = rng.normal(size=shape)
        else:
            value = np.ones(shape) if kind == "scale" else np.zeros(shape)
        filled.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def with_sample(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
    """The config with the tiny sample in place of what is not configured; unchanged without data.sample.

    Without data of the user's own, the sample world is written; without a model, a tiny random one whose tokenizer is
    learned from the records.

    Raises:
      PreflightError: data.path or data.mixture names something that holds no records.
    """
    if not config.data.sample:
        return config
    config = config.copy_and_resolve_references()
    sample = workdir / "sample"
    if not config.data.path and not config.data.root and not config.data.mixture:
        records = write_sample_world(sample / "world", config.seed)
        config.data.path, config.data.root = str(records), str(records.parent)
    if not config.model.path:
        problems = list(preflight.data_problems(config))
        if problems:
            raise preflight.PreflightError("; ".join(problems))
        write_tiny_model(sample / "model", _record_texts(open_records(config)) + _reasoning(sample), config.seed)
        config.model.path = str(sample / "model")
    return config


def _reasoning(sample: Path) -> list[str]:
    """Answers of the sample world's cold start, so that the tokenizer of the runs to come knows their words."""
    file = sample / "world" / "cold_start.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [row["conversations"][-1]["value"] for row in rows]


def _record_texts(mixture: Mixture) -> list[str]:
    """Texts of the first records, for a tokenizer; records that cannot be read are left to the loader to report."""
    texts = []
    for source in mixture.sources:
        for i in range(min(len(source), _RECORDS)):
            try:
                messages = source[i].messages
            except RecordError:
                continue
            parts = [p for m in messages for p in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
            texts += [
                p if isinstance(p, str) else p["text"] for p in parts if isinstance(p, str) or p["type"] == "text"
            ]
    return texts
