"""The `infer` task: ask questions about one video or image, those of a config or a file, or one after the other."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections

from mllm4d_jax.encode.encoder import Encoder, media_identity, media_name
from mllm4d_jax.encode.example import Example
from mllm4d_jax.eval.asking import Manner
from mllm4d_jax.eval.clip_questions import (
    ClipQuestion,
    ClipQuestionError,
    read_questions,
    record_questions,
    typed_question,
)
from mllm4d_jax.eval.session import Answer, ClipSession, OneClip
from mllm4d_jax.eval.terminal import Line, converse, standard_input, typed_lines
from mllm4d_jax.files.atomic import require_place
from mllm4d_jax.files.remote import absolute, place
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.report.build import write_page
from mllm4d_jax.report.items import ShownAnswer
from mllm4d_jax.report.look import film, look_page, shown_answer
from mllm4d_jax.report.reading import flat
from mllm4d_jax.run.build import encoder_of
from mllm4d_jax.run.start import ModelChoice, choose_model, load_chosen


class InferError(ValueError):
    """The request cannot be answered as it stands."""


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Entry point of the task: prints the answers on stdout and the figures on stderr, and writes the page.

    Where the config has no question, they are taken from standard input, line by line; 1 is returned if a line of a
    file or pipe was none.

    Raises:
      InferError, ClipQuestionError, EvaluationError, RecordError, RecordFileError, ProcessorError, MeshError: what is
        missing or unusable;
      StartError, ResumeError, ModelConfigError, CheckpointError, PeftError: the model;
      StorageError, ReportError: the page.
    """
    del workdir
    manner = Manner.of(config.prompt)
    media, known = find_questions(config, manner)
    if config.page:
        require_place(config.page)
    typed = standard_input()
    lines = None if known else _typed(typed_lines(typed), typed.isatty())
    choice = choose_model(config.model.path, config.model.adapter, config.model.step)
    clip = OneClip()
    with encoder_of(choice.base, config.video, chat_template=config.model.chat_template) as encoder:
        looked = manner.conversation("the clip", [{"role": "user", "content": media}])
        examples = [clip.encode(encoder, record) for record in ([one.record for one in known] or [looked])]
    named = len(known) > 1 or not (known or typed.isatty())
    talk = _Talk(config, choice, encoder, clip, [media_name(part) for part in media], named=named)
    if lines is None:
        for question, example in zip(known, examples, strict=True):
            talk.ask(question, example)
        return 0
    talk.session.see(examples[0])

    def ask(number: int, text: str) -> None:
        question = typed_question(text, f"line {number}", media, manner)
        talk.ask(question, clip.encode(encoder, question.record))

    return converse(lines, ask, typed.isatty())


def find_questions(
    config: ml_collections.ConfigDict, manner: Manner
) -> tuple[list[dict[str, Any]], list[ClipQuestion]]:
    """Return the parts of a message that show the clip, and the questions that the config names; [] for none.

    Raises:
      InferError: there is no clip, or there are two; ClipQuestionError, RecordFileError, RecordError: see
        `clip_questions`.
    """
    if config.question and not config.question.strip():
        raise InferError('config.question is empty: give one with --config.question="..."')
    media = [{"type": k, "path": absolute(p)} for k, p in (("video", config.clip), ("image", config.image)) if p]
    known = []
    if config.record and media:
        raise InferError("config.record has a clip of its own: leave config.clip and config.image out")
    if config.record:
        known = record_questions(config.record, config.data.root, manner)
        contents = (message["content"] for message in known[0].record.messages)
        media = [part for parts in contents if not isinstance(parts, str) for part in parts if part["type"] != "text"]
    if not media:
        raise InferError(
            "nothing to look at: give --config.clip=FILE, --config.image=FILE, or --config.record=FILE:KEY with a clip"
        )
    if config.question:
        known.append(typed_question(config.question, "config.question", media, manner))
    if config.questions:
        known += read_questions(config.questions, media, manner)
    identities = {media_identity(one.record): one.record.key for one in reversed(known)}
    if len(identities) > 1:
        raise ClipQuestionError(f"the questions {', '.join(identities.values())} are about different clips")
    return media, known


def _typed(lines: Iterator[Line], terminal: bool) -> Iterator[Line]:
    """The lines; of a pipe the first is awaited before a model is loaded. Raises InferError where there is none."""
    if terminal:
        return lines
    first = next(lines, None)
    if first is None:
        raise InferError(
            'there is no question: give --config.question="...", --config.questions=FILE or --config.record=FILE:KEY, '
            "or write them to standard input, one a line"
        )
    return itertools.chain([first], lines)


