"""Checkpoints of a run: parameters, optimiser and everything else needed to go on exactly where it stopped.

Dropout and the order of the data are functions of the seed and the step, so that no generator has a state to save.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import ml_collections
import orbax.checkpoint as ocp

from configs.common import task_keys
from configs.schema import flatten
from mllm4d_jax.data.sources import Mixture, RecordSource
from mllm4d_jax.encode import chat_template
from mllm4d_jax.parallel.place import placed

_LISTED = 5  # differences named in an error
_SAMPLED = 1 << 20  # bytes read at either end of a large file
_MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    *chat_template.FILES,
)


class ResumeError(ValueError):
    """The checkpoints in the workdir cannot be continued with this config."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is; counts are over all processes, so that another number of them can go on.

    Attributes:
      step: optimiser steps done.
      position: groups of questions consumed, the loader's whole state (see `data.stream`).
      rejected: records that could not be used.
    """

    step: int = 0
    position: int = 0
    rejected: int = 0


@dataclasses.dataclass(frozen=True)
class Meta:
    """The part of a checkpoint that is not arrays.

    Attributes:
      step, position, rejected: as in `Progress`.
      config: the resolved config, flat (dotted names).
      content: digests of what the config's paths point at, by config key.
    """

    step: int
    position: int
    rejected: int
    config: Mapping[str, Any]
    content: Mapping[str, str]


class Checkpoints:
    """The checkpoints below one folder, written in the background. Use as a context manager."""

    def __init__(self, folder: str | Path, keep: int, keep_best: int = 0) -> None:
        """
        Args:
          folder: made when missing.
          keep: number of newest checkpoints kept.
          keep_best: number of checkpoints with the lowest loss kept besides.
        """
        self.folder = Path(folder).absolute()
        policies, loss = ocp.checkpoint_managers, operator.itemgetter("loss")
        best = [policies.BestN(get_metric_fn=loss, reverse=True, n=keep_best)] if keep_best else []
        options = ocp.CheckpointManagerOptions(
            best_fn=loss,
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), *best]),
            enable_async_checkpointing=True,
            create=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Waits until what was saved is on disk."""
        self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def save(
        self, trainable: Any, opt_state: Any, meta: Meta, loss: float, pending: Mapping[str, Any] | None = None
    ) -> None:
        """Saves as step `meta.step`; every process of the run has to call it.

        The checkpoint appears whole or not at all: it is written beside its place and then renamed. The arrays may be
        donated or changed as soon as this returns.

        Args:
          loss: what `keep_best` compares, the same on every process.
          pending: JSON-able work that was begun for a later step, see `pending`.
        """
        content = {"run": dataclasses.asdict(meta), "shapes": _shapes(trainable), "pending": pending}
        self._manager.save(
            meta.step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(trainable),
                opt=ocp.args.StandardSave(opt_state),
                meta=ocp.args.JsonSave(content),
            ),
            metrics={"loss": loss},
        )

    def replace_trainable(self, step: int, trainable: Any) -> None:
        """Saves parameters alone, in place of what there is for the step."""
        if step in self._manager.all_steps():
            self._manager.delete(step)
        args = ocp.args.Composite(
            trainable=ocp.args.StandardSave(trainable), meta=ocp.args.JsonSave({"shapes": _shapes(trainable)})
        )
        self._manager.save(step, args=args, metrics={"loss": 0.0})

    def meta(self, step: int) -> Meta:
        """What `save` was given for a step."""
        return Meta(**self._json(step)["run"])

    def pending(self, step: int) -> dict[str, Any] | None:
        """What `save` was given as such for a step."""
        return self._json(step).get("pending")

    def _json(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, trainable: Any, opt_state: Any) -> tuple[Any, Any]:
        """The arrays of a step, placed as wanted: on any mesh and any number of processes.

        Args:
          step: one that exists.
          trainable, opt_state: trees with the shapes and the placement wanted; their values are not used.

        Raises:
          ResumeError: the stored parameters have other names or shapes.
        """
        restored = self._restore(step, trainable=trainable, opt=opt_state)
        return restored["trainable"], restored["opt"]

    def restore_trainable(self, step: int, trainable: Any) -> Any:
        """`restore` without the optimiser."""
        return self._restore(step, trainable=trainable)["trainable"]

    def _restore(self, step: int, **trees: Any) -> Any:
        stored, wanted = self._json(step)["shapes"], _shapes(trees["trainable"])
        differing = [name for name in sorted(stored | wanted) if stored.get(name) != wanted.get(name)]
        if differing:
            listed = ", ".join(f"{n}: stored {stored.get(n)}, model {wanted.get(n)}" for n in differing[:_LISTED])
            raise ResumeError(f"the parameters in {self.folder / str(step)} do not fit the model: {listed}")
        args = {name: ocp.args.StandardRestore(abstract(tree)) for name, tree in trees.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**args))


