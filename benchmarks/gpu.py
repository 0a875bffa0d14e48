"""What one GPU does with this project and with Transformers: parity, training, decoding, a GRPO step, sparse layers.

python benchmarks/gpu.py [--parts=parity,sft,...] [--budget=480] [--out=gpu.md] [--reference_python=PYTHON]
python benchmarks/gpu.py --tiny          # the same code on tiny models, on a CPU: three minutes on two free cores
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ROW = "ROW "  # see gpu_work.py
GOLDEN = ("qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe")
SIDES = ("ours", "theirs")
SMOKE_SECONDS = 42
# Rows x questions of a clip and what is kept for the backward pass. After a stroke: what is taken where the one before
# it fails; the best of each N counts.
TRAINING = "4x20:dots/8x20:full,12x1:dots/32x1:full"
MORE_TRAINING = "5x20:dots,8x20:dots_except_mlp,24x1:dots_except_mlp"
SLACK = 5  # how many times its time a part may take on a CPU, which others may use as well


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

    slack = SLACK if args.device == "cpu" else 1
    wide, widest = ("2x3,1x1", "3x2") if tiny else ("2x12,1x1", "16x12")
    training, more = ("2x3:full,2x1:full", "1x3:dots") if tiny else (args.training, MORE_TRAINING)
    verify = ("run.py", "--config=configs/verify.py")
    golden = [(*verify, f"--config.golden=tests/golden/{name}") for name in GOLDEN]
    if tiny:
        golden = [(*golden[-1], "--config.case=video")]
    grpo = ["benchmarks/grpo_vs_hf.py", f"--device={args.device}", f"--out={folder / 'grpo.json'}", "--rounds=1"]
    if tiny:
        grpo += ["--completions=3", "--tokens=6", "--frames=4", "--side=64", "--layers=2", "--width=128"]
    else:
        grpo += ["--dtype=bfloat16", f"--model={folder / '2b'}", "--frames=32", "--tokens=128"]
    if args.reference_python:
        grpo.append(f"--reference_python={args.reference_python}")
    theirs = ("benchmarks/gpu_theirs.py", f"--candidates={wide}", *tiny)
    found = [
        Part("card", ours("card"), 12, 60),
        Part("sft", ours("sft", f"--candidates={training}"), 90, 180),
        Part("theirs", theirs, 60, 120, theirs=True),
        Part("decode", ours("decode", f"--candidates={wide}"), 80, 160),
        Part("grpo", tuple(grpo), 130, 220, results=folder / "grpo.json"),
        *(Part("parity", command, 45, 100) for command in golden),
        Part("sparse", ("benchmarks/gpu_sparse.py", *tiny), 80, 150),
        Part("sft_more", ours("sft", f"--candidates={more}"), 45, 120),
        Part("decode_more", ours("decode", f"--candidates={widest}"), 45, 100),
    ]
    if args.parts:
        found = [part for name in args.parts for part in found if part.name == name]
    return [part._replace(limit=slack * part.limit) for part in found]


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

    def best(self, parts: Sequence[str], side: str, figure: str, **wanted: Any) -> float | None:
        """The largest of a figure among rows of these parts that have all `wanted` values."""
        rows = [row for name, row in self.rows if name in parts and row.get("side") == side]
        found = [row[figure] for row in rows if row.get(figure) and wanted.items() <= row.items()]
        return max(found, default=None)

    def compare(self) -> None:
        """Add how many times as fast ours is as theirs."""

        def add(case: str, mine: float | None, other: float | None, times: Callable[[float, float], float]) -> None:
            if mine and other:
                self.add("ratios", dict(case=case, ours=mine, theirs=other, times_as_fast=times(mine, other)))

        theirs = self.best(("theirs",), "theirs", "qa_per_second")
        for n in dict.fromkeys(row["questions"] for _, row in list(self.rows) if "questions" in row):
            mine = self.best(("sft", "sft_more"), "ours", "qa_per_second", questions=n)
            add(f"training, N = {n}, QA/s", mine, theirs, lambda a, b: a / b)
        for case in [row["case"] for part, row in self.rows if part == "decode"]:
            mine, other = (self.best(("decode", "theirs"), s, "tokens_per_second", case=case) for s in SIDES)
            add(f"decoding {case}, tokens/s", mine, other, lambda a, b: a / b)
        steps = [{row.get("side"): row} for part, row in list(self.rows) if part == "grpo" and "step_s" in row]
        if len(steps) == len(SIDES):
            both = steps[0] | steps[1]
            for name in [name for name in both["ours"] if name.endswith("_s")]:
                mine, other = (both[side].get(name) for side in SIDES)
                add(f"GRPO step, {name.removesuffix('_s')}, seconds", mine, other, lambda a, b: b / a)


def shown(value: Any) -> str:
    """A figure with four digits; anything else as it is."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


class Runner:
    """Runs parts one after the other, or all at once."""

    def __init__(self, args: argparse.Namespace, folder: Path, table: Table) -> None:
        self._args, self._folder, self._table, self._started = args, folder, table, time.monotonic()
        self._reference = args.reference_python or sys.executable
        asked = "from importlib.util import find_spec as f; print(all(map(f, ('torch', 'transformers', 'peft'))))"
        answer = subprocess.run([self._reference, "-c", asked], capture_output=True, text=True, check=False)
        self._has_reference = answer.stdout.strip() == "True"

    def run(self, parts: Sequence[Part]) -> None:
        """Parts of one name run side by side (parity, which times nothing), with --smoke all of them."""
        usable = []
        for part in parts:
            if part.name in ("theirs", "grpo") and not self._has_reference:
                self._note(part, f"torch, transformers or peft is not in {self._reference}")
            else:
                usable.append(part)
        names = dict.fromkeys(part.name for part in usable)
        groups = [usable] if self._args.smoke else [[p for p in usable if p.name == name] for name in names]
        full_size = self._args.device == "gpu" and not self._args.smoke
        writer = self._write_weights() if "grpo" in names and full_size else None
        for group in groups:
            left = self._args.budget - (time.monotonic() - self._started)
            if left < group[0].seconds and full_size:
                self._note(group[0], f"left out: {left:.0f} s are left and about {group[0].seconds} are needed")
                continue
            if group[0].name == "grpo" and writer:
                writer.wait()
            with concurrent.futures.ThreadPoolExecutor(len(group)) as pool:
                done = [pool.submit(self._run, p, n, left, len(group) == 1) for n, p in enumerate(group)]
            for one in done:
                one.result()
        if writer:
            end(writer)

    def _note(self, part: Part, note: str) -> None:
        self._table.add(part.name, dict(case="process", note=note))

    def _run(self, part: Part, number: int, left: float, alone: bool) -> None:
        """Run a part to its end or its limit; adds its rows, and one of the process."""
        started, log = time.monotonic(), self._folder / f"{part.name}{number}.log"
        limit = part.limit if self._args.device == "cpu" else min(part.limit, left)
        lines: list[str] = []
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [self._reference if part.theirs else sys.executable, *part.command],
                cwd=ROOT,
                env=self._environment(alone),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                process_group=0,  # its own processes end with it
            )
            timer = threading.Timer(limit, end, (process,))
            timer.start()
            for line in process.stdout:
                if line.startswith(ROW):
                    self._table.add(part.name, json.loads(line.removeprefix(ROW)))
                elif line.strip():
                    lines.append(line.strip())
            code = process.wait()
            timer.cancel()
        if part.results and part.results.is_file():
            for row in json.loads(part.results.read_text(encoding="utf-8")):
                self._table.add(part.name, row)
        figures: dict[str, Any] = dict(case="process", process_s=time.monotonic() - started)
        if part.name == "parity":
            passed = sum(line.startswith("ok ") for line in lines)
            figures |= dict(case=Path(part.command[2]).name, checks_passed=passed, result=lines[-1] if lines else "")
        if code:
            said = [text.strip() for text in log.read_text(encoding="utf-8", errors="replace").splitlines()]
            why = f"ended after {limit:.0f} s" if figures["process_s"] >= limit else f"exit code {code}"
            figures |= dict(error=f"{why}: {' / '.join([*lines[-2:], *filter(None, said[-3:])])[-500:]}")
        self._table.add(part.name, figures)

    def _environment(self, alone: bool) -> dict[str, str]:
        """The device, one store of compiled programs and of tuned kernels for all parts, memory."""
        found = dict(os.environ)
        found["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[self._args.device]
        found["JAX_COMPILATION_CACHE_DIR"] = str(self._folder / "compiled")
        found["JAX_TRACEBACK_FILTERING"] = "off"  # the last line of a traceback is the message then
        found.setdefault("CUDA_VISIBLE_DEVICES", "0")
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        if alone:
            found.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93")
        else:
            found.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        return found

    def _write_weights(self) -> subprocess.Popen:
        """Begin to write the weights of the GRPO step, which a processor does while the device is busy."""
        command = [sys.executable, "tools/make_checkpoint.py", "--size=2b", f"--out={self._folder / '2b'}"]
        environment = self._environment(alone=False) | dict(JAX_PLATFORMS="cpu")
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, process_group=0)


def end(process: subprocess.Popen) -> None:
    """End a part with all processes that it started, if it has not ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    args = arguments()
    started, table = time.monotonic(), Table(Path(args.out) if args.out else None)
    with tempfile.TemporaryDirectory() as name:
        parts = parts_of(args, Path(name))
        expected = sum({part.name: part.seconds for part in parts}.values())
        print(f"about {expected:.0f} s on an H100; budget: {args.budget:.0f} s", flush=True)
        Runner(args, Path(name), table).run(parts)
    table.compare()
    print(f"\n{table.markdown()}\n{time.monotonic() - started:.0f} s in all", flush=True)
    return 1 if any("error" in row for _, row in table.rows) else 0


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--parts",
        default="",
        help="some of card,sft,theirs,decode,grpo,parity,sparse,sft_more,decode_more, in the order in which they run",
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds; parts that would not fit are left out")
    parser.add_argument(
        "--training",
        default=TRAINING,
        help="ROWSxN:REMAT,... of the part sft, each with what to take if it fails after a stroke",
    )
    parser.add_argument("--out", default="", help="file for the table, in Markdown; JSON is written beside it")
    parser.add_argument("--reference_python", default="", help="interpreter that has torch, transformers and peft")
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the GPU, all parts at once")
    args = parser.parse_args(argv)
    asked, args.parts = tuple(filter(None, args.parts.split(","))), ()
    args.device = "cpu" if args.tiny else "gpu"
    if args.smoke:
        args.budget = min(args.budget, SMOKE_SECONDS)
    known = dict.fromkeys(part.name for part in parts_of(args, Path()))
    if unknown := set(asked) - set(known):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    args.parts = asked or tuple(name for name in known if not (args.smoke and name.endswith("_more")))
    return args


if __name__ == "__main__":
    sys.exit(main())
