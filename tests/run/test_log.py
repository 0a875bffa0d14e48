"""What a run records of its steps."""

from __future__ import annotations

import struct

import pytest
from tensorboardX.proto import event_pb2

from mllm4d_jax.files.jsonl import JsonLinesError, read_steps
from mllm4d_jax.files.storage import StorageError
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


def events(folder):
    """The events of TensorBoard files: records of length u64, its checksum u32, the event, its checksum u32."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack_from("Q", data)
            yield event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_tensorboard_has_the_means_of_the_steps_between_two_lines(tmp_path):
    """As the bar has them, the last step of a run included, and none of what a restored run does again."""
    with open_log(tmp_path, 0) as log:
        for step in range(1, 10):
            log.step(row(step, loss=float(step)))
    found = list(events(tmp_path / "tb"))
    values = [(value, event.step) for event in found for value in event.summary.value]
    losses = [(value.simple_value, step) for value, step in values if value.tag == "train/loss"]
    assert losses == [(1.5, 2), (3.5, 4), (5.5, 6), (7.5, 8), (9.0, 9)]
    for path in (tmp_path / "tb").iterdir():
        path.unlink()
    with open_log(tmp_path, 4):
        pass
    starts = [event.step for event in events(tmp_path / "tb") if event.HasField("session_log")]
    assert starts == [5] and next(e.step for e in found if e.HasField("session_log")) == 1


def test_a_board_that_cannot_be_written_is_said_once_and_holds_nothing_up(tmp_path, caplog):
    """It was written by a thread, behind a queue of ten: the thread died, and the eleventh figure waited for ever."""
    (tmp_path / "tb").write_text("in the way")
    with open_log(tmp_path, 0) as log:
        for step in range(1, 40):
            log.step(row(step))
    assert caplog.text.count("no more figures for TensorBoard") == 1
    assert len(read_steps(tmp_path / "metrics.jsonl")) == 39


def test_a_full_disk_ends_the_log_with_the_files_name(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with open_log(tmp_path, 0) as log, pytest.raises(StorageError, match="metrics.jsonl: No space left on device"):
        log.step(row(1))


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
