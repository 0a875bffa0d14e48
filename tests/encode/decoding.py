"""Encoders that decode in the process of the test: nothing to start, and what is decoded can be watched."""

from __future__ import annotations

from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.media import images, video


class _Here:
    """What a `DecodePool` does, without its processes and its time limit."""

    def probe(self, path):
        return video.probe(path)

    def read(self, *request):
        return video.read_video(*request)

    def image(self, *request):
        return images.read_image(*request)


def in_process(*args, **kwargs) -> Encoder:
    encoder = Encoder(*args, **kwargs)
    encoder._pool = _Here()
    return encoder
