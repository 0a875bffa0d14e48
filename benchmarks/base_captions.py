"""Measure which words a base model says rightly about rendered clips that it has not seen, each after the right ones.

python -m benchmarks.base_captions --clips=128
python -m benchmarks.base_captions --model=runs/base --clips=128

Prints, for every aspect of a caption, how many words there were, how many were the most likely ones, and the share that
the most frequent word would have; "alone" where an answer begins with that aspect. Words of several tokens are left
out. "text" is what is matched beside the clip; "far": letters looked up behind states; "told": what told states come
to, their centres written again; "derived": the same without a question. A "figure", right within 0.1, is followed by
its label, or by the "option" that is nearest to it. A "letter" is that of the reasoning, of three or four options; that
of the answer is it again. A "place" is a coordinate of a state in camera heights, right within 0.1, "asked" one behind
a question; what is always zero is left out.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from configs import common
from configs.tables.quickstart import BASE
from configs.tables.quickstart_recipe import MATCHING, PRETRAINING_CLIPS
from data_prep.captions import words
from data_prep.captions.captions import CAMERA
from data_prep.captions.task import caption_clip
from data_prep.questions.options import LETTERS
from data_prep.questions.rules import question_rules
from data_prep.scenes.relations import LABELS
from data_prep.synthetic.worlds import SyntheticConfig
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import Example
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.qwen_vl import QwenVL, vision_geometry
from mllm4d_jax.qa.records import as_target
from mllm4d_jax.quickstart.stages import own
from mllm4d_jax.rows.batch import collate
from mllm4d_jax.run.build import encoder_of

SEED = 2000  # not that of pre-training
ROWS = 64  # of a batch
WAYS = {way for three in words.SIGNED.values() for way in three} | set(words.MAIN)
LABEL_WORDS = {label for labels in LABELS.values() for label in labels}
KINDS = (("way", WAYS), ("size", set(words.SIZES)), ("distance", set(words.DISTANCES)), ("column", set(words.COLUMNS)))


def examples_of(encoder: Encoder, clips: int) -> list[tuple[str, Example]]:
    """Render clips of `SEED` as pre-training's were and encode what is said about them, each with its kind."""
    config = common.config("curate", dict(PRETRAINING_CLIPS))
    made = SyntheticConfig.of(config.synthetic)
    rules = question_rules(config)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "videos").mkdir()
        names = [f"captions-{SEED}-{n:06d}" for n in range(clips)]
        said = [caption_clip(root, made, rules, SEED, name).rows for name in names]
        write_json(root / "captions.json", [row for rows in said for row in rows])
        records, number = RecordFile(str(root / "captions.json"), str(root), ""), itertools.count()
        groups = [[as_target(records[next(number)]) for _ in rows] for rows in said]
        encoded = [example for group in groups for example in encoder.encode_group(group)]  # a clip is decoded once
        return list(zip((row["kind"] for rows in said for row in rows), encoded, strict=True))


def likely(model: QwenVL, examples: list[Example]) -> Iterator[np.ndarray]:
    """Yield the most likely next token at every place of each example: i32[S]."""
    graphdef, state = nnx.split(model)
    length = max(len(e.tokens) for e in examples)

    @jax.jit
    def best(state, inputs):
        model = nnx.merge(graphdef, state)
        return model.logits(model(inputs)).argmax(-1)

    ids = (model.config.image_token_id, model.config.video_token_id)
    for start in range(0, len(examples), ROWS):
        rows = examples[start : start + ROWS]
        padded = rows + rows[:1] * (ROWS - len(rows))
        inputs = collate(padded, vision_geometry(model.config), visual_token_ids=ids, length=length)
        yield from np.asarray(best(state, inputs))[: len(rows)]


