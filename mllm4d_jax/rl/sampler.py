"""Autoregressive generation: prefill once, then jitted chunks of decode steps with early exit.

The model is the learner's own (no second implementation), so the log-probs recorded here are the learner's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.text import KVCache
from mllm4d_jax.processing.batch import ModelInputs


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How a token is drawn.

    Attributes:
      temperature: 0 is greedy; the logits are divided by it before anything else.
      top_k: keep the k most likely tokens, 0 for all.
      top_p: keep the smallest set of likely tokens whose mass reaches top_p (nucleus); 1 for all.
      eos_ids: tokens that end a row (kept in its output).
      forbidden_ids: tokens that are never drawn: vision placeholders and padding belong to prompts only.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    eos_ids: tuple[int, ...] = ()
    forbidden_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature >= 0, top_k >= 0 and 0 < top_p <= 1 are required, got {self}")


class DecodeState(NamedTuple):
    """Everything a decode step reads and writes.

    Attributes:
      cache: keys and values, prompt in slots 0..S-1, generated token k in slot S+k of every row.
      logits: f32[B, V] of the next token.
      keys: one PRNG key a row: a completion does not depend on its neighbours.
      next_position: i32[B] M-RoPE position of the next token.
      done: bool[B].
      step: i32[] tokens generated so far.
      tokens: i32[B, N] output, 0 after the end; logprobs: f32[B, N] of the drawn tokens at the given temperature.
    """

    cache: KVCache
    logits: jax.Array
    keys: jax.Array
    next_position: jax.Array
    done: jax.Array
    step: jax.Array
    tokens: jax.Array
    logprobs: jax.Array


@dataclasses.dataclass(frozen=True)
class Generation:
    """Result of `generate`.

    Attributes:
      tokens: i32[B, N], zeros after each row's end; lengths: i32[B], the end token included.
      logprobs: f32[B, N].
      logits: f32[B, steps, V] if asked for, else None.
      positions: i32[B, steps] positions of the generated tokens (the same on all three axes).
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray
    logits: np.ndarray | None
    positions: np.ndarray


