"""Decoding of videos and images under limits of time and memory, in processes that can be killed.

A codec that hangs inside C++ cannot be interrupted from Python; only ending its process helps. The pool keeps one
process per concurrent caller and reuses it, so that a clip pays for the transfer of its resized frames through a pipe
(about 2 ms for 32 frames of 224 x 224) and not for a new interpreter (about 0.2 s, once, and again after each kill).
Processes are started as fresh programs, never forked: safe after JAX has started threads.

Such a process is `python -m mllm4d_jax.media.decode_pool`. It speaks length-prefixed messages over stdin and stdout: a
request is a JSON object, a reply a JSON object followed by the raw array it announces. It ends when stdin closes, so
it does not outlive its parent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
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

from mllm4d_jax.media.container import DECODER_ERRORS, Timeline, read_timeline
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.images import MAX_PIXELS, read_image
from mllm4d_jax.media.resize import ImageRule, ResizeRule
from mllm4d_jax.media.video import VideoClip, VideoInfo, probe, read_video
from mllm4d_jax.qa.errors import MediaError

_MEMORY = 4 << 30  # address space of a decoder process, more for each further thread of the codec
_MEMORY_PER_THREAD = 1 << 30
_LENGTH = struct.Struct(">Q")
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class _Worker:
    """One decoder process."""

    def __init__(self):
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [_PACKAGE_PARENT, env.get("PYTHONPATH")]))
        env["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)  # for headers that lie about their size
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
        """(reply, array). After a MediaError of reason "timeout" or "decoder_crash" the process is gone."""
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
            array = None
            if reply is not None and "shape" in reply:
                array = np.empty(reply["shape"], reply["dtype"])
                if array.size and self.process.stdout.readinto(memoryview(array).cast("B")) != array.nbytes:
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
        return reply, array

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
    """`probe`, `read` and `image` within limits; may be called from several threads at once.

    Pickles without its processes, so that it can travel to data-loader workers. Close it, or use it as a context
    manager; its processes also end with this one.
    """

    def __init__(self, timeout_s: float = 60.0, threads: int = 1):
        """`timeout_s` seconds per request; `threads` of the codec of each video."""
        self.timeout_s, self.threads = timeout_s, threads
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []

    def __reduce__(self):
        return type(self), (self.timeout_s, self.threads)

    def probe(self, path: str) -> VideoInfo:
        """See `video.probe`; also raises MediaError "timeout", "decoder_crash", "decoder_error", "out_of_memory"."""
        reply, times = self._ask({"kind": "probe", "path": path})
        return VideoInfo(*reply["size"], reply["fps"], times)

    def read(self, path: str, sample: SampleRule, resize: ResizeRule | None = None) -> VideoClip:
        """See `video.read_video`; also raises MediaError as `probe`."""
        rules = {"sample": dataclasses.asdict(sample), "resize": dataclasses.asdict(resize) if resize else None}
        reply, frames = self._ask({"kind": "read", "path": path, "threads": self.threads} | rules)
        indices, times = np.array(reply["indices"], np.int64), np.array(reply["times"], np.float64)
        return VideoClip(frames, indices, times, reply["source_fps"], reply["total_frames"])

    def image(self, path: str, resize: ImageRule) -> np.ndarray:
        """See `images.read_image`: u8[h, w, 3]; also raises MediaError as `probe`."""
        return self._ask({"kind": "image", "path": path, "resize": dataclasses.asdict(resize)})[1]

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
        worker = self._take() or _Worker()
        reply, array = worker.ask(request, self.timeout_s)
        with self._lock:
            self._idle.append(worker)
        if "error" in reply:
            raise MediaError(reply["error"], reply["reason"])
        return reply, array

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


class _Decoder:
    """Answers requests; remembers the timeline of the last video, which is asked for twice."""

    def __init__(self):
        self._known: tuple[tuple[str, int, int], Timeline] | None = None

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        """(reply, array) of one request."""
        kind, path = request["kind"], request["path"]
        if kind == "image":
            return {}, read_image(path, ImageRule(**request["resize"]))
        line = self._timeline(path)
        if kind == "probe":
            info = probe(path, line)
            return {"size": (info.height, info.width), "fps": info.fps}, info.times
        _limit_memory(request["threads"])
        resize = ResizeRule(**request["resize"]) if request["resize"] else None
        sample = SampleRule(**request["sample"])
        clip = read_video(path, sample, resize, threads=request["threads"], timeline=line)
        reply = {"indices": clip.indices.tolist(), "times": clip.times.tolist()}
        return reply | {"source_fps": clip.source_fps, "total_frames": clip.total_frames}, clip.frames

    def _timeline(self, path: str) -> Timeline:
        try:
            state = os.stat(path)
        except (OSError, ValueError):
            return read_timeline(path)  # says what is wrong
        key = (path, state.st_size, state.st_mtime_ns)
        if self._known is None or self._known[0] != key:
            self._known = (key, read_timeline(path))
        return self._known[1]


def _limit_memory(threads: int) -> None:
    """Give this process more address space for more threads; at the limit an allocation fails, and no machine swaps."""
    wanted = _MEMORY + (threads - 1) * _MEMORY_PER_THREAD
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or wanted <= hard:
        resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))


def _serve() -> None:
    """Answer requests from stdin until it closes."""
    # Codecs may print: keep the reply channel to ourselves and send everything else to stderr.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    cv2.setNumThreads(1)
    _limit_memory(1)
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interrupt, signal.SIG_IGN)  # whoever asked decides when to stop; it kills or closes stdin
    decoder = _Decoder()
    while (request := _receive(sys.stdin.buffer)) is not None:
        # Should the parent be gone by the time a codec hangs, the alarm's default action still ends this process.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["timeout_s"] + 5)
        array = None
        try:
            reply, array = decoder.answer(request)
            array = np.ascontiguousarray(array)
            reply |= {"shape": array.shape, "dtype": array.dtype.str}
        except MediaError as error:
            reply = {"error": error.message, "reason": error.reason}
        except MemoryError as error:
            said = f"{request['path']}: decoding it needs more memory than a decoder may use ({error})"
            reply = {"error": said, "reason": "out_of_memory"}
        except (cv2.error, OSError, *DECODER_ERRORS) as error:
            reply = {"error": f"{request['path']}: decoding failed ({error})", "reason": "decoder_error"}
        _send(replies, reply, b"" if array is None else memoryview(array).cast("B"))
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    _serve()
