"""What share of the places that decode steps compute is in a completion, and how many steps there are.

Lengths are log-normal, the longest about eight times the shortest, as those of reasoning are. The sampler's own
scheduling and counters run, with programs that compute nothing in place of the device's: no second is measured.
In parts: some prompts are taken at a time, until the longest of their completions ends. Refill: those that end make
room for others.

python benchmarks/slot_use.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mllm4d_jax.generate.completions import SamplingStatistics
from mllm4d_jax.generate.stream import Limits
from tests.generate.fakes import FakeSampler, run

MEDIAN, SPREAD = 512, np.log(8) / 4  # tokens; two standard deviations to either side are 1:8
CHUNK = 32  # steps between two looks, as configured
# Prompts, completions of each, then (prompts, completions of each) at a time: the first in parts and with refill.
CASES = (
    (16, 12, ((4, 12), (8, 6), (16, 3), (16, 12))),
    (8, 12, ((2, 12), (4, 6), (8, 3))),
    (32, 8, ((8, 8),)),
    (64, 1, ((8, 1),)),
)
COUNTS = ("steps", "branch_steps", "wasted_branch_steps")


def cost(lengths: np.ndarray, limits: Limits) -> SamplingStatistics:
    """Of completions of these lengths, i32[B, G]."""
    return run(FakeSampler(CHUNK), lengths, limits)[0].statistics


def line(name: str, parts: list[SamplingStatistics]) -> str:
    """A row of the table."""
    steps, computed, wasted = (sum(getattr(part, count) for part in parts) for count in COUNTS)
    return f"| {name} | {steps:,} | {computed:,} | {1 - wasted / computed:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    rng = np.random.default_rng(parser.parse_args().seed)
    print("| prompts x completions | at a time | decode steps | places computed | in a completion |")
    print("|---|---|---:|---:|---:|")
    for prompts, branches, ways in CASES:
        lengths = np.exp(rng.normal(np.log(MEDIAN), SPREAD, (prompts, branches))).round().astype(np.int32)
        what, first = f"{prompts} x {branches}", ways[0][0]
        parts = [cost(lengths[at : at + first], Limits(first)) for at in range(0, prompts, first)]
        print(line(f"{what} | {first} x {branches}, in parts", parts), flush=True)
        for rows, width in ways:
            print(line(f"{what} | {rows} x {width}, refill", [cost(lengths, Limits(rows, width))]), flush=True)


if __name__ == "__main__":
    main()