class _Talk:
    """The model with the clip in front of it, and what is made of its answers: text, figures, page.

    Attributes:
      session: what answers.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        choice: ModelChoice,
        encoder: Encoder,
        clip: OneClip,
        files: Sequence[str],
        *,
        named: bool,
    ) -> None:
        """Load the model.

        Args:
          clip: encoded before; `files`: what its images and videos are called.
          named: answers are printed behind their questions.
        """
        self._config, self._choice, self._files, self._named = config, choice, files, named
        self._film, self._shown = None, []
        if config.page:
            frames = ((one, "image" if one.time is None else f"{one.time:.2f} s") for one in clip.frames(encoder))
            self._film = film([(one.pixels, caption) for one, caption in frames])
        started, tensor = time.monotonic(), config.mesh.tensor
        mesh = make_mesh(dict(config.mesh), jax.local_devices()[: tensor if tensor > 0 else None])
        model = load_chosen(choice, dtype=config.model.dtype, attention=config.model.attention, mesh=mesh)
        self._load_s, self._backend = time.monotonic() - started, model.backend.name
        self.session = ClipSession(model, encoder, config)

    def ask(self, question: ClipQuestion, example: Example) -> None:
        """Answer a question: print the answer, and add it to the page."""
        answer = self.session.answer(example)
        print(f"> {question.text}\n{answer.text}\n" if self._named else answer.text, flush=True)
        self._print_figures(answer, example)
        if self._film is not None:
            self._shown.append(self._shown_answer(question, example, answer))
            self._write_page(example)

    def _print_figures(self, answer: Answer, example: Example) -> None:
        grids = ", ".join(f"{g.modality} {g.t}x{g.h}x{g.w}" for g in example.grids)
        ending = "" if answer.stopped else f" (stopped at max_new_tokens = {self._config.max_new_tokens})"
        decode = sum(seconds for _, seconds in answer.decode)
        print(
            f"prompt tokens {len(example.tokens)} ({answer.visual_tokens} visual; patch grids {grids}), "
            f"generated {answer.tokens}{ending}\n"
            f"{_rate(answer.decode):.2f} tokens/s; load {self._load_s:.1f} s, clip {answer.prefix_s:.1f} s, question "
            f"{answer.question_s:.1f} s, decode {decode:.1f} s (first calls include compilation); "
            f"attention {self._backend}",
            file=sys.stderr,
            flush=True,
        )

    def _shown_answer(self, question: ClipQuestion, example: Example, answer: Answer) -> ShownAnswer:
        limit = self._config.max_new_tokens
        return shown_answer(
            f"{len(self._shown) + 1}. {question.record.key}",
            question.text,
            question.choices,
            answer.text,
            reasoning="<thinking>" in example.text,  # whoever asks for it
            truth=question.truth,
            solution=question.solution,
            facts=(("tokens", f"{answer.tokens}"),),
            notes=(*question.notes, *([] if answer.stopped else [f"it ends at max_new_tokens = {limit}"])),
        )

    def _write_page(self, example: Example) -> None:
        """Write what there is so far, so that an end at any moment loses no answer that was printed."""
        c, name = self._config, " and ".join(os.path.basename(file) for file in self._files)
        drawn = "greedy" if c.temperature == 0 else f"temperature {c.temperature:g}, seed {c.seed}"
        facts = {
            "model": str(self._choice),
            "clip": ", ".join(self._files),
            "patches": ", ".join(f"{g.modality} {g.t} x {g.h} x {g.w}" for g in example.grids),
            "prompt": c.prompt.mode + (f" ({c.prompt.file})" if c.prompt.file else ""),
            "answers": f"{drawn}, at most {c.max_new_tokens} tokens",
        }
        html = look_page(f"Answers about {name}", self._film, self._shown, facts, dict(flat(c.to_dict())))
        write_page(place(c.page), html)


def _rate(chunks: Sequence[tuple[int, float]]) -> float:
    """Decode steps per second, those of the first of several chunks, which compiles, left out."""
    counted = chunks[1:] or chunks
    seconds = sum(seconds for _, seconds in counted)
    return sum(steps for steps, _ in counted) / seconds if seconds > 0 else 0.0
