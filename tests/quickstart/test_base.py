"""The base model in the repository: small enough, of the shape that its command trains, with the tokens it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

import mllm4d_jax
from configs.pretrain_tiny import get_config
from data_prep.captions.task import phrases
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Piece, Tokenizer
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.tensor_files import TensorFiles
from mllm4d_jax.run.tiny import SHAPES, tiny_config

BASE = Path(mllm4d_jax.__file__).parent / "quickstart/base"


def test_it_is_small_and_stored_in_bfloat16():
    files = list(BASE.iterdir())
    assert sum(file.stat().st_size for file in files) <= 4e6
    assert {"config.json", "tokenizer.json", "model.safetensors"} < {file.name for file in files}
    assert set(TensorFiles.scan(BASE, ModelConfig.from_folder(BASE)).dtypes.values()) == {"BF16"}


def test_it_has_the_shape_that_its_command_trains():
    tokenizer = Tokenizer.from_folder(BASE)
    tokenizer.check_config(ProcessorConfig.from_folder(BASE))
    wanted = ModelConfig.from_dict(tiny_config(tokenizer.special_ids, SHAPES[get_config().data.sample], len(phrases())))
    found = ModelConfig.from_folder(BASE)
    assert (found.text, found.vision, found.tied) == (wanted.text, wanted.vision, wanted.tied)


def test_every_phrase_is_one_token():
    tokenizer = Tokenizer.from_folder(BASE)
    for phrase in phrases():
        ids, _ = tokenizer.encode_pieces([Piece(phrase)])
        assert len(ids) == 1 and tokenizer.decode(ids) == phrase


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("<thinking>1.3: B</thinking><answer>B</answer>", 7),
        ("\nOptions:\nA. right\nB. not moving\nC. left\nAnswer with the letter of the correct option.", 8),
    ],
)
def test_what_is_said_often_is_short(text, tokens):
    ids, _ = (tokenizer := Tokenizer.from_folder(BASE)).encode_pieces([Piece(text)])
    assert tokenizer.decode(ids) == text and len(ids) == tokens
