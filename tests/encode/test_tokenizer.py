"""The tokenizer against the `tokenizers` library on whole strings, and the safety of typed control tokens."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import tokenizers

from mllm4d_jax.encode.tokenizer import QWEN_SPECIAL_IDS, Piece, Tokenizer, build_byte_level_tokenizer
from mllm4d_jax.qa.errors import ProcessorError, RecordError

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
    for name in ("vocab.json", "merges.txt"):  # not read, and the message says so
        (tmp_path / name).touch()
    with pytest.raises(ProcessorError, match="vocab.json and merges.txt are not read.*hf download"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ProcessorError, match="tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ProcessorError, match="im_start"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.BPE()))


def saved(tokenizer, folder, change):
    """The tokenizer of a folder whose tokenizer.json was changed."""
    state = json.loads(tokenizer._backend.to_str())
    change(state)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return Tokenizer.from_folder(folder)


def flag(content, **flags):
    def change(state):
        next(t for t in state["added_tokens"] if t["content"] == content).update(flags)

    return change


PADDING = dict(strategy={"Fixed": 64}, direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0)
TRUNCATION = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
BEFORE_ALL = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
TEMPLATE = dict(
    type="TemplateProcessing",
    single=[BEFORE_ALL, {"Sequence": {"id": "A", "type_id": 0}}],
    pair=[{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    special_tokens={"<|endoftext|>": {"id": "<|endoftext|>", "ids": [151643], "tokens": ["<|endoftext|>"]}},
)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(truncation=TRUNCATION),
        lambda state: state.update(padding=PADDING | {"pad_token": "<|endoftext|>"}),
        lambda state: state.update(post_processor=TEMPLATE),
        lambda state: state.update(
            post_processor=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
        ),
        lambda state: state["model"].update(dropout=0.9),
        flag("<think>", lstrip=True, rstrip=True),
        flag("<think>", special=True),
        flag("</think>", normalized=True, single_word=True),
        flag("<|im_end|>", lstrip=True, rstrip=True),
        flag("<|im_end|>", special=False),
    ],
)
def test_saved_settings_change_no_prompt(tokenizer, tmp_path, change):
    """What a file may hold besides its vocabulary cuts, pads, strips or varies nothing, and moves no target."""
    pieces = [
        Piece("<|im_start|>", control=True),
        Piece("assistant\n"),
        Piece("<think>\nDescribe this video. What moves? \n</think>\n\n  <|im_end|> ", supervised=True),
        Piece("<|im_end|>", control=True, supervised=True),
        Piece("\n", supervised=True),
    ]
    ids, supervised = tokenizer.encode_pieces(pieces)
    for made in (saved(tokenizer, tmp_path, change), copy.deepcopy(saved(tokenizer, tmp_path, change))):
        found = made.encode_pieces(pieces)
        assert (found[0].tolist(), found[1].tolist()) == (ids.tolist(), supervised.tolist())
        assert made.decode(found[0]) == "".join(p.rendered for p in pieces)


def test_added_tokens_of_tokenizer_config(tokenizer, tmp_path):
    """transformers takes tokens from tokenizer_config.json that tokenizer.json lacks."""

    def without_last(state):
        state["added_tokens"] = state["added_tokens"][:-2]
        for content in ("<think>", "</think>"):
            del state["model"]["vocab"][content]
        vocab = state["model"]["vocab"]
        start = 1 + max(i for i in vocab.values() if i < 151643)
        vocab |= {f"<{i}>": i for i in range(start, 151643)}  # a real model's ids have no gaps

    think = {"151667": dict(content="<think>", special=False), "151668": dict(content="</think>", special=False)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": think}))
    made = saved(tokenizer, tmp_path, without_last)
    assert typed(made, "<think>a</think>").tolist() == typed(tokenizer, "<think>a</think>").tolist()
    assert typed(made, "<think>").tolist() == [151667]


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"151645": {"content": "<|im_start|>", "special": True}},
            "<|im_start|> gets the id 151644, but .* says 151645",
        ),
        ({"160000": {"content": "<|new|>", "special": True}}, "<|new|> gets the id .*, but .* says 160000"),
        ({"0": "<|im_start|>"}, "added_tokens_decoder is not a table"),
        (["<|im_start|>"], "added_tokens_decoder is not a table"),
    ],
)
def test_contradicting_added_tokens(tokenizer, tmp_path, config, message):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": config}))
    with pytest.raises(ProcessorError, match=message.replace("|", r"\|")):
        saved(tokenizer, tmp_path, lambda state: None)


def test_ids_that_the_library_would_move(tokenizer, tmp_path):
    """A token that the model part lacks gets the next free id, whatever its own entry says."""

    def without_think(state):
        del state["model"]["vocab"]["<think>"]

    with pytest.raises(ProcessorError, match=r"tokenizer.json: <think> gets the id \d+, but .* says 151667"):
        saved(tokenizer, tmp_path, without_think)


def test_a_panic_of_the_library_is_a_bad_record(tokenizer, tmp_path):
    """As millions of spaces in a row cause it; here by a pattern that gives up sooner."""

    def give_up_soon(state):
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "(a+)+b|."}

    made = saved(tokenizer, tmp_path, give_up_soon)
    with pytest.raises(RecordError, match="text of 41 characters cannot be tokenised") as caught:
        typed(made, "a" * 40 + "c")
    assert caught.value.reason == "bad_text"
    assert made.decode(typed(made, "still whole")) == "still whole"


def test_least_tokens_is_a_lower_bound(tokenizer):
    texts = [
        "",
        " " * 5000,
        "Describe this video." * 300,
        "e\u0301" * 900,
        "漢字 🎥" * 300,
        "<think><|repo_name|>" * 99,
    ]
    pads = Piece("<|video_pad|>", control=True, count=70)
    for text in texts:
        pieces = [Piece(text), pads, Piece(text)]
        assert tokenizer.least_tokens(pieces) <= len(tokenizer.encode_pieces(pieces)[0])
    assert tokenizer.least_tokens([Piece(" " * 1_000_000), pads]) > 20_000


def test_ids_of_no_token(tokenizer):
    """Gaps of the vocabulary and rows by which a head is padded are no text; decoding passes over them."""
    letter = typed(tokenizer, "a").tolist()
    assert tokenizer.decode([*letter, 5000, 151700, *letter]) == "aa"
    unused = tokenizer.unused_ids(151700)
    assert 5000 in unused and unused[-1] == 151699 and not set(unused) & {*letter, 151643, 151668}


def test_more_ids_than_the_model_has(tokenizer, qwen3):
    tokenizer.check_config(dataclasses.replace(qwen3, vocab_size=151669))
    with pytest.raises(ProcessorError, match=r"ids up to 151668 \('</think>'\).* vocab_size 151668"):
        tokenizer.check_config(dataclasses.replace(qwen3, vocab_size=151668))


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
