"""A bucket for tests: the emulator, behind a server that counts requests and can make some of them go wrong."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import random
import re
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mllm4d_jax.files import remote
from tools.bucket_server import free_port, make_bucket, running

BUCKET = "trial-bucket"
FAULTS = ("429", "503", "slow", "cut", "short")


class Front:
    """What stands before the emulator.

    Attributes:
      requests: "GET name", "POST name" -> how often; `sent`: bytes of answers.
      rate: share of the requests that go wrong, each in one of the ways `kinds`.
      refuse: answers a (method, name) with a status, None to let it through.
      marks: names of empty objects that end with "/", as consoles make them; the emulator takes them for its folders.
    """

    def __init__(self, port: int, behind: int) -> None:
        self.requests: Counter[str] = Counter()
        self.sent, self.rate, self.kinds, self.hit = 0, 0.0, FAULTS, 0
        self.refuse = lambda method, name: None
        self.marks: tuple[str, ...] = ()
        self._random, self._lock = random.Random(0), threading.Lock()
        front = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm, wbufsize = True, 1 << 20

            def do(self) -> None:
                front.answer(self, behind)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do
            log_message = lambda *_: None  # noqa: E731

        self.url = f"http://127.0.0.1:{port}"
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.handle_error = lambda *_: None  # clients that were interrupted or killed
        self.server.daemon_threads = True

    def reset(self) -> None:
        """Forget what was counted, and let everything go right."""
        self.requests.clear()
        self._random.seed(0)
        self.rate, self.kinds, self.sent, self.hit, self.refuse = 0.0, FAULTS, 0, 0, lambda method, name: None
        self.marks = ()

    def fault(self) -> str:
        with self._lock:
            wrong = self._random.random() < self.rate
            self.hit += wrong
            return self._random.choice(self.kinds) if wrong else ""

    def answer(self, asked: http.server.BaseHTTPRequestHandler, behind: int) -> None:
        body = asked.rfile.read(int(asked.headers.get("content-length") or 0))
        if "chunked" in asked.headers.get("transfer-encoding", ""):
            body = b""
            while size := int(asked.rfile.readline(), 16):
                body += asked.rfile.read(size)
                asked.rfile.readline()
            asked.rfile.readline()
        name = object_name(asked.path, body)
        with self._lock:
            self.requests[f"{asked.command} {name}"] += 1
        fault, refused = self.fault(), self.refuse(asked.command, name)
        if refused is not None or fault in ("429", "503"):
            return self.reply(asked, refused or int(fault), {}, b'{"error": {"code": %d}}' % (refused or int(fault)))
        if fault == "slow":
            time.sleep(0.3)
        if asked.command == "DELETE" and not self.is_meant(asked.path, behind):
            return self.reply(asked, 412, {}, b'{"error": {"code": 412}}')
        if asked.command == "GET" and name in self.marks:
            return self.reply(asked, 200, {}, json.dumps(mark(name)).encode())
        onward = http.client.HTTPConnection("127.0.0.1", behind, timeout=60)
        with contextlib.closing(onward):
            own = ("host", "content-length", "transfer-encoding", "accept-encoding")
            onward.request(
                asked.command, asked.path, body, {k: v for k, v in asked.headers.items() if k.lower() not in own}
            )
            answer = onward.getresponse()
            data = answer.read()
        if self.marks and asked.command == "GET":
            data = self.with_marks(asked.path, data)
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in ("content-length", "transfer-encoding")}
        if fault == "short" and asked.command == "GET" and "alt=media" in asked.path:
            data = data[: len(data) // 2]
        cut = len(data) // 2 if fault == "cut" and asked.command == "GET" else None
        self.reply(asked, answer.status, kept, data, cut)

    def with_marks(self, target: str, data: bytes) -> bytes:
        """An answer to a request, with what it has to list of `marks`."""
        parts = urllib.parse.urlsplit(target)
        query = dict(urllib.parse.parse_qsl(parts.query))
        if not parts.path.endswith(f"/b/{BUCKET}/o"):
            return data
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        below = [name for name in self.marks if name.startswith(prefix)]
        shown = [name for name in below if not delimiter or delimiter not in name.removeprefix(prefix)]
        listed = json.loads(data)
        return json.dumps(listed | {"items": [*(listed.get("items") or ()), *map(mark, shown)]}).encode()

    def is_meant(self, target: str, behind: int) -> bool:
        """Whether an object is of the generation that a request to delete it names, which the emulator ignores."""
        parts = urllib.parse.urlsplit(target)
        wanted = urllib.parse.parse_qs(parts.query).get("ifGenerationMatch")
        if wanted is None:
            return True
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", behind, timeout=60)) as onward:
            onward.request("GET", parts.path)
            answer = onward.getresponse()
            return answer.status != 200 or json.loads(answer.read())["generation"] == wanted[0]

    def reply(self, asked, status: int, headers: dict, data: bytes, cut: int | None = None) -> None:
        self.sent += len(data)
        asked.send_response_only(status)
        for key, value in headers.items():
            asked.send_header(key, value)
        asked.send_header("Content-Length", str(len(data)))
        asked.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that was interrupted
            asked.wfile.write(data if cut is None else data[:cut])
            asked.wfile.flush()
        if cut is not None:
            asked.close_connection = True


def mark(name: str) -> dict[str, str]:
    """What a bucket says of an empty object that marks a folder."""
    about = {"size": "0", "generation": "1", "crc32c": "AAAAAA=="}
    return {"kind": "storage#object", "bucket": BUCKET, "name": name, **about}


def object_name(target: str, body: bytes) -> str:
    """Return the object that a request is about, or its path."""
    parts = urllib.parse.urlsplit(target)
    query = urllib.parse.parse_qs(parts.query)
    if "/upload/" in parts.path:
        named = re.search(rb'"name": ?"([^"]*)"', body)
        return query["name"][0] if "name" in query else named[1].decode() if named else parts.path
    found = re.search(r"/b/[^/]+/o/(.+)", parts.path)
    return urllib.parse.unquote(found[1]) if found else f"{parts.path}?{query.get('prefix', [''])[0]}"


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[Front]:
    """Yield the front of an emulator with one bucket in a folder; this process and those it starts are sent there."""
    port, behind = free_port(), free_port()
    names = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")
    before = {name: os.environ.get(name) for name in names}
    with running(folder, behind, f"http://127.0.0.1:{port}") as emulator:
        make_bucket(emulator, BUCKET)
        front = Front(port, behind)
        threading.Thread(target=front.server.serve_forever, daemon=True).start()
        os.environ.update(dict.fromkeys(names, front.url))
        try:
            yield front
        finally:
            front.server.shutdown()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def put_folder(folder: Path, name: str) -> str:
    """Upload all files of a folder; return its path in the bucket."""
    for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        remote.upload(f"gs://{BUCKET}/{name}/{file.relative_to(folder).as_posix()}", file)
    return f"gs://{BUCKET}/{name}"
