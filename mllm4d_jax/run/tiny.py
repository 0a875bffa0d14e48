"""What a tiny run needs and the user did not give: a sample world, and a tiny random Qwen3-VL that knows its words."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from configs.common import SAMPLE_WORLD
from configs.published import Size, Tower, hugging_face_config
from mllm4d_jax.data.sources import Mixture
from mllm4d_jax.encode.tokenizer import build_byte_level_tokenizer
from mllm4d_jax.files.made_folder import make_folder
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.hf import save_model
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.weight_map import abstract_model
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.run import preflight
from mllm4d_jax.run.build import open_records

VOCABULARY = 512
PHRASES = "phrases.json"  # beside the records: texts that are tokens of their own in a model made for them
_RECORDS = 1000  # the tokenizer is learned from at most so many of a source
# What a prompt holds besides the records' own text.
_SCAFFOLD = ("system\nuser\nassistant\n", *(f"<{t / 10:.1f} seconds>" for t in range(40)))


# Of the codes of figures: wavelengths, each with its weight, and a noise by which no two are quite alike.
_WAVES = ((16.0, 1.5), (8.0, 1.5), (4.0, 1.2), (2.0, 1.0), (1.0, 0.8), (0.5, 0.6))
_NOISE = 0.2


class Shape(NamedTuple):
    """What a tiny model is like.

    Attributes:
      size: of its parts, in terms of the published ones.
      head, vision_heads: width of a decoder's head; heads of the vision tower.
      vocabulary: most tokens, phrases not counted.
      dtype: of the files.
      start: standard deviation of the embedding tables' first values.
    """

    size: Size
    head: int
    vision_heads: int
    vocabulary: int
    dtype: str
    start: float


# By `data.sample`: what learns a few answers by heart in two minutes, and what can be pre-trained to see. Of the second
# the figures are small so that updates, not the first values, decide what a token means.
SHAPES: Mapping[str, Shape] = {
    "tiny": Shape(Size("", 128, 3, 4, 2, 256, Tower(3, 64, 128, (0, 1))), 32, 2, VOCABULARY, "float32", 1.0),
    "base": Shape(Size("", 128, 3, 4, 2, 384, Tower(2, 96, 256, (0,)), tied=True), 32, 3, 420, "bfloat16", 0.1),
}


def tiny_config(special_ids: Mapping[str, int], shape: Shape = SHAPES["tiny"], phrases: int = 0) -> dict[str, Any]:
    """Return config.json of a tiny model, in the spelling of the released checkpoints.

    Args:
      special_ids: ids of the tokenizer's special tokens, by content.
      shape: of the model.
      phrases: tokens besides those of its vocabulary.
    """
    config = hugging_face_config(shape.size)
    config["text_config"] |= dict(
        bos_token_id=special_ids["<|endoftext|>"],
        dtype=shape.dtype,
        eos_token_id=special_ids["<|im_end|>"],
        head_dim=shape.head,
        max_position_embeddings=4096,
        rope_scaling=dict(mrope_interleaved=True, mrope_section=[6, 5, 5], rope_type="default"),
        vocab_size=shape.vocabulary + phrases,
    )
    config["vision_config"] |= dict(num_heads=shape.vision_heads, num_position_embeddings=64)
    names = dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>")
    names |= dict(vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")
    return config | {key: special_ids[name] for key, name in names.items()} | dict(torch_dtype=shape.dtype)


def write_tiny_model(
    folder: str | Path, texts: Sequence[str], seed: int = 0, kind: str = "tiny", phrases: Sequence[str] = ()
) -> bool:
    """Writes config.json, tokenizer.json, the preprocessor files and model.safetensors.

    An existing complete folder made from the same arguments is kept.

    Args:
      folder: where to.
      texts: what the tokenizer's merges are learned from.
      seed: of the weights.
      kind: key of `SHAPES`.
      phrases: texts that are a token each.

    Returns:
      True when it was written, False when it was there.

    Raises:
      FolderError: the folder has something else in it.
    """
    shape = SHAPES[kind]

    def write(target: Path) -> None:
        vocabulary = shape.vocabulary + len(phrases)
        tokenizer = build_byte_level_tokenizer([*texts, *_SCAFFOLD], vocabulary, phrases=phrases)
        tokenizer.save(str(target / "tokenizer.json"))
        special_ids = {t.content: i for i, t in tokenizer.get_added_tokens_decoder().items() if t.special}
        config = tiny_config(special_ids, shape, len(phrases))
        (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            (target / name).write_text(json.dumps(_preprocessor(), indent=1) + "\n")
        figures = _figures(tokenizer, phrases)
        save_model(_random_model(ModelConfig.from_dict(config), shape, seed, figures), target)

    digest = hashlib.sha256("\0".join([*texts, *phrases]).encode()).hexdigest()
    spec = {"kind": f"{kind} model", "version": 2, "seed": seed, "texts": digest}
    return make_folder(Path(folder), spec, write)


def _preprocessor() -> dict[str, Any]:
    return dict(
        size=dict(shortest_edge=4096, longest_edge=65536),
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def _figures(tokenizer: Tokenizer, phrases: Sequence[str]) -> dict[int, float]:
    """Ids of the phrases that are figures, such as "-0.3", and their values."""
    figures = [text for text in phrases if text.removeprefix("-").replace(".", "", 1).isdecimal()]
    return {tokenizer.encode(text, add_special_tokens=False).ids[0]: float(text) for text in figures}


def figure_codes(values: np.ndarray, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return a first embedding for each figure f64[N], such that near ones are alike: f64[N, width] of unit size.

    Each is the sines and cosines of its value at some wavelengths (`_WAVES`), turned into random directions. Drawn
    independently, 199 figures are as many words without order: what a difference is was not learned from them in 1,700
    steps in which it was from these in 500 (benchmarks/RESULTS.md).
    """
    waves, sizes = np.array(_WAVES).T
    angles = 2 * np.pi * values[:, None] / waves
    codes = np.concatenate([np.cos(angles) * sizes, np.sin(angles) * sizes], 1)
    directions = np.linalg.qr(rng.normal(size=(width, codes.shape[1])))[0]
    return codes @ directions.T * (width / (sizes**2).sum()) ** 0.5


