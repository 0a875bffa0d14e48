"""One optimiser step: pure jitted functions of (trainable, opt_state, frozen, rows)."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.models.split import merge_model
from mllm4d_jax.parallel.place import place_rows, placed_rows, split_rows
from mllm4d_jax.parallel.products import learning_options, over_positions, pick
from mllm4d_jax.parallel.rules import batch_shards, replicated
from mllm4d_jax.rows.rows import RowBatch
from mllm4d_jax.run.fitting import Choice, Fitted, Room, free_bytes
from mllm4d_jax.run.log import say
from mllm4d_jax.run.loop import check_finite
from mllm4d_jax.run.optimizer import StepMetrics, Sums, apply_sums
from mllm4d_jax.run.throughput import mfu, peak_memory_gib
from mllm4d_jax.sft.feed import StepData


class TrainStep:
    """The compiled step. Buffers of `trainable` and `opt_state` are donated.

    The random numbers of a step (dropout) follow from the seed, the number of the step and that of the micro-batch, so
    there is no random state to save.

    Attributes:
      compiles: how often the step was traced; one per batch shape is expected.
      retraces: traces beyond one per batch shape. Anything but 0 is a fault.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        trainable: Any,
        opt_state: Any,
        mesh: Mesh,
        chunk: int,
        seed: int = 0,
        remat: Sequence[str] = ("",),
        room: Room = free_bytes,
    ) -> None:
        """A batch that no policy lets fit is taken in parts, as if `train.accumulation` were higher.

        Args:
          graphdef: structure of the model, from `models.split.split_model`.
          optimizer: see `run.optimizer.make_optimizer`.
          trainable, opt_state: the trees to train, or their shapes with shardings; the results are placed like them.
          mesh: devices, the same as the model was made for.
          chunk: supervised positions whose logits exist at a time.
          seed: of dropout.
          remat: policies that the decoder may have, fastest first, see `run.fitting`; '' for the model's own.
          room: bytes that are left on the devices.
        """
        self.mesh, self.compiles, self._shapes = mesh, 0, set()
        self._parts: dict[Any, int] = {}  # of batches that do not fit whole, by their shapes

        def sums(remat, trainable, frozen, batch, step, micro):
            self.compiles += 1  # runs when traced, not when executed
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), micro)
            return batch_sums(graphdef, trainable, frozen, batch, chunk, key, mesh, remat)

        def whole(remat, trainable, opt_state, frozen, batch, step):
            return apply_sums(optimizer, trainable, opt_state, sums(remat, trainable, frozen, batch, step, 0))

        def add(remat, total, trainable, frozen, batch, step, micro):
            return jax.tree.map(jnp.add, total, sums(remat, trainable, frozen, batch, step, micro))

        def fitted(function, donated, places):
            settings = dict(donate_argnums=donated, out_shardings=places, compiler_options=options)
            return Fitted(lambda name: jax.jit(functools.partial(function, name), **settings), remat, room)

        def zeros(trainable):
            scalars = (jnp.zeros((), jnp.float32) for _ in range(3))
            return Sums(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trainable), *scalars)

        places = jax.tree.map(lambda x: x.sharding, (trainable, opt_state))
        scalar = replicated(mesh)
        results = (*places, StepMetrics(*[scalar] * len(StepMetrics._fields)))
        partial, options = Sums(places[0], *[scalar] * 3), learning_options(mesh)
        self._whole = fitted(whole, (0, 1), results)
        self._zeros = jax.jit(zeros, out_shardings=partial)
        self._add = fitted(add, 0, partial)
        self._finish = jax.jit(functools.partial(apply_sums, optimizer), donate_argnums=(0, 1), out_shardings=results)

    @property
    def retraces(self) -> int:
        return self.compiles - len(self._shapes) - self._whole.dropped - self._add.dropped

    def __call__(
        self, trainable: Any, opt_state: Any, frozen: Any, batches: Sequence[RowBatch], step: int
    ) -> tuple[Any, Any, StepMetrics]:
        """Runs one step; returns before it has finished on the device.

        Args:
          trainable, opt_state, frozen: see `models.split.split_model` and `run.optimizer.init_optimizer`.
          batches: the micro-batches of this step, in any shapes; each supervised token counts the same.
          step: number of the step, from 0.
        """
        number, micro = np.int32(step), 0
        if len(batches) == 1 and _shape(batches[0]) not in self._parts:
            self._count(batches[0], accumulated=False)
            args = trainable, opt_state, frozen, place_rows(batches[0], self.mesh), number
            choice = self._whole.choose(*args)
            if choice.fits or not self._divisors(batches[0]):
                return choice.run(*args)
            del args  # frees the batch
            self._parts[_shape(batches[0])] = self._fewest_parts(batches[0], choice, trainable, frozen)
        total = self._zeros(trainable)
        for batch in batches:
            if _shape(batch) not in self._parts:
                choice = self._choose_add(batch, total, trainable, frozen)
                self._parts[_shape(batch)] = self._fewest_parts(batch, choice, trainable, frozen)
            for rows in split_rows(batch, self._parts[_shape(batch)]):
                self._count(rows, accumulated=True)
                total = self._add(total, trainable, frozen, place_rows(rows, self.mesh), number, np.int32(micro))
                micro += 1
        return self._finish(trainable, opt_state, total)

    def _choose_add(self, batch: RowBatch, total: Any, trainable: Any, frozen: Any) -> Choice:
        self._count(batch, accumulated=True)
        return self._add.choose(total, trainable, frozen, place_rows(batch, self.mesh), np.int32(0), np.int32(0))

    def _fewest_parts(self, batch: RowBatch, choice: Choice, trainable: Any, frozen: Any) -> int:
        """In how many parts a batch has to be taken; as many as there can be where it fits in none of them.

        Args:
          choice: for the whole batch.
        """
        parts, possible = 1, self._divisors(batch)
        while not choice.fits and possible:
            # Memory is at most in proportion to the rows.
            parts = next((n for n in possible if choice.wanted * parts <= choice.room * n), possible[-1])
            possible = [n for n in possible if n > parts]
            choice = self._choose_add(split_rows(batch, parts)[0], self._zeros(trainable), trainable, frozen)
        if parts > 1:
            rows = len(batch.loss_index)
            say(f"a batch of {rows} rows does not fit and is taken in {parts} parts; the sums stay the same")
        return parts

    def _divisors(self, batch: RowBatch) -> list[int]:
        """In how many parts a batch can be taken that the devices share evenly, ascending, without 1."""
        processes = len({device.process_index for device in self.mesh.devices.flat})
        each, rest = divmod(len(batch.loss_index) * processes, batch_shards(self.mesh))
        return [] if rest else [n for n in range(2, each + 1) if each % n == 0]

    def lower(self, trainable: Any, opt_state: Any, frozen: Any, batch: RowBatch) -> jax.stages.Lowered:
        """The step of one batch for ahead-of-time compilation, without devices or data.

        Args:
          trainable, opt_state, frozen: arrays, or shapes with shardings.
          batch: global arrays or their shapes; where they lie is decided here.
        """
        self._count(batch, accumulated=False)

        shapes = placed_rows(batch, self.mesh)
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self.mesh))
        return self._whole.lower(trainable, opt_state, frozen, shapes, step)

    def _count(self, batch: RowBatch, accumulated: bool) -> None:
        self._shapes.add((accumulated, _shape(batch)))


