"""The `curate` task: clips -> scenes -> questions -> record files, resumable clip by clip.

A clip is a Stereo4D annotation file with its rectified left video and two sidecars beside it (`clip_files`). The
`synthetic` source first writes such clips, so that both sources go through the same readers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from data_prep import blind
from data_prep.balance import PRESETS, select
from data_prep.errors import SceneError
from data_prep.export import Output, assemble, check_result
from data_prep.objects import objects_from_tracks, read_captions, read_masks
from data_prep.parts import ClipRejected, ClipResult, PartStore, process_clips
from data_prep.questions import QuestionRules, propose
from data_prep.relations import Refused
from data_prep.scene import Scene
from data_prep.splits import split_of
from data_prep.stereo4d import frames_size, read_stereo4d
from data_prep.synthetic import make_clip, write_clip
from data_prep.worlds import SyntheticConfig

CLIPS = "clips"
TRAIN, BENCH = "train.json", "bench.json"
# What balancing and the blind guessers read; conversations and solutions stay on disk.
_JUDGED = (
    "id",
    "source_id",
    "question_type",
    "subtask",
    "template",
    "answer",
    "options",
    "label",
    "rank",
    "motion",
    "frames",
)


class CurateError(ValueError):
    """The configured source cannot be curated."""


@dataclasses.dataclass(frozen=True)
class ClipFiles:
    """Files of one clip: annotations npz, left video, masks (npz or RLE JSON), captions JSON."""

    annotations: Path
    video: Path
    masks: Path
    captions: Path


def clip_files(folder: Path, stem: str) -> ClipFiles:
    """The files of clip `stem`: `.npz`, `-left_rectified.mp4`, `-masks.npz` or `-masks.json`, `-captions.json`.

    Raises:
      ClipRejected: "missing_file", naming those that are not there.
    """
    masks = next((p for p in (folder / f"{stem}-masks{s}" for s in (".npz", ".json")) if p.is_file()), None)
    named = [folder / f"{stem}{ending}" for ending in (".npz", "-left_rectified.mp4", "-captions.json")]
    missing = [p.name for p in named if not p.is_file()] + ([] if masks else [f"{stem}-masks.npz or .json"])
    if missing:
        raise ClipRejected("missing_file", f"{folder} has no {', '.join(missing)}")
    return ClipFiles(named[0], named[1], masks, named[2])


def read_scene(files: ClipFiles, scale: str) -> tuple[Scene, tuple[Mapping[str, str], ...]]:
    """The scene of a clip with its objects, and the objects that were left out (reason, detail).

    Args:
      scale: one of `scene.SCALES`.

    Raises:
      SceneError: a file is damaged, or files do not fit each other.
    """
    clip = read_stereo4d(files.annotations)
    scene = clip.scene(frames_size(files.video, len(clip.timestamps)), scale=scale)
    masks = read_masks(files.masks, scene.num_frames, scene.image_size)
    objects, dropped = objects_from_tracks(scene, clip.tracks, masks, read_captions(files.captions))
    left_out = tuple({"reason": "object_dropped", "detail": f"{d.object_id}: {d.reason}"} for d in dropped)
    return dataclasses.replace(scene, objects=objects), left_out


@dataclasses.dataclass(frozen=True)
class ClipWork:
    """Turns one clip into its questions; picklable, and a function of the clip alone.

    Attributes:
      root: media root; videos are named relative to it.
      folder: where the clips' files are.
      scale: see `read_scene`.
      rules, seed, bench_share: see `questions.propose` and `splits.split_of`.
      synthetic: None to read clips that are there, else what to render first; a clip id then ends in its number.
    """

    root: Path
    folder: Path
    scale: str
    rules: QuestionRules
    seed: int
    bench_share: float
    synthetic: SyntheticConfig | None = None

    def __call__(self, clip_id: str) -> ClipResult:
        """Raises ClipRejected for a clip that gives no questions."""
        source_id = ""
        try:
            scene, left_out = read_scene(self._files(clip_id), self.scale)
            source_id = scene.source_id
            found = propose(scene, self.rules, self.seed)
        except SceneError as error:
            raise ClipRejected("bad_scene", str(error), source_id) from error
        except Refused as error:
            raise ClipRejected(error.reason, str(error), source_id) from error
        if not found:
            raise ClipRejected("no_questions", "no relation of this clip has a clear answer", source_id)
        video = clip_files(self.folder, scene.clip_id).video.relative_to(self.root).as_posix()
        rows = tuple(question.record(video) for question in found)
        split = split_of(source_id, bench_share=self.bench_share)
        return ClipResult(clip_id, source_id, split, rows, left_out)

    def _files(self, clip_id: str) -> ClipFiles:
        if self.synthetic is None:
            return clip_files(self.folder, clip_id)
        clip = make_clip(self.seed, int(clip_id.rpartition("-")[2]), self.synthetic)
        write_clip(clip, self.folder, codec="mpeg4")
        return clip_files(self.folder, clip.scene.clip_id)


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Entry point of the task: writes train.json, bench.json, rejected.jsonl and manifest.json into the workdir.

    Raises:
      CurateError: no clips. ExportError: the workdir holds another run's results. BalanceError: too few questions.
    """
    root = Path(workdir)
    work, clip_ids = plan(config, root)
    settings = {k: v for k, v in config.to_dict().items() if k not in ("workers", "workdir", "distributed")}
    with PartStore(root, seed=config.seed, config=settings) as store:
        done = process_clips(clip_ids, work, store, workers=config.workers, check=check_result, progress=True)
        rows = [{k: row[k] for k in _JUDGED} for clip_id in clip_ids for row in store.read(clip_id).rows]
        chosen = choose(config, rows)
        outputs = [Output(TRAIN, "conversations", "train"), Output(BENCH, "bench", "bench")]
        manifest = assemble(store, clip_ids, root, outputs, keep=chosen.__contains__, progress=True)
    print(f"{done} clips done now, {len(clip_ids)} in all; {sum(manifest['rejected'].values())} rejections")
    for split, counts in manifest["questions"].items():
        print(f"{split}: {sum(counts.values())} questions; " + ", ".join(f"{k} {n}" for k, n in sorted(counts.items())))
    print_blind(row for row in rows if row["id"] in chosen)
    print(f"records: {root / TRAIN} and {root / BENCH}; media root: {work.root}")
    return 0


