"""Rows and weights of several processes, in two real ones."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

from mllm4d_jax.parallel import multihost

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_two_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.parallel.two_processes"]
    how = dict(env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    running = [subprocess.Popen([*command, str(i), str(port)], **how) for i in range(2)]
    try:
        said = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    assert all("as it should be" in text for text in said)


def test_alone_nothing_is_asked():
    assert multihost.gather_bytes(b"x") == [b"x"] and multihost.together(lambda: 3) == 3
