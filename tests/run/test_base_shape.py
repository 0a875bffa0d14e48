"""The shape of the quickstart's base: small enough, in bfloat16, with tokens for what its records say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs import common
from configs.tables.quickstart_recipe import LETTERS
from data_prep.captions.task import phrases
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Piece, Tokenizer
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.tensor_files import TensorFiles
from mllm4d_jax.run.preflight import PreflightError
from mllm4d_jax.run.tiny import with_sample


def begun(folder, listed):
    record = {"image": "a.png", "conversations": [{"from": "user", "value": "<image>\nDescribe the red box."}]}
    record["conversations"].append({"from": "gpt", "value": "sideways leftwards far"})
    (folder / "captions.json").write_text(json.dumps([record]))
    (folder / "phrases.json").write_text(json.dumps(listed))
    places = {"data.path": str(folder / "captions.json"), "data.root": str(folder)}
    return with_sample(common.config("sft", {**LETTERS, **places}), folder / "run")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return begun(tmp_path_factory.mktemp("base"), phrases()).model.path


def test_it_fits_a_repository_and_its_files_belong_together(base):
    config, files = ModelConfig.from_folder(base), TensorFiles.scan(base, ModelConfig.from_folder(base))
    assert set(files.dtypes.values()) == {"BF16"} and config.tied
    assert sum(len(files.read(name)) > 0 for name in files.location) > 50
    tokenizer = Tokenizer.from_folder(base)
    tokenizer.check_config(ProcessorConfig.from_folder(base))
    assert tokenizer.vocab_size <= config.text.vocab_size == 420 + len(phrases())


def test_every_phrase_is_one_token(base):
    tokenizer = Tokenizer.from_folder(base)
    for phrase in phrases():
        ids, _ = tokenizer.encode_pieces([Piece(phrase)])
        assert len(ids) == 1 and tokenizer.decode(ids) == phrase


def test_figures_begin_like_their_neighbours(base):
    tokenizer, files = Tokenizer.from_folder(base), TensorFiles.scan(base, ModelConfig.from_folder(base))
    table = next(files.read(name) for name in files.location if name.endswith("embed_tokens.weight")).astype(np.float64)
    texts = [f"{n / 10:.1f}" for n in range(-60, 61)]
    rows = table[[tokenizer.encode_pieces([Piece(text)])[0][0] for text in texts]]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    alike = rows @ rows.T
    near, apart, far = (np.mean(np.diagonal(alike, n)) for n in (1, 4, 30))
    assert near > 0.7 > apart > far and near < 0.99
    words = table[[tokenizer.encode_pieces([Piece(word)])[0][0] for word in (" far", "left", "the camera")]]
    assert 0.5 < np.std(words) / np.std(table) < 2, "words are of the same size"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("<thinking>1.3: B</thinking><answer>B</answer>", 7),
        ("\nOptions:\nA. right\nB. not moving\nC. left\nAnswer with the letter of the correct option.", 8),
    ],
)
def test_what_is_said_often_is_short(base, text, tokens):
    tokenizer = Tokenizer.from_folder(base)
    ids, _ = tokenizer.encode_pieces([Piece(text)])
    assert tokenizer.decode(ids) == text and len(ids) == tokens


@pytest.mark.parametrize("listed", [{"a": 1}, ["a", ""], ["a", 1]])
def test_phrases_that_are_no_list_of_texts_are_refused(tmp_path, listed):
    with pytest.raises(PreflightError, match="phrases.json must be a list of texts that are not empty"):
        begun(tmp_path, listed)
