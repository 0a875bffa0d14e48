"""The `captions` source: rendered clips and what a small base model is trained on about them, resumable by clips."""

from __future__ import annotations

import contextlib
import functools
import random
import re
from collections.abc import Mapping
from pathlib import Path

import ml_collections

from configs.schema import fixed
from configs.tables.curation import CLIP_KEYS
from data_prep.captions import captions as say
from data_prep.captions import matching
from data_prep.captions.words import spoken_words
from data_prep.questions.names import object_names
from data_prep.questions.wording import ANCHORS, NUMBERING, PHRASINGS, THRESHOLD, short_reasoning
from data_prep.scenes.relations import LABELS, RelationRules
from data_prep.sources.frames import write_video
from data_prep.store.export import RecordWriter
from data_prep.store.parts import ClipResult, PartStore, process_clips
from data_prep.synthetic.clip import make_clip
from data_prep.synthetic.worlds import SyntheticConfig
from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.qa.options import INSTRUCTION, lettered, write_question

RECORDS, PHRASES = "captions.json", "phrases.json"
# Kind of a record -> the file that has all of it, to begin with one thing at a time.
PARTS: Mapping[str, str] = {"caption": "seen.json", "matching": "matching.json"}
# Of a clip: objects described, single aspects asked for, questions of either kind that the text alone answers.
_OBJECTS, _ASPECTS, _MATCHED = 2, 3, 2
_ABOUT = 0.4  # share of clips beside which is asked what a question is about
# What stands around the figures of a spatial state (`mllm4d_jax.qa.reasoning`), for the stages to come.
_STATE = ("**Spatial State (frame ", "):**\n- Camera Center: ", "\n- Object Center: ", "null", "[", "]", ", ", "-")
_FIELD = re.compile(r"\{\w+\}")


def run_captions(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Write videos/, captions.json, `PARTS` and phrases.json into the workdir.

    captions.json has all records, seen.json whole captions, which only a look at the clip can tell, matching.json
    questions that their text answers. phrases.json lists what is worth a token of its own.

    Raises:
      StoreError: the workdir holds another run's results.
    """
    root = Path(workdir).absolute()
    (root / "videos").mkdir(parents=True, exist_ok=True)
    s = config.synthetic
    made = SyntheticConfig(**{name: value for name, value in s.items() if name != "clips"})
    clip_ids = [f"captions-{config.seed}-{n:06d}" for n in range(s.clips)]
    with PartStore(root, seed=config.seed, config=fixed(config, CLIP_KEYS)) as store:
        work = functools.partial(caption_clip, root, made, config.seed)
        done = process_clips(clip_ids, work, store, workers=config.workers)
        print(f"{done} clips done now, {len(clip_ids)} in all")
        with contextlib.ExitStack() as files:
            writer = files.enter_context(RecordWriter(root / RECORDS))
            parts = {kind: files.enter_context(RecordWriter(root / name)) for kind, name in PARTS.items()}
            for clip_id in clip_ids:
                for row in store.read(clip_id).rows:
                    writer.write(row)
                    if row["kind"] in parts:
                        parts[row["kind"]].write(row)
    write_json(root / PHRASES, phrases())
    print(f"records: {root / RECORDS} ({writer.records}); media root: {root}")
    return 0


def caption_clip(root: Path, config: SyntheticConfig, seed: int, clip_id: str) -> ClipResult:
    """Render a clip, write its video and say what is in it; text alone is asked about beside it."""
    number = int(clip_id.rpartition("-")[2])
    clip = make_clip(seed, number, config)
    video = f"videos/{clip_id}.mp4"
    write_video(root / video, clip.left, clip.scene.timestamps, "mpeg4")
    rng = random.Random(f"{seed}/{number}")
    told = say.things_told(clip.scene, rng, _OBJECTS)
    said = [("caption", *caption) for caption in say.captions(told)]
    said += [("aspect", *caption) for caption in say.aspects(told, rng, _ASPECTS)]
    for ask in (matching.nearest_number, matching.same_word):
        said += [("matching", *ask(rng)) for _ in range(_MATCHED)]
    if rng.random() < _ABOUT:
        names = list(object_names(clip.scene)[0].values()) or ["the box"]
        said.append(("about", *matching.aspect_asked(rng, clip.scene.num_frames, rng.choice(names))))
    rows = tuple(
        {
            "id": f"{clip_id}:{n:02d}",
            "video": video,
            "kind": kind,
            "conversations": [{"from": "user", "value": f"<video>\n{asked}"}, {"from": "gpt", "value": answer}],
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
    templates = [*texts, *ANCHORS, say.DESCRIBE, matching.NEAREST, matching.SAME, matching.ABOUT]
    pieces = {piece for text in templates for piece in _FIELD.split(text)}
    found = {piece for piece in pieces if len(piece.strip()) > 1}
    tau = THRESHOLD.format(tau=f"{100 * RelationRules.tau:.6g} cm")
    found |= {f" {NUMBERING}", f" {tau}", say.DESCRIBE.format(o=say.CAMERA), f"\n{INSTRUCTION}", say.CAMERA}
    shown = write_question("", lettered("1234")).splitlines()
    found |= {f"\n{shown[1]}", *(f"\n{line[:-1]}" for line in shown[2:6])}
    found |= {label for labels in LABELS.values() for label in labels}
    found |= {piece for piece in re.split(r"\w: \w|\b\w\b", short_reasoning("x", "y")) if piece}
    found |= {*spoken_words(), ": ", *_STATE, " seconds>", "user\n", "assistant\n", "system\n"}
    return [*sorted(found), *(f"{n / 10:.1f}" for n in range(100))]
