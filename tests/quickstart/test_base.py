"""The base model that is part of the repository: small, with a token for every phrase, and able to see a little."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import common
from configs.tables.quickstart import BASE
from configs.tables.quickstart_recipe import PRETRAINING_CLIPS, SEEING
from data_prep.captions.captions import CAMERA
from data_prep.captions.task import caption_clip, phrases
from data_prep.captions.words import MAIN
from data_prep.synthetic.worlds import SyntheticConfig
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.encode.tokenizer import Piece, Tokenizer
from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.qa.records import as_target
from mllm4d_jax.quickstart.stages import own
from mllm4d_jax.rows.batch import collate
from mllm4d_jax.run.build import encoder_of

CLIPS, SEED = 40, 2000  # another seed than that of pre-training
FOLDER = own(BASE)


def test_it_is_small_and_has_a_token_for_every_phrase():
    assert sum(file.stat().st_size for file in Path(FOLDER).iterdir()) < 4e6
    tokenizer = Tokenizer.from_folder(FOLDER)
    assert all(len(tokenizer.encode_pieces([Piece(phrase)])[0]) == 1 for phrase in phrases())


def test_it_sees_where_a_camera_goes_that_it_has_not_seen_before(tmp_path):
    """Which of six ways, said first; measured on 128 clips: .81 where one way is clear."""
    synthetic = {k.removeprefix("synthetic."): v for k, v in PRETRAINING_CLIPS.items() if k.startswith("synthetic.")}
    synthetic.pop("clips")
    (tmp_path / "videos").mkdir()
    clips = [
        caption_clip(tmp_path, SyntheticConfig(**synthetic), SEED, f"captions-{SEED}-{n:06d}") for n in range(CLIPS)
    ]
    rows = [row for clip in clips for row in clip.rows if row["conversations"][0]["value"].endswith(CAMERA)]
    write_json(tmp_path / "captions.json", rows)
    records = RecordFile(str(tmp_path / "captions.json"), str(tmp_path), "")
    model = load_model(FOLDER, dtype=jnp.float32, attention="xla")
    graphdef, state = nnx.split(model)
    encoder = encoder_of(FOLDER, common.config("sft", dict(SEEING)).video, 512)
    try:
        examples = [encoder.encode_group([as_target(records[n])])[0] for n in range(len(rows))]
    finally:
        encoder.close()
    inputs = collate(
        examples,
        vision_geometry(model.config),
        visual_token_ids=(model.config.image_token_id, model.config.video_token_id),
    )
    told = np.array(jax.jit(lambda s, i: nnx.merge(graphdef, s).logits(nnx.merge(graphdef, s)(i)))(state, inputs))
    tokenizer = encoder.tokenizer
    ways = {tokenizer.encode_pieces([Piece(f" {way}")])[0][0]: way for way in MAIN}
    right = []
    for row, example in enumerate(examples):
        place = next(n for n, token in enumerate(example.tokens) if token in ways)
        likely = max(ways, key=lambda token: told[row, place - 1, token])
        right.append(likely == example.tokens[place])
    assert len(right) == CLIPS and np.mean(right) > 0.55, np.mean(right)
