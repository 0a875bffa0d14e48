"""What one call of the sampler gets, checked and as numbers of all branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

import jax
import numpy as np

from mllm4d_jax.generate.decoding import PromptCache
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.rows.batch import ModelInputs


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """Numbers of B prompts with G branches."""

    limits: np.ndarray  # i32[B, G], longest completion in tokens; 1 where a slot of a shared-prefix row is empty
    prompt_ids: np.ndarray  # u32[B, G], with the next one what random keys are made of
    numbers: np.ndarray  # i32[B, G], of the branches within their prompts
    asked: np.ndarray | None  # i32[B, G] tokens each branch of shared-prefix rows begins with; None for plain rows
    slots: int  # places that these tokens have, 0 for plain rows
    most: int  # positions that a branch's cache may have to hold; the last token of a completion is never fed back

    @classmethod
    def checked(
        cls,
        inputs: ModelInputs,
        prompt_ids: Sequence[int] | Sequence[Sequence[int]],
        branches: int,
        max_new_tokens: int | np.ndarray,
    ) -> Self:
        """From the arguments of `Prompts.checked`, which says what they are and what is refused."""
        prompts = len(inputs.tokens)
        limits = _limits(max_new_tokens, prompts, branches)
        if inputs.layout is None:
            ids = np.broadcast_to(_prompt_ids(prompt_ids, prompts)[:, None], limits.shape)
            numbers = np.broadcast_to(np.arange(branches, dtype=np.int32), limits.shape)
            return cls(limits, ids, numbers, None, 0, max(int(limits.max()) - 1, 1))
        asked = _asked(inputs, branches)
        ids = _prompt_ids(np.asarray(prompt_ids).reshape(-1), limits.size).reshape(limits.shape)
        # Every question is a prompt of its own and its completion that prompt's first.
        limits, slots = np.where(asked, limits, 1), inputs.layout.length
        return cls(limits, ids, np.zeros_like(limits), asked, slots, slots + max(int(limits.max()) - 1, 1))

    def take(self, rows: np.ndarray) -> Self:
        """Numbers of some of the prompts; `most` is still of all, so that caches are made for all of them."""
        chosen = {name: getattr(self, name)[rows] for name in ("limits", "prompt_ids", "numbers")}
        return dataclasses.replace(self, asked=None if self.asked is None else self.asked[rows], **chosen)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts for the sampler.

    Attributes:
      inputs: on the host, or already on the devices. Plain rows, one prompt each, padded on either side; or
        shared-prefix rows, each about one clip, with a question in each branch slot (it may have fewer: the completion
        of an empty slot is one token that means nothing).
      call: their numbers.
      features: vision features computed before; None has `inputs.vision` encoded.
      prefix: of the rows, computed before by `Sampler.prefix`; `inputs` are then the rows' branches alone
        (`decoding.prefill_branches`).
    """

    inputs: ModelInputs
    call: Call
    features: VisionFeatures | None = None
    prefix: PromptCache | None = None

    @classmethod
    def checked(
        cls,
        inputs: ModelInputs,
        prompt_ids: Sequence[int] | Sequence[Sequence[int]],
        branches: int,
        max_new_tokens: int | np.ndarray,
        features: VisionFeatures | None = None,
        prefix: PromptCache | None = None,
    ) -> Self:
        """From what is asked of them.

        Args:
          prompt_ids: a number in [0, 2^32) for each prompt, see `policy.prompt_id`; for shared-prefix rows B x G of
            them, one for each question, which is then what it would be as a prompt in a row of its own.
          branches: completions per prompt (G); the slots of shared-prefix rows.
          max_new_tokens: length cap; one number, or an array that broadcasts to [B, G].

        Raises:
          ValueError: arguments that contradict each other, or shared-prefix rows with several clips in a row.
        """
        if prefix is not None and len(prefix.visible) != len(inputs.tokens):
            raise ValueError(f"{len(prefix.visible)} prefixes for {len(inputs.tokens)} rows")
        return cls(inputs, Call.checked(inputs, prompt_ids, branches, max_new_tokens), features, prefix)

    def __len__(self) -> int:
        return len(self.call.limits)

    def take(self, rows: np.ndarray) -> Self:
        """Some of the prompts, perhaps repeated."""
        inputs, features = fill_rows(self.inputs, self.features, rows)
        prefix = self.prefix
        if prefix is not None and not np.array_equal(rows, np.arange(len(self))):
            prefix = PromptCache(jax.tree.map(lambda x: x[:, rows], prefix.kv), prefix.visible[rows])
        return type(self)(inputs, self.call.take(rows), features, prefix)

    def divided(self, size: int) -> Iterator[Self]:
        """At most `size` of the prompts at a time, in their order."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))


def _asked(inputs: ModelInputs, branches: int) -> np.ndarray:
    """i32[B, N] tokens in each branch slot."""
    layout, segments = inputs.layout, np.asarray(inputs.segment_ids)
    if branches != layout.slots:
        raise ValueError(f"{branches} branches for rows of {layout.slots} branch slots: they must be equally many")
    if segments.max() > 1:
        row = int(np.argmax(segments.max(1) > 1))
        raise ValueError(f"row {row} has {segments[row].max()} clips; a row to be answered is about one")
    used = segments[:, layout.prefix :].reshape(len(segments), layout.slots, layout.length) != 0
    if (used[..., 1:] & ~used[..., :-1]).any():
        raise ValueError("a question must fill its branch slot from the first place on, without gaps")
    return used.sum(-1).astype(np.int32)


def _limits(max_new_tokens: int | np.ndarray, prompts: int, branches: int) -> np.ndarray:
    if branches < 1 or prompts < 1:
        raise ValueError(f"at least one prompt and one branch are required, got {prompts} and {branches}")
    limits = np.array(np.broadcast_to(max_new_tokens, (prompts, branches)), np.int32)
    if limits.min() < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {limits.min()}")
    return limits


def _prompt_ids(ids: Sequence[int] | np.ndarray, prompts: int) -> np.ndarray:
    if len(ids) != prompts:
        raise ValueError(f"{len(ids)} prompt ids for {prompts} prompts")
    if any(not 0 <= int(i) < 2**32 for i in ids):
        raise ValueError(f"prompt ids must be in [0, 2^32), got {list(ids)}")
    return np.array([int(i) for i in ids], np.uint32)


def fill_rows(
    inputs: ModelInputs, features: VisionFeatures | None, rows: np.ndarray
) -> tuple[ModelInputs, VisionFeatures | None]:
    """Rows `rows` of a batch, and the features they use.

    Plain rows point into the frames (or features) of all, which stay as they are; those of a shared-prefix row are its
    own and go with it.
    """
    count = len(inputs.tokens)
    if np.array_equal(rows, np.arange(count)):
        return inputs, features
    vision = inputs.vision
    if inputs.layout is not None:

        def repeat(x, dim: int = 0):
            before, each, after = x.shape[:dim], x.shape[dim] // count, x.shape[dim + 1 :]
            own = x.reshape(*before, count, each, *after).take(rows, dim)
            return own.reshape(*before, len(rows) * each, *after)

        vision = jax.tree.map(repeat, vision)
        if features is not None:
            features = VisionFeatures(repeat(features.merged), repeat(features.deepstack, 1))
    filled = inputs._replace(
        tokens=inputs.tokens[rows],
        positions=inputs.positions[:, rows],
        segment_ids=inputs.segment_ids[rows],
        vision_index=inputs.vision_index[rows],
        vision=vision,
    )
    return filled, features
