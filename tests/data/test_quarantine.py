"""The quarantine file and its ceiling."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mllm4d_jax.data.quarantine import Quarantine, QuarantineError
from mllm4d_jax.files.jsonl import JsonLinesError
from mllm4d_jax.files.storage import StorageError
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import parse_record


def test_a_half_written_line_is_dropped(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        '{"source": 0, "index": 3, "key": "k", "reason": "r", "message": "m"}\n{"source": 0, "index": 4, "k'
    )
    quarantine = Quarantine(path, 0.5)
    assert quarantine.knows(0, 3) and not quarantine.knows(0, 4) and not quarantine.knows(1, 3)
    for _ in range(2):
        quarantine.add(0, 4, RecordError("m", "r", "k4"))
    quarantine.add(1, 4, RecordError("m", "r", "other#4"))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["source"], e["index"]) for e in entries] == [(0, 3), (0, 4), (1, 4)]
    assert entries[-1] == {"source": 1, "index": 4, "key": "other#4", "reason": "r", "message": "m"}


def test_a_damaged_line_is_named_and_says_what_to_do(tmp_path):
    path = tmp_path / "q.jsonl"
    good = '{"source": 0, "index": 3, "key": "k", "reason": "r", "message": "m"}\n'
    path.write_text(f'{good}{{"source": 0, "ind\n{good}')
    for host in (0, 1):
        with pytest.raises(JsonLinesError, match=r"q.jsonl, line 2: not a JSON object\. .* delete it"):
            Quarantine(path, 0.5, host=host)
    for entry in ('{"source": 0}', '{"source": "a", "index": 1}', '{"index": null}'):
        path.write_text(f"{good}{entry}\n")
        with pytest.raises(QuarantineError, match=r"q.jsonl, line 2: .* name no record\. Delete this line"):
            Quarantine(path, 0.5)
    assert not Quarantine(path, 0.5, fresh=True).knows(0, 3)


def test_hosts_write_their_own_file_and_know_what_all_found(tmp_path):
    for host in (0, 1):
        Quarantine(tmp_path / "q.jsonl", 0.5, host=host).add(0, host, RecordError("m", "r", "k"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.1.jsonl", "q.jsonl"]
    for host in (0, 1, 2):
        quarantine = Quarantine(tmp_path / "q.jsonl", 0.5, host=host)
        assert quarantine.knows(0, 0) and quarantine.knows(0, 1)
    # A run from the start forgets them all: else it would read other records than when it goes on.
    Quarantine(tmp_path / "q.jsonl", 0.5, host=1, fresh=True)
    assert not any(Quarantine(tmp_path / "q.jsonl", 0.5).knows(0, n) for n in (0, 1)) and not list(tmp_path.iterdir())


def test_lines_that_were_made_otherwise_are_refused(tmp_path):
    """Also those of a version that did not say; where the caller makes sure itself, nothing is said or asked."""
    path = tmp_path / "q.jsonl"
    Quarantine(path, 0.5, config="a1").add(0, 3, RecordError("m", "r", "k"))
    assert json.loads(path.read_text())["config"] == "a1" and Quarantine(path, 0.5, config="a1").knows(0, 3)
    for config in ("b2", "a"):
        with pytest.raises(
            QuarantineError, match=rf"q.jsonl, line 1: .*\('a1', this run is {config}\).*delete this file"
        ):
            Quarantine(path, 0.5, config=config)
    path.unlink()
    Quarantine(path, 0.5).add(0, 3, RecordError("m", "r", "k"))
    assert "config" not in json.loads(path.read_text())
    with pytest.raises(QuarantineError, match=r"\(None, this run is a1\)"):
        Quarantine(path, 0.5, config="a1")


@pytest.mark.parametrize(
    "raw",
    [
        {f"key {n}": n for n in range(100_000)},
        {"conversations": [{"from": "x" * 5_000_000, "value": "a"}]},
        {"conversations": [{"from": "human", "value": ["x"] * 1_000_000}]},
        {"video": ["../" + "x" * 5_000_000], "conversations": [{"from": "human", "value": "<video>"}]},
        {"video": ["a.mp4"] * 100_000, "conversations": [{"from": "human", "value": "a"}]},
        {"conversations": [{"from": "gpt", "value": "a", "weight": "x" * 5_000_000}]},
        {"conversations": [{"from": "human", "value": "a"}], "system": ["x" * 5_000_000]},
    ],
)
def test_a_line_is_short_whatever_the_record_holds(tmp_path, raw):
    with pytest.raises(RecordError) as caught:
        parse_record(raw, "k" * 5_000_000, tmp_path)
    Quarantine(tmp_path / "q.jsonl", 0.5).add(0, 1, caught.value)
    entry = json.loads((tmp_path / "q.jsonl").read_text())
    assert 20 < len(entry["message"]) <= 1200 and 200 < len(entry["key"]) <= 300


@pytest.mark.parametrize("cluster", [1, 20])
def test_the_ceiling_bears_with_chance_but_not_with_more(cluster):
    """Shares of the limit itself pass, three times the limit is stopped; whole clips go bad at once."""

    def run(share, steps=4_000):
        rng = np.random.default_rng(0)
        quarantine = Quarantine("/nonexistent/q", 0.01, per_group=cluster)
        for group in range(1, steps + 1):
            if rng.uniform() < share:
                for _ in range(cluster):
                    quarantine.count(group * cluster)

    run(0.01)
    with pytest.raises(QuarantineError):
        run(0.03)


def test_no_verdict_before_twenty_groups():
    early = Quarantine("/nonexistent/q", 0.0, per_group=3)
    for seen in range(1, 60):
        early.count(seen)
    with pytest.raises(QuarantineError, match="60 of the first 60"):
        early.count(60)


def test_a_list_on_a_full_disk_ends_with_its_name(tmp_path):
    (tmp_path / "q.jsonl").symlink_to("/dev/full")
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.1)
    with pytest.raises(StorageError, match="q.jsonl: No space left on device"):
        quarantine.add(0, 1, RecordError("is broken", "bad_record", "k"))


@pytest.mark.parametrize("tail", [b"\0" * 600, b"\xff", b'{"source": 0, "ind'])
def test_what_a_crash_leaves_at_its_end_is_cut_off(tmp_path, tail):
    path = tmp_path / "q.jsonl"
    Quarantine(path, 0.1).add(0, 1, RecordError("is broken", "bad_record", "k"))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert Quarantine(path, 0.1).knows(0, 1) and path.read_bytes() == whole
