"""The `curate` task: clips -> scenes -> questions -> record files and a report, resumable clip by clip."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_collections

from configs.schema import fixed
from configs.tables.curation import CLIP_KEYS
from data_prep.captions.task import run_captions
from data_prep.cold_start.task import run_cold_start
from data_prep.questions.balance import PRESETS, BalanceError, select, split_of
from data_prep.questions.blind import screen
from data_prep.questions.propose import QuestionRules, ask
from data_prep.questions.rules import question_rules
from data_prep.scenes.forms import FORMS
from data_prep.scenes.relations import Refused
from data_prep.sources.base import ClipSource
from data_prep.sources.formed import FormedSource
from data_prep.sources.monocular import MonocularSource
from data_prep.sources.stereo import PAIR, StereoSource
from data_prep.sources.stereo4d import Stereo4DSource, SyntheticSource
from data_prep.store.export import REJECTED, assemble, bench_record, check_result, conversation_record, r1_record
from data_prep.store.parts import ClipRejected, ClipResult, PartStore, canonical_json, process_clips
from data_prep.store.report import write_curation_report
from data_prep.store.untrusted import SceneError
from data_prep.synthetic.worlds import SyntheticConfig
from data_prep.teacher.describe import describe
from mllm4d_jax.files.atomic import write_atomic
from mllm4d_jax.files.bucket_lock import take_folder
from mllm4d_jax.files.cache import copied_folder
from mllm4d_jax.files.mirror import Mirror, copy_of
from mllm4d_jax.files.remote import is_remote
from mllm4d_jax.media.decode_pool import DecodePool

OUTPUTS = {
    "train.json": ("train", conversation_record),
    "train_r1.jsonl": ("train", r1_record),
    "bench.json": ("bench", bench_record),
}
CHOSEN = "chosen.json"
_CHOICE = ("preset", "balance", "total", "bench_total")  # of the config: what chooses among the questions of clips
EVERYTHING = "all"  # of the presets the one that balances nothing
# What balancing, the blind guessers and the report read; conversations and solutions stay on disk.
_JUDGED = (
    *("id", "clip_id", "source_id", "question_type", "subtask", "template", "answer", "options"),
    *("label", "rank", "motion", "frames"),
)
_ELSEWHERE = {"describe": describe, "captions": run_captions}  # they do not write into a bucket
# What has to be in the input folder, for the message that it is not.
_SIDECARS = "; for questions about objects <clip>-masks.npz or .json and <clip>-captions.json"
_EXPECTED = {
    "stereo4d": "Stereo4D annotations: <clip>.npz with <clip>-left_rectified.mp4 (or .mov, or a folder of images)"
    f"{_SIDECARS}",
    "stereo": "stereo videos: <clip>-left.mp4 and <clip>-right.mp4 (or _left, -left_rectified, .mov), or packed "
    f"<clip>.mp4 (stereo.layout){_SIDECARS}",
    "monocular": "<clip>.mp4 (or .mov) with <clip>-spatialtracker.npz (or <clip>_result.npz) and a folder "
    f"<clip>-moge{_SIDECARS}",
}


class CurateError(ValueError):
    """The configured input holds no clips, or nothing to ask about."""


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Run the task.

    Writes train.json, train_r1.jsonl, bench.json, rejected.jsonl, chosen.json, manifest.json and report.html into the
    workdir, and with `tfds.write` the data set under tfds/. The sources "cold_start", "describe" and
    "captions" have modules of their own.

    Raises:
      CurateError: no clips, or none with a clear answer. StoreError: the workdir holds another run's results.
      BalanceError: too few questions.
    """
    own = [path for path in (workdir, config.input) if is_remote(path)]
    if config.source in _ELSEWHERE:
        if own:
            raise CurateError(f"{own[0]}: source = '{config.source}' is not supported in a bucket yet: copy the files")
        return _ELSEWHERE[config.source](config, workdir)
    with ExitStack() as held:
        root = Path(workdir).absolute()
        if is_remote(workdir):
            root = copy_of(workdir)
            lock = take_folder(workdir, root.parent, held)
            held.enter_context(Mirror(workdir, root, lock.check))

        def named(path: Path) -> str:
            return str(path).replace(str(root), workdir) if own else str(path)

        if config.source == "cold_start":
            return run_cold_start(config, root if is_remote(workdir) else Path(workdir), named)
        return _curate(config, root, named)


