"""The step on eight fake devices: the same numbers however they are arranged, and nothing large is gathered."""

from __future__ import annotations

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.encode.example import Example, Grid
from mllm4d_jax.encode.positions import mrope_positions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.models.split import attach_lora, split_model
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.rows.rows import collate_rows, needed_sizes, share_prefix
from mllm4d_jax.run.optimizer import init_optimizer, make_optimizer
from mllm4d_jax.sft.step import TrainStep

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = ("qwen3_vl", "qwen2_5_vl")
MESHES = (dict(data=8), dict(fsdp=8), dict(tensor=2, fsdp=4), dict(data=2, fsdp=2, tensor=2))
STEPS, ROWS, FRAMES, SIDE = 3, 8, 5, 8


def make_rows(config):
    """Eight rows of one clip each, with one to three questions."""
    rng = np.random.default_rng(3)
    ids = (config.image_token_id, config.video_token_id)
    grids = (Grid("video", FRAMES, SIDE, SIDE),)
    per_frame = SIDE * SIDE // config.merge_size**2
    rows = []
    for n in range(ROWS):
        runs, count = (FRAMES, 1) if config.family == "qwen3_vl" else (1, FRAMES)
        start = []
        for _ in range(runs):
            visual = [config.video_token_id] * (count * per_frame)
            start += [*rng.integers(10, 300, 2), config.vision_start_token_id, *visual, config.vision_end_token_id]
        patches = rng.normal(size=(FRAMES * SIDE * SIDE, 3 * config.temporal_patch_size * config.patch_size**2))
        examples = []
        for i in range(1 + n % 3):
            answer = int(rng.integers(1, 4))
            tokens = np.array([*start, *rng.integers(10, 300, 3 + answer)], np.int32)
            positions, delta = mrope_positions(
                tokens, grids, image_token_id=ids[0], video_token_id=ids[1], merge_size=config.merge_size,
                family=config.family, tokens_per_second=config.tokens_per_second,
                second_per_grid=() if config.family == "qwen3_vl" else [1.0],
            )  # fmt: skip
            supervised = np.arange(len(tokens)) >= len(tokens) - answer
            examples.append(
                Example(f"{n}.{i}", tokens, positions, delta, supervised, patches.astype(np.float32), grids, (), "")
            )
        rows.append(share_prefix(examples, ids))
    return rows


class Run:
    """A model with adapters over `axes`, and a batch."""

    def __init__(self, name, axes, devices=None):
        self.mesh = make_mesh(axes, devices)
        model = load_model(GOLDEN / name, dtype=jnp.float32, mesh=self.mesh, attention="xla", remat="full")
        attach_lora(model, rank=2, alpha=4.0, dropout=0.1, rngs=nnx.Rngs(0), mesh=self.mesh)
        graphdef, lora, self.frozen = split_model(model)
        rng = np.random.default_rng(1)  # B starts at zero, which would leave A without a gradient
        noisy = jax.tree.map(lambda x: np.float32(np.asarray(x) + 0.1 * rng.normal(size=x.shape)), lora)
        self.lora = jax.device_put(noisy, jax.tree.map(lambda x: x.sharding, lora))
        # Rates at which three steps move the adapters by about their size.
        rates = np.full(STEPS, 1e-2, np.float32)
        optimizer = make_optimizer(rates, b1=0.9, b2=0.99, eps=1e-3, weight_decay=0.0, clip_norm=1.0)
        self.opt_state = init_optimizer(optimizer, self.lora, self.mesh)
        self.step = TrainStep(graphdef, optimizer, self.lora, self.opt_state, self.mesh, 16, seed=5)
        config = ProcessorConfig.from_folder(GOLDEN / name)
        geometry, rows = vision_geometry(model.config), make_rows(config)
        ids = (config.image_token_id, config.video_token_id)
        self.batch = collate_rows(rows, needed_sizes(rows, geometry), geometry, visual_token_ids=ids)
        self.config = model.config

    def train(self):
        metrics = []
        lora, opt_state = jax.tree.map(jnp.copy, (self.lora, self.opt_state))
        with jax.default_matmul_precision("highest"):
            for i in range(STEPS):
                lora, opt_state, m = self.step(lora, opt_state, self.frozen, [self.batch], i)
                metrics.append([float(x) for x in m])
        assert self.step.compiles == 1
        return np.array(metrics), jax.tree.map(np.asarray, lora)

    def compiled(self) -> str:
        """The compiled step as text."""
        with jax.default_matmul_precision("highest"):
            return self.step.lower(self.lora, self.opt_state, self.frozen, self.batch).compile().as_text()


@functools.lru_cache
def one_device(name):
    return Run(name, dict(data=1), jax.devices()[:1]).train()


def gathered(text: str) -> list[tuple[int, ...]]:
    """Shapes of the results of all all-gathers of a compiled program."""
    results = re.findall(r" = (.*?) all-gather(?:-start)?\(", text)
    shapes = [dims for result in results for dims in re.findall(r"\w+\[([\d,]*)\]", result)]
    return [tuple(map(int, dims.split(","))) for dims in shapes if dims]


def check_gathers(run: Run) -> None:
    """Weights of a layer are gathered where fsdp splits them; the head, the embedding and activations never are."""
    rows, length = run.batch.inputs.tokens.shape
    vision, width, vocabulary = run.batch.inputs.vision, run.config.text.hidden_size, run.config.text.vocab_size
    frames, patches = vision.frame_segments.shape
    features = frames * patches // run.config.vision.merge_size**2
    shapes = gathered(run.compiled())
    assert len(shapes) > 5 or run.mesh.shape["fsdp"] == 1
    for shape in shapes:
        assert not {frames, features, vocabulary} & set(shape), shape
        assert len(shape) < 3 or (rows, length) not in zip(shape, shape[1:], strict=False), shape
        if run.mesh.shape["tensor"] == 1:  # else heads of a device's own frames are put together
            assert math.prod(shape) < width * min(vocabulary, rows * length, features), shape


CASES = [pytest.param("qwen3_vl", MESHES[-1], id="all-axes")] + [
    pytest.param(name, axes, id=f"{name}-{axes}", marks=pytest.mark.slow)
    for name in FAMILIES
    for axes in MESHES
    if (name, axes) != ("qwen3_vl", MESHES[-1])
]


@pytest.mark.parametrize(("name", "axes"), CASES)
def test_any_mesh_trains_the_same(name, axes):
    (expected, lora), run = one_device(name), Run(name, axes)
    found, other = run.train()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[-1, 0] < expected[0, 0] - 0.01
    for a, b in zip(jax.tree.leaves(lora), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)
    check_gathers(run)
