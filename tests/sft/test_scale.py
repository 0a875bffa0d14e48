"""Whole runs on data as it comes: clips of every shape and length, and a share of it unusable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from configs import sft as sft_config
from mllm4d_jax.data.order import Order
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.files.jsonl import read_steps
from mllm4d_jax.sft import task as sft
from mllm4d_jax.sft.step import Trainer

PER_VIDEO = 4
# frames, height, width: landscape, portrait, square, strip; short and long
SHAPES = ((16, 48, 64), (6, 64, 48), (40, 64, 64), (3, 40, 96), (90, 96, 40), (24, 72, 128), (9, 128, 72), (2, 64, 64))


def write_clip(path, frames: int, height: int, width: int) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 8.0, (width, height))
    rng = np.random.default_rng(frames)
    for _ in range(frames):
        writer.write(cv2.resize(rng.integers(0, 255, (6, 8, 3)).astype(np.uint8), (width, height)))
    writer.release()


def record(video, text="What moves?", role="human", answer="B") -> dict:
    return {
        "video": video,
        "conversations": [{"from": role, "value": f"<video>\n{text}"}, {"from": "gpt", "value": answer}],
    }


def damaged_clips(folder) -> dict[str, str]:
    """Writes one clip per kind of damage; name -> the reason it must be refused for."""
    write_clip(folder / "whole.mp4", 8, 64, 96)
    write_clip(folder / "one_frame.mp4", 1, 64, 64)
    write_clip(folder / "sliver.mp4", 4, 16, 16 * 250)
    whole = (folder / "whole.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no video " * 100)
    # Noise whose first bytes a decoder takes for its own format.
    (folder / "noise.mp4").write_bytes(b"BBCD" + np.random.default_rng(0).bytes(20_000))
    # Whole containers that name no codec, and another one than the frames were written with.
    (folder / "no_codec.mp4").write_bytes(whole.replace(b"mp4v", b"zzzz").replace(b"esds", b"free"))
    (folder / "other_codec.mp4").write_bytes(whole.replace(b"mp4v", b"avc1").replace(b"esds", b"free"))
    return {
        "absent.mp4": "missing_file",
        "truncated.mp4": "truncated_video",
        "empty.mp4": "empty_file",
        "text.mp4": "not_a_video",
        "noise.mp4": "not_a_video",
        "no_codec.mp4": "not_a_video",
        "other_codec.mp4": "truncated_video",
        "one_frame.mp4": "one_frame",
        "sliver.mp4": "bad_size",
    }


def damaged_lines(video: str, n: int) -> list[tuple[str, str]]:
    """(line, reason) of every kind of record that is wrong in itself, about a clip that is not."""
    turns = [{"from": "human", "value": f"What moves? {n}"}, {"from": "gpt", "value": "B"}]
    bad = (
        ({"video": video, "conversations": turns}, "placeholder_mismatch"),
        (record(video, f"<video>Twice? {n}"), "placeholder_mismatch"),
        (record(video, role="moderator"), "unknown_role"),
        (record("../" + video), "path_outside_root"),
        (record(video, "very " * 2000), "too_long"),
        ({"video": video, "conversations": [{"from": "human", "value": "<video>What moves?"}]}, "no_target"),
        ([n], "bad_record"),
    )
    lines = [(json.dumps(value), reason) for value, reason in bad]
    return [*lines, ('{"video": "' + video + '", "conversations": [', "bad_json")]


def write_records(folder, total: int) -> tuple:
    """`total` lines in random order, 5 % of them unusable in every way in turn; returns (path, index -> reason).

    With many lines every damaged clip has several questions, so that whole groups fall out.
    """
    damage = damaged_clips(folder)
    for n, shape in enumerate(SHAPES):
        write_clip(folder / f"good_{n}.mp4", *shape)
    kinds = [(json.dumps(record(name)), reason) for name, reason in damage.items()]
    kinds += damaged_lines("good_0.mp4", 0)
    bad = [kinds[n % len(kinds)] for n in range(total // 20)]
    if len(bad) < len(kinds):  # a short file has room for some; the seed decides which
        picked = np.random.default_rng(1).permutation(len(kinds))[: len(bad)]
        bad = [kinds[i] for i in picked]
    good = [(json.dumps(record(f"good_{n % len(SHAPES)}.mp4", f"Question {n}?")), "") for n in range(total - len(bad))]
    lines = [*good, *bad]
    order = np.random.default_rng(0).permutation(total)
    path = folder / "records.jsonl"
    path.write_text("\n".join(lines[i][0] for i in order) + "\n")
    return path, {n: lines[i][1] for n, i in enumerate(order) if lines[i][1]}


def tiny_run(model, path, frames: int = 4):
    """The tiny config on one device, on these records."""
    config = sft_config.get_config("tiny")
    config.data.sample = ""
    config.model.path, config.data.path, config.data.root = str(model), str(path), str(path.parent)
    config.data.questions_per_video, config.video.num_frames = PER_VIDEO, frames
    config.train.checkpoint_every = 10_000
    return config


@pytest.mark.parametrize("total", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_twentieth_unusable(tiny_world, tmp_path, monkeypatch, total):
    """The run finishes, quarantine names exactly the bad records, every other one is trained on once in the epoch."""
    path, expected = write_records(tmp_path, total)
    groups = Order([RecordFile(path, tmp_path).clips], (1.0,), per_group=PER_VIDEO, seed=0).sources[0].groups
    per_step = max(n for n in range(1, 9) if groups % n == 0)
    config = tiny_run(tiny_world[0], path)
    config.data.max_quarantine_rate = 0.1
    config.data.prefix_buckets, config.data.branch_buckets = (128, 512), (64, 512)
    config.data.rows = jax.device_count()
    config.train.batch_size, config.train.steps = per_step * PER_VIDEO, groups // per_step
    trained = []
    advance = Trainer.advance

    def and_note(self, step, data):
        trained.extend(data.keys)
        return advance(self, step, data)

    monkeypatch.setattr(Trainer, "advance", and_note)
    assert sft.run(config, str(tmp_path / "run")) == 0
    assert sorted(trained) == sorted(f"records.jsonl#{n}" for n in range(total) if n not in expected)
    entries = [json.loads(line) for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert {e["index"]: e["reason"] for e in entries} == expected and len(entries) == len(expected)
    rows = read_steps(tmp_path / "run/metrics.jsonl")
    assert len(rows) == config.train.steps and rows[-1]["quarantined"] == len(expected)
    assert sum(row["examples"] for row in rows) == total - len(expected) and rows[-1]["retraces"] == 0
    assert all(np.isfinite(row["loss"]) for row in rows)


CONFIG = """
from configs import sft


