"""Gathers what `report.write_report` shows of a curation run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from data_prep.questions import blind
from data_prep.questions.balance import PRESETS
from data_prep.questions.splits import SPLITS, fraction
from data_prep.sources.base import Source
from data_prep.store.parts import PartStore
from data_prep.store.report import CurationSummary, SampledClip, write_report
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule

REPORT = "report.html"


def write_curation_report(
    config: ml_collections.ConfigDict,
    root: Path,
    source: Source,
    manifest: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Prints the blind guessers' figures and writes `<root>/report.html`.

    Args:
      root: the workdir; its parts hold the questions.
      rows: of the chosen questions, see `curate.judged_rows`.
    """
    by_split = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    guessed = {split: blind.baselines(group) for split, group in by_split.items() if group}
    letters = {
        split: blind.letter_test(group)
        for split, group in by_split.items()
        if any(len(row["options"]) == 4 for row in group)
    }
    for split, found in guessed.items():
        print_blind(split, found)
    summary = CurationSummary(
        manifest=manifest,
        rows=rows,
        blind=guessed,
        letters=letters,
        clips=sampled_clips(config, root, source, rows),
        shares=PRESETS[config.preset].shares if config.preset in PRESETS else {},
    )
    write_report(root / REPORT, summary)


def print_blind(split: str, found: Mapping[str, Mapping[str, float]]) -> None:
    """What can be guessed without looking, per subtask: the best guesser against chance."""
    for subtask, figures in found.items():
        guessers = {name: value for name, value in figures.items() if name not in ("chance", "count")}
        best = max(guessers, key=guessers.get)
        print(
            f"blind, {split}, {subtask}: best {guessers[best]:.3f} ({best}), chance {figures['chance']:.3f}, "
            f"{figures['count']:.0f} questions"
        )


def sampled_clips(
    config: ml_collections.ConfigDict, root: Path, source: Source, rows: Sequence[Mapping[str, Any]]
) -> list[SampledClip]:
    """A few clips with scene, frames and chosen questions; the same for the same rows and seed."""
    chosen: dict[str, set[str]] = {}
    for row in rows:
        chosen.setdefault(row["part"], set()).add(row["id"])
    names = sorted(chosen, key=lambda name: fraction(config.seed, "report", name))[: config.report.clips]
    store = PartStore(root, seed=config.seed, config={})
    pool, found = DecodePool(config.decode_timeout_s), []
    with pool:
        for name in sorted(names):
            clip = source.load(name)
            seen = pool.read(str(clip.video), SampleRule("uniform", config.questions.num_frames, None))
            questions = [row for row in store.read(name).rows if row["id"] in chosen[name]]
            named = {frame for row in questions for frame in row["frames"]["source"]}
            frames = {int(n): image for n, image in zip(seen.indices, seen.frames, strict=True) if int(n) in named}
            quality = clip.scene.provenance.get("quality") or {}
            figures = {k: float(v) for k, v in quality.items() if isinstance(v, int | float)}
            found.append(SampledClip(clip.scene, frames, questions, figures))
    return found
