"""LoRA fine-tuning here against Transformers with PEFT: same weights, same records, one process, questions per second.

python benchmarks/sft_vs_hf.py [--questions=1,20] [--frames=16] [--side=224] [--rounds=5] [--threads=2]

Needs requirements-reference.txt. A random Qwen3-VL with a frozen tower in float32 and rank-16 adapters on q, k, v, o.
Theirs is what a Trainer does: one padded row per question, each with its own copy of the clip, logits of every
position, AdamW. Ours is the step of a run with data.questions_per_video = N. The two take turns; figures are medians.
Processor seconds stand beside the clock's because they depend less on what else the machine does. Clips are stored as
512 x 512 MPEG-4; both sides decode with this project's decoder, in the main process, theirs once per question.
Both start from the same adapter, so every step's loss and gradient norm must agree; the gaps are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CLIPS = 4  # questions of a step at N = 1, each about a clip of its own


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--questions", default="1,20", help="values of N; N = 1 takes 4 clips a step, the others one")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=224, help="side of a frame in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=2, help="cores for both")
    parser.add_argument("--layers", type=int, default=6, help="of the decoder and of the tower")
    parser.add_argument("--width", type=int, default=512, help="of the decoder; the tower has half")
    args = parser.parse_args()
    # Both libraries size their thread pools by the cores they may use, when they are imported.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Spinning at barriers stalls torch for seconds when another process has one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from benchmarks.small_model import ModelSize

    torch.set_num_threads(args.threads)
    shape = ModelSize(args.layers, args.width, args.layers, args.width // 2)
    print(f"{args.frames} frames of {args.side} x {args.side}, {args.threads} threads, {shape}", flush=True)
    print("   N  side    data s   step s    CPU s    QA/s  QA/s with data")
    for count in map(int, args.questions.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), count, args, shape)


def compare(folder: Path, count: int, args: argparse.Namespace, shape) -> None:
    """Runs both sides at N = `count` and prints their lines."""
    from benchmarks import sft_contenders as sides
    from benchmarks.small_model import write_model

    clips, steps = (CLIPS if count == 1 else 1), args.rounds + 1
    records = sides.write_world(folder / "world", clips * steps, count)
    write_model(folder / "model", shape, [records.read_text(encoding="utf-8")])
    config = sides.run_config(
        folder / "model", records, batch=clips * count, per_video=count, steps=steps, frames=args.frames, side=args.side
    )
    ours = sides.Ours(config, folder)
    with ours.encoder:
        asked = [[ours.record(i) for i in numbers] for numbers in ours.load(steps)]
        theirs = sides.Theirs(config, ours.adapter, ours.encoder)
        for step in range(steps):  # compiles every shape of the run
            ours.run(step)
        ours.restart()
        pairs = [(ours.run(step), theirs.run(asked[step])) for step in range(steps)]
    for name, runs in zip(("ours", "theirs"), zip(*pairs, strict=True), strict=True):
        measured = runs[1:]  # their first step warms up
        data, step, cpu = (statistics.median(getattr(r, part) for r in measured) for part in ("data", "step", "cpu"))
        both = statistics.median(r.data + r.step for r in measured)
        places = clips * count
        print(
            f"{count:4d}  {name:6s}  {data:6.2f}  {step:7.2f}  {cpu:7.2f}  {places / step:6.2f}  {places / both:14.2f}"
        )
    faster = statistics.median(b.step / a.step for a, b in pairs[1:])
    with_data = statistics.median((b.data + b.step) / (a.data + a.step) for a, b in pairs[1:])
    loss = [abs(a.loss - b.loss) for a, b in pairs]
    norm = [abs(a.norm / b.norm - 1) for a, b in pairs]
    less = statistics.median(b.cpu / a.cpu for a, b in pairs[1:])
    print(
        f"      ours is {faster:.2f} times as fast, {with_data:.2f} with data, and takes {less:.2f} times less CPU time"
    )
    print(f"      ours: {ours.facts()}")
    print(
        f"      loss {pairs[0][0].loss:.5f} -> {pairs[-1][0].loss:.5f}; gap of the first step: loss {loss[0]:.1e}, "
        f"gradient norm {norm[0]:.1e}; largest of all {steps}: {max(loss):.1e}, {max(norm):.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
