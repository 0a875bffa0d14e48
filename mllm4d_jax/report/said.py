"""The text of a completion with its thinking and its answer marked, and cut to a size that a page can hold."""

from __future__ import annotations

from mllm4d_jax.qa.reasoning import find_blocks
from mllm4d_jax.report.page import Markup, escape, join, tag

_LOOKS = {"thinking": "thought", "answer": "answer", "": None}


def pieces(completion: str) -> list[tuple[str, str]]:
    """Return (kind, text) in order, together the whole text; kind is "thinking", "answer" or "".

    Marked are the blocks that the reward reads (`reasoning.find_blocks`), their tags included. An answer block inside
    the thinking is marked as the answer.
    """
    thinking, answers = find_blocks(completion)
    blocks = (("answer", answers[-1] if answers else None), ("thinking", thinking))
    spans = {kind: (block.start, block.end) for kind, block in blocks if block}
    edges = sorted({0, len(completion)}.union(*spans.values()))
    out: list[tuple[str, str]] = []
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        kind = next((kind for kind, (a, b) in spans.items() if a <= start < b), "")
        out.append((kind, completion[start:end]))
    return out


def shortened(text: str, max_bytes: int) -> Markup:
    """The text as HTML of at most about `max_bytes` bytes: two thirds from its beginning, the rest from its end."""
    keep = len(text)
    if keep > max_bytes:  # every character takes a byte at least
        keep = max_bytes
    while True:
        head, tail = (text, "") if keep == len(text) else (text[: keep - keep // 3], text[len(text) - keep // 3 :])
        shown = escape(head), escape(tail)
        size = sum(len(part.encode("utf-8")) for part in shown)
        if size <= max_bytes or keep <= 16:
            break
        keep = max(16, min(keep - 1, keep * max_bytes // size))
    if keep == len(text):
        return shown[0]
    cut = tag("span", f" … {len(text) - keep:,} characters are left out here … ", class_="cut")
    return join([shown[0], cut, shown[1]])


def said(completion: str, max_bytes: int) -> Markup:
    """The marked completion; an empty one says that it is."""
    if not completion:
        return tag("p", "The completion is empty.", class_="empty")
    shares = {"thinking": max_bytes * 3 // 5, "answer": max_bytes // 5, "": max_bytes // 10}
    parts = []
    for kind, text in (piece for piece in pieces(completion) if piece[1]):
        whole = max_bytes if len(completion) == len(text) else shares[kind]
        inner = shortened(text, whole)
        parts.append(tag("span", inner, class_=_LOOKS[kind], title=kind) if kind else inner)
    return tag("div", *parts, class_="said", tabindex="0", role="region", aria_label="completion")
