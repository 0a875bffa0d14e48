"""The `captions` source: rendered clips and what a small base model is trained on about them, resumable by clips."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from configs.schema import fixed
from configs.tables.curation import CLIP_KEYS
from data_prep.captions import matching, told
from data_prep.captions.captions import CAMERA, DESCRIBE, aspects, captions, things_told
from data_prep.captions.placed import PLACE, placed, placed_behind_questions
from data_prep.captions.words import spoken_words
from data_prep.questions.propose import QuestionRules
from data_prep.questions.rules import question_rules
from data_prep.questions.wording import ANCHORS, NUMBERING, PHRASINGS, THRESHOLD, brief_state, short_reasoning
from data_prep.scenes.relations import LABELS, RelationRules
from data_prep.sources.frames import write_video
from data_prep.store.export import RecordWriter
from data_prep.store.parts import ClipResult, PartStore, process_clips
from data_prep.synthetic.clip import make_clip
from data_prep.synthetic.worlds import SyntheticConfig, pieces_of_names
from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.qa.options import INSTRUCTION, lettered, write_question

PHRASES = "phrases.json"
_ALL = 99
# What every later step keeps: a skill that none of its texts asks for is forgotten within a step.
_KEPT: Mapping[str, int] = {"matching": 1, "far": 1, "reckoning": 1}
# File of each step of pre-training -> kinds of the records in it, each with how many of a clip at most.
FILES: Mapping[str, Mapping[str, int]] = {
    "letters.json": {"matching": _ALL, "far": _ALL},
    "matching.json": {"matching": _ALL, "far": _ALL, "reckoning": _ALL},
    "placing.json": {"caption": _ALL, "place": _ALL, **_KEPT},
    "asking.json": {"asked": 3, "place": 1, "told": 3, "caption": 1, "aspect": 1, **_KEPT},
}
_WITHOUT_CLIPS = ("letters.json",)  # beside a clip letters are hardly learned from nothing
# Of a clip: objects described, texts about a few aspects, questions of either kind that are matched, letters looked up
# behind states, texts about all that states come to, states asked for behind a question, questions about told states.
_OBJECTS, _ASPECTS, _MATCHED, _FAR, _RECKONED, _ASKED, _TOLD = 2, 6, 1, 2, 4, 3, 4
_UNSEEN = 10_000_000  # from this number on worlds are only told of
_TOLD_SIZE = 32  # pixels: enough to know which points are seen
_CLIP = "<video>\n"
_FIELD = re.compile(r"\{\w+\}")


def run_captions(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Write videos/, `FILES` and phrases.json, which lists what is worth a token of its own, into the workdir.

    Raises:
      StoreError: the workdir holds another run's results. KindError: as `question_rules`.
    """
    root = Path(workdir).absolute()
    (root / "videos").mkdir(parents=True, exist_ok=True)
    s = config.synthetic
    made = SyntheticConfig.of(s)
    rules = question_rules(config)
    clip_ids = [f"captions-{config.seed}-{n:06d}" for n in range(s.clips)]
    with PartStore(root, seed=config.seed, config=fixed(config, CLIP_KEYS)) as store:
        work = functools.partial(caption_clip, root, made, rules, config.seed)
        done = process_clips(clip_ids, work, store, workers=config.workers)
        print(f"{done} clips done now, {len(clip_ids)} in all")
        with contextlib.ExitStack() as files:
            writers = {name: files.enter_context(RecordWriter(root / name)) for name in FILES}
            for clip_id in clip_ids:
                rows = store.read(clip_id).rows
                for name, kinds in FILES.items():
                    for row in rows_of(rows, kinds, int(clip_id.rpartition("-")[2])):
                        writers[name].write(without_clip(row) if name in _WITHOUT_CLIPS else row)
    write_json(root / PHRASES, phrases())
    counts = ", ".join(f"{root / name} ({writer.records})" for name, writer in writers.items())
    print(f"records: {counts}; media root: {root}")
    return 0


def rows_of(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, int], number: int) -> list[Mapping[str, Any]]:
    """Return rows of some kinds in their order; of a kind that has more than it may, others for every clip `number`."""
    kept = []
    for kind, most in kinds.items():
        places = [place for place, row in enumerate(rows) if row["kind"] == kind]
        kept += [places[(number + n) % len(places)] for n in range(min(most, len(places)))]
    return [rows[place] for place in sorted(kept)]


