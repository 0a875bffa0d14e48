"""A GRPO step here against Transformers `generate` with PEFT: same weights, same clips, one process, seconds by phase.

python benchmarks/grpo_vs_hf.py [--prompts=2] [--completions=12] [--frames=16] [--tokens=96] [--rounds=3]
python benchmarks/grpo_vs_hf.py --check                          # compares the numbers on a small model; no timing
python benchmarks/grpo_vs_hf.py --device=gpu --dtype=bfloat16 --size=2b --frames=32 --tokens=512

Needs requirements-reference.txt. A random Qwen3-VL with a frozen tower and rank-16 adapters on q, k, v, o; the paper's
prompt, reward and objective (KL term included), and a second reward that is noise, so that there is a gradient. No end
token: all completions have the same length. Sides take turns; figures are medians. Clips are decoded before the clock
starts. What remains of the ratio without the tower on both sides is printed, too.

Theirs is the loop of a group-relative trainer. One `generate` call draws all sequences of all prompts from a cache; one
forward pass per prompt scores its sequences under the reference (the adapter switched off: at the start it changes
nothing), one with gradients under the policy. Every sequence is a row with prompt and clip of its own.
In its favour: `generate` encodes a clip once for all its sequences (as of Transformers 5.23), logits are made at the
completions alone, old log-probs are the policy's own, without a pass, clips are decoded once, tensors lie ready before
the clock starts (ours are put together within it), and the sequences of all prompts are one batch for decoding.
Against it: no inference engine and no attention kernels of other packages; in the two scoring passes a clip is encoded
once per sequence, as trainers do.

Before that both sides look at the same completions twice, at the start and after our optimiser step: log-probs under
policy and reference, loss and gradient norm have to agree to 1e-4 in float32, or the exit code is 1.
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

TOLERANCE = 1e-4


def main() -> int:
    args = arguments()
    if args.device == "cpu":
        # Both libraries size their thread pools by the cores they may use, when they are imported.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        # Spinning at barriers stalls torch for seconds when another process has one of the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the memory of a GPU is for both
    import jax
    import torch

    from benchmarks import grpo_contenders as sides

    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    elif args.sides == "both" and not torch.cuda.is_available():
        raise SystemExit("this torch sees no GPU: install one built for CUDA, or measure ours alone with --sides=ours")
    if args.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # GPUs would round factors to fewer bits
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = sides.write_world(folder / "world", args.prompts)
        shape = sides.Shape(args.layers, args.width, args.layers, args.width // 2)
        sides.write_weights(folder / "model", args.size, shape, records)
        names = ("prompts", "completions", "tokens", "frames", "side", "dtype")
        config = sides.run_config(folder / "model", records, **{n: getattr(args, n) for n in names})
        model = shape if args.size == sides.SMALL else args.size
        work = f"{args.prompts} prompts x {args.completions} completions of {args.tokens} tokens"
        clip = f"{args.frames} frames of {args.side} x {args.side}"
        print(f"{work}, {clip}, {args.dtype} on {jax.devices()[0].device_kind}, {model}", flush=True)
        with sides.open_ours(config, folder / "run") as ours:
            theirs = None
            if args.sides == "both":
                theirs = sides.Theirs(config, ours, "cuda" if args.device == "gpu" else "cpu", args.at_once)
            drawn = ours.draw(ours.prompts())
            agreed = compare(ours, theirs, drawn, args.dtype)
            if not args.check:
                measure(ours, theirs, drawn, args)
    return 0 if agreed else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--completions", type=int, default=12, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=96, help="of a completion")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=224, help="side of a frame in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each side")
    parser.add_argument("--threads", type=int, default=2, help="cores for both, on a CPU")
    parser.add_argument("--size", default="small", help="small, tiny, or a published size such as 2b")
    parser.add_argument("--layers", type=int, default=6, help="of a small model's decoder and tower")
    parser.add_argument("--width", type=int, default=512, help="of a small model's decoder; the tower has half")
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--sides", default="both", choices=("both", "ours"))
    parser.add_argument("--at-once", type=int, default=12, help="their sequences of a forward pass while scoring")
    parser.add_argument("--check", action="store_true", help="compare the numbers on a small model and stop")
    args = parser.parse_args()
    if args.dtype == "bfloat16" and args.device == "cpu":
        parser.error("--dtype=bfloat16 goes with --device=gpu: XLA's CPU backend lacks products that decoding needs")
    if args.check:
        if args.sides != "both" or args.dtype != "float32":
            parser.error("--check compares both sides in float32")
        args.size, args.layers, args.width = "small", 3, 128
        args.frames, args.side, args.tokens, args.completions = 6, 64, 12, 4
    return args


def compare(ours, theirs, drawn, dtype: str) -> bool:
    """Lets ours learn twice from the same completions; prints how far theirs is from it each time."""
    import numpy as np

    sampled, worst = drawn.rollouts.logprobs, 0.0
    for when in ("at the start", "after a step"):
        adapter = ours.adapter
        own = ours.numbers(drawn)
        if not own.norm > 0:
            raise SystemExit("no gradient: all texts of a prompt are equal, give a larger --tokens or --completions")
        if when == "at the start":
            print(f"log-probs of sampler and learner apart: {np.abs(sampled - own.policy).max():.1e} nats", flush=True)
        if theirs is None:
            continue
        theirs.load(adapter)
        other = theirs.numbers(drawn)
        gaps = {
            "policy": np.abs(own.policy - other.policy).max() / np.abs(own.policy).mean(),
            "reference": np.abs(own.reference - other.reference).max() / np.abs(own.reference).mean(),
            # Advantages have a standard deviation of 1, and the mean of their terms at the start is 0: no ratio.
            "loss": abs(own.loss - other.loss),
            "gradient norm": abs(own.norm / other.norm - 1),
        }
        worst = float(np.max([worst, *gaps.values()]))  # a NaN stays one
        listed = ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items())
        print(f"{when}: loss {own.loss:.6f}, gradient norm {own.norm:.5f}; apart: {listed}", flush=True)
    if dtype == "float32" and not worst <= TOLERANCE:
        print(f"the sides disagree: {worst:.1e} is more than {TOLERANCE}")
        return False
    return True


def measure(ours, theirs, drawn, args: argparse.Namespace) -> None:
    """Steps of both sides in turn, after one of each that warms up."""
    runs: dict[str, list] = {"ours": [], "theirs": []}
    for number in range(args.rounds + 1):
        found = ours.prompts()
        runs["ours"].append(ours.step(found))
        if theirs is not None:
            runs["theirs"].append(theirs.step(found.prompts, theirs.feed(found.prompts)))
        whole = ", ".join(f"{name} {steps[-1].whole:.2f} s" for name, steps in runs.items() if steps)
        print(f"{f'round {number}' if number else 'warm-up'}: {whole}, load {os.getloadavg()[0]:.1f}", flush=True)
    table({name: steps[1:] for name, steps in runs.items() if steps}, args)
    facts(ours, drawn, runs["ours"][1:])


def table(runs: dict[str, list], args: argparse.Namespace) -> None:
    """Seconds of every phase on every side, and how often ours goes into theirs."""
    from benchmarks.grpo_contenders import PHASES

    count = args.prompts * args.completions
    print("side    " + "".join(f"{name:>11s}" for name in PHASES) + "     step s  CPU s  rollouts/s  tokens/s")
    for name, steps in runs.items():
        phases = [statistics.median(step.phases[phase] for step in steps) for phase in PHASES]
        whole, cpu = (statistics.median(getattr(step, part) for step in steps) for part in ("whole", "cpu"))
        listed = "".join(f"{seconds:11.3f}" for seconds in phases)
        rates = f"{whole:11.2f}  {cpu:5.1f}  {count / whole:10.2f}  {count * args.tokens / whole:8.1f}"
        print(f"{name:8s}{listed}{rates}")
    if "theirs" not in runs:
        return
    pairs = list(zip(runs["ours"], runs["theirs"], strict=True))
    shares = [statistics.median(b.phases[phase] / a.phases[phase] for a, b in pairs) for phase in PHASES]
    whole = statistics.median(b.whole / a.whole for a, b in pairs)
    print(f"{'ratio':8s}" + "".join(f"{share:11.2f}" for share in shares) + f"{whole:11.2f}")
    blind = statistics.median((b.whole - b.phases["vision"]) / (a.whole - a.phases["vision"]) for a, b in pairs)
    cpu = statistics.median(b.cpu / a.cpu for a, b in pairs)
    each = ", ".join(f"{b.whole / a.whole:.2f}" for a, b in pairs)
    print(f"ours is {whole:.2f} times as fast ({each}), {blind:.2f} without the tower, {cpu:.2f} in CPU time")


def facts(ours, drawn, steps: list) -> None:
    """Sizes of a step, and how much of the hardware our update uses."""
    import jax

    from mllm4d_jax.parallel.chips import peak_flops
    from mllm4d_jax.run.throughput import mfu, peak_memory_gib

    counts, flops = ours.facts(drawn)
    seconds = statistics.median(step.phases["update"] for step in steps)
    share = mfu(flops, seconds, 1, peak_flops(jax.devices()[0].device_kind))
    memory = peak_memory_gib()
    print(
        f"prompt of {counts['prompt']} tokens ({counts['visual']} visual); tokens of the update's rows: ours "
        f"{counts['ours']:,} with padding, theirs {counts['theirs']:,}; our update: {flops / 1e12:.3f} TFLOP, "
        f"{flops / seconds / 1e12:.3f} TFLOP/s"
        + ("" if share is None else f", MFU {share:.1%} of the bfloat16 peak")
        + ("" if memory is None else f", {memory:.1f} GiB at most")
    )


if __name__ == "__main__":
    sys.exit(main())
