"""The training step on a tiny real model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.steps import Counts
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.models.split import attach_lora, split_model
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.parallel.rules import replicated
from mllm4d_jax.rows.batch import ModelInputs, collate
from mllm4d_jax.rows.rows import RowBatch, collate_rows, needed_sizes, share_prefix
from mllm4d_jax.run.fitting import extra_bytes
from mllm4d_jax.run.optimizer import init_optimizer, make_optimizer
from mllm4d_jax.sft.feed import StepData
from mllm4d_jax.sft.step import Trainer, TrainStep


class Setup:
    """A tiny model on one device, its adapter moved away from B = 0, where A would have no gradient."""

    def __init__(self, folder):
        self.mesh = make_mesh({"data": -1}, jax.devices()[:1])
        model = load_model(folder, dtype=jnp.float32, mesh=self.mesh, attention="xla", remat="full")
        attach_lora(model, rank=4, alpha=8.0, rngs=nnx.Rngs(0), mesh=self.mesh)
        self.graphdef, lora, self.frozen = split_model(model)
        rng = np.random.default_rng(1)
        noisy = jax.tree.map(lambda x: np.float32(np.asarray(x) + 0.02 * rng.normal(size=x.shape)), lora)
        self.lora = jax.device_put(noisy, jax.tree.map(lambda x: x.sharding, lora))
        rates = np.full(9, 1e-2, np.float32)
        self.optimizer = make_optimizer(rates, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
        self.opt_state = init_optimizer(self.optimizer, self.lora, self.mesh)
        self.step = self.new_step()
        self.ids = model.config.image_token_id, model.config.video_token_id
        self.geometry = vision_geometry(model.config)

    def new_step(self, **kwargs):
        return TrainStep(self.graphdef, self.optimizer, self.lora, self.opt_state, self.mesh, 64, **kwargs)

    def run(self, batch):
        self.lora, self.opt_state, metrics = self.step(self.lora, self.opt_state, self.frozen, [batch], 0)
        return metrics

    def rows(self, examples, **sizes):
        rows = [share_prefix([example], self.ids) for example in examples]
        sizes = dataclasses.replace(needed_sizes(rows, self.geometry), **sizes)
        return collate_rows(rows, sizes, self.geometry, visual_token_ids=self.ids)


@pytest.fixture(scope="module")
def encoded(tiny_world, make_config):
    """The eight examples of the tiny world."""
    folder, path = tiny_world
    options = VideoOptions.from_mapping(make_config(folder, path).video)
    with Encoder(ProcessorConfig.from_folder(folder), Tokenizer.from_folder(folder), options) as encoder:
        records = RecordFile(path, path.parent)
        return [encoder.encode(records[i]) for i in range(8)]


@pytest.fixture(scope="module")
def trained(tiny_world, encoded):
    """Three steps on one batch and one on a poisoned batch; everything the tests below look at."""
    setup = Setup(tiny_world[0])
    batch = setup.rows(encoded, supervised=128)
    start = jax.tree.map(np.array, setup.lora)
    frozen = jax.tree.map(np.array, setup.frozen)
    reference = reference_loss(setup, encoded)
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


def test_loss_is_the_mean_over_supervised_tokens(trained, encoded):
    *_, reference, metrics, _ = trained
    np.testing.assert_allclose(float(metrics[0].loss), reference[0], rtol=1e-5)
    np.testing.assert_allclose(float(metrics[0].accuracy), reference[1], rtol=1e-6)
    assert float(metrics[0].weight) == sum(x.supervised.sum() for x in encoded)
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
        self.dtype = jnp.dtype(jnp.float32)
        self.table = nnx.Param(jnp.eye(8))
        self.lora_a = nnx.LoRAParam(jax.random.normal(jax.random.key(0), (8, 8)))
        self.remat = "full"

    def __call__(self, inputs, dropout_key=None):
        hidden = self.table[...][inputs.tokens] @ self.lora_a[...]
        # Something large between that changes nothing, as if more of it were kept.
        return hidden + 0.0 * ((hidden @ hidden.mT) @ hidden) if self.remat == "none" else hidden

    def head_kernel(self):
        return self.table[...]


def toy_step(**kwargs):
    """(step, lora, opt_state, frozen) of the toy on one device."""
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    graphdef, lora, frozen = split_model(Toy())
    lora, frozen = jax.device_put((lora, frozen), replicated(mesh))
    optimizer = make_optimizer(np.full(9, 1e-2), b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
    opt_state = init_optimizer(optimizer, lora, mesh)
    return TrainStep(graphdef, optimizer, lora, opt_state, mesh, 4, **kwargs), lora, opt_state, frozen


def toy_batch(length, weight):
    tokens = np.arange(2 * length, dtype=np.int32).reshape(2, length) % 8
    inputs = ModelInputs(tokens, np.zeros((3, 2, length), np.int32), tokens, tokens, None)
    index = np.array([[0, 1], [0, 1]], np.int32)
    return RowBatch(inputs, index, np.array([[3, 2], [1, 0]], np.int32), weight)


def test_padded_positions_are_not_averaged_over():
    step, lora, opt_state, frozen = toy_step()
    adapter = np.asarray(lora["lora_a"], np.float64)
    weight = np.array([[1, 1], [0, 2]], np.float32)
    *_, metrics = step(lora, opt_state, frozen, [toy_batch(4, weight)], 0)
    logits = adapter[[0, 1, 4, 5]]  # the first two tokens of either row through an identity table
    losses = [np.log(np.exp(row).sum()) - row[target] for row, target in zip(logits, (3, 2, 1, 0), strict=True)]
    np.testing.assert_allclose(float(metrics.loss), np.dot(losses, weight.ravel()) / 4, rtol=1e-6)
    assert abs(np.dot(losses, weight.ravel()) / 4 - np.mean(losses)) > 0.1


def test_compiles_and_retraces_are_counted():
    step, lora, opt_state, frozen = toy_step()
    seen = []
    for length, dtype in ((4, np.float32), (4, np.float32), (6, np.float32), (4, np.float32), (4, np.float16)):
        lora, opt_state, _ = step(lora, opt_state, frozen, [toy_batch(length, np.ones((2, 2), dtype))], 0)
        seen.append((step.compiles, step.retraces))
    # A new length is a new shape; another dtype in a known shape is what must not happen, and is noticed.
    assert seen == [(1, 0), (1, 0), (2, 0), (2, 0), (3, 1)]
    for number in range(2):
        batches = [toy_batch(length, np.ones((2, 2), np.float32)) for length in (4, 6, 4)]
        lora, opt_state, _ = step(lora, opt_state, frozen, batches, number)
        assert (step.compiles, step.retraces) == (5, 1)


def copied(trees):
    """Trees of which the step may have the buffers."""
    return jax.tree.map(jnp.copy, trees)


def test_micro_batches_are_one_batch(tiny_world, encoded):
    """Halves of unlike numbers of supervised tokens; compared are loss, and gradients through what they do."""
    setup = Setup(tiny_world[0])
    batch = setup.rows(encoded, supervised=128)
    batch.loss_weight[:4, 1:] = 0
    dims = jax.tree.map(lambda _: 0, batch)
    dims = dims._replace(inputs=dims.inputs._replace(positions=1))
    first, second = (
        jax.tree.map(lambda x, dim, i=i: np.split(x, 2, dim)[i], batch, dims) for i in range(2)
    )  # frames lie row by row, so half of them belong to half of the rows
    assert second.loss_weight.sum() > 2 * first.loss_weight.sum() > 0
    with jax.default_matmul_precision("highest"):
        whole = setup.step(*copied((setup.lora, setup.opt_state)), setup.frozen, [batch], 0)
        split = setup.step(*copied((setup.lora, setup.opt_state)), setup.frozen, [first, second], 0)
    for a, b in zip(whole[2], split[2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    moments = [jax.tree.leaves(optax.tree.get(state, "mu")) for _, state, _ in (whole, split)]
    for a, b in zip(*moments, strict=True):  # a tenth of the clipped gradient, exactly
        assert np.abs(a - b).max() <= 1e-6 * max(np.abs(x).max() for x in moments[0])
    # Adam's first update is lr * g / (|g| + eps), so a difference of gradients counts by lr * eps / (|g| + eps)^2.
    for a, b, *mu in zip(*(jax.tree.leaves(tree) for tree in (whole[0], split[0])), *moments, strict=True):
        small, gap = 10 * np.minimum(*np.abs(mu)), 10 * np.abs(mu[0] - mu[1])
        assert np.all(np.abs(a - b) <= 1e-6 + 1e-2 * 1e-8 * gap / (small + 1e-8) ** 2)


@pytest.mark.parametrize("count", [1, 3])
def test_a_step_without_weight_changes_nothing_but_the_place_in_the_schedule(count):
    step, lora, opt_state, frozen = toy_step()
    lora, opt_state, _ = step(lora, opt_state, frozen, [toy_batch(4, np.ones((2, 2), np.float32))], 0)
    before = jax.tree.map(np.array, (lora, opt_state))
    nothing = [toy_batch(4, np.zeros((2, 2), np.float32))] * count
    lora, opt_state, metrics = step(lora, opt_state, frozen, nothing, 1)
    assert bool(metrics.finite) and float(metrics.weight) == float(metrics.loss) == 0
    in_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
    further = jax.tree.map(
        lambda x: x._replace(count=x.count + 1) if in_schedule(x) else x, before, is_leaf=in_schedule
    )
    assert jax.tree.all(jax.tree.map(np.array_equal, further, (lora, opt_state)))
    assert not jax.tree.all(jax.tree.map(np.array_equal, further, before))


def test_a_step_without_weight_is_logged_as_not_measured():
    """And later steps are logged with the rate that they had."""
    step, lora, opt_state, frozen = toy_step()
    rates = np.arange(1, 10, dtype=np.float32)
    trainer, rows = Trainer(step, frozen, lora, opt_state, rates), []
    for number, weight in enumerate((1, 0, 1), 1):
        batch = toy_batch(4, np.full((2, 2), weight, np.float32))
        rows.append(trainer.advance(number, StepData((batch,), (), 0, Counts(slots=8), 0.0)))
    rows.append(trainer.finish())
    assert [row["lr"] for row in rows[1:]] == [1.0, None, 3.0]
    for name in ("loss", "accuracy", "grad_norm"):
        assert [row[name] is None for row in rows[1:]] == [False, True, False]


def test_one_micro_batch_without_weight_is_harmless():
    step, lora, opt_state, frozen = toy_step()
    full, empty = (toy_batch(4, np.full((2, 2), w, np.float32)) for w in (1, 0))
    alone = step(*copied((lora, opt_state)), frozen, [full], 0)
    padded = step(lora, opt_state, frozen, [empty, full], 0)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(padded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_auto_takes_what_fits_and_splits_a_batch_that_does_not(count, capsys):
    """The memory that is left is an argument; what the programs want is the compiler's own figure for them."""
    batches = [toy_batch(256, np.array([[1, 1], [0, 2]], np.float32))] * count
    plain, lora, opt_state, frozen = toy_step()
    want = plain(*copied((lora, opt_state)), frozen, batches, 0)

    def wanted(remat):
        step, *trees = toy_step(remat=(remat,))
        return extra_bytes(step.lower(*trees, batches[0]).compile())

    none, full = wanted("none"), wanted("full")
    assert full < none / 4
    # An accumulated gradient is there besides, and so is its sum.
    for room, name, parts in ((2 * none, "none", 1), (none // 2, "full", 1), (full * 2 // 3, "full", 2)):
        step, *_ = toy_step(remat=("none", "full"), room=lambda room=room: room)
        for _ in range(2):
            found = step(*copied((lora, opt_state)), frozen, batches, 0)
        out = capsys.readouterr().out
        assert f"takes '{name}'" in out and out.count("does not fit and is taken in 2 parts") == (parts == 2), room
        assert step.retraces == 0
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
