"""The sample world tells the truth: its answers against what can be measured in its pictures."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from mllm4d_jax.data import samples
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.samples import SampleError, draw, make_clip, questions, write_sample_world
from mllm4d_jax.qa.rewards import score


def shape_mask(frame: np.ndarray) -> np.ndarray:
    """Pixels of the shape: the ground is grey, the shape is not."""
    return np.ptp(frame.astype(int), axis=-1) > 40


def measured_camera_shift(frames: np.ndarray) -> np.ndarray:
    """Camera displacement (x, y) in pixels by matching each ground picture to the next, shape pixels left out."""
    total = np.zeros(2)
    for a, b in zip(frames[:-1], frames[1:], strict=True):
        best = None
        for dx in range(-4, 5):
            for dy in range(-4, 5):
                inner = slice(6 + dy, 58 + dy), slice(6 + dx, 58 + dx)
                keep = ~(shape_mask(a)[inner] | shape_mask(b)[6:58, 6:58])
                error = np.abs(a[inner].astype(int) - b[6:58, 6:58])[keep].mean()
                if best is None or error < best[0]:
                    best = (error, dx, dy)
        total += best[1:]
    return total


def centroid(frame: np.ndarray) -> np.ndarray:
    rows, cols = np.nonzero(shape_mask(frame))
    return np.array([cols.mean(), rows.mean()])


def direction_of(shift: np.ndarray) -> str:
    x, y = shift
    return ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")


@pytest.mark.parametrize("seed", range(3))
def test_answers_agree_with_the_pictures(seed):
    rng = np.random.default_rng(seed)
    clip = make_clip(rng)
    frames = draw(clip)
    camera = measured_camera_shift(frames)
    moved = centroid(frames[-1]) - centroid(frames[0]) + camera
    expected = [
        direction_of(camera),
        np.linalg.norm(camera) / 10,
        direction_of(moved),
        np.linalg.norm(moved) / 10,
    ]
    asked = questions(clip, rng)
    assert len(asked) == 4
    for question, want in zip(asked, expected, strict=True):
        letter = question.letter
        options = dict(line.split(". ", 1) for line in question.text.splitlines() if line[1:3] == ". ")
        assert sorted(options) == list("ABCD") and len(set(options.values())) == 4
        if isinstance(want, str):
            assert options[letter] == want
        else:
            assert abs(float(options[letter]) - want) < 0.15
            others = [abs(float(v) - want) for k, v in options.items() if k != letter]
            assert abs(float(options[letter]) - want) <= min(others)


def test_letters_and_ranks_are_not_favoured():
    rng = np.random.default_rng(0)
    letters, ranks = [], []
    for _ in range(300):
        for n, question in enumerate(questions(make_clip(rng), rng)):
            letter = question.letter
            options = [line.split(". ", 1)[1] for line in question.text.splitlines() if line[1:3] == ". "]
            letters.append(letter)
            if n % 2:
                ranks.append(sorted(options, key=float).index(options["ABCD".index(letter)]))
    assert min(np.unique(letters, return_counts=True)[1]) > 240  # 300 of 1200 expected, sd 15
    assert min(np.bincount(ranks, minlength=4)) > 110  # 150 of 600 expected, sd 11


def test_files_are_deterministic_and_readable(tmp_path):
    path = write_sample_world(tmp_path / "a", seed=3, clips=2)
    again = write_sample_world(tmp_path / "b", seed=3, clips=2)
    other = write_sample_world(tmp_path / "c", seed=4, clips=2)
    assert path.read_bytes() == again.read_bytes() != other.read_bytes()
    records = RecordFile(path, path.parent)
    assert len(records) == 8
    video = records[7].messages[0]["content"][0]["path"]
    capture = cv2.VideoCapture(video)
    decoded = []
    while (got := capture.read())[0]:
        decoded.append(got[1][..., ::-1])
    capture.release()
    rng = np.random.default_rng(3)
    for _ in range(2):
        clip = make_clip(rng)
        questions(clip, rng)
    assert np.abs(np.array(decoded).astype(int) - draw(clip)).mean() < 12  # lossy codec


def test_complete_folder_is_kept_and_damaged_one_rebuilt(tmp_path):
    path = write_sample_world(tmp_path / "w", seed=1, clips=1)
    stamp = path.stat().st_mtime_ns
    write_sample_world(tmp_path / "w", seed=1, clips=1)
    assert path.stat().st_mtime_ns == stamp
    (tmp_path / "w/videos/clip_000.mp4").unlink()
    write_sample_world(tmp_path / "w", seed=1, clips=1)
    assert (tmp_path / "w/videos/clip_000.mp4").is_file()
    write_sample_world(tmp_path / "w", seed=1, clips=2)
    assert len(json.loads(path.read_text())) == 8


def test_an_interrupted_write_leaves_nothing_half_done(tmp_path, monkeypatch):
    calls = []

    def fail(path, frames):
        calls.append(path)
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(samples, "write_video", fail)
        with pytest.raises(OSError, match="disk full"):
            write_sample_world(tmp_path / "w", clips=1)
    assert calls and not (tmp_path / "w").exists()
    assert write_sample_world(tmp_path / "w", clips=1).is_file()


def test_foreign_files_are_never_removed(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/thesis.txt").write_text("mine")
    with pytest.raises(SampleError, match="in the way"):
        write_sample_world(tmp_path / "w")
    assert (tmp_path / "w/thesis.txt").read_text() == "mine"


def test_reasoning_and_solutions_are_the_drawn_world(tmp_path):
    """The written reasoning earns the whole reward."""
    folder = write_sample_world(tmp_path / "a", seed=3, clips=2).parent
    reasoned = json.loads((folder / "cold_start.json").read_text())
    prompts = [json.loads(line) for line in (folder / "r1.jsonl").read_text().splitlines()]
    assert len(reasoned) == len(prompts) == 8
    for record, prompt in zip(reasoned, prompts, strict=True):
        assert record["conversations"][0]["value"] == prompt["messages"][0]["content"]
        found = score(record["conversations"][1]["value"], prompt["solution"], "paper")
        assert found["total"] == pytest.approx(1.0)
    rng = np.random.default_rng(3)
    clip = make_clip(rng)
    start, end = questions(clip, rng)[0].states
    np.testing.assert_allclose(np.subtract(end, start)[:2], (clip.camera[-1] - clip.camera[0]) / 10, atol=0.1)
