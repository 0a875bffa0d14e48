r"""Which of the two published forms a model's prompts have, read from the chat template of its folder.

Templates are programs (Jinja) and are not run: what is needed is what they write. A template is taken apart into the
text it writes and the places where it puts a role or a message's own text; branches for tools and for numbered images
are passed over. That skeleton is cut at every `<|im_start|>`, and each turn must be one that `encode.chat` renders:

    <|im_start|>ROLE\nCONTENT<|im_end|>\n      CONTENT: text, images and videos between their markers
    <|im_start|>system\nWORDS<|im_end|>\n      a default system prompt
    <|im_start|>ROLE\n<think>\nTHOUGHT\n</think>\n\nCONTENT<|im_end|>\n
    <|im_start|>assistant\n                    the opening of an answer, Instruct
    <|im_start|>assistant\n<think>\n           the same, Thinking

So the published templates in all their versions and white space pass, as do those of fine-tuned folders that write the
same; anything else written, and any filter that changes a message, is refused. Digests of the published files would
refuse those other folders too; conditions are not interpreted, so a template that writes these turns in unusual cases
only is not told apart.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mllm4d_jax.files.json_object import read_object
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.files.remote import place
from mllm4d_jax.qa.errors import ProcessorError

# Of several templates the one counts that transformers takes for a processor, and after those the tokenizer's.
FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")
CHOICES = ("auto", "instruct", "thinking")
_PUBLISHED_SYSTEM = {"qwen2_5_vl": "You are a helpful assistant."}

_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_LITERAL = re.compile(_STRING, re.DOTALL)
_TAG = re.compile(rf"{{#.*?#}}|{{%(?:{_STRING}|[^'\"])*?%}}|{{{{(?:{_STRING}|[^'\"])*?}}}}", re.DOTALL)
_CONTENT, _ROLE = "\0", "\1"  # where a message's own text goes, and its role
_ROLE_NAMES = re.compile(r"\w+(\.role|\[['\"]role['\"]\])")
# Strings in an expression that only look at a message, or take its thought or the line breaks around it away.
_HARMLESS = re.compile(
    r"""\[\s*(['"])\w+\1\s*\]|\.(?:l|r)?strip\((['"])(?:\\n|\n)\2\)|\.split\((['"])</?think>\3\)|\.get\((['"])\w+\4\)"""
)
_CHANGES = re.compile(r"\|\s*(?!(?:length|first|last|list)\b)\w+|\.\w+\(")  # filters and methods
# Conditions that never hold for our messages: tools, and numbers before images and videos.
_NEVER = re.compile(r"\b(?:tools?|tool_calls|add_vision_id)\b")
_NOT_NEVER = re.compile(r"\bnot\s+\(?[\w.]*(?:tool|add_vision_id)")

_BODY = rf"(?:{_CONTENT}|<\|vision_start\|><\|(?:image|video)_pad\|><\|vision_end\|>)*"
_HEADER, _END = rf"(?:system|user|assistant|{_ROLE})\n", r"<\|im_end\|>\n"
_TURN = re.compile(rf"{_HEADER}(?:{_BODY}{_END})+")
_DEFAULT_SYSTEM = re.compile(rf"system\n((?:(?!<\|)[^{_CONTENT}{_ROLE}])+){_END}")
_THOUGHT = re.compile(rf"{_HEADER}<think>\n{_CONTENT}\n</think>\n\n{_CONTENT}(?:{_END})?")
_UNENDED = re.compile(_HEADER + _CONTENT)  # an answer whose end is written after its tool calls
_OPENING, _THINKING = "assistant\n", "assistant\n<think>\n"


@dataclasses.dataclass(frozen=True)
class ChatForm:
    """Form of a model's prompts.

    Attributes:
      default_system: system prompt of conversations without one; None for none.
      thinking: answers begin with a thought, which the prompt for an answer has opened.
    """

    default_system: str | None = None
    thinking: bool = False

    @property
    def opening(self) -> str:
        """What a prompt already says of the answer to come."""
        return "<think>\n" if self.thinking else ""

    @classmethod
    def published(cls, family: str, thinking: bool = False) -> ChatForm:
        """Return the form of a family's released models."""
        return cls(_PUBLISHED_SYSTEM.get(family), thinking)


def chat_form(folder: str | Path, family: str, choice: str = "auto") -> ChatForm:
    """Return the form of prompts of the model in a folder.

    Args:
      family: "qwen3_vl" or "qwen2_5_vl".
      choice: "instruct" or "thinking", whatever the folder says; "auto" = by its chat template, and without one the
        Instruct form.

    Raises:
      ProcessorError: the template writes something else, or cannot be read.
    """
    if choice not in CHOICES:
        raise ProcessorError(f"unknown chat template {choice!r} (known: {', '.join(CHOICES)})")
    if choice != "auto":
        return ChatForm.published(family, choice == "thinking")
    found = _find(place(folder))
    if found is None:
        return ChatForm.published(family)
    source, template = found
    try:
        return _form(*_skeleton(template))
    except _OtherForm as error:
        raise ProcessorError(
            f"{source}: the chat template is neither the Instruct nor the Thinking form of Qwen-VL: {error}. Prompts "
            "would not be those that the model was trained on. If one of the forms is right all the same, say so: "
            "--config.model.chat_template=instruct, or thinking"
        ) from None


class _OtherForm(Exception):
    """What in a template is not of the known forms."""


def _find(folder: Path) -> tuple[str, str] | None:
    """The name of the first file that has a template, and the template; None without any."""
    for name in FILES:
        file = folder / name
        value: Any = None
        if name.endswith(".json"):
            value = (read_object(file, ProcessorError) or {}).get("chat_template")
        elif file.is_file():
            try:
                value = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ProcessorError(f"{file}: not UTF-8 text ({error})") from error
        if isinstance(value, list):  # templates by name, as tokenizer_config.json may have them
            value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        if isinstance(value, dict):
            value = value.get("default")
        if value:
            if not isinstance(value, str):
                raise ProcessorError(f"{file}: chat_template is no text: {shown(value)}")
            return str(file), value
    return None


def _form(skeleton: str, systems: set[str]) -> ChatForm:
    """The form that a skeleton writes, `systems` being default system prompts that it has set. Raises _OtherForm."""
    before, *turns = skeleton.split("<|im_start|>")
    if not re.fullmatch(_BODY, before):
        raise _OtherForm(f"it writes {_visible(before)} outside of turns")
    if not turns:
        raise _OtherForm("it writes no <|im_start|>")
    thoughts, opening = False, ""
    for n, turn in enumerate(turns):
        if turn in (_OPENING, _THINKING) and n == len(turns) - 1:
            opening = turn
        elif found := _DEFAULT_SYSTEM.fullmatch(turn):
            systems.add(found[1])
        elif _THOUGHT.fullmatch(turn):
            thoughts = True
        elif not (_TURN.fullmatch(turn) or (thoughts and _UNENDED.fullmatch(turn))):
            raise _OtherForm(f"it writes the turn {_visible('<|im_start|>' + turn)}")
    if len(systems) > 1:
        raise _OtherForm(f"it has several default system prompts: {', '.join(map(shown, sorted(systems)))}")
    if not opening and not turns[-1].startswith(_OPENING):  # some open the answer right after a question
        raise _OtherForm("it does not end a prompt with <|im_start|>assistant and a line break")
    if thoughts and opening != _THINKING:
        raise _OtherForm("its answers hold a thought that its prompts do not open with <think>")
    return ChatForm(systems.pop() if systems else None, opening == _THINKING)


def _visible(text: str) -> str:
    return shown(text.replace(_ROLE, "{role}").replace(_CONTENT, "{content}"))


def _skeleton(template: str) -> tuple[str, set[str]]:
    """What a template writes, in the order of its text and without branches for `_NEVER`; default system prompts.

    Raises:
      _OtherForm: something in it is unknown.
    """
    written, systems, taken, outer = [], set(), True, []
    for kind, text in _parts(template):
        word, _, rest = text.partition(" ")
        if kind == "text":
            written += [text] * taken
        elif kind == "{{":
            written += _written(text) if taken else []
        elif word in ("if", "for", "macro"):
            outer.append(taken)
            taken = taken and not _never(rest)
        elif word in ("elif", "else") and outer:
            taken = outer[-1] and not _never(rest)
        elif word in ("endif", "endfor", "endmacro") and outer:
            taken = outer.pop()
        elif word == "set" and "=" in rest:
            name, _, value = (part.strip() for part in rest.partition("="))
            if taken and "system" in name and _LITERAL.fullmatch(value) and _text_of(value):
                systems.add(_text_of(value))
            elif taken:
                _check(value)
        elif word not in ("generation", "endgeneration"):
            raise _OtherForm(f"it has the statement {shown(text)}")
    return "".join(written), systems


def _never(condition: str) -> bool:
    cases = [re.sub(r"\bis\s+not\b", "is", case) for case in re.split(r"\bor\b", condition)]
    return all(_NEVER.search(case) and not _NOT_NEVER.search(case) for case in cases)


def _parts(template: str) -> Iterator[tuple[str, str]]:
    """("text", what stands between tags), ("{{", expression) and ("{%", statement), with white space as transformers.

    That is Jinja with trim_blocks and lstrip_blocks: a block takes the line break after it and the indent before it, a
    minus sign in a tag all white space on its side.
    """
    template = re.sub(r"\r\n?", "\n", template).removesuffix("\n")
    place, after, starts_line = 0, "", True
    for tag in [*_TAG.finditer(template), None]:
        text = template[place : tag.start() if tag else None]
        kept = text.lstrip() if after == "-" else text.removeprefix("\n") if after == "block" else text
        starts_line = place == 0 or text[: len(text) - len(kept)].endswith("\n")
        if tag is None:
            yield "text", kept
            return
        kind, inside, place = tag[0][:2], tag[0][2:-2], tag.end()
        indent = kept.rfind("\n") + 1
        if inside[:1] == "-":
            kept = kept.rstrip()
        elif kind != "{{" and inside[:1] != "+" and (indent or starts_line) and not kept[indent:].strip():
            kept = kept[:indent]
        yield "text", kept
        after = "-" if inside[-1:] == "-" else "block" if kind != "{{" and inside[-1:] != "+" else ""
        if kind != "{#":
            yield kind, re.sub(r"^[-+]|[-+]$", "", inside).strip()


def _written(expression: str) -> Iterator[str]:
    """What an expression writes: the strings and messages that it joins. Raises _OtherForm."""
    operands, depth = [""], 0
    for part in re.findall(rf"{_STRING}|.", expression, re.DOTALL):
        depth += (part in "([{") - (part in ")]}")
        if part in "+~" and not depth:
            operands.append("")
        else:
            operands[-1] += part
    for operand in map(str.strip, operands):
        if _LITERAL.fullmatch(operand):
            yield _text_of(operand)
        elif _ROLE_NAMES.fullmatch(operand):
            yield _ROLE
        elif operand != "bos_token" and not operand.startswith("raise_exception("):  # Qwen's tokenizers have no bos
            _check(operand)
            yield _CONTENT


def _check(expression: str) -> None:
    """Raises _OtherForm for an expression by which more, or less, than a message's own text may be written."""
    rest = _HARMLESS.sub("", expression)
    if _CHANGES.search(_LITERAL.sub("", rest)) or any(len(s) > 2 for s in _LITERAL.findall(rest)):
        raise _OtherForm(f"it has the expression {shown(expression)}")


def _text_of(literal: str) -> str:
    """Text of a string literal, with the escapes that Jinja knows."""
    return literal[1:-1].encode("ascii", "backslashreplace").decode("unicode_escape")
