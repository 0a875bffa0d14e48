"""Video decoding under a time limit, in processes that can be killed.

A codec that hangs inside C++ cannot be interrupted from Python; only ending its process helps. The pool keeps one
process per concurrent caller and reuses it, so that a clip pays for the transfer of its resized frames through a pipe
(about 2 ms for 32 frames of 224 x 224) and not for a new interpreter (about 0.2 s, once, and again after each kill).
Processes are started as fresh programs, never forked: safe after JAX has started threads.

Such a process is `python -m mllm4d_jax.media.decode_pool`. It speaks length-prefixed messages over stdin and stdout: a
request is a JSON object, a reply a JSON object followed by the raw frames it announces. It ends when stdin closes, so
it does not outlive its parent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np

from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ResizeRule
from mllm4d_jax.media.video import VideoClip, VideoInfo, probe, read_video
from mllm4d_jax.qa.errors import MediaError

_LENGTH = struct.Struct(">Q")
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class _Worker:
    """One decoder process."""

    def __init__(self):
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [_PACKAGE_PARENT, env.get("PYTHONPATH")]))
        # A media file may be a playlist that names network addresses: files only.
        env["OPENCV_FFMPEG_CAPTURE_OPTIONS"] = "protocol_whitelist;file"
        env["OPENBLAS_NUM_THREADS"] = "1"  # the matrix products of a resize are too small to share
        self._stderr = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mllm4d_jax.media.decode_pool"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
            start_new_session=True,  # Ctrl-C is for the caller to handle; a killed decoder would look like a bad video
        )

    def ask(self, request: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], np.ndarray | None]:
        """(reply, frames). After a MediaError of reason "timeout" or "decoder_crash" the process is gone."""
        expired = threading.Event()

        def expire():
            expired.set()
            self.process.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.daemon = True
        timer.start()
        try:
            _send(self.process.stdin, request | {"timeout_s": timeout_s})
            reply = _receive(self.process.stdout)
            frames = None
            if reply is not None and "shape" in reply:
                frames = np.empty(reply["shape"], np.uint8)
                if self.process.stdout.readinto(memoryview(frames).cast("B")) != frames.nbytes:
                    reply = None
        except BrokenPipeError:
            reply = None
        except BaseException:
            self.close()  # interrupted between request and reply: the pipe is out of step
            raise
        finally:
            timer.cancel()
            timer.join()  # a timer that just fired has killed by now, so that no dead worker is kept
        if expired.is_set():
            self.close()
            raise MediaError(
                f"{request['path']} was not decoded within {timeout_s:g} s; its decoder was killed", "timeout"
            )
        if reply is None:
            raise MediaError(f"{request['path']} crashed the decoder ({self._last_words()})", "decoder_crash")
        return reply, frames

    def _last_words(self) -> str:
        self.process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self.close()
        return f"exit code {self.process.returncode}" + (f", {lines[-1]}" if lines else "")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._stderr.close()
        for stream in (self.process.stdin, self.process.stdout):
            try:
                stream.close()
            except BrokenPipeError:
                pass  # an unsent request; nobody is left to read it


class DecodePool(contextlib.AbstractContextManager):
    """`probe` and `read` with a time limit; may be called from several threads at once.

    Pickles without its processes, so that it can travel to data-loader workers. Close it, or use it as a context
    manager; its processes also end with this one.
    """

    def __init__(self, timeout_s: float = 60.0):
        """`timeout_s` seconds per request."""
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []

    def __reduce__(self):
        return type(self), (self.timeout_s,)

    def probe(self, path: str) -> VideoInfo:
        """See `video.probe`; also raises MediaError "timeout", "decoder_crash"."""
        reply, _ = self._ask({"kind": "probe", "path": path})
        return VideoInfo(**reply)

    def read(self, path: str, sample: SampleRule, resize: ResizeRule | None = None) -> VideoClip:
        """See `video.read_video`; also raises MediaError "timeout", "decoder_crash", "decoder_error"."""
        rules = {"sample": dataclasses.asdict(sample), "resize": dataclasses.asdict(resize) if resize else None}
        reply, frames = self._ask({"kind": "read", "path": path} | rules)
        return VideoClip(frames, np.array(reply["indices"], np.int64), reply["source_fps"], reply["total_frames"])

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
        worker = self._take() or _Worker()
        reply, frames = worker.ask(request, self.timeout_s)
        with self._lock:
            self._idle.append(worker)
        if "error" in reply:
            raise MediaError(reply["error"], reply["reason"])
        return reply, frames

    def _take(self) -> _Worker | None:
        """An idle worker that is still alive, if there is one."""
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.process.poll() is None:
                    return worker
                worker.close()
        return None

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def __exit__(self, *_) -> None:
        self.close()

    def __del__(self):
        if getattr(self, "_idle", None):
            self.close()


def _send(stream: BinaryIO, message: dict[str, Any], payload: memoryview | bytes = b"") -> None:
    body = json.dumps(message).encode()
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.write(payload)
    stream.flush()


def _receive(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message, None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    size = _LENGTH.unpack(head)[0]
    body = stream.read(size)
    return json.loads(body) if len(body) == size else None


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """(reply, frames) of one request."""
    if request["kind"] == "probe":
        return dataclasses.asdict(probe(request["path"])), None
    resize = ResizeRule(**request["resize"]) if request["resize"] else None
    clip = read_video(request["path"], SampleRule(**request["sample"]), resize)
    reply = {
        "shape": clip.frames.shape,
        "indices": clip.indices.tolist(),
        "source_fps": clip.source_fps,
        "total_frames": clip.total_frames,
    }
    return reply, clip.frames


def _serve() -> None:
    """Answer requests from stdin until it closes."""
    # Codecs may print: keep the reply channel to ourselves and send everything else to stderr.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    cv2.setNumThreads(1)
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interrupt, signal.SIG_IGN)  # whoever asked decides when to stop; it kills or closes stdin
    while (request := _receive(sys.stdin.buffer)) is not None:
        # Should the parent be gone by the time a codec hangs, the alarm's default action still ends this process.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["timeout_s"] + 5)
        try:
            reply, frames = _answer(request)
        except MediaError as error:
            reply, frames = {"error": error.message, "reason": error.reason}, None
        except (cv2.error, MemoryError, OSError) as error:
            reply, frames = {"error": f"{request['path']}: decoding failed ({error})", "reason": "decoder_error"}, None
        _send(replies, reply, b"" if frames is None else frames.data)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    _serve()
