"""A sampler that computes nothing: every branch goes on to its limit, which is what sizes and counts depend on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from mllm4d_jax.generate.inputs import Prompts
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.generate.stream import CompletionStream, Limits
from mllm4d_jax.rows.batch import ModelInputs


class FakeSampler:
    """Attributes: shapes, (prompts, branches, slots) of every decode step; fed, what was sent for every chunk."""

    mesh = None

    def __init__(self, chunk: int, ladder: Ladder | None = None) -> None:
        self.chunk, self.ladder, self.shapes, self.fed = chunk, ladder or Ladder(), [], []

    def form(self, weights):
        return "stacked"

    def everywhere(self, tree):
        return tree

    def start(self, weights, inputs, features, keys, prefix, *, branches, **how):
        shape, cache = (len(inputs.tokens), branches), SimpleNamespace(visible=np.zeros(inputs.tokens.shape))
        return cache, None, np.zeros(shape, np.int32), np.ones((*shape, 1), np.int32), np.zeros((*shape, 1), np.float32)

    def empty(self, weights, *, shape, prompt, apart):
        return SimpleNamespace(visible=np.zeros((shape[0], prompt))), shape

    def insert(self, rows, arrived, began, *, cache, own):
        return cache, own

    def take_prompts(self, cache, rows):
        return cache

    def take_branches(self, own, rows, columns):
        return *columns.shape, own[2]

    def grow_branches(self, own, *, width, slots):
        return own[0], width, slots

    def decode(self, weights, cache, *, own, feed, **how):
        assert own[:2] == feed.last.shape
        ends = np.sort(np.where(feed.done, 0, feed.limits - feed.index).max(1))  # of rows
        assert ends[feed.enough - 1] > 0
        steps = int(min(self.chunk, ends[feed.enough - 1]))
        assert (feed.index + np.minimum(feed.limits - feed.index, steps) - 2 < own[2])[~feed.done].all()
        self.shapes += [own] * steps
        self.fed.append(feed)
        new = np.ones((*own[:2], self.chunk), np.int32)
        return own, new, new.astype(np.float32), steps


def run(sampler: FakeSampler, lengths: np.ndarray, limits: Limits):
    """(The stream, its completions by number) for completions of these lengths, i32[B, G]."""
    tokens = np.ones((len(lengths), 2), np.int32)
    inputs = ModelInputs(tokens, np.zeros((3, *tokens.shape), np.int32), tokens, tokens - 2, None)
    prompts = Prompts.checked(inputs, range(len(lengths)), lengths.shape[1], lengths)
    waiting = prompts.divided(sampler.ladder.shards)
    stream = CompletionStream(sampler, (), waiting, SamplingOptions(), np.uint32(0), limits, None)
    return stream, dict(stream)