def without_clip(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as text alone."""
    asked, answer = row["conversations"]
    alone = {**asked, "value": asked["value"].removeprefix(_CLIP)}
    return {key: value for key, value in row.items() if key != "video"} | {"conversations": [alone, answer]}


def caption_clip(root: Path, config: SyntheticConfig, rules: QuestionRules, seed: int, clip_id: str) -> ClipResult:
    """Render a clip, write its video and say what is in it; text alone is asked about beside it."""
    number = int(clip_id.rpartition("-")[2])
    clip = make_clip(seed, number, config)
    video = f"videos/{clip_id}.mp4"
    write_video(root / video, clip.left, clip.scene.timestamps, "mpeg4")
    rng = random.Random(f"{seed}/{number}")
    seen = things_told(clip.scene, rng, _OBJECTS)
    said = [("caption", *caption) for caption in captions(seen)]
    said += [("aspect", *caption) for caption in aspects(seen, rng, _ASPECTS)]
    places = list(placed(clip.scene, seen, sum(config.camera_height) / 2))
    said += [("place", *caption) for caption in places]
    states = {thing: text for thing, (_, text) in zip(seen, places, strict=True)}
    behind = placed_behind_questions(states, clip.scene.num_frames, rng, _ASKED)
    said += [("asked", *caption) for caption in behind]
    matched = [ask(rng) for ask in (matching.nearest_number, matching.same_word) for _ in range(_MATCHED)]
    rng.shuffle(matched)
    said += [("matching", *caption) for caption in matched]
    said += [("far", *told.letter_behind_states(rng, clip.scene.num_frames)) for _ in range(_FAR)]
    said += [("reckoning", *told.derived(rng, clip.scene.num_frames)) for _ in range(_RECKONED)]
    other = make_clip(seed, _UNSEEN + number, dataclasses.replace(config, height=_TOLD_SIZE, width=_TOLD_SIZE)).scene
    said += [("told", *caption) for caption in told.told_questions(other, rules, seed, rng, _TOLD)]
    rows = tuple(
        {
            "id": f"{clip_id}:{n:02d}",
            "video": video,
            "kind": kind,
            "conversations": [{"from": "user", "value": f"{_CLIP}{asked}"}, {"from": "gpt", "value": answer}],
        }
        for n, (kind, asked, answer) in enumerate(said)
    )
    return ClipResult(clip_id, clip.scene.source_id, "train", rows)


def phrases() -> list[str]:
    """Return what a small model's tokenizer has one token for: phrases of questions and captions, and figures.

    A sentence that is always the same is one token, as a frequent word is to a large tokenizer; figures have one
    decimal, so that nearest ones can be told without spelling.
    """
    texts = [text for several in PHRASINGS.values() for text in several]
    templates = [*texts, *ANCHORS, DESCRIBE, matching.NEAREST, matching.SAME, PLACE]
    pieces = {piece for text in templates for piece in _FIELD.split(text)}
    found = {piece for piece in pieces if len(piece.strip()) > 1}
    tau = THRESHOLD.format(tau=f"{100 * RelationRules.tau:.6g} cm")
    found |= {f" {NUMBERING}", f" {tau}", DESCRIBE.format(o=CAMERA), f"\n{INSTRUCTION}", CAMERA}
    shown = write_question("", lettered("1234")).splitlines()
    found |= {f"\n{shown[1]}", *(f"\n{line[:-1]}" for line in shown[2:6])}
    found |= {label for labels in LABELS.values() for label in labels}
    found |= {piece for piece in re.split(r"\w: \w|\b\w\b", short_reasoning("x", "y")) if piece}
    found |= {
        "the object",
        *pieces_of_names(),
        *spoken_words(),
        ": ",
        " seconds>",
        "user\n",
        "assistant\n",
        "system\n",
        *_around_centers(),
    }
    figures = [f"{n / 10:.1f}" for n in range(100)]
    return [*sorted(found), *figures, *(f"-{figure}" for figure in figures[1:])]


def _around_centers() -> set[str]:
    """Return what stands around the figures of spatial states, as few and as long pieces as there can be."""
    whole, without = (brief_state(0, (1, 1, 1), thing) + "\n" for thing in ((1, 1, 1), None))
    return {piece for text in (whole, without) for piece in re.split(r"\d\.?\d?", text)}
