"""What a run asks of buckets is counted over all its processes."""

from __future__ import annotations

import subprocess
import sys

from mllm4d_jax.files import remote
from mllm4d_jax.files.traffic import Total, Traffic
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
