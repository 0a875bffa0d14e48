"""How a message quotes what stands in somebody else's file: escaped where it needs to be, and never long."""

from __future__ import annotations

from typing import Any


def cut(text: str, most: int) -> str:
    """Return a text of at most so many characters, as a message may hold it."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: Any) -> str:
    """Return a value as a message shows it: its repr, cut to 80 characters."""
    try:
        return cut(repr(value), 80)
    except ValueError:  # Python writes no number of thousands of digits
        return f"a number of type {type(value).__name__}, too long to be written"
    except RecursionError:
        return f"a {type(value).__name__} that is nested too deeply to be written"


def plain(value: object) -> str:
    """Return names as a message shows them: as they are if they can be printed, cut to 240 characters."""
    text = str(value)
    return cut(text if text.isprintable() else ascii(text), 240)
