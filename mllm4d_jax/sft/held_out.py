"""Loss on records that are not trained on: the same teacher-forced mean, over a fixed file, without dropout."""

from __future__ import annotations

import logging
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.data.group_encoder import GroupEncoder
from mllm4d_jax.data.loader import LoaderOptions
from mllm4d_jax.data.sources import Questions
from mllm4d_jax.models.split import merge_model
from mllm4d_jax.parallel import multihost
from mllm4d_jax.parallel.rules import place_rows, replicated
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.rows.rows import Group, RowBatch, RowSizes, pack_groups, share_prefix
from mllm4d_jax.rows.shape import RowShape, largest
from mllm4d_jax.sft.step import token_cross_entropy

log = logging.getLogger(__name__)


class HeldOutError(ValueError):
    """The held-out records cannot be used."""


class HeldOutLoss:
    """Mean loss per supervised token over every usable record of a source, each once, in rows like those of training.

    Records that cannot be used are left out; the first measurement names them in the log.
    """

    def __init__(
        self,
        encoder: GroupEncoder,
        options: LoaderOptions,
        shape: RowShape,
        graphdef: nnx.GraphDef,
        frozen: Any,
        mesh: Mesh,
        chunk: int,
    ) -> None:
        """
        Args:
          encoder: of one source.
          options, shape: those of the training rows, so that few more shapes are compiled.
          graphdef, frozen: of the model, see `state.split_model`.
          mesh: the model's devices.
          chunk: supervised positions whose logits exist at a time.
        """
        self._encoder, self._options, self._shape = encoder, options, shape
        self._frozen, self._mesh, self._told = frozen, mesh, False

        def sums(trainable: Any, frozen: Any, batch: RowBatch) -> tuple[jax.Array, jax.Array]:
            model = merge_model(graphdef, trainable, frozen)
            chosen = jax.vmap(lambda row, index: row[index])(model(batch.inputs), batch.loss_index)
            out = token_cross_entropy(chosen, model.head_kernel(), batch.loss_target, batch.loss_weight, chunk, mesh)
            return out.loss, out.weight

        self._sums = jax.jit(sums, out_shardings=(replicated(mesh),) * 2)
        self._groups = list(_groups(encoder, options.questions_per_video))

    def __call__(self, trainable: Any) -> float:
        """The loss, nats per supervised token. Every process of the run has to call it at the same point.

        Raises:
          HeldOutError: no record is usable.
        """
        total = weight = 0.0
        bad: list[RecordError] = []
        for start in range(0, len(self._groups), self._options.groups):
            batch = self._batch(self._groups[start : start + self._options.groups], bad)
            loss, count = self._sums(trainable, self._frozen, place_rows(batch, self._mesh))
            total, weight = total + float(loss), weight + float(count)
        if not weight:
            raise HeldOutError(f"data.eval_path: not one usable record; the first: {bad[0] if bad else 'none at all'}")
        if bad and not self._told:
            listed = "; ".join(str(error) for error in bad[:5])
            log.warning("%d held-out records cannot be used and are left out, the first: %s", len(bad), listed)
        self._told = True
        return total / weight

    def _batch(self, questions: list[Questions], bad: list[RecordError]) -> RowBatch:
        """This process's rows of a few groups, in the shape that all processes agree on."""
        hosts = jax.process_count()
        groups: list[Group] = []
        for group in questions[jax.process_index() :: hosts]:
            encoded = self._encoder(group)
            bad += [e for e in encoded if isinstance(e, RecordError)]
            examples = [e for e in encoded if not isinstance(e, RecordError)]
            groups += share_prefix(examples, self._shape.visual_token_ids) if examples else ()
        _, count = self._options.local(hosts)
        rows = tuple(tuple(row) for row in pack_groups(groups, count))
        needed = self._shape.needed(rows)
        told = multihost.gather([getattr(needed, name) for name in RowSizes.__dataclass_fields__]).tolist()
        sizes = self._shape.sizes(largest([RowSizes(*row) for row in told]))
        return self._shape.collate(rows, sizes, needed.length)


def _groups(encoder: GroupEncoder, most: int):
    """The records of a source by clip, at most so many together, in the order of the file."""
    clips: dict[int, list[int]] = {}
    for i, clip in enumerate(encoder.sources[0].clips.tolist()):
        clips.setdefault(clip, []).append(i)
    for records in clips.values():
        for start in range(0, len(records), most):
            yield Questions(0, tuple(records[start : start + most]))
