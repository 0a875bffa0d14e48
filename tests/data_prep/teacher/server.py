"""A chat endpoint on the loopback interface that answers, and fails, as a script says."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time


def completion(content, finish="stop"):
    return json.dumps({"choices": [{"message": {"content": content}, "finish_reason": finish}], "usage": {"x": 1}})


OK = ("status", 200, {}, completion('{"n": 7}'))


class Handler(http.server.BaseHTTPRequestHandler):
    """Plays the next step of the script of the `Server` that is `self.server.outer`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        outer, body = self.server.outer, self.rfile.read(int(self.headers["Content-Length"]))
        with outer.lock:
            outer.in_flight += 1
            outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
            step = outer.script[min(len(outer.seen), len(outer.script) - 1)]
            outer.seen.append((time.monotonic(), self.path, dict(self.headers), json.loads(body)))
        try:
            self.play(*step)
        except (BrokenPipeError, ConnectionResetError):
            pass
        with outer.lock:
            outer.in_flight -= 1

    def play(self, kind, status=200, headers=None, text=""):
        self.close_connection = True
        data = text.encode()
        if kind == "hang_up":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif kind == "silent":
            self.server.outer.stop.wait(10)
        elif kind == "drip_head":
            self.drip(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 200)
        else:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_body(kind, data)

    def send_body(self, kind, data):
        if kind == "endless":
            self.end_headers()
            for _ in range(10_000):
                self.wfile.write(b" " * 65536)
            return
        if kind != "promised":  # the script's own headers say how long it is
            self.send_header("Content-Length", str(len(data) + (100 if kind == "truncated" else 0)))
        self.end_headers()
        if kind == "drip":
            self.drip(data)
            return
        if kind == "held":
            time.sleep(0.05)
        self.wfile.write(data)

    def drip(self, data):
        for byte in data:
            if self.server.outer.stop.wait(0.05):
                return
            self.connection.sendall(bytes([byte]))

    def log_message(self, *_):
        pass


class Server:
    """Answers the n-th request with the n-th step of a script; keeps what it was asked and when."""

    def __init__(self, *script):
        self.script, self.seen, self.lock = list(script), [], threading.Lock()
        self.in_flight = self.most_in_flight = 0
        self.stop = threading.Event()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.outer = True, self
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()
