"""A GRPO step here against Transformers `generate` with PEFT: same weights, same clips, seconds by phase.

python benchmarks/grpo_vs_hf.py [--prompts=2] [--completions=12] [--frames=16] [--tokens=96] [--rounds=3]
python benchmarks/grpo_vs_hf.py --check                          # compares the numbers on a small model; no timing
python benchmarks/grpo_vs_hf.py --device=gpu --dtype=bfloat16 --size=2b --frames=32 --tokens=512

Needs requirements-reference.txt. A random Qwen3-VL with a frozen tower and rank-16 adapters on q, k, v, o; the paper's
prompt, reward and objective (KL term included), and a second reward that is noise, so that there is a gradient. No end
token: all completions have the same length. Figures are medians. Clips are decoded before the clock starts. What the
ratio is without the tower on both sides is printed, too.

On a CPU both sides are in one process and take turns. On a GPU each has a process of its own, ours first, since each
library keeps the memory it has taken; what theirs has to compare with goes through a file. So it is with
--reference_python, too: the interpreter of an environment that has requirements-reference.txt beside requirements.txt.

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
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TOLERANCE = 1e-4
HANDED, STEPS = "handed.npz", "{}.json"  # files of two processes: for theirs, and each side's seconds


def main() -> int:
    args = arguments()
    if args.device == "cpu":
        # Both libraries size their thread pools by the cores they may use, when they are imported.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        # Spinning at barriers stalls torch for seconds when another process has one of the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if args.child:
        return {"ours": our_process, "theirs": their_process}[args.child](args, Path(args.folder))
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as name:
        begin(args, Path(name))
        apart = args.device == "gpu" or args.reference_python
        return (one_by_one if apart else in_turns)(args, Path(name))


def begin(args: argparse.Namespace, folder: Path) -> None:
    """Writes records, clips and, unless --model names some, weights; says what is compared."""
    from benchmarks import grpo_work as work
    from benchmarks.small_model import ModelSize

    records = work.write_world(folder / "world", args.prompts)
    shape = ModelSize(args.layers, args.width, args.layers, args.width // 2)
    if not args.model:
        work.write_weights(folder / "model", args.size, shape, records)
    model = args.model or (shape if args.size == work.SMALL else args.size)
    done = f"{args.prompts} prompts x {args.completions} completions of {args.tokens} tokens"
    clip = f"{args.frames} frames of {args.side} x {args.side}"
    print(f"{done}, {clip}, {args.dtype} on a {args.device.upper()}, {model}", flush=True)


def config_of(args: argparse.Namespace, folder: Path):
    """The config that both sides follow."""
    from benchmarks import grpo_work as work

    names = ("prompts", "completions", "tokens", "frames", "side", "dtype")
    model = Path(args.model) if args.model else folder / "model"
    config = work.run_config(model, folder / "world" / "prompts.jsonl", **{n: getattr(args, n) for n in names})
    if args.device == "gpu":
        config.rollout.chunk = args.tokens  # no completion ends before the others: one program, which takes its time
    return config


def in_turns(args: argparse.Namespace, folder: Path) -> int:
    """Both sides in this process, step by step."""
    import jax

    from benchmarks import grpo_ours

    if args.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    with grpo_ours.open_ours(config_of(args, folder), folder / "run") as ours:
        drawn = ours.draw(ours.prompts())
        handed, theirs, agreed = look(ours, drawn), None, True
        if args.sides == "both":
            import torch

            from benchmarks.grpo_theirs import Theirs

            torch.set_num_threads(args.threads)
            theirs = Theirs(config_of(args, folder), ours.encoder, "cpu", args.at_once)
            agreed = compare(theirs, handed, args.dtype)
        if args.check:
            return 0 if agreed else 1
        runs: dict[str, list] = {"ours": [], "theirs": []}
        for number in range(args.rounds + 1):
            found = ours.prompts()
            runs["ours"].append(ours.step(found))
            if theirs is not None:
                runs["theirs"].append(theirs.step([prompt.key for prompt in found.prompts]))
            say(number, {name: steps[-1].whole for name, steps in runs.items() if steps})
        table({name: steps[1:] for name, steps in runs.items() if steps}, args)
        facts(ours, drawn, runs["ours"][1:])
    return 0 if agreed else 1


def one_by_one(args: argparse.Namespace, folder: Path) -> int:
    """Each side in a process that ends before the other one begins."""
    from benchmarks.grpo_work import load_steps

    runs, code = {}, 0
    for side in ("ours", "theirs")[: 2 if args.sides == "both" else 1]:
        python = args.reference_python if side == "theirs" and args.reference_python else sys.executable
        command = [python, __file__, *sys.argv[1:], f"--child={side}", f"--folder={folder}"]
        platform = "cuda" if side == "ours" and args.device == "gpu" else "cpu"  # the memory is for torch alone then
        code = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": platform}, check=False).returncode
        if (folder / STEPS.format(side)).is_file():
            runs[side] = load_steps(folder / STEPS.format(side))[1:]
        if code:
            break
    if runs:
        table(runs, args)
    return code


def our_process(args: argparse.Namespace, folder: Path) -> int:
    """Our side of `one_by_one`."""
    import jax

    from benchmarks import grpo_ours
    from benchmarks.grpo_work import save_steps

    if args.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")  # GPUs would round factors to fewer bits
    with grpo_ours.open_ours(config_of(args, folder), folder / "run") as ours:
        print(f"ours on {jax.devices()[0].device_kind}", flush=True)
        drawn, steps, rounds = ours.draw(ours.prompts()), [], []
        handed = look(ours, drawn)
        for number in range(0 if args.check else args.rounds + 1):
            found = ours.prompts()
            rounds.append(tuple(prompt.key for prompt in found.prompts))
            steps.append(ours.step(found))
            say(number, {"ours": steps[-1].whole})
        handed._replace(rounds=tuple(rounds)).save(folder / HANDED)
        if steps:
            save_steps(folder / STEPS.format("ours"), steps)
            facts(ours, drawn, steps[1:])
    return 0


def their_process(args: argparse.Namespace, folder: Path) -> int:
    """Their side of `one_by_one`."""
    import torch

    from benchmarks.grpo_theirs import Theirs
    from benchmarks.grpo_work import Handed, save_steps
    from mllm4d_jax.run.build import encoder_of

    device = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    if device == "cpu":
        torch.set_num_threads(args.threads)
    elif not torch.cuda.is_available():
        raise SystemExit("this torch sees no GPU: install one built for CUDA, or measure ours alone with --sides=ours")
    config, handed, steps = config_of(args, folder), Handed.load(folder / HANDED), []
    with encoder_of(config.model.path, config.video, config.data.max_tokens) as encoder:
        theirs = Theirs(config, encoder, device, args.at_once)
        agreed = compare(theirs, handed, args.dtype)
        for number, keys in enumerate(handed.rounds):
            steps.append(theirs.step(keys))
            say(number, {"theirs": steps[-1].whole})
            save_steps(folder / STEPS.format("theirs"), steps)
    if device == "cuda":
        print(f"theirs: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most", flush=True)
    return 0 if agreed else 1


def say(number: int, seconds: dict[str, float]) -> None:
    """Says how long a step took."""
    whole = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    print(f"{f'round {number}' if number else 'warm-up'}: {whole}, load {os.getloadavg()[0]:.1f}", flush=True)


def look(ours, drawn):
    """Lets ours learn twice from the same completions; returns what theirs is given of it."""
    import numpy as np

    handed = ours.look(drawn)
    for _, own in handed.looks:
        if not own.norm > 0:
            raise SystemExit("no gradient: all texts of a prompt are equal, give a larger --tokens or --completions")
    gap = np.abs(handed.sample.logprobs - handed.looks[0][1].policy).max()
    print(f"log-probs of sampler and learner apart: {gap:.1e} nats", flush=True)
    return handed


def compare(theirs, handed, dtype: str) -> bool:
    """Prints how far theirs is from ours on the same completions each time; whether that is within the tolerance."""
    import numpy as np

    from benchmarks.grpo_work import LOOKS

    worst = 0.0
    for when, (adapter, own) in zip(LOOKS, handed.looks, strict=True):
        theirs.load(adapter)
        other = theirs.numbers(handed.sample)
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
    parser.add_argument("--model", default="", help="folder of weights to use in place of random ones")
    parser.add_argument("--out", default="", help="JSON file for the figures of both sides")
    parser.add_argument("--reference_python", default="", help="interpreter of their side")
    parser.add_argument("--check", action="store_true", help="compare the numbers on a small model and stop")
    for hidden in ("--child", "--folder"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dtype == "bfloat16" and args.device == "cpu":
        parser.error("--dtype=bfloat16 goes with --device=gpu: XLA's CPU backend lacks products that decoding needs")
    if args.check:
        if args.sides != "both" or args.dtype != "float32":
            parser.error("--check compares both sides in float32")
        args.size, args.layers, args.width = "small", 3, 128
        args.frames, args.side, args.tokens, args.completions = 6, 64, 12, 4
    return args


def table(runs: dict[str, list], args: argparse.Namespace) -> None:
    """Seconds of every phase on every side, and how often ours goes into theirs."""
    from benchmarks.grpo_work import PHASES

    count = args.prompts * args.completions
    rows = []
    print("side    " + "".join(f"{name:>11s}" for name in PHASES) + "     step s  CPU s  rollouts/s  tokens/s")
    for name, steps in runs.items():
        phases = [statistics.median(step.phases[phase] for step in steps) for phase in PHASES]
        whole, cpu = (statistics.median(getattr(step, part) for step in steps) for part in ("whole", "cpu"))
        listed = "".join(f"{seconds:11.3f}" for seconds in phases)
        rates = f"{whole:11.2f}  {cpu:5.1f}  {count / whole:10.2f}  {count * args.tokens / whole:8.1f}"
        print(f"{name:8s}{listed}{rates}")
        seconds = {f"{phase}_s": value for phase, value in zip(PHASES, phases, strict=True)}
        rows.append(
            dict(case="step", side=name) | seconds | dict(step_s=whole, tokens_per_second=count * args.tokens / whole)
        )
    if args.out:
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
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
