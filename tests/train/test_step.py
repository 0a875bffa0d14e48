"""The training step on a tiny real model, on one device and on eight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.data.loader import BatchLayout, make_batch
from mllm4d_jax.data.records import RecordFile
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.lora import attach_lora
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.processing.config import ProcessorConfig
from mllm4d_jax.processing.encode import Encoder, VideoOptions
from mllm4d_jax.processing.tokenizer import Tokenizer
from mllm4d_jax.train.state import init_optimizer, make_optimizer, split_model
from mllm4d_jax.train.step import TrainStep, place_batch


@pytest.fixture(scope="module")
def examples(tiny_world):
    folder, path = tiny_world
    options = VideoOptions(num_frames=4)
    with Encoder(ProcessorConfig.from_folder(folder), Tokenizer.from_folder(folder), options) as encoder:
        records = RecordFile(path, path.parent)
        return [encoder.encode(records[i]) for i in range(8)]


class Setup:
    """Model, optimiser and step on the first `devices` fake devices."""

    def __init__(self, folder, devices=1, chunk=8):
        self.mesh = make_mesh({"data": -1}, jax.devices()[:devices])
        model = load_model(folder, mesh=self.mesh)
        attach_lora(model, rank=4, alpha=8.0, rngs=nnx.Rngs(0), mesh=self.mesh)
        self.graphdef, self.lora, self.frozen = split_model(model)
        # B = 0 would leave A without a gradient.
        keys = iter(jax.random.split(jax.random.key(1), 99))
        noise = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), self.lora)
        self.lora = jax.device_put(noise, jax.tree.map(lambda x: x.sharding, self.lora))
        optimizer = make_optimizer(np.full(9, 1e-2), b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
        self.opt_state = init_optimizer(optimizer, self.lora, self.mesh)
        self.step = TrainStep(self.graphdef, optimizer, self.lora, self.opt_state, self.mesh, chunk)
        self.layout = BatchLayout(8, (128, 160, 192), vision_geometry(model.config), model_ids(model), devices)

    def run(self, batch):
        self.lora, self.opt_state, metrics = self.step(self.lora, self.opt_state, self.frozen, batch)
        return metrics


def model_ids(model):
    return model.config.image_token_id, model.config.video_token_id


@pytest.fixture(scope="module")
def trained(tiny_world, examples):
    """One device, two steps on one batch and one on a poisoned batch; everything the tests below look at."""
    setup = Setup(tiny_world[0])
    batch = make_batch(examples, setup.layout)
    start = jax.tree.map(np.array, setup.lora)
    frozen = jax.tree.map(np.array, setup.frozen)
    reference = reference_loss(setup, batch, examples)
    metrics = [setup.run(batch), setup.run(batch)]
    after = jax.tree.map(np.array, (setup.lora, setup.opt_state))
    bad = batch._replace(loss_weight=batch.loss_weight * np.float32("nan"))
    metrics.append(setup.run(bad))
    return setup, batch, start, frozen, reference, metrics, after


def reference_loss(setup, batch, examples):
    """Mean over supervised tokens of -log p from the model's own full logits, one row at a time in numpy."""
    model = nnx.merge(setup.graphdef, setup.lora, setup.frozen)
    logits = np.asarray(nnx.jit(lambda m, i: m.logits(m(i)))(model, place_batch(batch, setup.mesh).inputs), np.float64)
    losses, hits = [], []
    for row, example in zip(logits, examples, strict=True):
        for s in np.flatnonzero(example.supervised):
            scores = row[s - 1]
            losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[example.tokens[s]])
            hits.append(scores.argmax() == example.tokens[s])
    return np.mean(losses), np.mean(hits)


def test_loss_is_the_mean_over_supervised_tokens(trained):
    *_, reference, metrics, _ = trained
    np.testing.assert_allclose(float(metrics[0].loss), reference[0], rtol=1e-5)
    np.testing.assert_allclose(float(metrics[0].accuracy), reference[1], rtol=1e-6)
    assert float(metrics[1].loss) < float(metrics[0].loss)


def test_only_the_adapter_changes(trained):
    setup, _, start, frozen, *_ = trained
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), start, setup.lora))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), frozen, setup.frozen))


def test_a_bad_step_is_reported_and_changes_nothing(trained):
    setup, *_, metrics, after = trained
    assert bool(metrics[1].finite) and not bool(metrics[2].finite)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), after, (setup.lora, setup.opt_state))
    assert jax.tree.all(same)


def test_one_compile_for_one_shape(trained):
    setup = trained[0]
    assert (setup.step.compiles, setup.step.retraces) == (1, 0)


def test_a_retrace_would_be_counted(trained):
    """The counter can fail: another dtype in the same shape traces again."""
    setup, batch = trained[:2]
    setup.run(batch._replace(loss_weight=batch.loss_weight.astype(jnp.bfloat16)))
    assert (setup.step.compiles, setup.step.retraces) == (2, 1)


def test_eight_devices_give_the_same_step(tiny_world, examples, trained):
    one, _, start, *_ = trained
    many = Setup(tiny_world[0], devices=8)
    batch = make_batch(examples, many.layout)
    placed = place_batch(batch, many.mesh).inputs
    assert len(placed.tokens.sharding.device_set) == 8 and placed.tokens.addressable_shards[0].data.shape[0] == 1
    assert placed.vision.patches.addressable_shards[0].data.shape[0] == placed.vision.patches.shape[0] // 8
    metrics = many.run(batch)
    np.testing.assert_allclose(float(metrics.loss), float(trained[5][0].loss), rtol=1e-5)
    np.testing.assert_allclose(float(metrics.grad_norm), float(trained[5][0].grad_norm), rtol=1e-4)
    many.run(batch)
    # Adam divides by the gradient's own size, so tiny differences grow: compare against how far the step moved.
    for a, b, c in zip(*map(jax.tree.leaves, (trained[6][0], many.lora, start)), strict=True):
        assert np.abs(a - b).max() < 2e-2 * np.abs(a - c).max()
    assert many.step.compiles == 1
