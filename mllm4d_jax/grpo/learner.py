"""One optimiser step on completions: jitted functions of (trainable, opt_state, frozen, features, rows, batch).

A step encodes nothing anew: prompts come with their vision features, each prompt is computed once for all of its
completions, and log-probs are made at the completions' tokens only. Policy and reference are the same frozen weights
with two small trees; both are scored by one compiled function.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.encode.grids import VisionInputs
from mllm4d_jax.generate.policy import TokenScores, token_scores
from mllm4d_jax.grpo.batch import Denominators, Mean, RolloutBatch, add_means, denominators
from mllm4d_jax.grpo.objective import objective, prepare
from mllm4d_jax.grpo.presets import ObjectiveConfig
from mllm4d_jax.grpo.ratios import correct_for_gap
from mllm4d_jax.models.split import merge_model
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.parallel.mesh import process_count
from mllm4d_jax.parallel.place import everywhere, join_rows, place_rows
from mllm4d_jax.parallel.products import compiler_options, learning_options
from mllm4d_jax.parallel.rules import constrain_rows, replicated
from mllm4d_jax.rows.completion_rows import CompletionRows
from mllm4d_jax.run.fitting import Fitted, Room, free_bytes
from mllm4d_jax.run.optimizer import StepMetrics, Sums, apply_sums


class PromptFeatures(NamedTuple):
    """Vision features of B prompts, each with room for n merged tokens.

    Attributes:
      merged: [B, n, H]; deepstack: [K, B, n, H]; see `models.vision.VisionFeatures`.
    """

    merged: jax.Array
    deepstack: jax.Array

    def flat(self) -> VisionFeatures:
        """As the model and the sampler take them."""
        prompts, count, width = self.merged.shape
        deepstack = self.deepstack.reshape(len(self.deepstack), prompts * count, width)
        return VisionFeatures(self.merged.reshape(-1, width), deepstack)


class Update(NamedTuple):
    """What a step leaves besides the new trees; on the device.

    Attributes:
      step: of the last inner iteration.
      metrics: of the rewards and of the last inner iteration, and the gap before the first.
      gap_max: f32[].
      advantages: f32[C].
    """

    step: StepMetrics
    metrics: dict[str, Mean]
    gap_max: jax.Array
    advantages: jax.Array


class Learner:
    """The compiled functions of a step.

    Attributes:
      compiles: how often one of them was traced.
      mesh: of the model.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        trainable: Any,
        opt_state: Any,
        objective: ObjectiveConfig,
        *,
        temperature: float,
        banned_ids: Sequence[int],
        mesh: Mesh,
        chunk: int = 1024,
        remat: Sequence[str] = ("",),
        room: Room = free_bytes,
    ) -> None:
        """
        Args:
          graphdef: structure of the model, from `models.split.split_model`.
          optimizer, trainable, opt_state: as for `sft.step.TrainStep`; results are placed like these trees.
          objective: what is minimised.
          temperature, banned_ids: of the sampler.
          mesh: the same as the model was made for.
          chunk: positions whose logits exist at a time.
          remat, room: as for `sft.step.TrainStep`.
        """
        self.mesh, self.objective, self.compiles = mesh, objective, 0
        self._graphdef, self._optimizer, self._chunk = graphdef, optimizer, chunk
        self._temperature, self._banned_ids = float(temperature), tuple(banned_ids)
        places = jax.tree.map(lambda x: x.sharding, (trainable, opt_state))
        scalar = replicated(mesh)
        zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, jnp.float32))
        encode = functools.partial(encode_prompts, graphdef, mesh)
        self._encode = self._compiled(encode, static_argnums=3)
        self._score = self._compiled(self._score_into, donate_argnums=0, out_shardings=scalar)
        self._begin = self._compiled(functools.partial(_begin, objective), out_shardings=scalar)
        self._take = jax.jit(_take)
        self._zeros = self._compiled(zeros, out_shardings=places[0])
        added = dict(donate_argnums=0, out_shardings=(places[0], scalar, scalar, scalar))
        adding = lambda name: self._compiled(functools.partial(self._add_rows, name), **added)  # noqa: E731
        self._add = Fitted(adding, remat, room)
        metrics = StepMetrics(*[scalar] * len(StepMetrics._fields))
        self._finish = self._compiled(self._apply, donate_argnums=(0, 1), out_shardings=(*places, metrics))

    def _compiled(self, function, **options):
        def counted(*args):
            self.compiles += 1  # runs when traced, not when executed
            return function(*args)

        return jax.jit(counted, compiler_options=learning_options(self.mesh), **options)

    def lower(self, program: str, *args: Any) -> jax.stages.Lowered:
        """A program of a step ("encode", "score", "begin", "zeros", "add", "finish") for shapes that are placed."""
        return getattr(self, f"_{program}").lower(*args)

    def encode(self, trainable: Any, frozen: Any, vision: VisionInputs | None, prompts: int) -> PromptFeatures | None:
        """Features of the frames of all prompts, once for sampler, policy and reference."""
        return None if vision is None else self._encode(trainable, frozen, place_rows(vision, self.mesh), prompts)

    def score(
        self, tree: Any, frozen: Any, features: PromptFeatures | None, parts: Sequence[CompletionRows], batch: Any
    ) -> jax.Array:
        """f32[C, T] log-probs of all completions under the policy of a tree; 0 where there is no token.

        Args:
          tree: like the trainable tree.
          features, parts, batch: as for `update`.
        """
        return self._score_all(tree, frozen, self._placed(features, parts), batch)

    def _score_all(self, tree: Any, frozen: Any, placed: Sequence[tuple], batch: Any) -> jax.Array:
        whole = everywhere(np.zeros(batch.mask.shape, np.float32), self.mesh)
        for features, rows in placed:
            whole = self._score(whole, tree, frozen, features, rows)
        return whole

    def _placed(
        self, features: PromptFeatures | None, parts: Sequence[CompletionRows]
    ) -> list[tuple[PromptFeatures | None, CompletionRows]]:
        """The rows of all processes on the devices, each part with the features that they are about.

        A process's rows are about its own prompts, and their features on its own devices: no other needs them.
        """
        if process_count(self.mesh) == 1:
            return [(features, place_rows(rows, self.mesh)) for rows in parts]
        placed = []
        for rows in parts:
            prompts = np.arange(len(rows.completions)) if rows.prompts is None else rows.prompts
            taken = None if features is None else join_rows(self._take(features, prompts), self.mesh)
            placed.append((taken, place_rows(rows._replace(prompts=None), self.mesh)))
        return placed

    def update(
        self,
        trainable: Any,
        opt_state: Any,
        frozen: Any,
        features: PromptFeatures | None,
        parts: Sequence[CompletionRows],
        batch: RolloutBatch,
        *,
        reference: Any = None,
        iterations: int = 1,
    ) -> tuple[Any, Any, Update]:
        """One step; `trainable` and `opt_state` are donated.

        The learner's own log-probs are compared with the sampler's before the parameters change. A step in one part
        and one iteration finds them in the same pass that it differentiates; any other scores all parts first.

        Args:
          features: of the prompts; in a run of several processes, of this process's on its own devices.
          parts: micro-batches, on the host; the result does not depend on how the rows are divided. Each process gives
            rows of as many of its own prompts.
          batch: all completions of all processes, log-probs from the sampler, on the host.
          reference: tree of the policy that beta keeps the trained one near to; None without that term.
          iterations: updates on these completions (mu).
        """
        batch, placed = everywhere(jax.tree.map(np.asarray, batch), self.mesh), self._placed(features, parts)
        if reference is not None:
            batch = batch._replace(reference_logprobs=self._score_all(reference, frozen, placed, batch))
        first = None
        if scores_first(len(parts), iterations):
            first = self._score_all(trainable, frozen, placed, batch)
        batch, totals, weight, metrics, gap_max = self._begin(batch, first)
        for _ in range(iterations):
            grads, loss, found = self._zeros(trainable), jnp.float32(0), []
            for of_rows, rows in placed:
                grads, part, means, gap = self._add(grads, trainable, frozen, of_rows, rows, batch, totals)
                loss, gap_max = loss + part, jnp.maximum(gap_max, gap)
                found.append(means)
            trainable, opt_state, step = self._finish(trainable, opt_state, grads, loss, weight)
        return trainable, opt_state, Update(step, metrics | add_means(*found), gap_max, batch.advantages)

    def _scores(
        self, tree: Any, frozen: Any, features: PromptFeatures | None, rows: CompletionRows, remat: str = ""
    ) -> TokenScores:
        """Log-probs and entropies f32[R, N, T], 0 where there is no token."""
        model = merge_model(self._graphdef, tree, frozen)
        if remat:
            model.remat = remat
        hidden = model(rows.inputs, features=_features_of_rows(features, rows.prompts, self.mesh))
        chosen = jax.vmap(lambda row, index: row[index])(hidden, rows.loss_index)
        sampling, how = (self._temperature, self._banned_ids), dict(chunk=self._chunk, mesh=self.mesh)
        found = token_scores(chosen, model.head_kernel(), rows.loss_target, *sampling, **how)

        def lay_out(values: jax.Array) -> jax.Array:
            padded = jnp.pad(values, ((0, 0), (0, 1)))  # entry M: no token
            return jax.vmap(lambda row, index: row[index])(padded, rows.places)

        return TokenScores(*map(lay_out, found))

    def _score_into(
        self, whole: jax.Array, tree: Any, frozen: Any, features: PromptFeatures | None, rows: CompletionRows
    ) -> jax.Array:
        """`whole` f32[C, T] with the log-probs of these rows in place."""
        logprobs = self._scores(tree, frozen, features, rows).logprobs
        slot = logprobs.shape[-1]
        return whole.at[rows.completions.reshape(-1), :slot].set(logprobs.reshape(-1, slot))

    def _add_rows(
        self,
        remat: str,
        total: Any,
        trainable: Any,
        frozen: Any,
        features: PromptFeatures | None,
        rows: CompletionRows,
        batch: RolloutBatch,
        totals: Denominators,
    ) -> tuple[Any, jax.Array, dict[str, Mean], jax.Array]:
        """(total + gradient of these rows, their loss, metrics, largest gap)."""

        def loss(tree: Any) -> tuple[jax.Array, tuple[dict[str, Mean], jax.Array]]:
            found = self._scores(tree, frozen, features, rows, remat)
            part, slot = _rows_of(batch, rows), found.logprobs.shape[-1]
            logprobs, entropy = (x.reshape(-1, slot) for x in found)
            found = None if part.importance is not None else jax.lax.stop_gradient(logprobs)
            part, metrics, gap_max = _corrected(self.objective, part, found)
            value, more = objective(logprobs, part, totals, self.objective, entropy)
            return value, (metrics | more, gap_max)

        (value, (metrics, gap_max)), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
        return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, grads), value, metrics, gap_max

    def _apply(
        self, trainable: Any, opt_state: Any, grads: Any, loss: jax.Array, weight: jax.Array
    ) -> tuple[Any, Any, StepMetrics]:
        # The objective has divided by the step's counts: the weight only says whether there is anything to learn.
        return apply_sums(self._optimizer, trainable, opt_state, Sums(grads, loss, jnp.float32(0), weight))


