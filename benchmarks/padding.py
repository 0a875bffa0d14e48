"""How much of the rows is padding, and how many shapes a run compiles, for clips and questions of given sizes.

No model and no video: groups of made-up sizes go through the order, the packing and the buckets of a real run.

python benchmarks/padding.py
python benchmarks/padding.py --questions=20 --rows=2,4 --groups=16 --steps=1000
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import sft
from configs.published import published_config
from mllm4d_jax.data.order import Order
from mllm4d_jax.data.stream import LoaderOptions
from mllm4d_jax.encode.example import Example, Grid
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.flops import Tuning, Work, padded_work, step_flops
from mllm4d_jax.rows.rows import Group, RowSizes, pack_groups
from mllm4d_jax.rows.shape import RowShape

MERGE = 2
# Height and width in merged tokens of frames of at most 224 x 224 pixels: landscape, portrait, square, 4:3.
SHAPES = ((5, 9), (9, 5), (7, 7), (6, 8))
MARKERS, SYSTEM, ANSWER = 9, 20, 3  # tokens of a time marker, before the video, of an answer that are supervised
GEOMETRY = VisionGeometry(merge_size=MERGE, position_side=0, window=0)


@dataclasses.dataclass(frozen=True)
class PaddingWorld:
    """What the clips are like: numbers drawn evenly between two ends.

    Attributes:
      questions: of a clip.
      branch: tokens of a question with its answer.
      short: share of the clips with 8 or 16 frames; the others have 32.
    """

    questions: tuple[int, int]
    branch: tuple[int, int]
    short: float


@dataclasses.dataclass(frozen=True)
class Result:
    """Of a run: share of padding, share of the executed FLOPs that the model does not need, shapes, and the step that
    brought the last of them."""

    padding: float
    extra: float
    shapes: int
    last_new: int


class Clips:
    """Groups of a made-up data set, by number of the clip."""

    def __init__(self, world: PaddingWorld, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        low, high = world.questions
        self.clips = np.repeat(np.arange(count), rng.integers(low, high + 1, count)).astype(np.int32)
        self.lengths = rng.integers(world.branch[0], world.branch[1] + 1, len(self.clips))
        self._shapes = rng.integers(len(SHAPES), size=count)
        self._times = np.where(rng.random(count) < world.short, rng.choice([4, 8], count), 16)

    def group(self, records: Sequence[int]) -> Group:
        """The group of these records, which are about one clip."""
        clip = self.clips[records[0]]
        (height, width), times = SHAPES[self._shapes[clip]], int(self._times[clip])
        shared = SYSTEM + times * (height * width + MARKERS)
        grid = Grid("video", times, height * MERGE, width * MERGE)
        return Group(tuple(self._example(shared + int(self.lengths[i]), grid) for i in records), shared)

    def _example(self, size: int, grid: Grid) -> Example:
        nothing = np.zeros(size, np.int32)
        return Example(
            key="",
            tokens=nothing,
            positions=np.broadcast_to(nothing, (3, size)),
            rope_delta=0,
            supervised=np.arange(size) >= size - ANSWER,
            patches=np.zeros((0, 1), np.float32),
            grids=(grid,),
            timestamps=(),
            text="",
        )


def needed_work(rows: Sequence[Sequence[Group]]) -> Work:
    """Work of the real tokens."""
    tokens = pairs = patches = frame_pairs = supervised = 0
    for g in (g for row in rows for g in row):
        tokens += g.shared + sum(g.branches)
        pairs += g.shared * (g.shared + 1) // 2 + sum(n * g.shared + n * (n + 1) // 2 for n in g.branches)
        supervised += ANSWER * len(g.examples)
        grid = g.examples[0].grids[0]
        patches += grid.t * grid.h * grid.w
        frame_pairs += grid.t * (grid.h * grid.w) ** 2
    return Work(tokens, pairs, patches, frame_pairs, 0, supervised)


def simulate(clips: Clips, options: LoaderOptions, shape: RowShape, steps: int, seed: int) -> Result:
    """Runs through `steps` steps."""
    order = Order([clips.clips], [1.0], per_group=options.questions_per_video, seed=seed)
    model = ModelConfig.from_dict(published_config("8b"), "8b")
    tuning = Tuning(rank=128, targets=("q_proj", "k_proj", "v_proj", "o_proj"), attention="splash")
    rows = options.rows or options.groups
    seen: Counter[RowSizes] = Counter()
    real = slots = last_new = 0
    needed = executed = 0.0
    for step in range(1, steps + 1):
        first = (step - 1) * options.groups
        groups = [clips.group(order[p].indices) for p in range(first, first + options.groups)]
        packed = pack_groups(groups, rows)
        sizes = shape.sizes(shape.needed(packed))
        last_new = last_new if seen[sizes] else step
        seen[sizes] += 1
        work = needed_work(packed)
        whole = padded_work(sizes.layout, rows, rows * sizes.frames, sizes.frame_patches, rows * sizes.supervised)
        real, slots = real + work.tokens, slots + whole.tokens
        needed += step_flops(model, work, tuning).total.hardware
        executed += step_flops(model, whole, tuning).total.hardware
    return Result(1 - real / slots, 1 - needed / executed, len(seen), last_new)


def span(text: str) -> tuple[int, int]:
    """ "20" or "1-20"."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=span, default=(1, 20), help="of a clip, e.g. 1-20")
    parser.add_argument("--branch", type=span, default=(40, 160), help="tokens of a question with its answer")
    parser.add_argument("--short", type=float, default=0.25, help="share of the clips with 8 or 16 frames")
    parser.add_argument("--groups", type=int, default=8, help="clips of a step")
    parser.add_argument("--per-video", type=int, default=20, help="most questions of a group")
    parser.add_argument("--rows", default="1,2,4,8", help="rows of a step, several to compare")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--clips", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clips = Clips(PaddingWorld(args.questions, args.branch, args.short), args.clips, args.seed)
    data = sft.get_config().data
    print(f"| clips a step | rows | padding | FLOPs beyond the needed | shapes in {args.steps} steps | last new at |")
    print("|---:|---:|---:|---:|---:|---:|")
    for rows in map(int, args.rows.split(",")):
        options = LoaderOptions(args.groups * args.per_video, args.per_video, rows)
        shape = RowShape(
            GEOMETRY,
            (),
            0,
            tuple(data.prefix_buckets),
            tuple(data.branch_buckets),
            clip_frames=16,
            frame_patches=196,
            clips=options.clips_per_row,
            branches=args.per_video,
        )
        r = simulate(clips, options, shape, args.steps, args.seed)
        print(f"| {args.groups} | {rows} | {r.padding:.1%} | {r.extra:.1%} | {r.shapes} | {r.last_new} |", flush=True)


if __name__ == "__main__":
    main()
