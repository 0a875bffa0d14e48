"""The base model that is part of the repository: small, with a token for every phrase, and able to see a little."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from benchmarks.base_captions import examples_of, likely
from configs import common
from configs.tables.quickstart import BASE
from configs.tables.quickstart_recipe import SEEING
from data_prep.captions.task import phrases
from data_prep.captions.words import MAIN
from mllm4d_jax.encode.tokenizer import Piece, Tokenizer
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.quickstart.stages import own
from mllm4d_jax.run.build import encoder_of

CLIPS = 40
FOLDER = own(BASE)


def test_it_is_small_and_has_a_token_for_every_phrase():
    assert sum(file.stat().st_size for file in Path(FOLDER).iterdir()) < 4e6
    tokenizer = Tokenizer.from_folder(FOLDER)
    assert all(len(tokenizer.encode_pieces([Piece(phrase)])[0]) == 1 for phrase in phrases())


def test_it_sees_where_a_camera_goes_that_it_has_not_seen_before():
    """The first word about the camera, its main way; the most frequent one would be right for about a third."""
    encoder = encoder_of(FOLDER, common.config("sft", dict(SEEING)).video, 512)
    try:
        examples = examples_of(encoder, CLIPS)
    finally:
        encoder.close()
    first = {encoder.tokenizer.encode_pieces([Piece(f" {way}")])[0][0] for way in MAIN}
    (mainly,) = encoder.tokenizer.encode_pieces([Piece("mainly")])[0]
    asked = [e for e in examples if e.tokens[np.flatnonzero(e.supervised)[0]] == mainly]
    right = []
    for example, best in zip(asked, likely(load_model(FOLDER, dtype=jnp.float32, attention="xla"), asked), strict=True):
        place = np.flatnonzero(example.supervised)[1]
        assert example.tokens[place] in first
        right.append(best[place - 1] == example.tokens[place])
    assert len(right) == CLIPS and np.mean(right) > 0.55, np.mean(right)