def draw(logits: jax.Array, keys: jax.Array, options: SamplingOptions) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
      logits: f32[B, V]; keys: one PRNG key a row.

    Returns:
      (tokens i32[B], log-probs f32[B] under the distribution drawn from; for greedy, at temperature 1).
    """
    if options.forbidden_ids:
        logits = logits.at[:, jnp.array(options.forbidden_ids)].set(-jnp.inf)
    if options.temperature == 0:
        tokens = jnp.argmax(logits, -1)
    else:
        logits = logits / options.temperature
        if options.top_k:
            kth = jax.lax.top_k(logits, min(options.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < kth, -jnp.inf, logits)
        if options.top_p < 1:
            logits = _nucleus(logits, options.top_p)
        tokens = jax.vmap(jax.random.categorical)(keys, logits)
    logprobs = jax.nn.log_softmax(logits, -1)
    return tokens.astype(jnp.int32), jnp.take_along_axis(logprobs, tokens[:, None], -1)[:, 0]


def _nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    ordered = jnp.sort(logits, -1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ordered, -1), -1) - jax.nn.softmax(ordered, -1)
    # A token stays while the mass of the likelier ones is below top_p, so the first always stays.
    threshold = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)


@functools.partial(jax.jit, static_argnames=("graphdef", "new_tokens"))
def _prefill(graphdef, state, inputs: ModelInputs, keys, new_tokens: int) -> DecodeState:
    model = nnx.merge(graphdef, state)
    b, s = inputs.tokens.shape
    out = model.forward(inputs, cache=model.text.init_cache(b, s + new_tokens))
    slots = jnp.arange(s)
    last = jnp.max(jnp.where(inputs.segment_ids != 0, slots, -1), -1)
    logits = model.logits(out.hidden[jnp.arange(b), last])
    # The largest position of the prompt, not of its last token: an image may reach further than the text after it.
    real = inputs.segment_ids[None] != 0
    following = jnp.max(jnp.where(real, inputs.positions, -1), (0, 2)) + 1
    return DecodeState(
        cache=out.cache,
        logits=logits,
        keys=keys,
        next_position=following.astype(jnp.int32),
        done=jnp.zeros(b, bool),
        step=jnp.int32(0),
        tokens=jnp.zeros((b, new_tokens), jnp.int32),
        logprobs=jnp.zeros((b, new_tokens), jnp.float32),
    )


def _decode_step(model: QwenVL, s: DecodeState, prompt: int, options: SamplingOptions) -> DecodeState:
    keys = jax.vmap(jax.random.fold_in, (0, None))(s.keys, s.step)
    tokens, logprobs = draw(s.logits, keys, options)
    tokens = jnp.where(s.done, 0, tokens)
    out = jax.lax.dynamic_update_slice(s.tokens, tokens[:, None], (0, s.step))
    scores = jax.lax.dynamic_update_slice(s.logprobs, jnp.where(s.done, 0.0, logprobs)[:, None], (0, s.step))
    ended = jnp.isin(tokens, jnp.array(options.eos_ids)) if options.eos_ids else jnp.zeros_like(s.done)
    positions = jnp.broadcast_to(s.next_position[None, :, None], (3, len(tokens), 1))
    result = model.decode(tokens[:, None], positions, s.cache, prompt + s.step)
    return DecodeState(
        cache=result.cache,
        logits=model.logits(result.hidden[:, 0]),
        keys=s.keys,
        next_position=s.next_position + 1,
        done=s.done | ended,
        step=s.step + 1,
        tokens=out,
        logprobs=scores,
    )


@functools.partial(
    jax.jit, static_argnames=("graphdef", "prompt", "options", "steps"), donate_argnames=("decode_state",)
)
def _decode_chunk(graphdef, state, decode_state: DecodeState, prompt: int, options: SamplingOptions, steps: int):
    model = nnx.merge(graphdef, state)
    stop = jnp.minimum(decode_state.step + steps, decode_state.tokens.shape[1])

    def going(s: DecodeState):
        return (s.step < stop) & ~jnp.all(s.done)

    return jax.lax.while_loop(going, lambda s: _decode_step(model, s, prompt, options), decode_state)


def stream(
    model: QwenVL, inputs: ModelInputs, *, max_new_tokens: int, options: SamplingOptions, seed: int = 0, chunk: int = 16
) -> Iterator[DecodeState]:
    """Prefills, then yields the state: once after the prompt and after every chunk of decode steps.

    The state yielded is donated to the next chunk: read what you need of it before asking for the next one.

    Args:
      model: any precision; inputs: a batch, padded on either side.
      seed: row r uses `fold_in(key(seed), r)`.
      chunk: decode steps per device call; rows that end early are checked between steps.
    """
    graphdef, state = nnx.split(model)
    rows, prompt = inputs.tokens.shape
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))
    current = _prefill(graphdef, state, inputs, keys, max_new_tokens)
    yield current
    while int(current.step) < max_new_tokens and not bool(jnp.all(current.done)):
        current = _decode_chunk(graphdef, state, current, prompt, options, chunk)
        yield current


def generate(
    model: QwenVL,
    inputs: ModelInputs,
    *,
    max_new_tokens: int,
    options: SamplingOptions,
    seed: int = 0,
    chunk: int = 16,
    keep_logits: bool = False,
) -> Generation:
    """Generates for a batch; see `stream` for the arguments.

    Args:
      keep_logits: also return the logits of every step (one device call a step: for parity checks).
    """
    kept, positions, final = [], [], None
    chunk = 1 if keep_logits else chunk
    for final in stream(model, inputs, max_new_tokens=max_new_tokens, options=options, seed=seed, chunk=chunk):
        if keep_logits:
            kept.append(np.asarray(final.logits))
        if not positions:
            positions.append(np.asarray(final.next_position))
    steps = int(final.step)
    tokens = np.asarray(final.tokens)
    return Generation(
        tokens=tokens,
        lengths=row_lengths(tokens[:, :steps], options.eos_ids),
        logprobs=np.asarray(final.logprobs),
        logits=np.stack(kept[:steps], 1) if keep_logits else None,
        positions=positions[0][:, None] + np.arange(steps),
    )


def row_lengths(tokens: np.ndarray, eos_ids: Sequence[int]) -> np.ndarray:
    """Number of tokens of each row up to and including its first end token: i32[B]."""
    ended = np.isin(tokens, list(eos_ids)) if eos_ids else np.zeros(tokens.shape, bool)
    first = np.where(ended.any(1), ended.argmax(1) + 1, tokens.shape[1])
    return first.astype(np.int32)
