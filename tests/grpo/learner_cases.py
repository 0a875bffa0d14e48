"""A small model with an adapter that does something, prompts about clips, and completions for them."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm4d_jax.encode.example import Example, Grid
from mllm4d_jax.encode.positions import mrope_positions
from mllm4d_jax.grpo.batch import RolloutBatch
from mllm4d_jax.grpo.learner import Learner
from mllm4d_jax.grpo.presets import ObjectiveConfig
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.models.split import attach_lora, split_model
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.rows.completion_rows import (
    PromptBatch,
    assign_rows,
    collate_prompts,
    completion_rows,
    needed_prompt_sizes,
)
from mllm4d_jax.run.optimizer import init_optimizer, learning_rates, make_optimizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
BANNED = (1, 2)


@functools.lru_cache
def parts(name: str, devices: int = 1, **axes: int):
    """(model config, graphdef, trainable, frozen, mesh): adapters whose B is not zero."""
    mesh = make_mesh(axes or {"data": devices}, jax.devices()[:devices])
    model = load_model(GOLDEN / name, dtype=jnp.float32, attention="xla", mesh=mesh)
    attach_lora(model, rank=4, alpha=8.0, rngs=nnx.Rngs(0), mesh=mesh)
    graphdef, trainable, frozen = split_model(model)
    return model.config, graphdef, noisy(trainable, 1), frozen, mesh


def noisy(tree, seed: int):
    """The tree with noise on every leaf, placed as it was."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    moved = [x + jax.device_put(0.05 * rng.normal(size=x.shape).astype(np.float32), x.sharding) for x in leaves]
    return jax.tree.unflatten(structure, moved)


def prompt(config, key: str, rng, *, grid: Grid | None, words: int) -> Example:
    """Text, a clip (unless `grid` is None), text."""
    merge, patch = config.vision.merge_size, 3 * config.vision.temporal_patch_size * config.vision.patch_size**2
    visual = [config.video_token_id] * (grid.t * grid.h * grid.w // merge**2) if grid else []
    tokens = np.array([*rng.integers(10, 90, 3), *visual, *rng.integers(10, 90, words)], np.int32)
    grids = (grid,) if grid else ()
    how = dict(image_token_id=config.image_token_id, video_token_id=config.video_token_id, merge_size=merge)
    seconds = dict(second_per_grid=[1.0] * len(grids), tokens_per_second=2.0)
    positions, delta = mrope_positions(tokens, grids, family=family(config), **how, **seconds)
    patches = rng.normal(size=(grid.t * grid.h * grid.w if grid else 0, patch)).astype(np.float32)
    return Example(key, tokens, positions, delta, np.zeros(len(tokens), bool), patches, grids, (), "")


def family(config) -> str:
    return "qwen3_vl" if config.vision.position_side else "qwen2_5_vl"


def prompts(name: str, count: int = 2, *, text_only: bool = False) -> tuple[list[Example], PromptBatch]:
    """Prompts of different lengths with clips of different sizes, the last one without a clip."""
    config, rng = parts(name)[0], np.random.default_rng(0)
    shapes = [Grid("video", 1, 4, 4), Grid("video", 1, 4, 2), None] if family(config) == "qwen2_5_vl" else None
    shapes = shapes or [Grid("video", 1, 4, 4), Grid("video", 1, 2, 4), None]
    chosen = [None if text_only else shapes[i % 3] for i in range(count)]
    found = [prompt(config, f"p{i}", rng, grid=g, words=4 + 2 * i) for i, g in enumerate(chosen)]
    visual = (config.image_token_id, config.video_token_id)
    return found, collate_prompts(found, needed_prompt_sizes(found), vision_geometry(config), visual)


def completions(prompts: int, branches: int, longest: int, seed: int = 0) -> RolloutBatch:
    """Random tokens, rewards and old log-probs near those of a uniform policy."""
    rng, count = np.random.default_rng(seed), prompts * branches
    lengths = rng.integers(1, longest + 1, count)
    lengths[0] = longest
    mask = (np.arange(longest) < lengths[:, None]).astype(np.float32)
    return RolloutBatch(
        tokens=(rng.integers(10, 90, (count, longest)) * mask).astype(np.int32),
        mask=mask,
        groups=np.repeat(np.arange(prompts, dtype=np.int32), branches),
        old_logprobs=(-5 + 0.1 * rng.normal(size=mask.shape)).astype(np.float32) * mask,
        rewards=rng.uniform(size=count).astype(np.float32),
        truncated=lengths == longest,
    )


def laid_out(batch: PromptBatch, rollouts: RolloutBatch, prompts: int, per_row: int, micro: int = 1) -> list:
    """The rows of all completions, in `micro` parts."""
    lengths = rollouts.mask.sum(1).astype(int)
    found = []
    for rows in assign_rows(lengths.reshape(prompts, -1), per_row, micro):
        slot = max(lengths[c] for _, chosen in rows for c in chosen)
        entries = max(sum(lengths[c] for c in chosen) for _, chosen in rows)
        found.append(completion_rows(batch, rows, rollouts.tokens, lengths, slot=int(slot), entries=int(entries)))
    return found


def learner(name: str, objective: ObjectiveConfig, *, rate: float = 1e-2, devices: int = 1, **axes: int):
    """(Learner, trainable, opt_state, frozen, reference); SGD-like enough to see the gradient in the update."""
    _, graphdef, trainable, frozen, mesh = parts(name, devices, **axes)
    trainable = jax.tree.map(lambda x: x.copy(), trainable)  # it will be donated
    rates = learning_rates(rate, 10, 0.0, "constant")
    optimizer = make_optimizer(rates, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1e9)
    opt_state = init_optimizer(optimizer, trainable, mesh)
    how = dict(temperature=0.8, banned_ids=BANNED, mesh=mesh, chunk=16)
    reference = noisy(trainable, 2)
    return Learner(graphdef, optimizer, trainable, opt_state, objective, **how), trainable, opt_state, frozen, reference
