"""Byte-level BPE tokenizer of the Qwen family. Control tokens enter a sequence as control tokens only on purpose.

Text never turns into control tokens by its content: `<|im_end|>` typed into a question stays ordinary text and does not
end the turn. Prompts are therefore sequences of `Piece`s; the control tokens among
them are looked up by id, and every run of text between two of them is tokenised as a whole. That equals tokenising the
rendered string at once, because a control token always separates the text before it from the text after it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.files.json_object import read_object
from mllm4d_jax.files.remote import place
from mllm4d_jax.qa.errors import ProcessorError, RecordError
from mllm4d_jax.qa.special_tokens import QWEN_TOKENS

QWEN_SPECIAL_IDS: Mapping[str, int] = {content: i for content, i, _ in QWEN_TOKENS}
_SPECIAL: Mapping[str, bool] = {content: special for content, _, special in QWEN_TOKENS}
_FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
# What config.json calls the tokens that the model treats as vision.
_PLACEHOLDERS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
REQUIRED = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *_PLACEHOLDERS.values())
VISION = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")

# Words with an optional leading mark, single digits, marks with trailing line breaks, line breaks, other space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a prompt: ordinary text, or one control token `count` times.

    Attributes:
      text: the text, or the control token's content.
      control: whether `text` is a control token.
      count: repetitions (control tokens only).
      supervised: whether its tokens are training targets.
    """

    text: str
    control: bool = False
    count: int = 1
    supervised: bool = False

    @property
    def rendered(self) -> str:
        return self.text * self.count


