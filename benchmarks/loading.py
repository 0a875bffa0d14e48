"""Loading a checkpoint here against Transformers' from_pretrained: processor seconds, seconds, peak memory.

python benchmarks/loading.py [--size=2b] [--dtype=bfloat16] [--rounds=3] [--folder=DIR] [--trees=DIR,...]

Needs requirements-reference.txt. Random weights of a published size in bfloat16 (`tools/make_checkpoint.py`; kept in
--folder, if given), read once before the first round so that every contender finds them in memory. Each load is a
process of its own; the contenders take turns, and what they import is not counted. Where nothing has to be converted,
from_pretrained returns views of the mapped file and has read nothing yet: "theirs, in memory" copies every parameter
afterwards, one by one, which is what ours has done when it returns. --trees are other checkouts to load with as well.
Peak memory is that of the whole process, pages of mapped files too. Medians with their range.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
OURS, MAPPED, COPIED = "ours", "theirs, as returned", "theirs, in memory"


def ours(folder: str, dtype: str) -> Callable[[], Any]:
    """Import what is needed and return a function that loads."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mllm4d_jax.models.hf import load_model

    jax.block_until_ready(jnp.zeros(1))
    return lambda: jax.block_until_ready(nnx.state(load_model(folder, dtype=jnp.dtype(dtype))))


def theirs(folder: str, dtype: str, copy: bool) -> Callable[[], Any]:
    """As `ours`; `copy`: out of the mapped file."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):  # imports the family, which is not done before a model is made
        AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))

    def load() -> Any:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype))
        if copy:
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        return model

    return load


def measure(contender: str, folder: str, dtype: str) -> dict[str, float]:
    """Load once in this process."""
    load = ours(folder, dtype) if contender == OURS else theirs(folder, dtype, contender == COPIED)
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    model = load()
    after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - started
    del model
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return dict(cpu=user + system, user=user, system=system, wall=seconds, peak=after.ru_maxrss / 2**20)


def in_process(contender: str, tree: Path, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Run `measure` in a process of its own, with the code of `tree`."""
    command = [sys.executable, __file__, f"--folder={folder}", f"--dtype={args.dtype}", f"--contender={contender}"]
    environment = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Print the table of all contenders."""
    trees = [Path(tree).resolve() for tree in args.trees.split(",") if tree]
    contenders = [(OURS, OURS, HERE), *((f"ours, {tree.name}", OURS, tree) for tree in trees)]
    contenders += [(name, name, HERE) for name in (MAPPED, COPIED)]
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as f:
            while f.read(1 << 24):
                pass
    print(f"load before {os.getloadavg()[0]:.1f}")
    found: dict[str, list[dict[str, float]]] = {label: [] for label, *_ in contenders}
    for _ in range(args.rounds):
        for label, name, tree in contenders:
            found[label].append(in_process(name, tree, folder, args))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
    print(f"load after {os.getloadavg()[0]:.1f}; files of {size:.2f} GiB, into {args.dtype}\n")
    print("| loader | CPU s | of them user | system | s | peak memory, GiB |\n|---|---:|---:|---:|---:|---:|")
    for label, results in found.items():
        cells = (_spread([r[key] for r in results]) for key in ("cpu", "user", "system", "wall", "peak"))
        print(f"| {label} | {' | '.join(cells)} |")


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="loading.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="2b", help="of configs/published.py")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="to load into")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default="", help="checkpoint to load; written first if there is none")
    parser.add_argument("--trees", default="", help="other checkouts of this project, by commas")
    parser.add_argument("--contender", default="", choices=("", OURS, MAPPED, COPIED), help=argparse.SUPPRESS)
    args = parser.parse_args(argv[1:])
    if args.contender:
        print(json.dumps(measure(args.contender, args.folder, args.dtype)))
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.folder or scratch) / ("" if args.folder else "model")
        if not (folder / "config.json").is_file():
            make = [sys.executable, HERE / "tools/make_checkpoint.py", f"--size={args.size}", f"--out={folder}"]
            subprocess.run(make, check=True)
        compare(folder, args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