def abstract(tree: Any) -> Any:
    """Return the shapes of a tree of arrays, placed like these."""
    return jax.tree.map(lambda x: placed(x, x.sharding), tree)


def _shapes(tree: Any) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape) for path, leaf in leaves}


def check_resumable(stored: Meta, config: Mapping[str, Any], content: Mapping[str, str], folder: str | Path) -> None:
    """Refuses to continue a run as a different one; which keys may change is in the table of its task (`Key`).

    Args:
      stored: of the checkpoint.
      config: the resolved config now, flat.
      content: digests now.
      folder: named in the error.

    Raises:
      ResumeError: naming every key that differs, with both values.
    """
    loose = {key.name for key in task_keys(config["task"]) if key.free or key.content}
    differing = []
    for name in sorted((set(stored.config) | set(config)) - loose):
        before, now = (c.get(name, "(not there)") for c in (stored.config, config))
        if before != now:
            differing.append(f"{name}: was {before!r}, is {now!r}")
    for name in sorted(set(stored.content) | set(content)):
        if name == "data.eval_path" and not config["train.keep_best"]:
            continue  # it matters only where checkpoints are compared by their loss on these records
        if stored.content.get(name) != content.get(name):
            before, now = (c.get(name, "") for c in (stored.config, config))
            differing.append(f"{name}: the content is not the same as when the run began (was {before!r}, is {now!r})")
    if differing:
        listed = "\n  ".join(differing)
        raise ResumeError(
            f"{folder} holds step {stored.step} of a run with other settings:\n  {listed}\n"
            "Set these back to go on with that run, or give another --workdir to start a new one"
        )


def flat_config(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Return dotted name -> value, in the config's own order; tuples as lists, as JSON gives them back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flatten(config)}


def content_digests(model: str | Path, records: Mixture, held_out: RecordSource | None = None) -> Mapping[str, str]:
    """Return digests of what must be the same again when a run is resumed, by config key."""
    digests = {
        "model.path": model_digest(model),
        "data.path": records.digest,
        "prompt.system": hashlib.sha256(records.system_prompt.encode()).hexdigest(),
    }
    return digests if held_out is None else digests | {"data.eval_path": held_out.digest}


def model_digest(folder: str | Path) -> str:
    """Return the digest of a model folder: config, tokenizer and chat template whole, weights sampled."""
    sha = hashlib.sha256()
    for name in _MODEL_FILES:
        file = Path(folder) / name
        sha.update(name.encode() + (file.read_bytes() if file.is_file() else b""))
    # A link to a file that is gone is left to loading, which says so.
    _add_sampled(sha, Path(folder), sorted(p for p in Path(folder).glob("*.safetensors") if p.is_file()))
    return sha.hexdigest()


def folder_digest(folder: str | Path) -> str:
    """Return the digest of all files below a folder, sampled: the same wherever the folder is moved."""
    sha = hashlib.sha256()
    _add_sampled(sha, Path(folder), sorted(p for p in Path(folder).rglob("*") if p.is_file()))
    return sha.hexdigest()


def _add_sampled(sha: hashlib._Hash, folder: Path, files: Iterable[Path]) -> None:
    """Add name, size and a mebibyte at either end of each file."""
    for file in files:
        size = file.stat().st_size
        sha.update(f"{file.relative_to(folder).as_posix()} {size}".encode())
        with file.open("rb") as f:
            sha.update(f.read(_SAMPLED))
            f.seek(max(0, size - _SAMPLED))
            sha.update(f.read(_SAMPLED))
