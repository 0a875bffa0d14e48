"""Processor seconds and memory of a clip, and hours for a release, on the paths `stereo4d` and `stereo`.

    python benchmarks/curation_rate.py [--tracks=25000] [--frames=199] [--size=512] [--used=32] [--repeats=3]

Renders one clip as large as Stereo4D's (about --tracks tracks over --frames frames) and one stereo clip of --used
frames, as many as a model is shown. Each is then done as `configs/curate.py:stereo4d` and `:stereo` do a clip, from
files to questions, in a process of its own with one thread. Seconds are processor time, the fastest of --repeats;
memory is the largest resident set of that process. Hours are seconds x --clips / --cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2

from data_prep.curate import ask_clip
from data_prep.questions.propose import QuestionRules
from data_prep.sources.stereo import StereoSource
from data_prep.sources.stereo4d import Stereo4DSource
from data_prep.synthetic.clip import make_clip, stereo4d_arrays, write_clip
from data_prep.synthetic.worlds import SyntheticConfig


def write_clips(folder: Path, options: argparse.Namespace) -> str:
    """Write the clip with annotations into `folder`/stereo4d, the pair into `folder`/stereo; say how large."""
    size = {"height": options.size, "width": options.size, "objects": (4, 4), "fps": 30.0}
    points = {"object_points": options.tracks // 12, "background_points": options.tracks * 4 // 5}
    clip = make_clip(0, 0, SyntheticConfig(**size, **points, frames=options.frames, smooth=False))
    write_clip(clip, folder / "stereo4d", codec="mpeg4", truth=False)
    lengths = stereo4d_arrays(clip)["track_lengths"]
    objects = len(clip.scene.objects)
    pair = make_clip(0, 1, SyntheticConfig(**size, frames=options.used, stereo=True))
    write_clip(pair, folder / "stereo", truth=False)
    return f"{len(lengths)} tracks, {lengths.mean():.0f} of {options.frames} frames each, {objects} masks"


def measure(kind: str, folder: Path, repeats: int) -> tuple[float, float, int]:
    """Processor seconds (the fastest), MiB of memory, and questions of the clip in `folder`."""
    cv2.setNumThreads(1)
    seconds, found = [], 0
    for n in range(repeats):
        if kind == "stereo4d":
            source = Stereo4DSource(folder, folder)
        else:
            source = StereoSource(folder, folder, folder / f"scenes-{n}")
        start = time.process_time()
        found = len(ask_clip(source, QuestionRules(), 0, 0.2, source.clip_ids()[0]).rows)
        seconds.append(time.process_time() - start)
        source.pool.close()
    # Linux: `ru_maxrss` of a new process begins at its parent's, VmHWM does not.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return min(seconds), int(status["VmHWM"].split()[0]) / 1024, found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {"tracks": 25_000, "frames": 199, "size": 512, "used": 32, "repeats": 3, "clips": 100_000, "cores": 64}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    # Fresh interpreters: memory of rendering is not memory of curation.
    spawn = multiprocessing.get_context("spawn")
    try:
        print(
            f"{options.size} x {options.size}; stereo4d: {write_clips(folder, options)}; stereo: {options.used} frames"
        )
        for kind in ("stereo4d", "stereo"):
            with spawn.Pool(1) as pool:
                seconds, memory, found = pool.apply(measure, (kind, folder / kind, options.repeats))
            hours = seconds * options.clips / options.cores / 3600
            print(
                f"{kind}: {seconds:.2f} s of CPU and {memory:.0f} MiB a clip, {found} questions; "
                f"{options.clips} clips on {options.cores} cores: {hours:.1f} hours"
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
