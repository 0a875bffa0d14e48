"""A run has its folder for itself."""

from __future__ import annotations

import pytest

from mllm4d_jax.files.lock import NAME, LockError, WriterLock
from mllm4d_jax.grpo import task as grpo
from mllm4d_jax.parallel import multihost
from mllm4d_jax.run.workdir import hold_workdir
from mllm4d_jax.sft import task as sft
from tests.files.test_lock import of_another_machine


@pytest.mark.parametrize("run", [sft.run, grpo.run])
def test_a_second_run_ends_before_it_touches_anything(make_config, tiny_world, tmp_path, run):
    """It used to replace the checkpoints of the first one, without a word."""
    (tmp_path / "metrics.jsonl").write_text("of the first\n")
    with WriterLock.of(tmp_path), pytest.raises(LockError, match="another run is writing to"):
        run(make_config(*tiny_world), str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_folder_is_made_held_and_left(tmp_path):
    with hold_workdir(tmp_path / "a" / "b") as held:
        assert held.path == tmp_path / "a" / "b" and (held.path / NAME).is_file()
        held.check()
        of_another_machine(held.path)
        with pytest.raises(LockError, match="taken over"):
            held.check()
        (held.path / NAME).unlink()
    assert list(held.path.iterdir()) == []


def test_all_processes_end_where_the_first_one_cannot_go_on(monkeypatch):
    def refuse():
        raise LockError("taken")

    with pytest.raises(LockError, match="taken"):
        multihost.primary_only(refuse)
    monkeypatch.setattr(multihost, "is_primary", lambda: False)
    monkeypatch.setattr(multihost, "gather", lambda numbers: multihost.np.array([[1], numbers]))
    with pytest.raises(ValueError, match="the first process of this run cannot go on; its own output says why"):
        multihost.primary_only(refuse)
    monkeypatch.setattr(multihost, "gather", lambda numbers: multihost.np.array([[0], numbers]))
    assert multihost.primary_only(refuse) is None