class Tokenizer:
    """A Qwen-shaped `tokenizers.Tokenizer` that keeps text and control tokens apart."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        source: str = "tokenizer",
        declared: Sequence[Mapping[str, Any]] = (),
    ):
        """`backend` is copied, without what would change, cut or lengthen a text.

        Args:
          source: names it in errors.
          declared: entries like those of `added_tokens` in tokenizer.json; those that `backend` lacks are added.

        Raises:
          ProcessorError: a control token that the chat format needs is not in the vocabulary, or a declared token does
            not get its id.
        """
        state = _plain(backend.to_str())
        known = {token["content"] for token in state["added_tokens"]}
        state["added_tokens"] += [_added(token) for token in declared if token["content"] not in known]
        self._load(json.dumps(state, ensure_ascii=False), source)
        for token in declared:
            # The library itself numbers the tokens that its model lacks, whatever the file says.
            found = self._backend.token_to_id(token["content"])
            if found != token["id"]:
                raise ProcessorError(
                    f"{source}: {token['content']} gets the id {found}, but added_tokens, or added_tokens_decoder in "
                    f"tokenizer_config.json, says {token['id']}: the files do not belong together, or ids are left out"
                )

    def _load(self, serialised: str, source: str) -> None:
        self._backend = tokenizers.Tokenizer.from_str(serialised)
        # Not part of the serialised form: text that spells a special token is tokenised as text.
        self._backend.encode_special_tokens = True
        self.source = source
        added = self._backend.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {t.content: i for i, t in sorted(added.items()) if t.special}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self._ids = frozenset(vocabulary.values())
        # A token of byte-level BPE is spelled with one character for each of its bytes.
        self._longest_token = max([1, *map(len, vocabulary), *(len(t.content.encode()) for t in added.values())])
        missing = [t for t in REQUIRED if t not in self.special_ids]
        if missing:
            raise ProcessorError(f"{source} has no special token {', '.join(missing)}: not a Qwen-VL tokenizer")

    def __getstate__(self) -> tuple[str, str]:
        return self._backend.to_str(), self.source

    def __setstate__(self, state: tuple[str, str]) -> None:
        self._load(*state)

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Reads `tokenizer.json`, and added tokens that only `tokenizer_config.json` has.

        Raises:
          ProcessorError: the file is missing or unreadable, or is no Qwen-VL tokenizer; or the two files give a token
            different ids.
        """
        file = place(path) / "tokenizer.json"
        if not file.is_file():
            raise ProcessorError(
                f"{file} not found (vocab.json and merges.txt are not read): download tokenizer.json of the checkpoint "
                f"next to its config.json (for example: hf download Qwen/Qwen3-VL-8B-Instruct tokenizer.json "
                f"--local-dir {path}), or let transformers write it with AutoTokenizer...save_pretrained"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ProcessorError(f"{file} cannot be read as a tokenizer ({error})") from error
        declared = [
            *(read_object(file, ProcessorError).get("added_tokens") or []),
            *_declared_tokens(file.with_name("tokenizer_config.json")),
        ]
        return cls(backend, str(file), declared)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id (ids may have gaps)."""
        return 1 + max(self._ids)

    @property
    def eos_ids(self) -> tuple[int, int]:
        """Ids that end a generation: end of turn, end of text."""
        return self.special_ids["<|im_end|>"], self.special_ids["<|endoftext|>"]

    @property
    def pad_id(self) -> int:
        return self.special_ids["<|endoftext|>"]

    @property
    def vision_ids(self) -> tuple[int, ...]:
        """Ids of markers and placeholders of images and videos; a sampler must never emit them."""
        return tuple(self.special_ids[t] for t in VISION if t in self.special_ids)

    def unused_ids(self, size: int) -> list[int]:
        """Return the ids below `size` that stand for no token: gaps, and rows by which a model's head is padded."""
        return sorted(set(range(size)) - self._ids)

    def check_config(self, config: ProcessorConfig) -> None:
        """Raises ProcessorError when placeholder ids of the tokenizer and of config.json differ, or it has more ids."""
        wrong = [
            f"{content} is {self.special_ids[content]} in {self.source}, config.json has {name} {getattr(config, name)}"
            for name, content in _PLACEHOLDERS.items()
            if self.special_ids[content] != getattr(config, name)
        ]
        if wrong:
            raise ProcessorError("; ".join(wrong) + ": tokenizer and model do not belong together")
        if config.vocab_size is not None and self.vocab_size > config.vocab_size:
            last = self._backend.id_to_token(self.vocab_size - 1)
            raise ProcessorError(
                f"{self.source} has ids up to {self.vocab_size - 1} ({last!r}), config.json has vocab_size "
                f"{config.vocab_size}: tokenizer and model do not belong together, or the model's embeddings were not "
                "resized when tokens were added"
            )

    def least_tokens(self, pieces: Sequence[Piece]) -> int:
        """Return a number of tokens below which a prompt cannot stay, without tokenising it: linear, and quick.

        Its text, normalised, has so many bytes, and no token has more than the longest one.
        """
        controls = sum(p.count for p in pieces if p.control)
        text = "".join(p.rendered for p in pieces if not p.control)
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        return controls + -(-len(text.encode()) // self._longest_token)

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenises a prompt.

        A text token is supervised when all its characters are: one that straddles the border (line breaks that open an
        answer merge with the header's) is not, since it cannot be generated after the header.

        Returns:
          (token ids i32[S], supervised bool[S]).

        Raises:
          RecordError: the library cannot take the text, for example one with millions of spaces in a row.
        """
        ids, flags = [np.zeros(0, np.int64)], [np.zeros(0, bool)]
        for control, run in groupby((p for p in pieces if p.text), key=lambda p: p.control):
            run = list(run)
            if control:
                ids += [np.full(p.count, self.special_ids[p.text]) for p in run]
                flags += [np.full(p.count, p.supervised) for p in run]
                continue
            encoded = self._encode("".join(p.rendered for p in run))
            spans = np.array(encoded.offsets, np.int64).reshape(-1, 2)
            unsupervised = np.repeat([not p.supervised for p in run], [len(p.rendered) for p in run])
            before = np.concatenate([[0], np.cumsum(unsupervised)])
            ids.append(np.array(encoded.ids, np.int64))
            flags.append((before[spans[:, 1]] == before[spans[:, 0]]) & (spans[:, 1] > spans[:, 0]))
        return np.concatenate(ids).astype(np.int32), np.concatenate(flags)

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            return self._backend.encode(text, add_special_tokens=False)
        except BaseException as error:
            # A panic of the library is no Exception, and its class cannot be imported. It leaves the tokenizer whole.
            if type(error).__name__ != "PanicException":
                raise
            message = f"a text of {len(text)} characters cannot be tokenised ({error}): shorten it"
            raise RecordError(message, "bad_text") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that do not form a character come out as U+FFFD, ids of no token as nothing."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)


def _plain(serialised: str) -> dict[str, Any]:
    """Return a tokenizer's file content without what is saved in some and must not reach a prompt or a target.

    Taken out: truncation, padding, dropout of merges (encoding would be random), what a post-processor puts around a
    text or takes off its tokens' offsets, and flags of Qwen's own added tokens by which they swallow white space next
    to them; those are special or not as published.
    """
    state = json.loads(serialised)
    state |= {"truncation": None, "padding": None, "post_processor": None}
    state["model"].pop("dropout", None)
    state["added_tokens"] = [_added(token) for token in state["added_tokens"]]
    return state


def _added(token: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of `added_tokens`, with the published flags where the token is one of Qwen's."""
    flags = dict(_FLAGS, special=False)
    if token["content"] in _SPECIAL:
        flags["special"] = _SPECIAL[token["content"]]
    else:
        flags |= {name: token[name] for name in flags if name in token}
    return flags | {"id": token["id"], "content": token["content"]}


def _declared_tokens(file: Path) -> list[dict[str, Any]]:
    """Entries of `added_tokens_decoder` in tokenizer_config.json, by their ids. Raises ProcessorError."""
    table = (read_object(file, ProcessorError) or {}).get("added_tokens_decoder") or {}
    if not isinstance(table, dict) or not all(
        i.isdecimal() and isinstance(t, dict) and isinstance(t.get("content"), str) for i, t in table.items()
    ):
        raise ProcessorError(f"{file}: added_tokens_decoder is not a table of tokens by their ids")
    return sorted(({**token, "id": int(i)} for i, token in table.items()), key=lambda token: token["id"])


def build_byte_level_tokenizer(
    texts: Iterable[str], vocab_size: int, special_ids: Mapping[str, int] | None = None, phrases: Sequence[str] = ()
) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE tokenizer shaped like Qwen's, with all of its added tokens. Save it with `.save(path)`.

    Args:
      texts: what the merges are learned from.
      vocab_size: at most this many tokens in all, added tokens included.
      special_ids: fixed ids by content, for example `QWEN_SPECIAL_IDS`; ids between the last merge and these stay
        unused. Added tokens not named take the next free ids after the last merge, in Qwen's order.
      phrases: texts that are a token each wherever they stand, the longest first; figures, signed or not, only where no
        digit or letter touches them. They come after all other tokens.

    Raises:
      ProcessorError: no room for 256 bytes plus the added tokens, or `special_ids` repeats an id, names an unknown
        token or an id that a byte or merge has.
    """
    fixed = dict(special_ids or {})
    unknown = set(fixed) - set(QWEN_SPECIAL_IDS)
    if unknown or len(set(fixed.values())) != len(fixed):
        raise ProcessorError(f"special_ids: unknown tokens {sorted(unknown)} or an id given twice: {fixed}")
    bpe_size = vocab_size - len(QWEN_TOKENS) - len(phrases)
    if bpe_size < 256:
        raise ProcessorError(
            f"vocab_size {vocab_size} is below 256 bytes + {len(QWEN_TOKENS)} added tokens + {len(phrases)} phrases"
        )
    if phrases:  # merges are for what is left between them
        between = re.compile("|".join(map(re.escape, sorted(phrases, key=len, reverse=True))))
        texts = [rest for text in texts for rest in between.split(text) if rest]
    trained = _qwen_shell(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=bpe_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    vocab = trained.get_vocab(with_added_tokens=False)
    used = set(vocab.values())
    taken = used & set(fixed.values())
    if taken:
        raise ProcessorError(f"special_ids: ids {sorted(taken)} belong to bytes or merges (vocab_size {vocab_size})")
    used |= set(fixed.values())
    free = (i for i in range(len(used) + len(QWEN_TOKENS) + 1) if i not in used)
    ids = {content: fixed[content] if content in fixed else next(free) for content, _, _ in QWEN_TOKENS}
    # Added tokens stand in the BPE vocabulary too: that is what lets their ids be chosen freely.
    merges = json.loads(trained.to_str())["model"]["merges"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in merges]
    shaped = _qwen_shell(models.BPE(vocab=vocab | ids, merges=merges))
    shaped.add_tokens([tokenizers.AddedToken(c, normalized=False, special=s) for c, _, s in QWEN_TOKENS])
    shaped.add_tokens(
        [tokenizers.AddedToken(p, normalized=False, single_word=p.lstrip("-")[:1].isdigit()) for p in phrases]
    )
    return shaped


def _qwen_shell(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(_SPLIT), behavior="isolated", invert=False)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend
