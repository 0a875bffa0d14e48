"""What one GPU does with this project and with Transformers: parity, training, decoding, a GRPO step, sparse layers.

python benchmarks/gpu.py [--parts=parity,sft,...] [--budget=480] [--out=gpu.md] [--reference_python=PYTHON]
python benchmarks/gpu.py --tiny          # the same code on tiny models, on a CPU in about four minutes
python benchmarks/gpu.py --smoke         # the same on the GPU, all parts at once: does everything run here?

Needs the repository, requirements.txt and, for the reference, torch for CUDA, transformers and peft (in this
environment or in that of --reference_python). Weights are random and made on the device; nothing is downloaded.

Qwen3-VL-8B in bfloat16, frozen tower, adapters of rank 128 on q, k, v, o; clips of 32 frames of 224 x 224, prompts of
1,024 tokens with their clip, questions of 96 tokens with their answer, of which 24 are supervised. The GRPO step is
that of grpo_vs_hf.py at 2B. MFU counts what the model needs (`models/flops.py`) against the peak of the data sheet.

Every part is a process of its own with a time limit, so that none takes another's memory or ends it. They run in the
order of their worth, and what the budget leaves no time for is left out and said so. Rows are printed when they are
measured; --out also keeps them as a table, beside it as JSON, from the first row on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ROW = "ROW "  # see gpu_work.py
GOLDEN = ("qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe")
SMOKE_SECONDS = 42


class Part(NamedTuple):
    """A process of the benchmark.

    Attributes:
      name: by which --parts chooses it.
      command: after the interpreter; `theirs`: the interpreter is that of the reference.
      seconds: it is expected to take; `limit`: after which it is ended.
      results: JSON file of its rows, of a script that does not print them.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    limit: float
    theirs: bool = False
    results: Path | None = None


def parts_of(args: argparse.Namespace, folder: Path) -> list[Part]:
    """All parts, the most valuable first."""
    tiny = ("--tiny",) * (args.tiny or args.smoke)

    def ours(part: str, *more: str) -> tuple[str, ...]:
        return ("benchmarks/gpu_ours.py", part, *more, *tiny)

    wide = ("2x3", "1x1") if tiny else ("2x12", "1x1", "16x12")
    training = ("2x3:full", "2x1:full") if tiny else ("8x20:full", "32x1:full")
    more = ("1x3:dots",) if tiny else ("4x20:dots", "8x1:dots")
    verify = ("run.py", "--config=configs/verify.py")
    grpo = ["benchmarks/grpo_vs_hf.py", f"--device={args.device}", f"--out={folder / 'grpo.json'}", "--rounds=1"]
    if tiny:
        grpo += ["--completions=3", "--tokens=6", "--frames=4", "--side=64", "--layers=2", "--width=128"]
    else:
        grpo += ["--dtype=bfloat16", f"--model={folder / '2b'}", "--frames=32", "--tokens=128"]
    if args.reference_python:
        grpo.append(f"--reference_python={args.reference_python}")
    theirs = ("benchmarks/gpu_theirs.py", f"--candidates={','.join(wide[1::-1])}", *tiny)
    return [
        Part("card", ours("card"), 25, 60),
        *(Part("parity", (*verify, f"--config.golden=tests/golden/{name}"), 45, 100) for name in GOLDEN),
        Part("sft", ours("sft", f"--candidates={','.join(training)}"), 110, 180),
        Part("decode", ours("decode", f"--candidates={','.join(wide)}"), 80, 150),
        Part("theirs", theirs, 60, 120, theirs=True),
        Part("grpo", tuple(grpo), 90, 150, results=folder / "grpo.json"),
        Part("sparse", ours("sparse"), 30, 80),
        Part("sft_more", ours("sft", f"--candidates={','.join(more)}"), 50, 100),
    ]


class Table:
    """The rows so far; prints each, and writes all of them after each.

    Attributes:
      rows: (part, figures by name).
    """

    def __init__(self, out: Path | None) -> None:
        self.rows: list[tuple[str, dict[str, Any]]] = []
        self._out, self._lock, self._started = out, threading.Lock(), time.monotonic()

    def add(self, part: str, row: Mapping[str, Any]) -> None:
        with self._lock:
            self.rows.append((part, dict(row)))
            listed = "  ".join(f"{name} {shown(value)}" for name, value in row.items() if value is not None)
            print(f"{time.monotonic() - self._started:5.0f} s  {part:9s} {listed}", flush=True)
            if self._out:
                self._out.parent.mkdir(parents=True, exist_ok=True)
                self._out.write_text(self.markdown(), encoding="utf-8")
                listed = [{"part": part} | row for part, row in self.rows]
                self._out.with_suffix(".json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """One table for each part."""
        blocks = []
        for part in dict.fromkeys(part for part, _ in self.rows):
            rows = [row for name, row in self.rows if name == part]
            columns = [
                c for c in dict.fromkeys(c for row in rows for c in row) if any(r.get(c) is not None for r in rows)
            ]
            lines = [columns, ["---"] * len(columns), *([shown(row.get(c)) for c in columns] for row in rows)]
            blocks.append(f"### {part}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
        return "\n".join(blocks)

    def best(self, part: str, side: str, figure: str, **wanted: Any) -> float | None:
        """The largest of a figure among rows that have all `wanted` values."""
        rows = [row for name, row in self.rows if name == part and row.get("side") == side]
        found = [row[figure] for row in rows if row.get(figure) and wanted.items() <= row.items()]
        return max(found, default=None)


def shown(value: Any) -> str:
    """A figure with four digits; anything else as it is."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def run_part(part: Part, limit: float, table: Table, environment: Mapping[str, str], python: str, log: Path) -> None:
    """Run a part to its end or for `limit` seconds; adds its rows, and one that says how it failed."""
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [python, *part.command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            process_group=0,  # its own processes end with it
        )
        timer = threading.Timer(limit, end, (process,))
        timer.start()
        last = ""
        for line in process.stdout:
            if line.startswith(ROW):
                table.add(part.name, json.loads(line.removeprefix(ROW)))
            elif line.strip():
                last = line.strip()
                errors.write(line)
        code = process.wait()
        timer.cancel()
    took = time.monotonic() - started
    if part.results and part.results.is_file():
        for row in json.loads(part.results.read_text(encoding="utf-8")):
            table.add(part.name, row)
    figures = dict(case="process", process_s=took)
    if part.name == "parity":
        figures |= dict(case=part.command[-1].rpartition("/")[2], result=last)
    if code == -signal.SIGKILL and took >= limit:
        figures |= dict(error=f"ended after {limit:.0f} s")
    elif code:
        said = [text for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if text.strip()]
        figures |= dict(error=f"exit code {code}: {' / '.join(said[-3:])[-400:]}")
    table.add(part.name, figures)


def end(process: subprocess.Popen) -> None:
    """End a part with all processes that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def environment_of(args: argparse.Namespace, folder: Path, *, alone: bool) -> dict[str, str]:
    """What parts are started with: the device, one store of compiled programs and of tuned kernels, memory."""
    platform = {"cpu": "cpu", "gpu": "cuda"}[args.device]
    found = dict(os.environ) | dict(JAX_PLATFORMS=platform, JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"))
    found |= dict(PYTHONPATH=os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))))
    if alone:
        found.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
    else:
        found.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return found


def summarise(table: Table) -> None:
    """Adds how often ours is as fast as theirs."""
    their_rate = table.best("theirs", "theirs", "qa_per_second")
    for questions in (20, 1, 3):
        rates = [table.best(part, "ours", "qa_per_second", questions=questions) for part in ("sft", "sft_more")]
        rate = max(filter(None, rates), default=None)
        if rate and their_rate:
            case = f"training, N = {questions}, QA/s"
            table.add("ratios", dict(case=case, ours=rate, theirs=their_rate, times_as_fast=rate / their_rate))
    for case in dict.fromkeys(row["case"] for part, row in table.rows if part == "decode"):
        rates = [table.best(part, side, "tokens_per_second", case=case) for part, side in SIDES]
        if all(rates):
            table.add(
                "ratios",
                dict(
                    case=f"decoding {case}, tokens/s", ours=rates[0], theirs=rates[1], times_as_fast=rates[0] / rates[1]
                ),
            )


SIDES = (("decode", "ours"), ("theirs", "theirs"))


def main() -> int:
    args = arguments()
    started, table = time.monotonic(), Table(Path(args.out) if args.out else None)
    theirs = args.reference_python or sys.executable
    has_reference = reference_is_there(theirs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [part for part in parts_of(args, folder) if not args.parts or part.name in args.parts.split(",")]
        if args.smoke:
            chosen = [part for part in chosen if part.name != "sft_more"]
        print(
            f"expected: {sum(p.seconds for p in chosen if p.name != 'parity') + 45:.0f} s of {args.budget} s",
            flush=True,
        )
        writer = None
        if any(part.name == "grpo" for part in chosen) and not (args.tiny or args.smoke) and has_reference:
            writer = write_weights(folder / "2b")

        def run(group: Sequence[Part], limit: float) -> None:
            with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
                for number, part in enumerate(group):
                    environment = environment_of(args, folder, alone=len(group) == 1)
                    python = theirs if part.theirs else sys.executable
                    log = folder / f"{part.name}{number}.log"
                    pool.submit(run_part, part, min(limit, part.limit), table, environment, python, log)

        for group in groups(chosen, at_once=args.smoke):
            left = args.budget - (time.monotonic() - started)
            name = group[0].name
            if name in ("theirs", "grpo") and not has_reference and not args.smoke:
                table.add(name, dict(case="process", note=f"torch, transformers or peft is not in {theirs}"))
            elif left < group[0].seconds and not args.smoke and not args.tiny:
                table.add(
                    name, dict(case="process", note=f"left out: {left:.0f} s are left, {group[0].seconds} needed")
                )
            else:
                if name == "grpo" and writer:
                    writer.wait()
                run(group, left)
        if writer and writer.poll() is None:
            end(writer)
    summarise(table)
    print(f"\n{table.markdown()}\n{time.monotonic() - started:.0f} s in all", flush=True)
    return 1 if any("error" in row for _, row in table.rows) else 0


def groups(parts: Sequence[Part], at_once: bool) -> list[list[Part]]:
    """Parts that run side by side: parity, which times nothing; everything, for a look at whether it runs."""
    if at_once:
        return [list(parts)]
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part)
    return list(found.values())


def reference_is_there(python: str) -> bool:
    """Whether an interpreter has what the reference needs."""
    asked = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ('torch', 'transformers', 'peft'))))"
    return subprocess.run([python, "-c", asked], check=False).returncode == 0


def write_weights(folder: Path) -> subprocess.Popen:
    """Begin to write random weights of the GRPO step's model, which processors do while the device is busy."""
    command = [sys.executable, "tools/make_checkpoint.py", "--size=2b", f"--out={folder}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, process_group=0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default="", help="some of card,parity,sft,decode,theirs,grpo,sparse,sft_more")
    parser.add_argument(
        "--budget", type=float, default=480, help="seconds in all; parts that would not fit are left out"
    )
    parser.add_argument("--out", default="", help="file for the table, in Markdown; JSON is written beside it")
    parser.add_argument("--reference_python", default="", help="interpreter that has torch, transformers and peft")
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the GPU, all parts at once")
    args = parser.parse_args()
    args.device = "cpu" if args.tiny else "gpu"
    if args.smoke:
        args.budget = min(args.budget, SMOKE_SECONDS)
    known = {part.name for part in parts_of(args, Path())}
    if unknown := set(filter(None, args.parts.split(","))) - known:
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(sorted(known))}")
    return args


if __name__ == "__main__":
    sys.exit(main())