def get_config():
    config = sft.get_config("tiny")
    config.data.sample = ""
    config.model.path, config.data.path, config.data.root = {model!r}, {path!r}, {root!r}
    config.data.questions_per_video, config.data.rows = {most}, 2
    if {most} < 20:  # few steps, few shapes
        config.data.prefix_buckets, config.data.branch_buckets = (512,), (64, 128)
    config.train.batch_size, config.train.steps, config.train.checkpoint_every = 8 * {most}, {steps}, {steps}
    return config
"""


@pytest.mark.parametrize(
    ("steps", "most"), [pytest.param(8, 2, marks=pytest.mark.slow), pytest.param(200, 20, marks=pytest.mark.slow)]
)
def test_mixed_clips_compile_early_and_never_again(tiny_world, tmp_path, capsys, steps, most):
    """Portrait, landscape, short and long clips with 1 to `most` questions each, as a user runs them.

    Eight clips in two rows a step. Prints what it cost.
    """
    rng, lines = np.random.default_rng(0), []
    for n in range(48):
        name, (frames, height, width) = f"clip_{n}.mp4", SHAPES[n % len(SHAPES)]
        write_clip(tmp_path / name, frames, height, width)
        for k in range(rng.integers(1, most + 1)):
            lines.append(json.dumps(record(name, f"Question {k}? " + "Look again. " * int(rng.integers(0, 4)))))
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines) + "\n")
    config = tmp_path / "mixed.py"
    config.write_text(
        CONFIG.format(model=str(tiny_world[0]), path=str(path), root=str(tmp_path), steps=steps, most=most)
    )
    root = Path(__file__).resolve().parents[2]
    # A process of its own has one device, not the eight of the tests.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "run.py", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_steps(tmp_path / "run/metrics.jsonl")
    compiles = [0, *(row["compiles"] for row in rows)]
    new = [row["step"] for row, before in zip(rows, compiles, strict=False) if row["compiles"] > before]
    waited = sum(r["data_wait_s"] for r in rows) / sum(r["step_s"] for r in rows)
    padding = np.mean([r["padding"] for r in rows])
    with capsys.disabled():
        print(
            f"\n{len(rows)} steps: compilations at steps {new}, {rows[-1]['retraces']} retraces; "
            f"padding {padding:.0%}; waiting for data {waited:.0%} of the time"
        )
    assert steps < 200 or padding < 0.3  # the buckets of the short run are coarse
    assert len(rows) == steps and rows[-1]["retraces"] == 0 and rows[-1]["quarantined"] == 0
    # A row is read after the next step was sent, so a compilation shows up to one row early.
    assert rows[-1]["compiles"] <= 16 and new[-1] <= 150
