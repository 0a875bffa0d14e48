"""What a run records of its steps."""

from __future__ import annotations

import pytest

from mllm4d_jax.files.jsonl import JsonLinesError, read_steps
from mllm4d_jax.run.log import RunLog
from tests.run.step_rows import row


def open_log(tmp_path, start):
    return RunLog(tmp_path, "sft", ("loss", "lr"), steps=9, start=start, log_every=2)


def test_lines_beyond_the_restored_step_go_away(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open_log(tmp_path, 0) as log:
        for step in range(1, 6):
            log.step(row(step))
        log.step(None)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert [r["step"] for r in read_steps(path)] == [1, 2, 3, 4, 5]
    with open_log(tmp_path, 3) as log:
        log.step(row(4, loss=0.125))
    rows = read_steps(path)
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and rows[-1]["loss"] == 0.125
    assert rows[0] == row(1)


def test_tensorboard_has_the_means_of_the_steps_between_two_lines(tmp_path, monkeypatch):
    """As the bar has them, the last step of a run included, and none of what a restored run does again."""
    said, purged = [], []

    class Board:
        def __init__(self, folder, purge_step=None, **_):
            purged.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            said.append((name, value, step))

        def close(self):
            pass

    monkeypatch.setattr("tensorboardX.SummaryWriter", Board)
    with open_log(tmp_path, 0) as log:
        for step in range(1, 10):
            log.step(row(step, loss=float(step)))
    losses = [(value, step) for name, value, step in said if name == "train/loss"]
    assert losses == [(1.5, 2), (3.5, 4), (5.5, 6), (7.5, 8), (9.0, 9)]
    with open_log(tmp_path, 4):
        pass
    assert [step for _, step in purged] == [1, 5]


def test_a_damaged_line_loses_no_later_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with open_log(tmp_path, 0) as log:
        for step in range(1, 6):
            log.step(row(step))
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2][:20] + "\n"
    path.write_text("".join(lines))
    with open_log(tmp_path, 5):
        assert path.read_text() == "".join(lines)
    with pytest.raises(JsonLinesError, match=r"metrics.jsonl, line 3: not a JSON object\. .* delete it"):
        open_log(tmp_path, 2)
    assert path.read_text() == "".join(lines)


def test_the_bar_says_the_summary_of_the_steps_since_the_last_one(tmp_path, capsys):
    with open_log(tmp_path, 0) as log:
        for step in (1, 2, 3, 4):
            log.step(row(step, loss=float(step)))
    said = capsys.readouterr().err
    assert "loss 1.5000, lr 5.00e-04" in said and "loss 3.5000, lr 2.50e-04" in said
