"""Clips per second and memory of the data loader, here and in other trees of this project, on the same clips.

    python benchmarks/loader.py [--tree=DIR,...] [--clips=400] [--epochs=4] [--workers=0,1,2] [--rounds=3]

Writes clips of 160 x 120 pixels and 48 frames, one question each, and takes padded batches of eight of them, 32 frames
a clip, as fast as they come; no model runs. The trees take turns: a process each for every round and number of workers,
one of the first, one of the second, and so on. "Start" is the time to the first batch. The first epoch's rate is that
of its other batches, beside which the last of the workers still start; the later rate is that of the other epochs.
Memory is the proportional set size (shared pages are divided among those who share them) of the process and all its
children together, the largest of samples half a second apart. Processor seconds are those of all of them from
start to end, imports included, and depend less than the clock on what else the machine does. Medians of the rounds,
with their range.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BATCH, FRAMES = 8, 32


def main() -> None:
    """Prints a row for each tree and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("tree", str(ROOT)), ("workers", "0,1,2"), ("drive", "")):
        parser.add_argument(f"--{name}", default=value)
    for name, number in (("clips", 400), ("epochs", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=number)
    arguments = parser.parse_args()
    if arguments.drive:
        sys.path.insert(0, os.getcwd())
        print(json.dumps(drive(Path(arguments.drive), int(arguments.workers), arguments.epochs)))
        return
    trees = [Path(tree).resolve() for tree in arguments.tree.split(",")]
    found: dict[tuple[Path, str], list[dict[str, float]]] = {}
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder), arguments.clips)
        for _ in range(arguments.rounds):
            for workers in arguments.workers.split(","):
                for tree in trees:
                    found.setdefault((tree, workers), []).append(measure(tree, workers, arguments.epochs, Path(folder)))
    print(f"load after: {os.getloadavg()[0]:.1f}")
    heads = ("start, s", "clips/s, first epoch", "clips/s, later", "processor seconds", "peak memory, MiB")
    print(f"| tree | workers | {' | '.join(heads)} |\n|---|{'---:|' * (1 + len(heads))}")
    for (tree, workers), rows in found.items():
        cells = (spread([row[name] for row in rows]) for name in ("start", "first", "later", "cpu", "memory"))
        print(f"| {tree} | {workers} | {' | '.join(cells)} |")


