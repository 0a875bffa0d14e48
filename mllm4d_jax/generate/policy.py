"""The distribution that completions are drawn from, in one place for the sampler and the learner, and the draw itself.

It is softmax(logits / temperature) over the tokens that are not banned. Banned tokens (visual placeholders, padding)
can never be drawn, so they have no share in the normalisation either: what the sampler records is the exact probability
of what it did, sampled frequencies follow it, and the learner, who calls the same functions, reproduces it. Nothing
else changes the distribution: top-k and top-p are a matter of drawing, refused where exact log-probs are required.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mllm4d_jax.encode.tokenizer import Tokenizer
from mllm4d_jax.parallel.products import einsum_f32, over_positions, pick

# Finite, so that a banned token adds exactly 0 to the entropy instead of 0 times infinity.
_BANNED = -1e30


class TokenScores(NamedTuple):
    """Per position."""

    logprobs: jax.Array  # f32[B, M] of the targets; about -1e30 for a banned target
    entropy: jax.Array  # f32[B, M] of the distribution, nats


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """[..., H] and [H, V] -> f32[..., V], summed in fp32 and not rounded to the activation dtype."""
    return einsum_f32("...h,hv->...v", hidden, head.astype(hidden.dtype))


def policy_logits(logits: jax.Array, temperature: float, banned_ids: Sequence[int]) -> jax.Array:
    """Unnormalised log-probs of the policy.

    Args:
      logits: f32[..., V].
      temperature: above 0.
      banned_ids: token ids below V.
    """
    if temperature <= 0:
        raise ValueError(f"log-probs need a temperature above 0, got {temperature} (greedy decoding reports them at 1)")
    if len(banned_ids):
        banned = jnp.zeros(logits.shape[-1], bool).at[jnp.asarray(banned_ids)].set(True)
        logits = jnp.where(banned, _BANNED, logits)
    return logits / temperature


def target_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-softmax at the targets: f32[..., V] and i32[...] -> f32[...]."""
    return pick(logits, targets) - jax.nn.logsumexp(logits, -1)


def token_scores(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: float,
    banned_ids: Sequence[int],
    *,
    chunk: int = 1024,
    mesh: Mesh | None = None,
) -> TokenScores:
    """Log-probs of the targets and entropies; differentiable.

    Args:
      hidden: [B, M, H] final hidden states that predict the targets.
      head: [H, V] output projection.
      targets: i32[B, M].
      temperature, banned_ids: those of the sampler (`SamplingOptions`).
      chunk, mesh: see `parallel.products.over_positions`.
    """

    def scores(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        policy = policy_logits(logits, temperature, banned_ids)
        whole = jax.nn.logsumexp(policy, -1, keepdims=True)
        share = jnp.exp(policy - whole)
        # Finite banned logits: 0 times -1e30 is 0.
        return pick(policy, targets) - whole[..., 0], whole[..., 0] - jnp.sum(share * policy, -1)

    return TokenScores(*over_positions(scores, hidden, head, (targets,), chunk=chunk, mesh=mesh))


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn and when a completion ends."""

    temperature: float = 0.0  # 0 is greedy; the logits are divided by it before anything else
    top_k: int = 0  # keep the k most likely tokens, 0 for all
    top_p: float = 1.0  # keep the smallest set of likely tokens whose mass reaches top_p (nucleus); 1 for all
    eos_ids: tuple[int, ...] = ()  # tokens that end a completion (kept in it)
    stop: tuple[str, ...] = ()  # texts that end a completion; the token that completes one is the last
    banned_ids: tuple[int, ...] = ()  # tokens that are never drawn, see `banned_token_ids`
    pad_id: int = 0  # what output arrays hold after the end of a completion
    require_exact: bool = False  # refuse all that makes the draw differ from the policy whose log-probs are recorded

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature >= 0, top_k >= 0 and 0 < top_p <= 1 are required, got {self}")
        both = sorted(set(self.eos_ids) & set(self.banned_ids))
        if both:
            raise ValueError(f"tokens {both} are banned and end a completion: take them out of one of the lists")
        if "" in self.stop:
            raise ValueError("an empty stop text would end every completion at once")
        if self.require_exact and (self.temperature == 0 or self.top_k or self.top_p < 1):
            raise ValueError(
                "completions that are trained on are drawn from the policy itself: temperature above 0, top_k 0 and "
                f"top_p 1, got {self.temperature}, {self.top_k} and {self.top_p}"
            )


def banned_token_ids(tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """What a completion must never hold: visual markers and placeholders, padding, ids that stand for no text.

    The padding token stays allowed where it also ends a text (as in all Qwen releases).

    Args:
      vocab_size: of the model's head, which is often larger than the tokenizer's vocabulary.
    """
    padding = {tokenizer.pad_id} - set(tokenizer.eos_ids)
    return tuple(sorted({*tokenizer.vision_ids, *padding, *tokenizer.unused_ids(vocab_size)}))


def prompt_id(key: str) -> int:
    """A number below 2^32 for a record's key: the same in every run, on every machine, in any batch."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little")


def branch_keys(seed: jax.Array, prompt_ids: jax.Array, branches: jax.Array) -> jax.Array:
    """One random key per branch, [B, G], from nothing but its arguments.

    Args:
      seed: u32[]; prompt_ids: u32[B, G]; branches: i32[B, G] number of each branch within its prompt.
    """
    root, fold = jax.random.key(seed), jax.random.fold_in
    return jax.vmap(jax.vmap(lambda prompt, branch: fold(fold(root, prompt), branch)))(prompt_ids, branches)


def draw(
    logits: jax.Array, keys: jax.Array, index: jax.Array | int, options: SamplingOptions
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per branch.

    Args:
      logits: f32[B, G, V].
      keys: [B, G] from `branch_keys`.
      index: i32[] or i32[B, G], number of each token within its completion; folded into the keys.

    Returns:
      (tokens i32[B, G], log-probs f32[B, G] under the policy: without top-k and top-p, and at
      temperature 1 for greedy).
    """
    policy = policy_logits(logits, options.temperature or 1.0, options.banned_ids)
    if options.temperature == 0:
        tokens = jnp.argmax(policy, -1)
    else:
        kept = policy
        if options.top_k:
            kth = jax.lax.top_k(kept, min(options.top_k, kept.shape[-1]))[0][..., -1:]
            kept = jnp.where(kept < kth, -jnp.inf, kept)
        if options.top_p < 1:
            kept = _nucleus(kept, options.top_p)
        keys = jax.vmap(jax.vmap(jax.random.fold_in))(keys, jnp.broadcast_to(index, keys.shape))
        tokens = jax.vmap(jax.vmap(jax.random.categorical))(keys, kept)
    return tokens.astype(jnp.int32), target_logprobs(policy, tokens)


def _nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    ordered = jnp.sort(logits, -1, descending=True)
    mass = jax.nn.softmax(ordered, -1)
    before = jnp.cumsum(mass, -1) - mass
    # A token stays while the mass of the likelier ones is below top_p, so the first always stays.
    threshold = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)
