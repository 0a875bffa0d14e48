"""The `infer` task: ask one question about one video or image."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np
from flax import nnx

from mllm4d_jax.encode.example import Example
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.files.remote import absolute
from mllm4d_jax.generate.completions import Completions
from mllm4d_jax.generate.policy import SamplingOptions, banned_token_ids
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.models.qwen_vl import QwenVL, vision_geometry
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.qa.reasoning import with_prompt
from mllm4d_jax.qa.records import Record
from mllm4d_jax.qa.system_prompt import resolve_system_prompt
from mllm4d_jax.rows.batch import collate
from mllm4d_jax.run.build import encoder_of
from mllm4d_jax.run.start import choose_model, load_chosen

_CHUNK = 16  # tokens between two looks at the answer
_LENGTH_MULTIPLE = 128  # prompts are padded to this, so that similar prompts share one compiled program


class InferError(ValueError):
    """The request cannot be answered as it stands."""


def build_record(question: str, *, video: str = "", image: str = "", system: str | None = None) -> Record:
    """One user turn: the media, then the question."""
    if not question.strip():
        raise InferError('config.question is empty: give one with --config.question="..."')
    parts = [{"type": kind, "path": absolute(p)} for kind, p in (("video", video), ("image", image)) if p]
    if not parts:
        raise InferError("nothing to look at: give --config.clip=FILE or --config.image=FILE")
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Record(key="question", messages=tuple(messages))


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Entry point of the task: prints the answer on stdout and the figures on stderr.

    Raises:
      InferError, RecordError, ProcessorError, MeshError: what is missing or unusable;
      StartError, ResumeError, ModelConfigError, CheckpointError, PeftError: the model.
    """
    del workdir
    system = resolve_system_prompt(file=config.system_file)
    record = build_record(config.question, video=config.clip, image=config.image, system=system)
    choice = choose_model(config.model.path, config.model.adapter, config.model.step)
    with encoder_of(choice.base, config.video, chat_template=config.model.chat_template) as encoder:
        example = encoder.encode(record, add_generation_prompt=True)
    started = time.monotonic()
    tensor = config.mesh.tensor
    mesh = make_mesh(dict(config.mesh), jax.local_devices()[: tensor if tensor > 0 else None])
    model = load_chosen(choice, dtype=config.model.dtype, attention=config.model.attention, mesh=mesh)
    loaded = time.monotonic() - started
    out = _generate(model, encoder.tokenizer, example, config)
    print(with_prompt(example.text, out.texts(encoder.tokenizer.decode)[0][0]), flush=True)
    grids = ", ".join(f"{g.modality} {g.t}x{g.h}x{g.w}" for g in example.grids)
    visual = int(np.isin(example.tokens, (model.config.image_token_id, model.config.video_token_id)).sum())
    ending = "" if out.finish_reason[0][0] == "stop" else f" (stopped at max_new_tokens = {config.max_new_tokens})"
    decode = sum(seconds for _, seconds in out.statistics.chunks)
    print(
        f"prompt tokens {len(example.tokens)} ({visual} visual; patch grids {grids}), "
        f"generated {out.lengths[0, 0]}{ending}\n"
        f"{_rate(out.statistics.chunks):.2f} tokens/s; load {loaded:.1f} s, "
        f"prefill {out.statistics.prefill_seconds:.1f} s, decode {decode:.1f} s (first calls include compilation); "
        f"attention {model.backend}",
        file=sys.stderr,
    )
    return 0


def _generate(model: QwenVL, tokenizer: Tokenizer, example: Example, config: ml_collections.ConfigDict) -> Completions:
    """The answer to an encoded prompt, left-padded to a multiple of `_LENGTH_MULTIPLE` tokens."""
    inputs = collate(
        [example],
        vision_geometry(model.config),
        visual_token_ids=(model.config.image_token_id, model.config.video_token_id),
        length=math.ceil(len(example.tokens) / _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE,
        pad_side="left",
    )
    options = SamplingOptions(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos_ids=tokenizer.eos_ids,
        banned_ids=banned_token_ids(tokenizer, model.config.text.vocab_size),
    )
    graphdef, state = nnx.split(model)
    return Sampler(graphdef, model.mesh, chunk=_CHUNK).generate(
        (state,),
        inputs,
        prompt_ids=[0],
        branches=1,
        max_new_tokens=config.max_new_tokens,
        options=options,
        seed=config.seed,
        detokenize=tokenizer.decode,
    )


def _rate(chunks: Sequence[tuple[int, float]]) -> float:
    """Decode steps per second, those of the first of several chunks, which compiles, left out."""
    counted = chunks[1:] or chunks
    seconds = sum(seconds for _, seconds in counted)
    return sum(steps for steps, _ in counted) / seconds if seconds > 0 else 0.0
