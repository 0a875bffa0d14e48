"""Errors of records and setups, which are told apart, and what their messages have in common."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping
from typing import Self

from mllm4d_jax.files.quoting import cut

MOST_SAID = 1200  # characters of what is said about a record


class ProcessorError(ValueError):
    """The model folder, tokenizer or options are wrong; every record would fail, so nothing is quarantined."""


class RecordError(ValueError):
    """One record cannot be used; the run may go on without it.

    Attributes:
      reason: short machine word, e.g. "missing_file", "truncated_video", "timeout", "too_long".
      key: the record's key ("file.json#17"), "" while unknown. `str(error)` starts with it.

    Message and key may quote the record and are cut: they go to logs, lists and pages.
    """

    default_reason = "bad_record"

    def __init__(self, message: str, reason: str = "", key: str = ""):
        # All three go to `args`, which keeps the error picklable across worker processes.
        super().__init__(cut(message, MOST_SAID), reason or self.default_reason, cut(key, MOST_SAID // 4))
        self.message, self.reason, self.key = self.args

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message

    def with_key(self, key: str) -> Self:
        """Return the same error naming `key`; an error that already names its record is returned unchanged."""
        if self.key:
            return self
        named = copy.copy(self)
        named.key = cut(key, MOST_SAID // 4)
        named.args = (self.message, self.reason, named.key)
        return named

    def with_names(self, names: Mapping[str, str]) -> Self:
        """Return the same error, its message with other names for what it speaks of."""
        message = self.message
        for name, other in names.items():
            message = message.replace(name, other)
        renamed = copy.copy(self)
        renamed.message, renamed.args = message, (message, self.reason, self.key)
        return renamed


class MediaError(RecordError):
    """An image or video file of the record is missing, damaged, unreadable or too slow to decode."""

    default_reason = "bad_media"


class PlaceholderError(RecordError):
    """Visual placeholders and visual files of the record do not match."""

    default_reason = "placeholder_mismatch"


class SolutionError(RecordError):
    """The solution of a record cannot be used."""

    default_reason = "bad_solution"


class TooLongError(RecordError):
    """The record needs more tokens than the budget; nothing is ever cut."""

    default_reason = "too_long"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the known name that is nearest, '' if none is near."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""
