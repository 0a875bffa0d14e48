"""Checkpoints of a run: parameters, optimiser and everything else needed to go on exactly where it stopped.

Dropout and the order of the data are functions of the seed and the step, so that no generator has a state to save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import ml_collections
import orbax.checkpoint as ocp

from configs.common import task_keys
from configs.schema import flatten
from mllm4d_jax import __version__
from mllm4d_jax.data.sources import Mixture, RecordSource
from mllm4d_jax.encode import chat_template
from mllm4d_jax.files import digests
from mllm4d_jax.files.remote import found, is_remote, place, trouble
from mllm4d_jax.files.storage import of_disk, storing
from mllm4d_jax.files.version import of_another
from mllm4d_jax.parallel import multihost
from mllm4d_jax.parallel.place import placed
from mllm4d_jax.run import saved
from mllm4d_jax.run.background import BackgroundErrors
from mllm4d_jax.run.saved import ResumeError

_LISTED = 5  # differences named in an error
_SAMPLED = 8 << 20  # bytes read of each file of weights
_MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    *chat_template.FILES,
)


log = logging.getLogger(__name__)


class SaveError(ValueError):
    """A checkpoint could not be written; those before it are as they were."""


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
    """The checkpoints below one folder, written in the background. Use as a context manager.

    What goes wrong in the background is raised by the next call of `save` or `check`, or at the end.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int,
        keep_best: int = 0,
        *,
        read_only: bool = False,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
          folder: made when missing.
          keep: number of newest checkpoints kept.
          keep_best: number of checkpoints with the lowest loss kept besides.
          read_only: of another run, which may be at work: nothing is changed.
          guard: called before anything is written; raises where that must not be.

        Raises:
          StorageError: the folder cannot be made.
        """
        self.folder = place(folder) if is_remote(folder) else Path(folder).absolute()
        self._guard, self._step = guard, -1
        policies, loss = ocp.checkpoint_managers, operator.itemgetter("loss")
        best = [policies.BestN(get_metric_fn=loss, reverse=True, n=keep_best)] if keep_best else []
        options = ocp.CheckpointManagerOptions(
            best_fn=loss,
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), *best]),
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._seal,
                create_directories_asynchronously=False,  # else what writes waits minutes for one that cannot be made
            ),
            create=not read_only,
            read_only=read_only,
            lightweight_initialize=read_only,  # else it reads a description in each, also in those nobody asked for
        )
        self._failures = BackgroundErrors()
        with storing(self.folder):
            if not read_only and multihost.is_primary():
                self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Self:
        self._failures.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        """Waits until what was saved is on disk.

        Raises:
          SaveError: it could not be written, and nothing else has gone wrong.
        """
        try:
            if kind is not None and jax.process_count() > 1:
                return  # others may be gone; the end of the process still waits for files that are being written
            with self._saving():
                self._manager.close()
        except Exception as error:
            if kind is None:
                raise
            if kind is not SaveError:  # else it is said already
                log.error("%s", error)
        finally:
            if kind is SaveError or self._failures.first is not None:
                saved.remove_unfinished(self.folder, settle_s=1.0)  # gives its room back
            self._failures.__exit__()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def save(
        self, trainable: Any, opt_state: Any, meta: Meta, loss: float, pending: Mapping[str, Any] | None = None
    ) -> None:
        """Saves as step `meta.step`; every process of the run has to call it.

        The checkpoint appears whole or not at all: it is written beside its place, with digests of its files, and then
        renamed. The arrays may be donated or changed as soon as this returns.

        Args:
          loss: what `keep_best` compares, the same on every process.
          pending: JSON-able work that was begun for a later step, see `pending`.

        Raises:
          SaveError: this checkpoint, or the one before, cannot be written.
        """
        shapes = {"shapes": _shapes(trainable), "opt_shapes": _shapes(opt_state)}
        content = shapes | {"run": dataclasses.asdict(meta), "pending": pending, "version": __version__}
        args = ocp.args.Composite(
            trainable=ocp.args.StandardSave(trainable),
            opt=ocp.args.StandardSave(opt_state),
            meta=ocp.args.JsonSave(content),
        )
        self._save(meta.step, args, loss)

    def save_trainable(self, step: int, trainable: Any) -> None:
        """Saves parameters alone. Raises SaveError as `save`."""
        content = {"shapes": _shapes(trainable), "opt_shapes": {}, "run": None, "version": __version__}
        parts = {"trainable": ocp.args.StandardSave(trainable), "meta": ocp.args.JsonSave(content)}
        self._save(step, ocp.args.Composite(**parts), 0.0)

    def _save(self, step: int, args: ocp.args.Composite, loss: float) -> None:
        self._guard()
        with self._saving():
            self._manager.wait_until_finished()  # so that what goes wrong is said of the step that it is about
        self._step = step
        with self._saving():
            self._manager.save(step, args=args, metrics={"loss": loss})

    def finish(self) -> None:
        """Return once the newest checkpoint is whole. Raises SaveError as `save`."""
        with self._saving():
            self._manager.wait_until_finished()
        self.check()

    def check(self) -> None:
        """Raises SaveError once the checkpoint that is being written has failed."""
        with self._saving():
            if self._failures.first is not None:
                raise self._failures.first

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            first = self._failures.first
            disk = of_disk(error, self.folder) or of_disk(first, self.folder) or trouble(error) or trouble(first)
            if disk is None:
                raise
            whole = [step for step in saved.steps(self.folder) if step != self._step]
            after = f"Step {whole[-1]} there is the newest" if whole else "There is none before it"
            raise SaveError(
                f"the checkpoint of step {self._step} cannot be saved: {disk}. {after}; once that is put right, the "
                "same command goes on from there"
            ) from error

    def _seal(self) -> None:
        """Add digests to a checkpoint that is complete but for its name; called in the background."""
        self._guard()
        if is_remote(self.folder):
            folder = self.folder / str(self._step)
        else:
            (folder,) = self.folder.glob(f"{self._step}{saved.UNFINISHED}*")
        digests.record(folder, without=saved.WRITTEN_LATER)

    def meta(self, step: int) -> Meta:
        """What `save` was given for a step. Raises ResumeError for no such checkpoint, or one that is damaged there."""
        return saved_meta(self.folder / str(step))

    def pending(self, step: int) -> dict[str, Any] | None:
        """What `save` was given as such for a step. Raises as `meta`."""
        return saved.read_meta(self.folder / str(step)).get("pending")

    def restore(self, step: int, trainable: Any, opt_state: Any) -> tuple[Any, Any]:
        """The arrays of a step, placed as wanted: on any mesh and any number of processes.

        Args:
          step: one that exists, which `saved.take_up` has found whole.
          trainable, opt_state: trees with the shapes and the placement wanted; their values are not used.

        Raises:
          ResumeError: the stored parameters, or the optimiser's, have other names or shapes.
        """
        restored = self._restore(step, trainable=trainable, opt=opt_state)
        return restored["trainable"], restored["opt"]

    def restore_trainable(self, step: int, trainable: Any) -> Any:
        """`restore` without the optimiser, of any folder: the first process compares the files with their digests.

        Raises:
          ResumeError: as `restore`, and for damage.
        """
        multihost.primary_only(lambda: self._require_whole(step, ("trainable", "meta")))
        return self._restore(step, trainable=trainable)["trainable"]

    def _require_whole(self, step: int, parts: Sequence[str]) -> None:
        folder = self.folder / str(step)
        if wrong := saved.damage(folder, parts=parts):
            others = ", ".join(str(one) for one in saved.steps(self.folder) if one != step)
            advice = f", or name another with model.step (others there: {others})" if others else ""
            raise ResumeError(f"the checkpoint {folder} is damaged: {wrong}. Put a whole copy in its place{advice}")

    def _restore(self, step: int, **trees: Any) -> Any:
        about = saved.read_meta(self.folder / str(step))
        told = of_another(self.folder / str(step), about.get("version"))
        if told and multihost.is_primary():
            log.warning("%s", told)
        names = {"trainable": ("shapes", "the parameters"), "opt": ("opt_shapes", "the optimiser's state")}
        for part, tree in trees.items():
            key, what = names[part]
            stored, wanted = about[key], _shapes(tree)
            differing = [name for name in sorted(stored | wanted) if stored.get(name) != wanted.get(name)]
            if differing:
                listed = ", ".join(f"{n}: stored {stored.get(n)}, model {wanted.get(n)}" for n in differing[:_LISTED])
                more = f", and {len(differing) - _LISTED} more" if len(differing) > _LISTED else ""
                raise ResumeError(f"{what} in {self.folder / str(step)} do not fit the model: {listed}{more}")
        args = {name: ocp.args.StandardRestore(abstract(tree)) for name, tree in trees.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**args))


def saved_meta(folder: Path) -> Meta:
    """Return the `Meta` of one checkpoint.

    Raises:
      ResumeError: it is none of a run, or damaged, or of another version of this program.
    """
    about = saved.read_meta(folder)
    run = about["run"]
    if run is None:
        raise ResumeError(f"{folder} is where a run began, not a checkpoint of one: name its workdir")
    known, found = {field.name for field in dataclasses.fields(Meta)}, set(run)
    if known != found:
        raise ResumeError(f"{saved.made_by_another(folder, about)}: it differs in {', '.join(sorted(known ^ found))}")
    return Meta(**run)


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
    keys = task_keys(config["task"])
    loose = {key.name for key in keys if key.free or key.content}
    # What a key that an earlier version did not have would have said: a new key's default is what was done before it.
    unsaid = {key.name: list(key.default) if isinstance(key.default, tuple) else key.default for key in keys}
    differing = []
    for name in sorted((set(stored.config) | set(config)) - loose):
        before, now = (c.get(name, "(not there)") for c in (stored.config, config))
        if stored.config.get(name, unsaid.get(name)) != now:
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
    """Return the digest of a model folder: config, tokenizer and chat template whole, weights sampled.

    Of each file of weights 8 MiB are read (`files.digests.sampled`): weights of another training are noticed, a
    single changed tensor where it is larger than the gap between two samples (39 MB in a file of 5 GB), a few changed
    bytes only in files up to 8 MiB.
    """
    folder, sha = place(folder), hashlib.sha256()
    for name in _MODEL_FILES:
        file = folder / name
        sha.update(name.encode() + (file.read_bytes() if file.is_file() else b""))
    # A link to a file that is gone is left to loading, which says so.
    weights = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    sha.update("\n".join(digests.all_sampled(folder, weights, _SAMPLED)).encode())
    return sha.hexdigest()


def folder_digest(folder: str | Path) -> str:
    """Return the digest of all files below a folder, sampled: the same wherever the folder is moved."""
    folder = place(folder)
    if is_remote(folder):
        files = [folder / name for name in sorted(found(folder))]
    else:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
    return hashlib.sha256("\n".join(digests.all_sampled(folder, files, _SAMPLED)).encode()).hexdigest()
