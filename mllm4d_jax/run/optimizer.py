"""The learning-rate schedule, the optimiser and its state, and the update that it makes of a step's sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh

from mllm4d_jax.parallel.rules import replicated

SCHEDULES = ("cosine", "constant")
OPTIMIZERS: Mapping[str, int] = {"adamw": 2, "muon": 1}  # name -> moments that it keeps of a matrix
MUON_STEPS = 3  # Newton-Schulz iterations: five take twice the time of a small model's step, and learn no faster
MUON_BETA = 0.95  # decay of its momentum, as published
_NOT_MATRICES = frozenset(("bias", "scale", "embed", "pos_embed"))  # last names of parameters


def learning_rates(peak: float, steps: int, warmup_ratio: float, schedule: str) -> np.ndarray:
    """Learning rate of every step: f32[steps].

    The first `ceil(warmup_ratio * steps)` steps rise linearly, step k of them at `peak * k / warm-up` (so step 0 is at
    zero); then half a cosine down to zero over the rest, or a constant. Same numbers as the Hugging Face schedules the
    release was trained with.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r} (known: {', '.join(SCHEDULES)})")
    k = np.arange(steps, dtype=np.float64)
    warmup = int(np.ceil(warmup_ratio * steps))
    share = (k - warmup) / max(1, steps - warmup)
    after = 0.5 * (1 + np.cos(np.pi * share)) if schedule == "cosine" else np.ones(steps)
    return (peak * np.where(k < warmup, k / max(1, warmup), after)).astype(np.float32)


def make_optimizer(
    rates: np.ndarray,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
    name: str = "adamw",
) -> optax.GradientTransformation:
    """Return the optimiser of a name of `OPTIMIZERS`, on gradients clipped to a global norm.

    Muon (Jordan 2024; Liu et al., arXiv 2502.16982) moves every matrix by its momentum made orthogonal, which is
    several times faster than AdamW from a random start; what `_matrices` leaves out is AdamW's, at the same rate.

    Args:
      rates: f32[steps] learning rate of every step; the last one holds afterwards.
      b1, b2, eps: Adam's, also for what Muon leaves to it; Muon's own momentum is `MUON_BETA`.
      weight_decay: decoupled; with Muon of its matrices alone.
      clip_norm: largest global gradient norm.
    """
    table = jnp.asarray(rates)

    def schedule(count: jax.Array) -> jax.Array:
        return table[jnp.minimum(count, len(rates) - 1)]

    if name == "muon":
        update = optax.contrib.muon(
            schedule,
            ns_steps=MUON_STEPS,
            beta=MUON_BETA,
            eps=eps,
            weight_decay=weight_decay,
            adam_b1=b1,
            adam_b2=b2,
            muon_weight_dimension_numbers=_matrices,
        )
    elif name == "adamw":
        update = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    else:
        raise ValueError(f"unknown optimiser {name!r} (known: {', '.join(OPTIMIZERS)})")
    return optax.chain(optax.clip_by_global_norm(clip_norm), update)


def _matrices(tree: Any) -> Any:
    """Mark what Muon moves: the last two axes of every weight of a matrix product, adapters included.

    Axes before them count layers or experts, each with a matrix of its own. Left out are vectors, and tables whose rows
    are used one by one: embeddings, vision positions and the output head.
    """

    def kind(path: tuple, _: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [key.key for key in path]
        other = names[-1] in _NOT_MATRICES or "lm_head" in names
        return None if other else optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    return jax.tree.map_with_path(kind, tree)


def optimizer_placement(optimizer: optax.GradientTransformation, trainable: Any, mesh: Mesh) -> Any:
    """Shardings of the optimiser's state: moments like the parameters they belong to, the rest on every device.

    A moment is known by its place: it ends with that of its parameter, whatever of the optimiser stands before it.

    Args:
      trainable: arrays, or shapes with shardings.
    """
    shardings = {path: x.sharding for path, x in jax.tree.leaves_with_path(trainable)}
    everywhere = replicated(mesh)

    def place(path: tuple, _: Any) -> Any:
        return next((shardings[path[n:]] for n in range(len(path)) if path[n:] in shardings), everywhere)

    return jax.tree.map_with_path(place, jax.eval_shape(optimizer.init, trainable))


def init_optimizer(optimizer: optax.GradientTransformation, trainable: Any, mesh: Mesh) -> Any:
    """The optimiser's first state, placed as `optimizer_placement` says."""
    return jax.jit(optimizer.init, out_shardings=optimizer_placement(optimizer, trainable, mesh))(trainable)


class StepMetrics(NamedTuple):
    """Scalars of one step."""

    loss: jax.Array  # f32 mean negative log-likelihood of the supervised tokens (nats)
    accuracy: jax.Array  # f32 share of supervised tokens that are the most likely one
    grad_norm: jax.Array  # f32 global norm before clipping
    weight: jax.Array  # f32 sum of the loss weights. If 0, nothing was changed but the place in the schedule.
    finite: jax.Array  # bool, loss and gradient are finite. If not, nothing was changed at all.

    def measured(self, **values: float) -> dict[str, float | None]:
        """Return columns of the step's row; None in a step that had nothing to learn from, and so measured nothing."""
        learned = float(self.weight) > 0
        return {name: value if learned else None for name, value in values.items()}


class Sums(NamedTuple):
    """Sums over the supervised tokens of some micro-batches, of which a step divides by the weight at its end.

    Attributes:
      grads: gradient of `loss`, f32, like the trainable tree.
      loss, correct, weight: see `sft.step.TokenLoss`.
    """

    grads: Any
    loss: jax.Array
    correct: jax.Array
    weight: jax.Array


def apply_sums(
    optimizer: optax.GradientTransformation, trainable: Any, opt_state: Any, sums: Sums
) -> tuple[Any, Any, StepMetrics]:
    """Means over the tokens, and the optimiser's update.

    A step of which no question could be used has weight 0: no loss, no gradient and no update. It is a step of the
    schedule all the same: the learning rate of every step is that of `learning_rates`, whatever came before it.
    """
    weight = jnp.where(sums.weight > 0, sums.weight, 1.0)
    grads = jax.tree.map(lambda g: g / weight, sums.grads)
    loss, norm = sums.loss / weight, optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(sums.weight)
    updates, new_state = optimizer.update(grads, opt_state, trainable)
    new = (optax.apply_updates(trainable, updates), new_state)

    def in_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def keep(after: Any, before: Any) -> Any:
        # The host looks at `finite` one step later; until then a bad step must not spread.
        good = finite if in_schedule(after) else finite & (sums.weight > 0)
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), after, before)

    kept = jax.tree.map(keep, new, (trainable, opt_state), is_leaf=in_schedule)
    return *kept, StepMetrics(loss, sums.correct / weight, norm, sums.weight, finite)
