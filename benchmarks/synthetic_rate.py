"""Rendered clips per second on one core.

    python benchmarks/synthetic_rate.py [--size=64] [--frames=8] [--clips=200]

Processor seconds of this process, the fastest of --repeats passes over the same clips: room, paths, rendering, exact
depth, masks and tracks; then the same with the clip's files written (to memory-backed storage if /dev/shm is there).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2

from data_prep.synthetic.clip import make_clip, write_clip
from data_prep.synthetic.worlds import SyntheticConfig


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("size", 64), ("frames", 8), ("clips", 200), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    config = SyntheticConfig(height=arguments.size, width=arguments.size, frames=arguments.frames)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    making, writing = [], []
    try:
        for _ in range(arguments.repeats):
            start = time.process_time()
            clips = [make_clip(0, n, config) for n in range(arguments.clips)]
            made = time.process_time()
            for clip in clips:
                write_clip(clip, folder, codec="mpeg4", truth=False)
            writing.append(time.process_time() - start)
            making.append(made - start)
    finally:
        shutil.rmtree(folder)
    print(f"{arguments.clips} clips of {arguments.frames} frames, {arguments.size} x {arguments.size}")
    for what, seconds in (("made", making), ("made and written", writing)):
        print(f"{what}: {arguments.clips / min(seconds):.1f} clips/s on one core")


if __name__ == "__main__":
    main()
