"""One optimiser step: a pure jitted function of (lora, opt_state, frozen, batch)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mllm4d_jax.parallel.rules import BATCH_AXES, batch_sharding, replicated
from mllm4d_jax.processing.rows import RowBatch
from mllm4d_jax.train.losses import token_cross_entropy


class StepMetrics(NamedTuple):
    """Scalars of one step.

    Attributes:
      loss: f32 mean negative log-likelihood of the supervised tokens (nats).
      accuracy: f32 share of supervised tokens that are the most likely one.
      grad_norm: f32 global norm before clipping.
      finite: bool, loss and gradient are finite. If not, parameters and optimiser were left as they were.
    """

    loss: jax.Array
    accuracy: jax.Array
    grad_norm: jax.Array
    finite: jax.Array


class TrainStep:
    """The compiled step. Buffers of `lora` and `opt_state` are donated.

    Attributes:
      compiles: how often the step was traced; one per batch shape is expected.
      retraces: traces beyond one per batch shape. Anything but 0 is a fault.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        lora: Any,
        opt_state: Any,
        mesh: Mesh,
        chunk: int,
    ) -> None:
        """
        Args:
          graphdef: structure of the model, from `state.split_model`.
          optimizer: see `state.make_optimizer`.
          lora, opt_state: the trees to train; their placement is the placement of the results.
          mesh: devices.
          chunk: supervised positions whose logits exist at a time.
        """
        self.mesh, self.compiles, self._shapes = mesh, 0, set()

        def step(lora, opt_state, frozen, batch):
            self.compiles += 1  # runs when traced, not when executed
            return update(graphdef, optimizer, chunk, lora, opt_state, frozen, batch)

        placement = jax.tree.map(lambda x: x.sharding, (lora, opt_state))
        scalars = StepMetrics(*(replicated(mesh) for _ in StepMetrics._fields))
        self._step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*placement, scalars))

    @property
    def retraces(self) -> int:
        return self.compiles - len(self._shapes)

    def __call__(self, lora: Any, opt_state: Any, frozen: Any, batch: RowBatch) -> tuple[Any, Any, StepMetrics]:
        """Runs one step; returns before it has finished on the device."""
        self._shapes.add((batch.inputs.layout, *(x.shape for x in jax.tree.leaves(batch))))
        return self._step(lora, opt_state, frozen, place_batch(batch, self.mesh))


def update(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    chunk: int,
    lora: Any,
    opt_state: Any,
    frozen: Any,
    batch: RowBatch,
) -> tuple[Any, Any, StepMetrics]:
    """Loss, gradient and optimiser update; the first three arguments are static."""

    def mean_loss(lora: Any) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, lora, frozen)
        hidden = model(batch.inputs)
        chosen = hidden.reshape(-1, hidden.shape[-1])[batch.loss_index]
        out = token_cross_entropy(chosen, model.head_kernel(), batch.loss_target, batch.loss_weight, chunk)
        # A step of which no question could be used has weight 0: no loss, no gradient.
        weight = jnp.maximum(out.weight, 1.0)
        return out.loss / weight, out.correct / weight

    (loss, accuracy), grads = jax.value_and_grad(mean_loss, has_aux=True)(lora)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, new_state = optimizer.update(grads, opt_state, lora)
    new = (optax.apply_updates(lora, updates), new_state)
    # The host looks at `finite` one step later; until then a bad step must not spread.
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (lora, opt_state))
    return *kept, StepMetrics(loss, accuracy, norm, finite)


def place_batch(batch: RowBatch, mesh: Mesh) -> RowBatch:
    """Puts a host batch on the devices: rows and frames split over the batch axes, supervision lists everywhere."""
    shards = batch_shards(mesh)

    def put(x: Any, batch_dim: int | None = 0) -> jax.Array:
        split = batch_dim is not None and x.shape[batch_dim] % shards == 0
        sharding: NamedSharding = batch_sharding(mesh, x.ndim, batch_dim) if split else replicated(mesh)
        return jax.device_put(x, sharding)

    inputs = batch.inputs
    placed = inputs._replace(
        tokens=put(inputs.tokens),
        positions=put(inputs.positions, 1),
        segment_ids=put(inputs.segment_ids),
        vision_index=put(inputs.vision_index),
        vision=jax.tree.map(put, inputs.vision),
    )
    return RowBatch(placed, *(put(x, None) for x in batch[1:]))


def batch_shards(mesh: Mesh) -> int:
    """Number of parts the rows of a batch are split into."""
    total = 1
    for axis in BATCH_AXES:
        total *= mesh.shape.get(axis, 1)
    return total