def plan(config: ml_collections.ConfigDict, root: Path) -> tuple[ClipWork, list[str]]:
    """What to do per clip, and the clip ids.

    Raises:
      CurateError: the input folder holds no annotation files.
    """
    rules = QuestionRules(num_frames=config.questions.num_frames, per_clip=config.questions.per_clip)
    common = dict(rules=rules, seed=config.seed, bench_share=config.bench_share)
    if config.source == "synthetic":
        s = config.synthetic
        made = SyntheticConfig(height=s.height, width=s.width, frames=s.frames, fps=s.fps, stereo=s.stereo)
        folder = root.absolute() / CLIPS
        work = ClipWork(root=root.absolute(), folder=folder, scale="metric", synthetic=made, **common)
        return work, [f"synthetic-{config.seed}-{n:06d}" for n in range(s.clips)]
    folder = Path(config.input).absolute()
    found = sorted(p.stem for p in folder.glob("*.npz") if not p.stem.endswith("-masks")) if config.input else []
    if not found:
        raise CurateError(
            f"input = '{config.input}' holds no Stereo4D annotation files (<clip>.npz beside "
            "<clip>-left_rectified.mp4, <clip>-masks.npz or .json and <clip>-captions.json)"
        )
    return ClipWork(root=folder, folder=folder, scale="assumed_baseline", **common), found


def choose(config: ml_collections.ConfigDict, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Ids of the questions of both splits, balanced by their presets. Raises BalanceError, CurateError."""
    if not rows:
        raise CurateError("not one question could be asked; the reasons are in the files under parts/ of the workdir")
    chosen: set[str] = set()
    for name, total in ((config.preset, config.total), ("bench", config.bench_total)):
        preset = dataclasses.replace(PRESETS[name], total=total or None)
        if any(split_of(row["source_id"], bench_share=config.bench_share) == preset.split for row in rows):
            picked = select(rows, preset, seed=config.seed, bench_share=config.bench_share)
            chosen |= {rows[n]["id"] for n in picked.indices}
    return chosen


def print_blind(rows: Iterable[Mapping[str, Any]]) -> None:
    """Prints what can be guessed without looking, per subtask, against chance."""
    for subtask, found in blind.baselines(list(rows)).items():
        print(f"blind {subtask}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
