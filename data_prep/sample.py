"""The sample world: a few rendered clips with questions and reasoning, as a curation writes them, for runs that have no
data of their own.

A small cut through the whole of `data_prep`: clips of `synthetic` with exact truth, questions of `questions`, the
reasoning of `cold_start.oracle`. It exists to try the training path in minutes; the clips are few and small enough to
be learned by heart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from configs.tables.tiny import PROMPT, TINY
from data_prep.cold_start import oracle
from data_prep.cold_start.r1_items import parse_item
from data_prep.cold_start.selection import record as reasoning_record
from data_prep.questions.propose import Question, QuestionRules, propose
from data_prep.sources.frames import write_video
from data_prep.store.export import RecordWriter, conversation_record, r1_record
from data_prep.synthetic.clip import SyntheticClip, make_clip
from data_prep.synthetic.worlds import SyntheticConfig
from mllm4d_jax.files.made_folder import make_folder

WORLD = SyntheticConfig(height=64, width=64, frames=16, fps=8.0)
# Questions count the frames that the tiny runs see, four a clip.
RULES = QuestionRules(num_frames=TINY["video.num_frames"], per_clip=4)


def sample_clips(seed: int) -> Iterator[tuple[SyntheticClip, list[Question]]]:
    """Yield clips and their questions without end; a clip with fewer than `RULES.per_clip` clear ones is left out.

    Args:
      seed: at least 0; clip after clip follows from it alone.
    """
    index = 0
    while True:
        clip = make_clip(seed, index, WORLD)
        asked = propose(clip.scene, RULES, seed)
        if len(asked) == RULES.per_clip:
            yield clip, asked
        index += 1


def write_sample_world(folder: str | Path, seed: int = 0, clips: int = 6) -> Path:
    """Write clips and records; the same arguments give the same bytes, and a complete world made with them is kept.

    Args:
      folder: gets `records.json` (conversations, as a curation's train.json), `r1.jsonl` (prompts with solutions, as
        train_r1.jsonl), `cold_start.json` (with brief reasoning, under the tiny runs' system prompt) and
        `videos/*.mp4`; it is also the media root.
      seed: of everything drawn, at least 0.
      clips: number of clips; each has `RULES.per_clip` questions.

    Returns:
      The path of `records.json`.

    Raises:
      FolderError: the folder has something else in it. SceneError: FFmpeg cannot write the videos.
        StorageError: the disk is full.
    """
    folder = Path(folder)

    def write(target: Path) -> None:
        (target / "videos").mkdir()
        with (
            RecordWriter(target / "records.json") as records,
            RecordWriter(target / "r1.jsonl") as prompts,
            RecordWriter(target / "cold_start.json") as reasoned,
        ):
            for n, (clip, asked) in zip(range(clips), sample_clips(seed), strict=False):
                video = f"videos/clip_{n:03d}.mp4"
                write_video(target / video, clip.left, clip.scene.timestamps, "mpeg4")
                for question in asked:
                    row = question.record(video)
                    records.write(conversation_record(row))
                    prompts.write(prompt := r1_record(row))
                    item = dataclasses.replace(parse_item(prompt, row["id"], row["id"]), system=PROMPT)
                    reasoned.write(reasoning_record(item, oracle.compose_brief(item), item.id))

    make_folder(folder, {"kind": "sample world", "version": 4, "seed": seed, "clips": clips}, write)
    return folder / "records.json"
