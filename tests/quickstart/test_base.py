"""The base model that is part of the repository: small, with a token for every phrase, and able to see a little."""

from __future__ import annotations

import collections
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from benchmarks.base_captions import examples_of, likely, words_of
from configs import common
from configs.tables.quickstart import BASE
from configs.tables.quickstart_recipe import MATCHING
from data_prep.captions.task import phrases
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


def test_it_sees_where_things_are_in_clips_that_it_has_not_seen_and_finds_the_letter_of_what_it_says():
    """The most frequent one is right for about .3 of the main ways, .2 of the columns and .3 of the letters."""
    encoder = encoder_of(FOLDER, common.config("sft", dict(MATCHING)).video, 512)
    try:
        examples = examples_of(encoder, CLIPS)
        said = collections.defaultdict(list)
        model = load_model(FOLDER, dtype=jnp.float32, attention="xla")
        for (kind, example), best in zip(examples, likely(model, [e for _, e in examples]), strict=True):
            for key, _, right in words_of(kind, example, best, encoder.tokenizer):
                said[key].append(right)
    finally:
        encoder.close()
    ways, letters = said["camera", "mainly", "way"], said["text", "letter of four"]
    assert len(ways) > CLIPS / 2 and np.mean(ways) > 0.9, np.mean(ways)
    columns, gaps = said["object", "last", "column"], said["object", "gap", "way"]
    assert min(len(columns), len(gaps)) > 0.7 * CLIPS and np.mean(columns) > 0.6 and np.mean(gaps) > 0.7
    # Coordinates within 0.1 camera heights: the most frequent one is right for .34 of the camera's, .11 of others.
    camera, first, last = (
        said["camera", "last", "place"],
        said["object", "first", "place"],
        said["object", "last", "place"],
    )
    assert np.mean(camera) > 0.85 and np.mean(first) > 0.65 and np.mean(last) > 0.65
    assert len(letters) > CLIPS and np.mean(letters) > 0.95, np.mean(letters)
    assert np.mean(said["told", "letter of four"]) > 0.95 and np.mean(said["told", "letter of three"]) > 0.98
    # Of what told states come to, the most frequent label is right for .3.
    assert np.mean(said["told", "centre"]) > 0.95 and np.mean(said["told", "label"]) > 0.6
    assert np.mean(said["told", "option"]) > 0.9
