"""Loss on records that are not trained on: the same teacher-forced mean, over a fixed file, without dropout."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.data.group_encoder import EncodedGroup, GroupEncoder
from mllm4d_jax.data.kept import KeptGroups
from mllm4d_jax.data.quarantine import counted
from mllm4d_jax.data.sources import Questions
from mllm4d_jax.data.stream import LoaderOptions
from mllm4d_jax.models.split import merge_model
from mllm4d_jax.parallel import multihost
from mllm4d_jax.parallel.place import place_rows
from mllm4d_jax.parallel.products import compiler_options
from mllm4d_jax.parallel.rules import replicated
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.rows.rows import Group, RowBatch, RowSizes, pack_groups, share_prefix
from mllm4d_jax.rows.shape import RowShape
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
          graphdef, frozen: of the model, see `models.split.split_model`.
          mesh: the model's devices.
          chunk: supervised positions whose logits exist at a time.
        """
        self._options, self._shape = options, shape
        self._frozen, self._mesh, self._warned = frozen, mesh, False

        def sums(trainable: Any, frozen: Any, batch: RowBatch) -> tuple[jax.Array, jax.Array]:
            model = merge_model(graphdef, trainable, frozen)
            chosen = jax.vmap(lambda row, index: row[index])(model(batch.inputs), batch.loss_index)
            out = token_cross_entropy(chosen, model.head_kernel(), batch.loss_target, batch.loss_weight, chunk, mesh)
            return out.loss, out.weight

        self._sums = jax.jit(sums, out_shardings=(replicated(mesh),) * 2, compiler_options=compiler_options(mesh))
        groups = list(_groups(encoder.sources[0].clips, options.questions_per_video))
        hosts, host = jax.process_count(), jax.process_index()
        batches = [groups[n : n + options.groups][host::hosts] for n in range(0, len(groups), options.groups)]
        self._counts = [len(batch) for batch in batches]  # groups of this process in each batch
        mine, ahead = [group for batch in batches for group in batch], options.groups // hosts
        self._groups = KeptGroups(mine, encoder, workers=options.workers, ahead=ahead)

    def __call__(self, trainable: Any, progress: Callable[[], None] = lambda: None, stop: Any = False) -> float | None:
        """The loss, nats per supervised token. Every process of the run has to call it at the same point.

        Args:
          trainable: what is trained, as it is now.
          progress: called after each batch.
          stop: true once this process was asked to stop. Then all of them end at the next batch, and there is no loss:
            what was trained has to be saved before the process is killed.

        Raises:
          HeldOutError: no record is usable.
        """
        sums: list[tuple[jax.Array, jax.Array]] = []
        bad: list[RecordError] = []
        with contextlib.closing(iter(self._groups)) as encoded:
            for count in self._counts:
                batch = self._batch(itertools.islice(encoded, count), bad, stop)
                if batch is None:
                    return None
                sums.append(self._sums(trainable, self._frozen, place_rows(batch, self._mesh)))
                jax.block_until_ready(sums[-2:-1])  # one in flight while the next is put together, and no more
                progress()
        total, weight = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
        if not weight:
            why = counted(error.reason for error in bad)
            first = bad[0] if bad else "none at all"
            raise HeldOutError(f"data.eval_path: not one usable record ({why}); the first: {first}")
        if bad and not self._warned:
            listed = "; ".join(str(error) for error in bad[:5])
            log.warning("%d held-out records cannot be used and are left out, the first: %s", len(bad), listed)
        self._warned = True
        return float(total / weight)

    def _batch(self, encoded: Iterable[EncodedGroup], bad: list[RecordError], stop: Any) -> RowBatch | None:
        """This process's rows of a few groups, in the shape that all processes agree on; None if one is to stop."""
        groups: list[Group] = []
        for group in encoded:
            bad += group.errors.values()
            groups += share_prefix(group.examples, self._shape.visual_token_ids)
        _, count = self._options.local(jax.process_count())
        rows = tuple(tuple(row) for row in pack_groups(groups, count))
        needed = self._shape.needed(rows)
        *of_all, stopping = multihost.gather([*dataclasses.astuple(needed), bool(stop)]).max(axis=0).tolist()
        return None if stopping else self._shape.collate(rows, self._shape.sizes(RowSizes(*of_all)), needed.length)


def _groups(clips: np.ndarray, most: int) -> Iterator[Questions]:
    """The records of a source by clip, at most so many together, in the order of the file."""
    by_clip: dict[int, list[int]] = {}
    for i, clip in enumerate(clips.tolist()):
        by_clip.setdefault(clip, []).append(i)
    for records in by_clip.values():
        for start in range(0, len(records), most):
            yield Questions(0, tuple(records[start : start + most]))