def _random_model(config: ModelConfig, shape: Shape, seed: int, figures: Mapping[int, float]) -> QwenVL:
    """A model with random weights: every matrix keeps activations of unit size; embedding tables as `shape` says.

    Figures (token -> value) have codes of their own.

    At the usual 0.02 a model this narrow passes on almost nothing and adapters on attention have nothing to work with.
    Drawn with NumPy: compiling a random generator for each shape would take longer than everything else.
    """
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(shape.dtype)
    model = abstract_model(config, dtype=dtype, attention="xla", remat="none")
    graphdef, state = nnx.split(model)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        sizes, kind = variable.get_value().shape, path[-1]
        if kind == "kernel":
            value = rng.normal(size=sizes) * sizes[-2] ** -0.5
        elif kind in ("embed", "pos_embed"):
            value = rng.normal(size=sizes) * shape.start
            if kind == "embed" and figures:
                rows, known = list(figures), np.array(list(figures.values()))
                noise = _NOISE * rng.normal(size=(len(rows), sizes[1]))
                value[rows] = shape.start * (figure_codes(known, sizes[1], rng) + noise)
        else:
            value = np.ones(sizes) if kind == "scale" else np.zeros(sizes)
        filled.append((path, variable.replace(jnp.asarray(value, dtype))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def with_sample(config: ml_collections.ConfigDict, workdir: Path) -> ml_collections.ConfigDict:
    """The config with the tiny sample in place of what is not configured; unchanged without data.sample.

    Without data of the user's own, the sample world is written; without a model, a tiny random one whose tokenizer is
    learned from the records.

    Raises:
      PreflightError: data.path or data.mixture names something that holds no records.
      FolderError: files of the user's own are where the sample would be.
    """
    if not config.data.sample:
        return config
    config = config.copy_and_resolve_references()
    sample = workdir / "sample"
    if not config.data.path and not config.data.root and not config.data.mixture:
        records = importlib.import_module(SAMPLE_WORLD).write_sample_world(sample / "world", config.seed)
        config.data.path, config.data.root = str(records), str(records.parent)
    if not config.model.path:
        problems = list(preflight.data_problems(config))
        if problems:
            raise preflight.PreflightError("; ".join(problems))
        texts = _record_texts(open_records(config)) + _reasoning(sample)
        phrases = _phrases(Path(config.data.root) / PHRASES) if config.data.sample == "base" else ()
        write_tiny_model(sample / "model", texts, config.seed, config.data.sample, phrases)
        config.model.path = str(sample / "model")
    return config


def _reasoning(sample: Path) -> list[str]:
    """Answers of the sample world's cold start, so that the tokenizer of the runs to come knows their words."""
    file = sample / "world" / "cold_start.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return [row["conversations"][-1]["value"] for row in rows]


def _phrases(file: Path) -> tuple[str, ...]:
    """Texts that are to be tokens; none without a file. Raises PreflightError: it is no list of texts."""
    if not file.is_file():
        return ()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise preflight.PreflightError(f"{file} is not JSON ({error})") from error
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise preflight.PreflightError(f"{file} must be a list of texts that are not empty")
    return tuple(dict.fromkeys(found))


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