def spread(values: list[float]) -> str:
    """Returns "median (lowest-highest)"."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def measure(tree: Path, workers: str, epochs: int, folder: Path) -> dict[str, float]:
    """Runs `drive` in a process that imports the project from a tree; adds the peak memory of all its processes."""
    command = [sys.executable, str(Path(__file__).resolve()), f"--drive={folder}", f"--workers={workers}"]
    command.append(f"--epochs={epochs}")
    environment = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)
    peak, over = [0.0], threading.Event()
    seconds: dict[int, float] = {}  # of each process when it was last seen

    def watch() -> None:
        while not over.wait(0.5):
            used = {pid: usage(pid) for pid in family(process.pid)}
            peak[0] = max(peak[0], sum(memory for memory, _ in used.values()))
            seconds.update((pid, max(seconds.get(pid, 0.0), cpu)) for pid, (_, cpu) in used.items())

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = process.communicate()
    over.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{tree}: the loader failed with {workers} workers; its own output says why")
    return json.loads(said.splitlines()[-1]) | {"memory": peak[0], "cpu": sum(seconds.values())}


def family(pid: int) -> list[int]:
    """Returns a process and all that came from it (Linux)."""
    try:
        children = Path(f"/proc/{pid}/task").glob("*/children")
        return [pid, *(p for file in children for child in file.read_text().split() for p in family(int(child)))]
    except OSError:  # it ended meanwhile
        return [pid]


def usage(pid: int) -> tuple[float, float]:
    """Returns the proportional set size of a process in MiB, and the processor seconds it has used."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended meanwhile
        return 0.0, 0.0
    memory = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return memory, (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def write_world(folder: Path, clips: int) -> None:
    """Writes moving noise, the records, and a random model's processor and tokenizer."""
    import cv2
    import numpy as np

    sys.path.insert(0, str(ROOT))
    from mllm4d_jax.run.tiny import write_tiny_model

    records = []
    for n in range(clips):
        writer = cv2.VideoWriter(str(folder / f"{n}.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 16.0, (160, 120))
        wide = np.random.default_rng(n).integers(0, 255, (15, 32, 3)).astype(np.uint8)
        wide = cv2.resize(wide, (256, 120), interpolation=cv2.INTER_CUBIC)
        for frame in range(48):
            writer.write(np.ascontiguousarray(wide[:, 2 * frame : 2 * frame + 160]))
        writer.release()
        turns = [{"from": "human", "value": "<video>\nWhich way?\nA. left\nB. right"}, {"from": "gpt", "value": "A"}]
        records.append({"video": f"{n}.mp4", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    write_tiny_model(folder / "model", ["Which way? A. left B. right <0.3 seconds> user assistant"], 0)


def drive(folder: Path, workers: int, epochs: int) -> dict[str, float]:
    """Goes through the epochs with the loader of a training run; returns the seconds to the first batch and the clips
    per second after it, of the first epoch and of the others."""
    from absl import flags

    from configs import sft

    flags.FLAGS.mark_as_parsed()
    config = sft.get_config("tiny")
    config.data.sample, config.data.path, config.data.root = "", str(folder / "records.json"), str(folder)
    config.model.path, config.data.workers, config.video.num_frames = str(folder / "model"), workers, FRAMES
    config.data.questions_per_video, config.train.batch_size, config.data.rows = 1, BATCH, 0
    config.video.max_pixels = 224 * 224
    batches = (old_batches if (Path.cwd() / "mllm4d_jax/train").is_dir() else new_batches)(config)
    number = len(json.loads((folder / "records.json").read_text())) // BATCH
    started = time.perf_counter()
    with contextlib.closing(batches):
        moments = [time.perf_counter() for _ in itertools.islice(batches, epochs * number)]
    first = BATCH * (number - 1) / (moments[number - 1] - moments[0])
    later = BATCH * (epochs - 1) * number / (moments[-1] - moments[number - 1]) if epochs > 1 else float("nan")
    return {"start": moments[0] - started, "first": first, "later": later}


def new_batches(config: Any) -> Iterator[Any]:
    """Yields the batches of today's tree."""
    from mllm4d_jax.data.group_encoder import GroupEncoder
    from mllm4d_jax.data.loader import Loader
    from mllm4d_jax.data.quarantine import Quarantine
    from mllm4d_jax.data.stream import GroupStream
    from mllm4d_jax.models.config import ModelConfig
    from mllm4d_jax.run.build import encoder_of, loader_options, open_records, processor_of, row_shape

    shape = row_shape(config, processor_of(config), ModelConfig.from_folder(config.model.path))
    records = open_records(config)
    with (
        tempfile.TemporaryDirectory() as out,
        encoder_of(config.model.path, config.video, config.data.max_tokens) as encoder,
    ):
        quarantine = Quarantine(Path(out) / "quarantine.jsonl", 0.0)
        groups = GroupEncoder(records.sources, encoder)
        with GroupStream(records, groups, quarantine, loader_options(config)) as stream:
            loader = Loader(stream, shape)
            while True:
                step = loader.next_step()
                yield step.finish(shape.sizes(step.needed))


def old_batches(config: Any) -> Iterator[Any]:
    """Yields the batches of the tree before it was ordered by rooms; its runs made them ahead in a thread."""
    modules = ("train.job", "train.preflight", "processing.encode", "processing.config", "processing.tokenizer")
    job, preflight, encode, processor, text = (import_module(f"mllm4d_jax.{name}") for name in modules)
    geometry = import_module("mllm4d_jax.processing.grids").VisionGeometry(2, 8, 0)
    prefetch = import_module("mllm4d_jax.data.prefetch")
    model = (processor.ProcessorConfig.from_folder(config.model.path), text.Tokenizer.from_folder(config.model.path))
    options = encode.VideoOptions.from_mapping(config.video)
    with tempfile.TemporaryDirectory() as out, encode.Encoder(*model, options, config.data.max_tokens) as encoder:
        records = preflight.open_data(config)
        loader = job.make_loader(config, Path(out), records, encoder, geometry, job.Progress())
        with loader, prefetch.Prefetcher(loader.next_batch) as made:
            while True:
                batch = made.poll(1.0)
                if batch is not None:
                    yield batch


if __name__ == "__main__":
    main()
