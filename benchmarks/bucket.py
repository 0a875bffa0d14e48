"""Clips per second of the data loader from a bucket of the emulator, and from the same files on the disk.

    python -m benchmarks.bucket [--clips=200] [--epochs=3] [--rounds=3] [--workers=0,2]

The clips of benchmarks/loader.py. The first epoch from the bucket fetches each clip; later ones find it in the cache,
and ask nothing. Disk and bucket take turns. The emulator on loopback has the latency of no network and shares the
processors with the loader: the figures say what the way costs, not what a bucket far away gives.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

from absl import flags

from benchmarks.loader import BATCH, FRAMES, new_batches, write_world
from mllm4d_jax.files import remote
from tools.bucket_server import make_bucket, running

BUCKET = "benchmark"


def main() -> None:
    """Prints rows for each number of workers, and the medians of bucket to disk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", default="0,2")
    for name, number in (("clips", 200), ("epochs", 3), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=number)
    asked = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    with tempfile.TemporaryDirectory() as folder:
        world, buckets = Path(folder) / "world", Path(folder) / "buckets"
        world.mkdir()
        buckets.mkdir()
        write_world(world, asked.clips)
        with running(buckets) as url:
            make_bucket(url, BUCKET)
            os.environ["STORAGE_EMULATOR_HOST"] = url
            for file in (file for file in world.rglob("*") if file.is_file()):
                remote.upload(f"gs://{BUCKET}/{file.relative_to(world).as_posix()}", file)
            print(
                "| workers | from | clips/s, first epoch | clips/s, later | requests | MB read |\n|---:|---|"
                + "---:|" * 4
            )
            for workers in map(int, asked.workers.split(",")):
                ratios = []
                for _ in range(asked.rounds):
                    disk, bucket = (
                        row(root, workers, asked.epochs, asked.clips) for root in (str(world), f"gs://{BUCKET}")
                    )
                    ratios.append((bucket[0] / disk[0], bucket[1] / disk[1]))
                first, later = (f"{statistics.median(column):.2f}" for column in zip(*ratios, strict=True))
                load = f"load {os.getloadavg()[0]:.0f}"
                print(
                    f"| {workers} | bucket/disk, median of {asked.rounds}, {load} | {first} | {later} | | |", flush=True
                )


def row(root: str, workers: int, epochs: int, clips: int) -> tuple[float, float]:
    """Prints a row; returns clips per second of the first epoch and of the others."""
    first, later, total = measure(root, workers, epochs, clips)
    place = "bucket" if root.startswith("gs:") else "disk"
    figures = f"{first:.1f} | {later:.1f} | {total.requests} | {total.received / 1e6:.1f}"
    print(f"| {workers} | {place} | {figures} |", flush=True)
    return first, later


def measure(root: str, workers: int, epochs: int, clips: int) -> tuple[float, float, object]:
    """Returns clips per second of the first epoch, of the others, and what the bucket was asked."""
    from configs import sft
    from mllm4d_jax.files.traffic import Traffic

    config = sft.get_config("tiny")
    config.data.sample, config.data.path, config.data.root = "", f"{root}/records.json", root
    config.model.path, config.data.workers, config.video.num_frames = f"{root}/model", workers, FRAMES
    config.data.questions_per_video, config.train.batch_size, config.data.rows = 1, BATCH, 0
    config.video.max_pixels, number = 224 * 224, clips // BATCH
    with tempfile.TemporaryDirectory() as cache, Traffic() as traffic:
        os.environ["XDG_CACHE_HOME"] = cache
        with contextlib.closing(new_batches(config)) as batches:
            moments = [time.perf_counter() for _ in itertools.islice(batches, epochs * number)]
        first = BATCH * (number - 1) / (moments[number - 1] - moments[0])
        return first, BATCH * (epochs - 1) * number / (moments[-1] - moments[number - 1]), traffic.total()


if __name__ == "__main__":
    main()
