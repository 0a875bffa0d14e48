"""Measure which words a base model says rightly about rendered clips that it has not seen, each after the right ones.

python -m benchmarks.base_captions --clips=128
python -m benchmarks.base_captions --model=runs/base --clips=128

Prints, for every aspect of a caption, how many words there were, how many were the most likely ones, and the share that
the most frequent word would have; "alone" where only that aspect was asked for. Words of several tokens are left out.
Letters and figures are those of the text that is matched beside the clip.
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
from configs.tables.quickstart_recipe import PRETRAINING_CLIPS, SEEING
from data_prep.captions import words
from data_prep.captions.captions import CAMERA
from data_prep.captions.task import caption_clip
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
KINDS = (("way", WAYS), ("size", set(words.SIZES)), ("distance", set(words.DISTANCES)), ("column", set(words.COLUMNS)))


def examples_of(encoder: Encoder, clips: int) -> list[Example]:
    """Render clips of `SEED` as pre-training's were and encode what is said about them."""
    values = {k.removeprefix("synthetic."): v for k, v in PRETRAINING_CLIPS.items() if k.startswith("synthetic.")}
    values.pop("clips")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "videos").mkdir()
        names = [f"captions-{SEED}-{n:06d}" for n in range(clips)]
        said = [caption_clip(root, SyntheticConfig(**values), SEED, name).rows for name in names]
        write_json(root / "captions.json", [row for rows in said for row in rows])
        records, number = RecordFile(str(root / "captions.json"), str(root), ""), itertools.count()
        groups = [[as_target(records[next(number)]) for _ in rows] for rows in said]
        return [example for group in groups for example in encoder.encode_group(group)]  # a clip is decoded once


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


def words_of(example: Example, best: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Yield what is counted of an answer: (what it tells of and of which kind it is, the word, whether it is likely).

    Args:
      best: of `likely`.
    """
    places = np.flatnonzero(example.supervised)
    told = [tokenizer.decode([int(example.tokens[place])]).strip() for place in places]
    seen = told[0] in words.ASPECTS
    about, aspect = "camera" if CAMERA in tokenizer.decode(example.tokens[: places[0]].tolist()) else "object", ""
    alone = ("alone",) if sum(word in words.ASPECTS for word in told) == 1 else ()
    for place, word in zip(places, told, strict=True):
        right = bool(best[place - 1] == example.tokens[place])
        kind = next((kind for kind, known in KINDS if word in known), "")
        if seen and word in words.ASPECTS:
            aspect = word
        elif seen and kind:
            yield (about, aspect, kind, *alone), word, right
        elif not seen and (word in tuple("ABCD") or word[:1].isdigit()):
            yield ("text", "letter" if word in "ABCD" else "figure"), word, right


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BASE, help="Hugging Face folder")
    parser.add_argument("--clips", type=int, default=128)
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    folder = own(args.model)
    encoder = encoder_of(folder, common.config("sft", dict(SEEING)).video, 512)
    try:
        examples = examples_of(encoder, args.clips)
    finally:
        encoder.close()
    said = collections.defaultdict(list)
    model = load_model(folder, dtype=jnp.float32, attention="xla")
    for example, best in zip(examples, likely(model, examples), strict=True):
        for key, word, right in words_of(example, best, encoder.tokenizer):
            said[key].append((word, right))
    print(f"{args.model}: {args.clips} clips of seed {SEED}; words said rightly after right ones")
    for key, found in sorted(said.items()):
        frequent = max(collections.Counter(word for word, _ in found).values()) / len(found)
        right = np.mean([ok for _, ok in found])
        print(f"{' '.join(key):34s} {len(found):5d}  right {right:.3f}  most frequent {frequent:.3f}")


if __name__ == "__main__":
    main()
