"""The `infer` task: ask one question about one video or image."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence

import jax
import ml_collections
from flax import nnx

from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import Example, VideoOptions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.generate.policy import SamplingOptions, banned_token_ids
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.models.qwen_vl import QwenVL, vision_geometry
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.qa.records import Record
from mllm4d_jax.qa.system_prompt import resolve_system_prompt
from mllm4d_jax.rows.batch import ModelInputs, collate
from mllm4d_jax.run.start import choose_model, load_chosen

_CHUNK = 16  # tokens between two looks at the answer
_LENGTH_MULTIPLE = 128  # prompts are padded to this, so that similar prompts share one compiled program


class InferError(ValueError):
    """The request cannot be answered as it stands."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What `ask` returns.

    Attributes:
      text: the answer without its end token.
      tokens: number of generated tokens, the end token included; finished: whether there was one.
      prompt_tokens, visual_tokens: length of the prompt and how much of it is image or video.
      prefill_seconds, decode_seconds: wall time, compilation included in the first call of a shape.
      tokens_per_second: generated tokens after the first chunk per second of their decoding (the first chunk compiles);
        over everything when the answer fits in one chunk.
    """

    text: str
    tokens: int
    finished: bool
    prompt_tokens: int
    visual_tokens: int
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float


def build_record(question: str, *, video: str = "", image: str = "", system: str | None = None) -> Record:
    """One user turn: the media, then the question."""
    if not question.strip():
        raise InferError('config.question is empty: give one with --config.question="..."')
    parts = [{"type": kind, "path": os.path.abspath(p)} for kind, p in (("video", video), ("image", image)) if p]
    if not parts:
        raise InferError("nothing to look at: give --config.clip=FILE or --config.image=FILE")
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Record(key="question", messages=tuple(messages))


def prompt_inputs(model: QwenVL, example: Example) -> ModelInputs:
    """One example as a batch of one, left-padded to a multiple of 128 tokens."""
    config = model.config
    return collate(
        [example],
        vision_geometry(config),
        visual_token_ids=(config.image_token_id, config.video_token_id),
        length=math.ceil(len(example.tokens) / _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE,
        pad_side="left",
    )


def ask(
    model: QwenVL, tokenizer: Tokenizer, example: Example, *, max_new_tokens: int, options: SamplingOptions, seed: int
) -> Answer:
    """Generates the answer to an encoded prompt.

    Args:
      example: encoded with a generation prompt.
      options: its end tokens decide when the answer is complete.
    """
    inputs = prompt_inputs(model, example)
    graphdef, state = nnx.split(model)
    out = Sampler(graphdef, model.mesh, chunk=_CHUNK).generate(
        (state,),
        inputs,
        prompt_ids=[0],
        branches=1,
        max_new_tokens=max_new_tokens,
        options=options,
        seed=seed,
        detokenize=tokenizer.decode,
    )
    chunks = out.statistics.chunks
    return Answer(
        text=out.texts(tokenizer.decode)[0][0],
        tokens=int(out.lengths[0, 0]),
        finished=out.finish_reason[0][0] == "stop",
        prompt_tokens=len(example.tokens),
        visual_tokens=int((inputs.vision_index >= 0).sum()),
        prefill_seconds=out.statistics.prefill_seconds,
        decode_seconds=sum(seconds for _, seconds in chunks),
        tokens_per_second=_rate(chunks),
    )


def _rate(chunks: Sequence[tuple[int, float]]) -> float:
    """Decode steps per second, those of the first of several chunks left out; see `Answer`."""
    counted = chunks[1:] or chunks
    seconds = sum(seconds for _, seconds in counted)
    return sum(steps for steps, _ in counted) / seconds if seconds > 0 else 0.0


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Entry point of the task: prints the answer on stdout and the figures on stderr.

    Raises:
      InferError, RecordError, ProcessorError, StartError, CheckpointError, MeshError: what is missing or unusable.
    """
    del workdir
    system = resolve_system_prompt(file=config.system_file)
    record = build_record(config.question, video=config.clip, image=config.image, system=system)
    choice = choose_model(config.model.path, config.model.adapter, config.model.step)
    tokenizer = Tokenizer.from_folder(choice.base)
    options = VideoOptions.from_mapping(config.video)
    with Encoder(ProcessorConfig.from_folder(choice.base), tokenizer, options) as encoder:
        example = encoder.encode(record, add_generation_prompt=True)
    started = time.monotonic()
    tensor = config.mesh.tensor
    mesh = make_mesh(dict(config.mesh), jax.local_devices()[: tensor if tensor > 0 else None])
    model = load_chosen(choice, dtype=config.model.dtype, attention=config.model.attention, mesh=mesh)
    loaded = time.monotonic() - started
    sampling = SamplingOptions(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        eos_ids=tokenizer.eos_ids,
        banned_ids=banned_token_ids(tokenizer, model.config.text.vocab_size),
    )
    answer = ask(model, tokenizer, example, max_new_tokens=config.max_new_tokens, options=sampling, seed=config.seed)
    print(answer.text, flush=True)
    grids = ", ".join(f"{g.modality} {g.t}x{g.h}x{g.w}" for g in example.grids)
    ending = "" if answer.finished else f" (stopped at max_new_tokens = {config.max_new_tokens})"
    print(
        f"prompt tokens {answer.prompt_tokens} ({answer.visual_tokens} visual; patch grids {grids}), "
        f"generated {answer.tokens}{ending}\n"
        f"{answer.tokens_per_second:.2f} tokens/s; load {loaded:.1f} s, prefill {answer.prefill_seconds:.1f} s, "
        f"decode {answer.decode_seconds:.1f} s (first calls include compilation); attention {model.backend}",
        file=sys.stderr,
    )
    return 0