def _curate(config: ml_collections.ConfigDict, root: Path, named: Callable[[Path], str]) -> int:
    """Do what `run` does in a folder of this machine. `named`: what messages call a file."""
    source = in_forms(make_source(config, root), config, root)
    clip_ids = source.clip_ids()
    rules = question_rules(config)
    work = functools.partial(ask_clip, source, rules, config.seed, config.bench_share)
    with PartStore(root, seed=config.seed, config=fixed(config, CLIP_KEYS)) as store:
        done = process_clips(clip_ids, work, store, workers=config.workers, check=check_result)
        print(f"{done} clips done now, {len(clip_ids)} in all")
        rows = judged_rows(store, clip_ids)
        settings = {name: value for name, value in config.to_dict().items() if name in _CHOICE}
        if not rows:
            rejected = assemble(store, clip_ids, root, OUTPUTS, settings=settings)["rejected"]
            raise CurateError(
                f"not one question could be asked: {json.dumps(rejected, sort_keys=True)}; clip by clip in "
                f"{named(root / REJECTED)}"
            )
        chosen = choose(config, rows, rules.weights)
        manifest = assemble(store, clip_ids, root, OUTPUTS, chosen.__contains__, settings)
        by_clip: dict[str, list[str]] = {}
        for row in rows:
            if row["id"] in chosen:
                by_clip.setdefault(row["part"], []).append(row["id"])
        write_atomic(root / CHOSEN, canonical_json(by_clip))
        _print_counts(manifest)
        write_curation_report(config, root, source, manifest, rows, chosen)
        media = config.input if is_remote(config.input) and not source.root.is_relative_to(root) else named(source.root)
        print(f"records: {', '.join(named(root / name) for name in OUTPUTS)}; media root: {media}")
        print(f"report: {named(root / 'report.html')}")
        if config.tfds.write:  # last: it decodes every clip, and ends at one that cannot be
            from data_prep.store.builder import write_dataset  # TFDS takes a while, in every worker process too

            write_dataset(config, root, source.root, store, by_clip)
    return 0


def _print_counts(manifest: Mapping[str, Any]) -> None:
    """Print how many questions there are per split and scenario, and why clips and objects were left out."""
    for split, counts in sorted(manifest["questions"].items()):
        listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        print(f"{split}: {sum(counts.values())} questions; {listed}")
    if manifest["rejected"]:
        print("left out: " + json.dumps(manifest["rejected"], sort_keys=True) + " (reasons: rejected.jsonl)")


def make_source(config: ml_collections.ConfigDict, workdir: Path) -> ClipSource:
    """Make the source of clips that the config names.

    Args:
      workdir: absolute; rendered clips, written videos and kept scenes go there.

    Raises:
      CurateError: there are no clips; says what is looked for.
    """
    if config.source == "synthetic":
        s = config.synthetic
        made = SyntheticConfig.of(s)
        return SyntheticSource(workdir, made, config.seed, s.clips)
    if not config.input:
        raise CurateError(f"input is not set: --config.input=DIR with {_EXPECTED[config.source]}")
    folder, videos, pool = (
        copied_folder(config.input).absolute(),
        workdir / "videos",
        DecodePool(config.decode_timeout_s),
    )
    if config.source == "stereo4d":
        source = Stereo4DSource(folder, videos if config.stereo4d.frames == "images" else folder, pool=pool)
    elif config.source == "monocular":
        source = MonocularSource(folder, config.monocular.max_spread, pool)
    else:
        s = config.stereo
        source = StereoSource(
            folder,
            root=folder if s.layout == PAIR else videos,
            scenes=workdir / "scenes",
            layout=s.layout,
            fov_degrees=s.fov_degrees,
            baseline=s.baseline or None,
            max_frames=s.max_frames,
            max_disparity=s.max_disparity or None,
            max_depth=s.max_depth,
            num_frames=config.questions.num_frames,
            min_gap=config.questions.min_gap,
            pool=pool,
        )
    if not source.clip_ids():
        raise CurateError(f"input = '{config.input}' holds no {_EXPECTED[config.source]}")
    return source