def _shape(batch: RowBatch) -> tuple:
    """What a program is compiled for."""
    return batch.inputs.layout, *(x.shape for x in jax.tree.leaves(batch))


def batch_sums(
    graphdef: nnx.GraphDef,
    trainable: Any,
    frozen: Any,
    batch: RowBatch,
    chunk: int,
    key: jax.Array,
    mesh: Mesh | None = None,
    remat: str = "",
) -> Sums:
    """Loss and gradient of one micro-batch, summed over its supervised tokens, under a policy or the model's own.

    Nothing is kept of the vision tower for the backward pass when none of it is trained: JAX keeps only what the
    gradient of `trainable` depends on.
    """

    def loss(trainable: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        model = merge_model(graphdef, trainable, frozen)
        if remat:
            model.remat = remat
        hidden = model(batch.inputs, dropout_key=key)
        chosen = jax.vmap(lambda row, index: row[index])(hidden, batch.loss_index)
        out = token_cross_entropy(chosen, model.head_kernel(), batch.loss_target, batch.loss_weight, chunk, mesh)
        return out.loss, (out.correct, out.weight)

    (total, counts), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
    return Sums(jax.tree.map(lambda g: g.astype(jnp.float32), grads), total, *counts)


class TokenLoss(NamedTuple):
    """Sums over the supervised positions; divide by `weight` for means.

    Attributes:
      loss: f32[] weighted sum of the negative log-likelihoods (nats).
      weight: f32[] sum of the weights.
      correct: f32[] weighted count of positions of which no logit is larger than the target's.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array


def token_cross_entropy(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int, mesh: Mesh | None = None
) -> TokenLoss:
    """Softmax cross-entropy of `hidden @ head` in float32.

    Args:
      hidden: [B, M, H] final hidden states that predict the targets, in the activation dtype.
      head: [H, V] output projection.
      targets: i32[B, M] token ids.
      weights: f32[B, M], 0 for padding.
      chunk, mesh: see `products.over_positions`.
    """

    def scores(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        picked = pick(logits, targets)
        correct = picked >= jax.lax.stop_gradient(logits).max(-1)
        return jax.nn.logsumexp(logits, axis=-1) - picked, correct.astype(jnp.float32)

    loss, correct = over_positions(scores, hidden, head, (targets,), chunk=chunk, mesh=mesh)
    return TokenLoss(jnp.sum(weights * loss), jnp.sum(weights), jnp.sum(weights * correct))


@dataclasses.dataclass(eq=False)
class Trainer:
    """Trained parameters and optimiser state; advances them step by step.

    The host reads the results of a step while the device works on the next one.

    Attributes:
      step: the compiled step.
      frozen, trainable, opt_state: its trees, on the devices.
      rates: f32[steps] learning rate of every step.
      peak: FLOP/s of a device, None when not known.
    """

    step: TrainStep
    frozen: Any
    trainable: Any
    opt_state: Any
    rates: np.ndarray
    peak: float | None = None

    def __post_init__(self) -> None:
        self._running: tuple[int, StepData, StepMetrics] | None = None  # sent to the device, and not read yet
        self.restart_clock()

    def advance(self, step: int, data: StepData) -> dict[str, float | None] | None:
        """Start a step (numbered from 1) and return the results of the one before it (None for the first).

        Raises:
          TrainingError: loss or gradient of the step before was not finite; the trees are as they were before it.
        """
        trees = self.trainable, self.opt_state, self.frozen
        self.trainable, self.opt_state, metrics = self.step(*trees, data.batches, step - 1)
        before, self._running = self._running, (step, data, metrics)
        return self._read(*before) if before else None

    def finish(self) -> dict[str, float | None] | None:
        """Results of the step under way, None when there is none. Raises as `advance`."""
        running, self._running = self._running, None
        return self._read(*running) if running else None

    def restart_clock(self) -> None:
        """Leaves the time since the last results out of the next step's: something other than steps was done."""
        self._clock = time.perf_counter()

    def _read(self, step: int, data: StepData, m: StepMetrics) -> dict[str, float | None]:
        counts, loss, norm = data.counts, float(m.loss), float(m.grad_norm)
        check_finite(bool(m.finite), step, loss, norm, data.keys)
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        return {
            "step": step,
            **m.measured(loss=loss, accuracy=float(m.accuracy), grad_norm=norm, lr=float(self.rates[step - 1])),
            "step_s": elapsed,
            "data_wait_s": data.waited,
            "examples": counts.examples,
            "clips": counts.clips,
            "tokens": counts.tokens,
            "visual": counts.visual,
            "supervised": counts.supervised,
            "padding": 1 - counts.tokens / counts.slots,
            "mfu": mfu(counts.gflops * 1e9, elapsed, self.step.mesh.size, self.peak),
            "memory_gib": peak_memory_gib(),
            "devices": self.step.mesh.size,
            "position": data.position,
            "quarantined": counts.rejected,
            "compiles": self.step.compiles,
            "retraces": self.step.retraces,
        }
