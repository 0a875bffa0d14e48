"""What share of the places that a decode step computes is in a completion, and how many steps that takes.

Lengths are log-normal, the longest about eight times the shortest, as those of reasoning are. They are set as limits of
a tiny random model's completions, so that the sampler's own counters say what was computed; no second is measured.
Parts: prompts are taken some at a time, each part until its longest completion ends. Refill: those that end make room.

python benchmarks/slot_use.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mllm4d_jax.generate.completions import SamplingStatistics
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.generate.stream import Limits
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.rows.batch import ModelInputs

MODEL = Path(__file__).resolve().parents[1] / "tests/golden/qwen3_vl"
MEDIAN, SPREAD = 128, np.log(8) / 4  # tokens; two standard deviations to either side are 1:8
CHUNK, PROMPT = 8, 4
# Prompts, completions of each, then (prompts, completions of each) at a time: the first in parts and with refill.
CASES = ((16, 12, ((4, 12), (8, 6), (16, 3))), (8, 12, ((2, 12), (4, 6), (8, 3))), (32, 8, ((8, 8),)))


class Side:
    """One tiny model and its sampler."""

    def __init__(self) -> None:
        graphdef, state = nnx.split(load_model(MODEL, dtype=jnp.float32, attention="xla"))
        self._sampler, self._weights = Sampler(graphdef, chunk=CHUNK), (state,)

    def cost(self, lengths: np.ndarray, limits: Limits) -> SamplingStatistics:
        """Of completions of these lengths, i32[B, G]."""
        tokens = np.ones((len(lengths), PROMPT), np.int32)
        positions = np.broadcast_to(np.arange(PROMPT, dtype=np.int32), (3, *tokens.shape))
        out = self._sampler.generate(
            self._weights,
            ModelInputs(tokens, positions, tokens, tokens - 2, None),
            prompt_ids=list(range(len(lengths))),
            branches=lengths.shape[1],
            max_new_tokens=lengths,
            options=SamplingOptions(temperature=1.0),
            limits=limits,
        )
        return out.statistics


def line(name: str, parts: list[SamplingStatistics]) -> str:
    """A row of the table."""
    steps, computed, wasted = (
        sum(getattr(p, n) for p in parts) for n in ("steps", "branch_steps", "wasted_branch_steps")
    )
    return f"| {name} | {steps:,} | {computed:,} | {1 - wasted / computed:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    rng, side = np.random.default_rng(parser.parse_args().seed), Side()
    print(f"jax {jax.__version__}, median of {MEDIAN} tokens, {CHUNK} steps between two looks\n")
    print("| prompts x completions | at a time | decode steps | places computed | in a completion |")
    print("|---|---|---:|---:|---:|")
    for prompts, branches, ways in CASES:
        lengths = np.exp(rng.normal(np.log(MEDIAN), SPREAD, (prompts, branches))).round().astype(np.int32)
        what, first = f"{prompts} x {branches}", ways[0][0]
        parts = [side.cost(lengths[at : at + first], Limits(first)) for at in range(0, prompts, first)]
        print(line(f"{what} | {first} x {branches}, in parts", parts), flush=True)
        for rows, width in ways:
            found = side.cost(lengths, Limits(rows, width))
            print(line(f"{what} | {rows} x {width}, refill", [found]), flush=True)


if __name__ == "__main__":
    main()
