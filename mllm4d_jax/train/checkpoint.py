"""Checkpoints of a run: adapter, optimiser and everything else needed to go on exactly where it stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

# Config keys that may differ between the parts of one run: they change where or how fast, not what is computed (the
# device layout, the layout of rows, the attention backend and the chunking change sums in the last bits).
FREE_KEYS = frozenset(
    {
        "workdir",
        "distributed",
        "model.attention",
        "model.remat",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "video.decode_timeout_s",
        "data.workers",
        "data.rows",
        "data.prefix_buckets",
        "data.branch_buckets",
        "data.max_quarantine_rate",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.resume",
        "train.loss_chunk",
    }
)
# Keys that name files: the content has to be the same (see `Meta.content`), the place may change.
CONTENT_KEYS = frozenset(
    {"model.path", "data.path", "data.root", "data.mixture", "prompt.system", "prompt.system_file"}
)
_LISTED = 5  # differences named in an error


class ResumeError(ValueError):
    """The checkpoints in the workdir cannot be continued with this config."""


@dataclasses.dataclass(frozen=True)
class Meta:
    """The part of a checkpoint that is not arrays.

    Attributes:
      step: optimiser steps done.
      position, rejected: the loader's state, see `data.loader`.
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

    def __init__(self, folder: str | Path, keep: int) -> None:
        """
        Args:
          folder: made when missing.
          keep: number of newest checkpoints kept.
        """
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exc: object) -> None:
        """Waits until what was saved is on disk."""
        self._manager.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def save(self, lora: Any, opt_state: Any, meta: Meta) -> None:
        """Saves as step `meta.step`. The arrays may be donated or changed as soon as this returns."""
        self._manager.save(
            meta.step,
            args=ocp.args.Composite(
                lora=ocp.args.StandardSave(lora),
                opt=ocp.args.StandardSave(opt_state),
                meta=ocp.args.JsonSave({"run": dataclasses.asdict(meta), "shapes": _shapes(lora)}),
            ),
        )

    def meta(self, step: int) -> Meta:
        """What `save` was given for a step."""
        return Meta(**self._json(step)["run"])

    def _json(self, step: int) -> dict[str, Any]:
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, lora: Any, opt_state: Any) -> tuple[Any, Any]:
        """The arrays of a step.

        Args:
          step: one that exists.
          lora, opt_state: trees with the shapes and the placement wanted; their values are not used.

        Raises:
          ResumeError: the stored adapter has other names or shapes.
        """
        stored, wanted = self._json(step)["shapes"], _shapes(lora)
        differing = [name for name in sorted(stored | wanted) if stored.get(name) != wanted.get(name)]
        if differing:
            listed = ", ".join(f"{n}: stored {stored.get(n)}, model {wanted.get(n)}" for n in differing[:_LISTED])
            raise ResumeError(f"the adapter in {self.folder / str(step)} does not fit the model: {listed}")
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (lora, opt_state))
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(lora=ocp.args.StandardRestore(target[0]), opt=ocp.args.StandardRestore(target[1])),
        )
        return restored["lora"], restored["opt"]


def _shapes(tree: Any) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): list(leaf.shape) for path, leaf in leaves}


def check_resumable(stored: Meta, config: Mapping[str, Any], content: Mapping[str, str], folder: str | Path) -> None:
    """Refuses to continue a run as a different one.

    Args:
      stored: of the checkpoint.
      config: the resolved config now, flat.
      content: digests now.
      folder: named in the error.

    Raises:
      ResumeError: naming every key that differs, with both values.
    """
    differing = []
    for key in sorted(set(stored.config) | set(config)):
        before, now = (_plain(c.get(key, "(not there)")) for c in (stored.config, config))
        if key not in FREE_KEYS | CONTENT_KEYS and before != now:
            differing.append(f"{key}: was {before!r}, is {now!r}")
    for key in sorted(set(stored.content) | set(content)):
        if stored.content.get(key) != content.get(key):
            before, now = (_plain(c.get(key, "")) for c in (stored.config, config))
            differing.append(f"{key}: the content is not the same as when the run began (was {before!r}, is {now!r})")
    if differing:
        listed = "\n  ".join(differing)
        raise ResumeError(
            f"{folder} holds step {stored.step} of a run with other settings:\n  {listed}\n"
            "Set these back to go on with that run, or give another --workdir to start a new one"
        )


def _plain(value: Any) -> Any:
    """Tuples come back from JSON as lists."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
