"""What a training run begins with, whatever its task: records, the step to go on after, model and optimiser."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import jax
import ml_collections

from mllm4d_jax.data.quarantine import Quarantine
from mllm4d_jax.data.sources import Mixture, RecordSource
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.models.split import needs_adapter
from mllm4d_jax.parallel import multihost
from mllm4d_jax.report.reading import QUARANTINE
from mllm4d_jax.run.build import Parts, build, encoder_of, open_records
from mllm4d_jax.run.checkpoint import Checkpoints, Progress, check_resumable, content_digests, flat_config
from mllm4d_jax.run.clips import check_clips
from mllm4d_jax.run.saved import ResumeError
from mllm4d_jax.run.workdir import write_config

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Begun:
    """A run of which only its task's own parts are missing.

    Attributes:
      workdir, checkpoints: where it is kept.
      mixture: its records; `content`: digests for `checkpoint.check_resumable`.
      progress: where it begins.
      parts: model and optimiser as they are built; what the newest checkpoint has is not in them yet.
      encoder: of its records; its decoder processes have to be closed.
    """

    workdir: Path
    checkpoints: Checkpoints
    mixture: Mixture
    content: Mapping[str, str]
    progress: Progress
    parts: Parts
    encoder: Encoder

    @property
    def config(self) -> ml_collections.ConfigDict:
        """Every key of its task."""
        return self.parts.config

    def open_quarantine(self, per_group: int = 1) -> Quarantine:
        """Open its list of unusable records; `per_group`: questions that a bad clip takes out together."""
        return Quarantine(
            self.workdir / QUARANTINE,
            self.config.data.max_quarantine_rate,
            rejected=multihost.share(self.progress.rejected),
            fresh=self.progress.step == 0,
            host=jax.process_index(),
            per_group=per_group,
        )

    def facts(self) -> dict[str, str]:
        """Return what it is, for its page."""
        c, parts = self.config, self.parts
        adapter = [f"LoRA rank {c.lora.rank} on {', '.join(c.lora.targets)}"] * needs_adapter(c.train.trainable)
        chosen = ", ".join(adapter + [pattern for pattern in c.train.trainable if pattern != "lora"])
        trained, frozen = (f"{sum(x.size for x in jax.tree.leaves(t)):,}" for t in (parts.trainable, parts.frozen))
        return {
            "records": f"{len(self.mixture):,} in {self.mixture.name}",
            "trainable parameters": f"{trained} ({chosen})",
            "frozen parameters": frozen,
            "devices": f"{parts.mesh.size} x {jax.devices()[0].device_kind} of {jax.process_count()} process(es), "
            f"mesh {dict(parts.mesh.shape)}",
        }


def begin(
    config: ml_collections.ConfigDict, workdir: Path, checkpoints: Checkpoints, held_out: RecordSource | None = None
) -> Begun:
    """Open the records, find the step to go on after, write config.json, and build model, optimiser and encoder.

    Args:
      held_out: records by whose loss the best checkpoints are chosen.

    Raises:
      BuildError, ResumeError, ClipsError: no records, or a workdir of another run; and what `build` raises.
    """
    mixture = open_records(config)
    content = content_digests(config.model.path, mixture, held_out)
    progress = resume_point(config, content, checkpoints)

    def note() -> None:
        check_clips(workdir, [*mixture.sources, *([held_out] if held_out else [])], fresh=progress.step == 0)
        write_config(workdir, config)

    multihost.primary_only(note)
    chat = config.model.chat_template
    encoder = encoder_of(config.model.path, config.video, config.data.max_tokens, chat_template=chat)
    return Begun(workdir, checkpoints, mixture, content, progress, build(config), encoder)


def resume_point(config: ml_collections.ConfigDict, content: Mapping[str, str], checkpoints: Checkpoints) -> Progress:
    """Return the progress of the workdir's newest checkpoint, or of a run from the start.

    Args:
      content: digests, see `checkpoint.content_digests`.

    Raises:
      ResumeError: the checkpoint is of a run with other settings, or train.resume is off and there is one.
    """
    latest = checkpoints.latest()
    if latest is None:
        return Progress()
    if not config.train.resume:
        raise ResumeError(
            f"{checkpoints.folder} already holds step {latest}: give another --workdir for a new run, or leave "
            "train.resume on to go on with that one"
        )
    stored = checkpoints.meta(latest)
    check_resumable(stored, flat_config(config), content, checkpoints.folder)
    log.info("continuing after step %d", latest)
    return Progress(stored.step, stored.position, stored.rejected)
