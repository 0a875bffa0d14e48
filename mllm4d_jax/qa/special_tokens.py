"""Texts that are tokens of their own in Qwen's vocabularies, and that no record's own text may hold."""

from __future__ import annotations

_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
)
_ORDINARY = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
)
# (content, published id, special). Tokens that are not special are single tokens wherever they are written.
QWEN_TOKENS = tuple(
    (content, i, content in _SPECIAL.split()) for i, content in enumerate(f"{_SPECIAL} {_ORDINARY}".split(), 151643)
)
