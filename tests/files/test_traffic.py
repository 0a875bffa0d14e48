"""What a run asks of buckets is counted over all its processes."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys

import jax
import jax.numpy as jnp

from mllm4d_jax.files import remote
from mllm4d_jax.files.traffic import Total, Traffic
from mllm4d_jax.run.checkpoint import Checkpoints
from tests.buckets import BUCKET

PATH = f"gs://{BUCKET}/traffic/a"
CODE = "import sys; from mllm4d_jax.files import remote; remote.read_range(sys.argv[1], 0, 5000)"


def test_requests_and_bytes_of_all_processes(front, tmp_path):
    with Traffic() as traffic:
        assert traffic.total() == Total() and traffic.said(5) == ""
        remote.upload(PATH, bytes(5000))
        front.reset()
        for _ in range(2):
            remote.read_range(PATH, 0, 5000)
        subprocess.check_call([sys.executable, "-c", CODE, PATH])
        got = traffic.total()
        assert got.requests == 1 + sum(front.requests.values()) == 4
        assert 15000 <= got.received < 17000 and 5000 <= got.sent < 6000
        assert traffic.said(50).endswith("per 100 steps 8 requests, 0.0 MB")
    with Traffic() as other:
        remote.read_range(PATH, 0, 10)
        assert other.total()[:2] == (1, 10)
    remote.read_range(PATH, 0, 10)


def test_a_run_of_no_steps_has_no_figures_of_one():
    """It was stopped before the first, or had only an evaluation to make up."""
    with Traffic() as traffic:
        assert traffic.said(0) == traffic.said(3) == ""


def test_what_tensorstore_asks_for_checkpoints_is_counted(front):
    with Traffic() as traffic, Checkpoints(f"gs://{BUCKET}/traffic/checkpoints", keep=1) as kept:
        kept.save_trainable(0, {"a": jax.random.normal(jax.random.key(0), 50_000)})
        kept.finish()
        saved, asked = traffic.total(), sum(front.requests.values())
        assert 150_000 <= saved.sent < 400_000
        kept.restore_trainable(0, {"a": jnp.zeros(50_000)})
        assert 150_000 <= traffic.total().received - saved.received < 400_000
        assert asked <= saved.requests <= 1.5 * asked  # those for credentials go elsewhere


def test_the_total_never_falls_while_others_are_at_work(front):
    remote.upload(PATH, bytes(10))
    with Traffic() as traffic, concurrent.futures.ThreadPoolExecutor(4) as pool:
        work = [pool.submit(remote.read_range, PATH, 0, 10) for _ in range(60)]
        while not traffic.total().requests:
            pass
        seen = [traffic.total().requests]
        while not all(one.done() for one in work):
            seen.append(traffic.total().requests)
        assert seen == sorted(seen) and traffic.total().requests == 60
