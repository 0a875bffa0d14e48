"""A small world that can be drawn anywhere: short clips and truthful questions about them, in the released format.

The world is flat and seen from above through a 64 x 64 window, the camera. The ground is a fixed random texture; the
camera slides over it and one coloured shape slides over the ground on its own. Every answer is computed from the
positions the clip was drawn from. It exists to try the whole training path in minutes; it says nothing about how well
a model understands real video.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mllm4d_jax.files.atomic import new_folder
from mllm4d_jax.media.written import require_frames
from mllm4d_jax.qa.options import lettered, write_question

SIZE = 64  # pixels, both sides of a clip
FRAMES = 16
FPS = 8.0
PIXELS_PER_METRE = 10.0
RADIUS = 7  # pixels, half the side of a shape
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230), "yellow": (235, 215, 40)}  # RGB
SHAPES = ("square", "circle", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
_MARKER = "complete.json"
_MARGIN = 40  # pixels of ground around the window's start, more than any camera travels


class SampleError(ValueError):
    """The sample files cannot be written where they should be."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """What a clip shows, in ground coordinates: x right, y down, pixels, origin at the camera's first position.

    Attributes:
      camera: f64[T, 2] position of the window's top left corner.
      target: f64[T, 2] position of the shape's centre.
      shape, colour: a member of SHAPES and of COLOURS.
      texture_seed: seed of the ground.
    """

    camera: np.ndarray
    target: np.ndarray
    shape: str
    colour: str
    texture_seed: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def make_clip(rng: np.random.Generator) -> Clip:
    """Draws a clip whose shape stays inside the window from the first frame to the last."""
    while True:
        camera_way, target_way = (np.array(list(DIRECTIONS.values())[k]) for k in rng.integers(0, 4, 2))
        camera_end, target_move = camera_way * rng.integers(8, 33), target_way * rng.integers(8, 33)
        start = rng.integers(RADIUS + 1, SIZE - RADIUS - 1, 2)
        end = start + target_move - camera_end
        if np.all(end > RADIUS) and np.all(end < SIZE - RADIUS):
            break
    share = np.linspace(0.0, 1.0, FRAMES)[:, None]
    return Clip(
        camera=np.round(share * camera_end),
        target=np.round(start + share * target_move),
        shape=SHAPES[rng.integers(len(SHAPES))],
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        texture_seed=int(rng.integers(1 << 31)),
    )


def draw(clip: Clip) -> np.ndarray:
    """The frames of a clip: u8[T, 64, 64, 3], RGB."""
    rng = np.random.default_rng(clip.texture_seed)
    side = SIZE + 2 * _MARGIN
    coarse = rng.integers(30, 180, (side // 8, side // 8)).astype(np.uint8)
    ground = np.repeat(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)[..., None], 3, axis=-1)
    frames = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
    for t in range(FRAMES):
        x, y = (clip.camera[t] + _MARGIN).astype(int)
        frame = ground[y : y + SIZE, x : x + SIZE].copy()
        _draw_shape(frame, clip.shape, COLOURS[clip.colour], (clip.target[t] - clip.camera[t]).astype(int))
        frames[t] = frame
    return frames


def _draw_shape(frame: np.ndarray, shape: str, colour: tuple[int, int, int], centre: np.ndarray) -> None:
    x, y = (int(v) for v in centre)
    if shape == "square":
        cv2.rectangle(frame, (x - RADIUS, y - RADIUS), (x + RADIUS, y + RADIUS), colour, -1)
    elif shape == "circle":
        cv2.circle(frame, (x, y), RADIUS, colour, -1)
    else:
        corners = np.array([[x, y - RADIUS], [x - RADIUS, y + RADIUS], [x + RADIUS, y + RADIUS]])
        cv2.fillPoly(frame, [corners], colour)


def direction(path: np.ndarray, i: int, j: int) -> str:
    """Dominant direction of the displacement between frames i and j of a path f64[T, 2]."""
    dx, dy = path[j] - path[i]
    if abs(dx) >= abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def distance(path: np.ndarray, i: int, j: int) -> float:
    """Metres between the positions of frames i and j of a path f64[T, 2]."""
    return float(np.linalg.norm(path[j] - path[i])) / PIXELS_PER_METRE


def numeric_options(truth: float, rng: np.random.Generator) -> list[float]:
    """Four distinct lengths in ascending order, one decimal, `truth` among them.

    The truth's rank is drawn first, uniformly, so that its place among the options says nothing about it.
    """
    rank = int(rng.integers(4))
    return [round(truth * 1.25 ** (k - rank), 1) for k in range(4)]


@dataclasses.dataclass(frozen=True)
class SampleQuestion:
    """A question about a clip."""

    text: str  # with its options
    letter: str  # of the right option
    subject: str  # "camera" or the shape's name
    path: np.ndarray  # f64[T, 2] of it, pixels
    answer: str  # text of the right option

    @property
    def states(self) -> list[list[float]]:
        """Where the subject is in the first and in the last frame: [x, y, z], metres; the world is flat, z is 0."""
        return [[round(float(v) / PIXELS_PER_METRE, 1) + 0.0 for v in self.path[t]] + [0.0] for t in (0, -1)]

    @property
    def solution(self) -> dict[str, Any]:
        """As in MLLM4D-R1-30k: the centres of what is asked about, null for the other."""
        nothing: list[None] = [None, None]
        camera = self.subject == "camera"
        centers = {
            "camera_center": self.states if camera else nothing,
            "object_center": nothing if camera else self.states,
        }
        return {"answer": self.letter, **centers}

    @property
    def reasoning(self) -> str:
        """The answer with the states that it follows from, in the form of the prompt `qa.system_prompt.ST_COT`."""
        solution, lines = self.solution, [f"The {self.subject} is asked about."]
        for n, name in enumerate(("start", "end")):
            lines.append(f"**Spatial State ({name} frame):**")
            for kind in ("camera", "object"):
                center = solution[f"{kind}_center"][n]
                lines.append(f"- {kind.title()} Center: {'null' if center is None else center}")
        lines.append(f"So it is {self.answer}, {self.letter}.")
        return f"<thinking>{chr(10).join(lines)}</thinking><answer>{self.letter}</answer>"


def questions(clip: Clip, rng: np.random.Generator) -> list[SampleQuestion]:
    """Four questions about a clip, two of direction and two of distance."""
    i, j = 0, FRAMES - 1
    span = f"between frame {i} and frame {j} of {j}"
    asked = []
    for subject, path in (("camera", clip.camera), (clip.name, clip.target)):
        over = "" if subject == "camera" else " over the ground"
        ways = list(rng.permutation(list(DIRECTIONS)))
        asked.append((f"Which way does the {subject} move{over} {span}?", ways, direction(path, i, j), subject, path))
        truth = round(distance(path, i, j), 1)
        lengths = [f"{v:.1f}" for v in rng.permutation(numeric_options(truth, rng))]
        asked.append((f"How many metres does the {subject} move{over} {span}?", lengths, f"{truth:.1f}", subject, path))
    out = []
    for question, options, answer, subject, path in asked:
        choices = lettered(options)
        letter = next(letter for letter, option in choices.items() if option == answer)
        out.append(SampleQuestion(write_question(question, choices), letter, subject, path, answer))
    return out


def write_sample_world(folder: str | Path, seed: int = 0, clips: int = 6) -> Path:
    """Writes clips and records; the same arguments give the same frames and records.

    An existing complete world of the same arguments is kept as it is.

    Args:
      folder: becomes `records.json` (a list in the conversations layout), `cold_start.json` (the same with reasoning),
        `r1.jsonl` (prompts with solutions, for reinforcement learning) and `videos/*.mp4`; it is also the media root.
      seed: of everything drawn.
      clips: number of clips; each has four questions.

    Returns:
      The path of `records.json`.

    Raises:
      SampleError: the folder has something else in it, or OpenCV cannot write mp4 files here.
    """
    folder = Path(folder)

    def write(target: Path) -> None:
        rng = np.random.default_rng(seed)
        (target / "videos").mkdir()
        records, reasoned, prompts = [], [], []
        for n in range(clips):
            clip, name = make_clip(rng), f"videos/clip_{n:03d}.mp4"
            write_video(target / name, draw(clip))
            for asked in questions(clip, rng):
                for rows, answer in ((records, asked.letter), (reasoned, asked.reasoning)):
                    turns = [{"from": "human", "value": f"<video>\n{asked.text}"}, {"from": "gpt", "value": answer}]
                    rows.append({"video": name, "conversations": turns})
                messages = [{"role": "user", "content": f"<video>\n{asked.text}"}]
                prompts.append({"messages": messages, "videos": [name], "solution": [asked.solution]})
        for file, rows in (("records.json", records), ("cold_start.json", reasoned)):
            (target / file).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (target / "r1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")

    build_folder(folder, {"kind": "sample world", "version": 3, "seed": seed, "clips": clips}, write)
    return folder / "records.json"


def write_video(path: Path, frames: np.ndarray) -> None:
    """Writes u8[T, H, W, 3] RGB frames as an mp4 at FPS (MPEG-4 part 2, the encoder every OpenCV build brings)."""
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, (width, height))
    if not writer.isOpened():
        raise SampleError(f"{path}: this OpenCV build cannot write mp4 files; install opencv-python-headless from PyPI")
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    require_frames(path, len(frames))


def build_folder(folder: Path, spec: Mapping[str, Any], write: Callable[[Path], None]) -> bool:
    """Makes a folder all at once: written beside its place, then renamed into it with a list of its files.

    A folder this function made is kept when it was made from the same `spec` and every file is there at its size, and
    is made anew otherwise.

    Args:
      folder: its final place.
      spec: JSON-able description of the content.
      write: fills an empty folder.

    Returns:
      True when it was written, False when an existing one was kept.

    Raises:
      SampleError: something else is in the way.
    """
    marker = folder / _MARKER
    if marker.is_file():
        stored = json.loads(marker.read_text(encoding="utf-8"))
        if stored["spec"] == dict(spec) and stored["files"] == _sizes(folder):
            return False
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise SampleError(f"{folder} is in the way: it holds files that were not written by this program")
    with new_folder(folder) as staging:
        write(staging)
        listing = {"spec": dict(spec), "files": _sizes(staging)}
        (staging / _MARKER).write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    return True


def _sizes(folder: Path) -> dict[str, int]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f != folder / _MARKER)
    return {f.relative_to(folder).as_posix(): f.stat().st_size for f in files}
