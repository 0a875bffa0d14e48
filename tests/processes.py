"""Runs of `run.py` in processes of their own, one or several that share a run over loopback."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys
import time

import ml_collections

ROOT = pathlib.Path(__file__).resolve().parents[1]


def write_config(path: pathlib.Path, config: ml_collections.ConfigDict) -> pathlib.Path:
    """A config file that gives exactly this config."""
    path.write_text(f"def get_config():\n    return {config.to_dict()!r}\n")
    return path


class Processes:
    """A run over `count` processes with `devices` CPU devices each. Use as a context manager; none is left behind."""

    def __init__(
        self,
        config: pathlib.Path,
        workdir: pathlib.Path | str,
        count: int = 1,
        devices: int = 1,
        outputs: pathlib.Path | None = None,
    ) -> None:
        """`outputs`: folder of what they print, by default that of the workdir."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        name, outputs = str(workdir).rpartition("/")[2], outputs or pathlib.Path(workdir).parent
        self.output = [outputs / f"{name}-process-{i}.txt" for i in range(count)]
        command = [sys.executable, "run.py", f"--config={config}", f"--workdir={workdir}"]
        if count > 1:
            command.append("--config.distributed=explicit")
        flags = f"--xla_force_host_platform_device_count={devices} --xla_llvm_disable_expensive_passes=true"
        self.running = []
        for i, path in enumerate(self.output):
            env = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "NPROC": "8",  # threads of XLA: collectives of two devices would else block all that two cores have
                "XLA_FLAGS": flags,
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(i),
            }
            with path.open("wb") as file:
                self.running.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT))

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.running:
            process.kill()
            process.wait()

    def wait(self, timeout: float = 150) -> list[int]:
        """Exit codes; raises AssertionError with the output when it takes too long."""
        end = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.running]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.text()}") from None

    def text(self) -> str:
        """All that they printed."""
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in self.output)

    def wait_for_steps(self, workdir: pathlib.Path, steps: int, timeout: float = 120) -> None:
        """Returns once metrics.jsonl has so many lines."""
        end, path = time.monotonic() + timeout, workdir / "metrics.jsonl"
        while not path.exists() or path.read_text().count("\n") < steps:
            assert time.monotonic() < end, f"no {steps} steps after {timeout} s:\n{self.text()}"
            codes = [process.poll() for process in self.running]
            assert any(code is None for code in codes), f"exit codes {codes}:\n{self.text()}"
            time.sleep(0.02)
