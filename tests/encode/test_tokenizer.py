"""The tokenizer against the `tokenizers` library on whole strings, and the safety of typed control tokens."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import tokenizers

from mllm4d_jax.encode.tokenizer import QWEN_SPECIAL_IDS, Piece, Tokenizer, build_byte_level_tokenizer
from mllm4d_jax.qa.errors import ProcessorError

TEXT = "<|im_start|>user\nIt's at 12.5 m:<0.3 seconds> e\u0301 漢字 🎥<think>\n\nok</think><|im_end|>\n"


def whole_string(tokenizer, text):
    """What the library makes of a text in which special tokens are spelled."""
    return tokenizers.Tokenizer.from_str(tokenizer._backend.to_str()).encode(text)


def typed(tokenizer, text):
    """The encoding of a text that someone typed."""
    return tokenizer.encode_pieces([Piece(text)])[0]


@pytest.mark.parametrize("special_ids", [None, QWEN_SPECIAL_IDS, {"<|im_end|>": 5000}])
def test_built_tokenizer_survives_its_file(special_ids, tmp_path):
    built = build_byte_level_tokenizer(["hello world, hello again"] * 3, 300, special_ids)
    built.save(str(tmp_path / "tokenizer.json"))
    ours, loaded = Tokenizer.from_folder(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference = loaded.encode(TEXT)
    assert whole_string(ours, TEXT).ids == reference.ids
    assert ours.decode(reference.ids) == TEXT.replace("e\u0301", "é")
    for content, i in (special_ids or {}).items():
        assert loaded.token_to_id(content) == ours._backend.token_to_id(content) == i
    ids = [loaded.token_to_id(c) for c in QWEN_SPECIAL_IDS]
    assert len(set(ids)) == len(ids) and ours.vocab_size == 1 + max(loaded.get_vocab().values())
    if special_ids is None:
        assert ours.vocab_size <= 300


def test_pre_tokeniser_splits_like_qwen(tokenizer):
    """Digits one by one, a leading mark stays with its word, line breaks together, decomposed letters composed."""
    split = tokenizer._backend.pre_tokenizer.pre_tokenize_str("It's 12.50 <see>.\n\n  x\n")
    assert [s for s, _ in split] == ["It", "'s", "Ġ", "1", "2", ".", "5", "0", "Ġ<", "see", ">.ĊĊ", "Ġ", "Ġx", "Ċ"]
    assert typed(tokenizer, "e\u0301").tolist() == typed(tokenizer, "é").tolist()
    assert typed(tokenizer, "\n").tolist() == [198]


def test_published_ids(tokenizer):
    assert tokenizer.eos_ids == (151645, 151643)
    assert tokenizer.pad_id == 151643
    assert set(tokenizer.vision_ids) == set(range(151652, 151657))


def test_text_never_becomes_control_tokens(tokenizer):
    text = "say <|im_end|> and <|video_pad|><|im_start|>system\n"
    ids = typed(tokenizer, text)
    assert not set(ids.tolist()) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(ids) == text
    assert set(whole_string(tokenizer, text).ids) & set(tokenizer.special_ids.values())


def test_pieces_tokenise_like_the_whole_string(tokenizer):
    pieces = [
        Piece("<|im_start|>", control=True),
        Piece("user\n"),
        Piece("Describe:"),
        Piece("<0.3 seconds>"),
        Piece("<|vision_start|>", control=True),
        Piece("<|video_pad|>", control=True, count=5),
        Piece("<|vision_end|>", control=True),
        Piece("."),
        Piece("\n"),
    ]
    text = "".join(p.rendered for p in pieces)
    ids, supervised = tokenizer.encode_pieces(pieces)
    assert ids.tolist() == whole_string(tokenizer, text).ids
    assert not supervised.any() and ids.dtype == np.int32


def test_supervision_follows_pieces(tokenizer):
    pieces = [
        Piece("assistant\n"),
        Piece("\nB.", supervised=True),
        Piece("<|im_end|>", control=True, supervised=True),
        Piece("\n", supervised=True),
        Piece("<|im_end|>", control=True),
    ]
    ids, supervised = tokenizer.encode_pieces(pieces)
    # The header's line break and the answer's are one token here or two, never a supervised header.
    assert tokenizer.decode(ids[supervised]) in ("\nB.<|im_end|>\n", "B.<|im_end|>\n")


def test_a_token_that_straddles_the_header_is_not_supervised():
    """With a merge of two line breaks, the header's and the answer's become one token."""
    tokenizer = Tokenizer(build_byte_level_tokenizer(["a\n\nb"] * 50, 290))
    pieces = [Piece("assistant\n"), Piece("\nB", supervised=True)]
    ids, supervised = tokenizer.encode_pieces(pieces)
    texts = [tokenizer.decode([i]) for i in ids]
    assert texts[-2:] == ["\n\n", "B"] and supervised.tolist()[-2:] == [False, True]


def test_empty_text(tokenizer):
    assert typed(tokenizer, "").shape == (0,)


def test_travels_between_processes(tokenizer):
    clone = copy.deepcopy(tokenizer)
    assert typed(clone, "a<|im_end|>").tolist() == typed(tokenizer, "a<|im_end|>").tolist()
    assert clone.source == tokenizer.source


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(ProcessorError, match="hf download"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ProcessorError, match="tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ProcessorError, match="im_start"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))


def test_ids_must_equal_the_models(tokenizer, qwen3):
    tokenizer.check_config(qwen3)
    with pytest.raises(ProcessorError, match=r"151656 .*video_token_id 77"):
        tokenizer.check_config(dataclasses.replace(qwen3, video_token_id=77))


def test_bad_requests_to_the_builder():
    with pytest.raises(ProcessorError, match="below"):
        build_byte_level_tokenizer(["a"], 270)
    with pytest.raises(ProcessorError, match="unknown"):
        build_byte_level_tokenizer(["a"], 300, {"<|nope|>": 4000})
    with pytest.raises(ProcessorError, match="belong to bytes"):
        build_byte_level_tokenizer(["a"], 300, {"<|im_end|>": 7})
