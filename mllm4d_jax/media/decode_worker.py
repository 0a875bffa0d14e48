"""The process that decodes videos for `decode_pool.DecodePool`: `python -m mllm4d_jax.media.decode_worker`.

Speaks length-prefixed messages over stdin and stdout: a request is a JSON object, a reply a JSON object followed by the
raw frames it announces. Ends when stdin closes, so it does not outlive its parent.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from typing import Any, BinaryIO

import cv2
import numpy as np

from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ResizeRule
from mllm4d_jax.media.video import probe, read_video
from mllm4d_jax.qa.errors import MediaError

LENGTH = struct.Struct(">Q")


def send(stream: BinaryIO, message: dict[str, Any], payload: memoryview | bytes = b"") -> None:
    body = json.dumps(message).encode()
    stream.write(LENGTH.pack(len(body)) + body)
    stream.write(payload)
    stream.flush()


def receive(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message, None at the end of the stream."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    size = LENGTH.unpack(head)[0]
    body = stream.read(size)
    return json.loads(body) if len(body) == size else None


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """(reply, frames) of one request."""
    if request["kind"] == "probe":
        info = probe(request["path"], request["threads"])
        return {"height": info.height, "width": info.width, "fps": info.fps, "frames": info.frames}, None
    resize = ResizeRule(**request["resize"]) if request["resize"] else None
    clip = read_video(request["path"], SampleRule(**request["sample"]), resize, request["threads"])
    reply = {
        "shape": clip.frames.shape,
        "indices": clip.indices.tolist(),
        "source_fps": clip.source_fps,
        "total_frames": clip.total_frames,
    }
    return reply, clip.frames


def main() -> None:
    # Codecs may print: keep the reply channel to ourselves and send everything else to stderr.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    cv2.setNumThreads(1)
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        signal.signal(interrupt, signal.SIG_IGN)  # whoever asked decides when to stop; it kills or closes stdin
    while (request := receive(sys.stdin.buffer)) is not None:
        # Should the parent be gone by the time a codec hangs, the alarm's default action still ends this process.
        signal.setitimer(signal.ITIMER_REAL, 2 * request["timeout_s"] + 5)
        try:
            reply, frames = answer(request)
        except MediaError as error:
            reply, frames = {"error": error.message, "reason": error.reason}, None
        except (cv2.error, MemoryError, OSError) as error:
            reply, frames = {"error": f"{request['path']}: decoding failed ({error})", "reason": "decoder_error"}, None
        send(replies, reply, b"" if frames is None else frames.data)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
