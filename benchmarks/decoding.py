"""What a clip costs to decode: 32 frames of a video, resized, by PyAV as this project reads it and by OpenCV's reader.

Both decode every frame with one thread and resize the sampled ones with the same function; they take turns, clip by
clip, in one process. OpenCV knows no frame times, so its side counts frames and trusts the count in the file's header.

python benchmarks/decoding.py                      # a clip made here: 10 s of 854 x 480, H.264
python benchmarks/decoding.py --video=clip.mp4 --rounds=20
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import cv2
import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ResizeRule, resize_bicubic
from mllm4d_jax.media.video import read_video

SAMPLE, RESIZE = SampleRule("uniform", 32, None), ResizeRule("per_frame", 32, 2, 784, 50176)


def make_clip(path: Path, seconds: int = 10, height: int = 480, width: int = 854) -> None:
    """Write a clip whose picture moves everywhere, as a hand-held camera's does."""
    rng = np.random.default_rng(0)
    scene = cv2.GaussianBlur(rng.integers(0, 256, (height * 2, width * 2, 3), np.uint8), (0, 0), 3)
    scene = cv2.normalize(scene, None, 0, 255, cv2.NORM_MINMAX)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for k in range(30 * seconds):
            y, x = int(height / 2 * (1 + np.sin(k / 40))), int(width / 2 * (1 + np.cos(k / 55)))
            view = np.ascontiguousarray(scene[y : y + height, x : x + width])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        file.mux(stream.encode(None))


def read_by_opencv(path: str) -> np.ndarray:
    """u8[T, H, W, 3] RGB: the frames that the header's count asks for."""
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    total, frames, number = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), [], 0
    wanted = set(SAMPLE.indices(total, capture.get(cv2.CAP_PROP_FPS)).tolist())
    while capture.grab():
        if number in wanted:
            image = capture.retrieve()[1]
            frames.append(resize_bicubic(image, *RESIZE.size(len(wanted), *image.shape[:2]))[..., ::-1])
        number += 1
    capture.release()
    return np.stack(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", default="")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = args.video or str(Path(folder) / "clip.mp4")
        if not args.video:
            make_clip(Path(path))
        sides = {"PyAV": lambda: read_video(path, SAMPLE, RESIZE).frames, "OpenCV": lambda: read_by_opencv(path)}
        away = np.abs(sides["PyAV"]().astype(float) - sides["OpenCV"]()).mean()
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, read in sides.items():
                wall, cpu = time.perf_counter(), time.process_time()
                read()
                spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, times in spent.items():
        wall, cpu = (1e3 * statistics.median(t[i] for t in times) for i in (0, 1))
        print(f"{name:7} {wall:7.1f} ms a clip, {cpu:7.1f} ms of CPU (median of {args.rounds})")
    print(f"mean difference of their pixels: {away:.3f} grey levels")


if __name__ == "__main__":
    main()
