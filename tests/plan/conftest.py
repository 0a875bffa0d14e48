"""What tests of plans share."""

from __future__ import annotations

import jax
import pytest

from configs import grpo as grpo_config


@pytest.fixture
def config(tiny_world):
    """The tiny run: 4 prompts x 8 completions."""
    model, world = tiny_world
    config = grpo_config.get_config("tiny")
    config.model.path, config.data.path, config.data.root = str(model), str(world), str(world.parent)
    config.model.adapter, config.rollout.prompts = "", 4
    return config


@pytest.fixture
def quick_compiles():
    """What is looked at here does not depend on how good the code for a CPU is."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
