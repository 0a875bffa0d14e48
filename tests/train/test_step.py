"""The training step on a tiny real model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.data.records import RecordFile
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.parallel.rules import replicated
from mllm4d_jax.processing.batch import ModelInputs, collate
from mllm4d_jax.processing.config import ProcessorConfig
from mllm4d_jax.processing.encode import Encoder, VideoOptions
from mllm4d_jax.processing.rows import RowBatch, collate_rows, needed_sizes, share_prefix
from mllm4d_jax.processing.tokenizer import Tokenizer
from mllm4d_jax.train import sft
from mllm4d_jax.train.state import init_optimizer, make_optimizer, split_model
from mllm4d_jax.train.step import TrainStep
from mllm4d_jax.train.trainer import Progress


class Setup:
    """The run of `config` on one device, its adapter moved away from B = 0, where A would have no gradient."""

    def __init__(self, config):
        self.mesh = make_mesh({"data": -1}, jax.devices()[:1])
        model, _ = sft.load_trainable(config, self.mesh)
        self.graphdef, _, _ = split_model(model)
        trainer, _ = sft.make_trainer(config, model, self.mesh, None, Progress())
        self.step, self.frozen, self.opt_state = trainer._step, trainer._frozen, trainer.opt_state
        rng = np.random.default_rng(1)
        noisy = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.02) * rng.normal(size=x.shape), trainer.lora)
        self.lora = jax.device_put(jax.tree.map(np.float32, noisy), jax.tree.map(lambda x: x.sharding, trainer.lora))
        self.ids = model.config.image_token_id, model.config.video_token_id
        self.geometry = vision_geometry(model.config)

    def run(self, batch):
        self.lora, self.opt_state, metrics = self.step(self.lora, self.opt_state, self.frozen, batch)
        return metrics


@pytest.fixture(scope="module")
def trained(tiny_world, make_config):
    """Three steps on one batch and one on a poisoned batch; everything the tests below look at."""
    folder, path = tiny_world
    config = make_config(folder, path)
    setup = Setup(config)
    options = VideoOptions.from_mapping(config.video)
    with Encoder(ProcessorConfig.from_folder(folder), Tokenizer.from_folder(folder), options) as encoder:
        records = RecordFile(path, path.parent)
        examples = [encoder.encode(records[i]) for i in range(8)]
    rows = [share_prefix([example], setup.ids) for example in examples]
    sizes = dataclasses.replace(needed_sizes(rows, setup.geometry), supervised=128)
    batch = collate_rows(rows, sizes, setup.geometry, visual_token_ids=setup.ids)
    start = jax.tree.map(np.array, setup.lora)
    frozen = jax.tree.map(np.array, setup.frozen)
    reference = reference_loss(setup, examples)
    metrics = [setup.run(batch) for _ in range(3)]
    after = jax.tree.map(np.array, (setup.lora, setup.opt_state))
    bad = batch._replace(loss_weight=batch.loss_weight * np.float32("nan"))
    metrics.append(setup.run(bad))
    return setup, start, frozen, reference, metrics, after


def reference_loss(setup, examples):
    """Mean over supervised tokens of -log p from the model's own full logits of plain rows, in numpy."""
    model = nnx.merge(setup.graphdef, setup.lora, setup.frozen)
    inputs = jax.tree.map(jnp.asarray, collate(examples, setup.geometry, visual_token_ids=setup.ids))
    logits = np.asarray(nnx.jit(lambda m, i: m.logits(m(i)))(model, inputs), np.float64)
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
    assert float(metrics[2].loss) < float(metrics[0].loss)


def test_only_the_adapter_changes(trained):
    setup, start, frozen, *_ = trained
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), start, setup.lora))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), frozen, setup.frozen))


def test_a_bad_step_is_reported_and_changes_nothing(trained):
    setup, *_, metrics, after = trained
    assert [bool(m.finite) for m in metrics] == [True, True, True, False]
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), after, (setup.lora, setup.opt_state))
    assert jax.tree.all(same)


def test_one_compile_for_one_shape(trained):
    setup = trained[0]
    assert (setup.step.compiles, setup.step.retraces) == (1, 0)


class Toy(nnx.Module):
    """Just enough of a model for a step."""

    def __init__(self):
        self.table = nnx.Param(jnp.eye(8))
        self.adapter = nnx.LoRAParam(jax.random.normal(jax.random.key(0), (8, 8)))

    def __call__(self, inputs):
        return self.table[...][inputs.tokens] @ self.adapter[...]

    def head_kernel(self):
        return self.table[...]


def toy_step():
    """(step, lora, opt_state, frozen) of the toy on one device."""
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    graphdef, lora, frozen = split_model(Toy())
    lora, frozen = jax.device_put((lora, frozen), replicated(mesh))
    optimizer = make_optimizer(np.full(9, 1e-2), b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    opt_state = init_optimizer(optimizer, lora, mesh)
    return TrainStep(graphdef, optimizer, lora, opt_state, mesh, 4), lora, opt_state, frozen


def toy_batch(length, weight):
    tokens = np.arange(2 * length, dtype=np.int32).reshape(2, length) % 8
    inputs = ModelInputs(tokens, np.zeros((3, 2, length), np.int32), tokens, tokens, None)
    index = np.arange(4, dtype=np.int32)
    return RowBatch(inputs, index, index[::-1].copy(), weight)


def test_padded_positions_are_not_averaged_over():
    step, lora, opt_state, frozen = toy_step()
    adapter = np.asarray(lora["adapter"], np.float64)
    weight = np.array([1, 1, 0, 0], np.float32)
    *_, metrics = step(lora, opt_state, frozen, toy_batch(4, weight))
    logits = adapter[:4]  # tokens 0..3 through an identity table
    losses = [np.log(np.exp(row).sum()) - row[target] for row, target in zip(logits, (3, 2, 1, 0), strict=True)]
    np.testing.assert_allclose(float(metrics.loss), np.mean(losses[:2]), rtol=1e-6)
    assert abs(np.mean(losses[:2]) - np.mean(losses)) > 0.1


def test_compiles_and_retraces_are_counted():
    step, lora, opt_state, frozen = toy_step()
    seen = []
    for length, dtype in ((4, np.float32), (4, np.float32), (6, np.float32), (4, np.float32), (4, np.float16)):
        lora, opt_state, _ = step(lora, opt_state, frozen, toy_batch(length, np.ones(4, dtype)))
        seen.append((step.compiles, step.retraces))
    # A new length is a new shape; another dtype in a known shape is what must not happen, and is noticed.
    assert seen == [(1, 0), (1, 0), (2, 0), (2, 0), (3, 1)]