class PromptEncoder:
    """Encodes prompts' frames on the devices of one process of several, with the sampler's weights."""

    def __init__(self, graphdef: nnx.GraphDef, mesh: Mesh) -> None:
        """`graphdef`, `mesh`: see `generate.weights.SamplingWeights`."""
        self._mesh, encode = mesh, functools.partial(encode_prompts, graphdef, mesh)
        self._encode = jax.jit(encode, static_argnums=3, compiler_options=compiler_options(mesh))

    def __call__(self, weights: tuple, vision: VisionInputs | None, prompts: int) -> PromptFeatures | None:
        """Features of the frames of all prompts; `weights`: trees on these devices."""
        return None if vision is None else self._encode(*weights, place_rows(vision, self._mesh), prompts)

    def lower(self, weights: tuple, vision: VisionInputs, prompts: int) -> jax.stages.Lowered:
        """The program, for shapes that are placed."""
        return self._encode.lower(*weights, vision, prompts)


def encode_prompts(
    graphdef: nnx.GraphDef, mesh: Mesh, trainable: Any, frozen: Any, vision: VisionInputs, prompts: int
) -> PromptFeatures:
    """Return the features of the frames of so many prompts, which share the frames evenly; to be jitted."""
    found = merge_model(graphdef, trainable, frozen).encode_vision(vision)
    rows, width = found.merged.shape
    merged = found.merged.reshape(prompts, rows // prompts, width)
    deepstack = found.deepstack.reshape(len(found.deepstack), *merged.shape)
    return PromptFeatures(constrain_rows(merged, mesh), constrain_rows(deepstack, mesh, 1))


def scores_first(parts: int, iterations: int) -> bool:
    """Return whether a step of so many micro-batches and iterations makes the policy's log-probs in a pass before."""
    return parts > 1 or iterations > 1


def _features_of_rows(features: PromptFeatures | None, prompts: jax.Array | None, mesh: Mesh) -> VisionFeatures | None:
    """Each row's block of features, taken from its prompt's."""
    if features is None:
        return None
    if prompts is None:
        return features.flat()
    merged, deepstack = _take(features, prompts)
    return PromptFeatures(constrain_rows(merged, mesh), constrain_rows(deepstack, mesh, 1)).flat()


def _take(features: PromptFeatures, prompts: jax.Array) -> PromptFeatures:
    return PromptFeatures(jnp.take(features.merged, prompts, 0), jnp.take(features.deepstack, prompts, 1))


def _begin(
    config: ObjectiveConfig, batch: RolloutBatch, first: jax.Array | None
) -> tuple[RolloutBatch, Denominators, jax.Array, dict[str, Mean], jax.Array]:
    """What has to be known of the whole batch before its parts: (prepared batch, denominators, weight, metrics, gap).

    The weight is 0 when nothing could move the parameters: no group of different rewards and no KL term. The optimiser
    then rests, too, instead of following its momentum.
    """
    batch, more = prepare(batch, config)  # first: the gap counts where there is something to learn
    batch, metrics, gap_max = _corrected(config, batch, first)
    pulls = jnp.any((batch.mask > 0) & (batch.advantages[:, None] != 0)) | (config.beta > 0)
    weight = (pulls & jnp.any(batch.mask > 0)).astype(jnp.float32)
    return batch, denominators(batch.mask), weight, metrics | more, gap_max


def _corrected(
    config: ObjectiveConfig, batch: RolloutBatch, logprobs: jax.Array | None
) -> tuple[RolloutBatch, dict[str, Mean], jax.Array]:
    """(batch corrected for its gap to the learner's log-probs, metrics, largest gap); None leaves it as it is."""
    if logprobs is None:
        return batch, {}, jnp.float32(0)
    batch, gap = correct_for_gap(batch, logprobs, bound=config.gap_bound, cap=config.importance_cap)
    return batch, {"gap": gap.mean_abs, "gap_kl": gap.kl}, gap.max_abs


def _rows_of(batch: RolloutBatch, rows: CompletionRows) -> RolloutBatch:
    """The completions of some rows, branch by branch."""
    numbers, slot = rows.completions.reshape(-1), rows.places.shape[-1]
    return jax.tree.map(lambda x: x[numbers, :slot] if x.ndim == 2 else x[numbers], batch)
