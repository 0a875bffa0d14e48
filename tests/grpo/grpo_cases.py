"""A small run of reinforcement learning that needs no training beforehand, and what it leaves."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from configs import grpo as grpo_config
from mllm4d_jax.files import remote
from mllm4d_jax.parallel.place import placed
from mllm4d_jax.run import saved

FIGURES = frozenset("0123456789.")


def figures(completion, solution, record):
    """A reward that a model without any training earns a little of: the share of digits among its characters."""
    return sum(c in FIGURES for c in completion) / max(1, len(completion))


def constant(completion, solution, record):
    return 0.5


def only_directions(completion, solution, record):
    return 0.0 if "metres" in record["question"] else figures(completion, solution, record)


def fails_on_the_second(completion, solution, record):
    if jax.process_index() == 1:
        raise RuntimeError("no")
    return 0.5


def make_config(world, reward="figures", **changes):
    """A run on a random tiny model with a fresh adapter: short completions, one device.

    Args:
      world: the fixture `tiny_world`.
      changes: group__key=value.
    """
    model, folder = world
    config = grpo_config.get_config("tiny")
    config.model.path, config.model.adapter = str(model), ""
    config.data.path, config.data.root = str(folder / "r1.jsonl"), str(folder)
    config.data.prefix_buckets = (512,)
    config.mesh.data = 1
    config.video.num_frames = 4
    config.reward.functions = (f"{__name__}:{reward}::1.0",)
    config.rollout.prompts, config.rollout.completions, config.rollout.temperature = 2, 8, 1.0
    config.rollout.max_new_tokens, config.rollout.chunk, config.rollout.buckets = 8, 8, (8,)
    config.rollout.stop = ()
    config.objective.beta = 0.0
    config.optim.lr, config.optim.b2, config.optim.warmup_ratio = 2e-3, 0.99, 0.0
    config.optim.schedule = "constant"
    config.eval.path = ""
    config.train.steps, config.train.checkpoint_every = 6, 2
    with config.unlocked():
        for name, value in changes.items():
            group, _, key = name.partition("__")
            config[group][key] = value
    return config


def final(folder: Path | str):
    """(step, all arrays by name) of the newest checkpoint, here or in a bucket."""
    root = remote.place(remote.absolute(folder)) / "checkpoints"
    step, here, found = saved.steps(root)[-1], jax.sharding.SingleDeviceSharding(jax.devices()[0]), {}
    for part in ("trainable", "opt"):
        path = root / str(step) / part
        stored = ocp.StandardCheckpointer()  # whatever devices, and of how many processes, the run was on
        shapes = jax.tree.map(functools.partial(placed, sharding=here), stored.metadata(path).item_metadata.tree)
        tree = stored.restore(path, shapes)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found |= {f"{part}{jax.tree_util.keystr(path)}": np.asarray(x) for path, x in leaves}
    return step, found


def same_bits(a, b) -> None:
    assert a[0] == b[0] and a[1].keys() == b[1].keys()
    for name, x in a[1].items():
        np.testing.assert_array_equal(x, b[1][name], err_msg=name)