def in_forms(source: ClipSource, config: ml_collections.ConfigDict, workdir: Path) -> ClipSource:
    """Return the source with the forms of its clips that the config names. Raises CurateError: they cannot be made."""
    if not config.forms:
        return source
    unknown = sorted(set(config.forms) - set(FORMS))
    if unknown or len(set(config.forms)) < len(config.forms):
        raise CurateError(f"forms = {tuple(config.forms)}: {unknown or 'a name twice'}; there are {', '.join(FORMS)}")
    if config.bench_share:
        raise CurateError(f"forms with bench_share = {config.bench_share} is not supported: examine on another run's")
    taken = [clip_id for clip_id in source.clip_ids() if clip_id.rpartition("@")[2] in FORMS]
    if taken:
        raise CurateError(f"clip {taken[0]!r} has the name of a form: rename its files, or leave forms out")
    return FormedSource(source, tuple(config.forms), workdir / "forms", DecodePool(config.decode_timeout_s))


def ask_clip(source: ClipSource, rules: QuestionRules, seed: int, bench_share: float, clip_id: str) -> ClipResult:
    """Ask about a clip: `questions.propose` and `balance.split_of`; a clip or object without questions is listed.

    Raises:
      ClipRejected: the clip cannot be loaded.
    """
    try:
        clip = source.load(clip_id)
    except SceneError as error:
        raise ClipRejected("bad_scene", str(error), again=True) from error
    scene, source_id = clip.scene, clip.scene.source_id
    try:
        found, unasked = ask(scene, rules, seed)
        lost = (*clip.left_out, *unasked)
    except Refused as error:
        found, lost = [], ({"reason": error.reason, "detail": str(error)}, *clip.left_out)
    else:
        if not found:
            lost = ({"reason": "no_questions", "detail": "no relation of this clip has a clear answer"}, *lost)
    video = clip.video.relative_to(source.root).as_posix()
    rows = tuple(question.record(video) for question in found)
    return ClipResult(clip_id, source_id, split_of(source_id, bench_share=bench_share) if found else "", rows, lost)


def judged_rows(store: PartStore, clip_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Read the fields of all proposed questions that balancing, the guessers and the report need."""
    return [
        {k: row[k] for k in _JUDGED} | {"part": clip_id, "split": result.split}
        for clip_id in clip_ids
        for result in (store.read(clip_id),)
        for row in result.rows
    ]


def choose(
    config: ml_collections.ConfigDict, rows: Sequence[Mapping[str, Any]], weights: Mapping[str, float]
) -> set[str]:
    """Choose the ids of the questions of both splits by their presets; preset "all" takes the training split whole.

    Of the training set those are left out again that let a guesser exceed `balance.slack` (`blind.screen`). Where no
    held-out questions can be chosen and no number of them was asked for, that is printed.

    Args:
      weights: of the scenarios asked about, see `kind_weights`.

    Raises:
      BalanceError: too few for the totals wanted.
    """
    chosen: set[str] = set()
    for split, name, total in (("train", config.preset, config.total), ("bench", "bench", config.bench_total)):
        group = [row for row in rows if row["split"] == split]
        if name == EVERYTHING:
            chosen |= {row["id"] for row in group}
        elif group and split == "train":
            balance = config.balance
            shares = {n: share * weights[n] for n, share in PRESETS[name].shares.items() if n in weights}
            changes = {"slack": balance.slack, "stretch": balance.stretch}
            preset = dataclasses.replace(PRESETS[name], shares=shares, total=total or None, **changes)
            while True:
                kept = [group[n] for n in select(group, preset, seed=config.seed, bench_share=config.bench_share)]
                out = screen(kept, balance.slack, config.seed)
                if not out or not total:
                    break
                group = [row for row in group if row["id"] not in out]  # others take their place
            chosen |= {row["id"] for row in kept} - out
        elif group:
            shares = {n: share for n, share in PRESETS[name].shares.items() if n in weights}
            preset = dataclasses.replace(PRESETS[name], shares=shares, total=total or None)
            try:
                picked = select(group, preset, seed=config.seed, bench_share=config.bench_share)
                chosen |= {group[n]["id"] for n in picked}
            except BalanceError as error:
                if total:
                    raise
                print(f"no held-out questions: {error}")
    return chosen