def words_of(
    kind: str, example: Example, best: np.ndarray, tokenizer: Tokenizer
) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Yield what is counted of an answer: (what it tells of and of which kind it is, the word, whether it is likely).

    Args:
      kind: of the record. best: of `likely`.
    """
    places = np.flatnonzero(example.supervised)
    spoken = [tokenizer.decode([int(example.tokens[place])]) for place in places]
    right = [bool(best[place - 1] == example.tokens[place]) for place in places]
    if kind in ("caption", "aspect"):
        about = "camera" if CAMERA in tokenizer.decode(example.tokens[: places[0]].tolist()) else "object"
        counted = _seen(spoken, (about,), ("alone",) if kind == "aspect" else ())
    elif kind in ("place", "asked"):
        for number, *key in _placed(spoken, kind):
            said = tokenizer.decode([int(best[places[number] - 1])])
            yield tuple(key), spoken[number], _is_near(said, spoken[number])
        return
    else:
        four = f"\n{LETTERS[3]}. " in tokenizer.decode(example.tokens[: places[0]].tolist())
        letter = f"letter of {'four' if four else 'three'}"
        counted = _read({"told": "told", "reckoning": "derived", "far": "far"}.get(kind, "text"), spoken, letter)
    for number, key in counted:
        said = tokenizer.decode([int(best[places[number] - 1])])
        near = key[-1] == "figure" and _is_near(said, spoken[number])
        yield key, spoken[number].strip(), near or right[number]


def _seen(spoken: list[str], about: tuple[str, ...], alone: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    aspect = ""
    for number, word in enumerate(map(str.strip, spoken)):
        kind = next((kind for kind, known in KINDS if word in known), "")
        if word in words.ASPECTS:
            if aspect and alone:
                return
            aspect = word
        elif kind:
            yield number, (*about, aspect, kind, *alone)


def _placed(spoken: list[str], kind: str) -> Iterator[tuple[int, str, str, str]]:
    thing, frame = "", 0
    for number, piece in enumerate(spoken):
        frame += "(frame" in piece
        thing = "camera" if "Camera" in piece else "object" if "Object" in piece else thing
        if piece.lstrip("-")[:1].isdigit() and "." in piece and (thing, frame) != ("camera", 1):
            yield number, thing, ("first", "last")[frame - 1], kind


def _is_near(said: str, right: str) -> bool:
    try:
        return abs(float(said) - float(right)) < 0.11
    except ValueError:
        return False


def _read(about: str, spoken: list[str], letter: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    stated = max((n for n, piece in enumerate(spoken) if piece.endswith(("]\n", "null\n"))), default=0)
    kinds = iter(("figure", "option"))  # what was measured, the option nearest to it
    for number, word in enumerate(map(str.strip, spoken)):
        figure = word.lstrip("-")[:1].isdigit()
        if figure and number < stated:
            yield number, (about, "centre")
        elif word in tuple(LETTERS):
            if letter:
                yield number, (about, letter)
            letter = ""  # the answer has it once more
        elif figure or word in LABEL_WORDS:
            named = "figure" if about == "derived" else next(kinds, "option")
            yield number, (about, named if figure else "label")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BASE, help="Hugging Face folder")
    parser.add_argument("--clips", type=int, default=128)
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    folder = own(args.model)
    encoder = encoder_of(folder, common.config("sft", dict(MATCHING)).video, 512)
    try:
        examples = examples_of(encoder, args.clips)
    finally:
        encoder.close()
    said = collections.defaultdict(list)
    model = load_model(folder, dtype=jnp.float32, attention="xla")
    for (kind, example), best in zip(examples, likely(model, [e for _, e in examples]), strict=True):
        for key, word, right in words_of(kind, example, best, encoder.tokenizer):
            said[key].append((word, right))
    print(f"{args.model}: {args.clips} clips of seed {SEED}; words said rightly after right ones")
    for key, found in sorted(said.items()):
        frequent = max(collections.Counter(word for word, _ in found).values()) / len(found)
        right = np.mean([ok for _, ok in found])
        print(f"{' '.join(key):34s} {len(found):5d}  right {right:.3f}  most frequent {frequent:.3f}")


if __name__ == "__main__":
    main()
