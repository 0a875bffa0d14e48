"""A run put together from its config."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from mllm4d_jax.models.flops import Tuning
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.lora import attach_lora
from mllm4d_jax.models.peft import is_peft_folder, load_peft
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.split import trained
from mllm4d_jax.run import preflight
from mllm4d_jax.run.checkpoint import Checkpoints, ResumeError, check_resumable
from mllm4d_jax.run.progress import Progress

log = logging.getLogger(__name__)


def what_is_trained(config: ml_collections.ConfigDict) -> str:
    """For people."""
    adapter = f"LoRA rank {config.lora.rank} on {', '.join(config.lora.targets)}"
    others = [pattern for pattern in config.train.trainable if pattern != "lora"]
    return ", ".join([adapter] * needs_adapter(config) + others)


def needs_adapter(config: ml_collections.ConfigDict) -> bool:
    """Whether something of an adapter is trained: a part named "lora", or a pattern that asks for its leaves."""
    return any("lora" in pattern for pattern in config.train.trainable)


def tuning(config: ml_collections.ConfigDict, model: QwenVL) -> Tuning:
    """What the FLOPs of a step depend on besides its batch."""
    patterns = tuple(config.train.trainable)
    return Tuning(
        rank=config.lora.rank if needs_adapter(config) else 0,
        targets=tuple(config.lora.targets),
        text=trained("text/stacks/0/mlp/down_proj/kernel", patterns),
        vision=trained("vision/blocks/attn/qkv/kernel", patterns),
        remat=config.model.remat,
        vision_remat=config.model.vision_remat,
    )


def resume_point(config: ml_collections.ConfigDict, content: Mapping[str, str], checkpoints: Checkpoints) -> Progress:
    """Progress of the newest checkpoint, or of a run from the start.

    Raises:
      ResumeError: the checkpoint is of a run with other settings, or train.resume is off and there is one.
    """
    latest = checkpoints.latest()
    if latest is None:
        return Progress()
    if not config.train.resume:
        raise ResumeError(
            f"{checkpoints.folder} already holds step {latest}: give another --workdir for a new run, or leave "
            "train.resume on to go on with that one"
        )
    stored = checkpoints.meta(latest)
    check_resumable(stored, preflight.flat_config(config), content, checkpoints.folder)
    log.info("continuing after step %d", latest)
    return Progress(stored.step, stored.position, stored.rejected)


def load_trainable(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> QwenVL:
    """The base model, with a fresh adapter if one is to be trained."""
    model = load_model(
        config.model.path,
        dtype=jnp.dtype(config.model.dtype),
        mesh=mesh,
        attention=config.model.attention,
        remat=config.model.remat,
    )
    model.vision_remat = config.model.vision_remat
    if needs_adapter(config):
        c, rngs = config.lora, nnx.Rngs(config.seed)
        attach_lora(
            model, rank=c.rank, alpha=c.alpha, targets=c.targets, dropout=c.get("dropout", 0.0), rngs=rngs, mesh=mesh
        )
        if is_peft_folder(config.model.adapter):
            load_peft(config.model.adapter, model)
    return model
