"""Small videos of every container and habit, written with PyAV; frame k is grey at level 10 + 8 k."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

TICK = Fraction(1, 1000)


def write_movie(
    path,
    times,
    codec="libx264",
    pixels="yuv420p",
    size=(48, 64),
    sound_s=0.0,
    aspect=None,
    tick=TICK,
    cover=0,
    options=None,
    b_frames=None,
):
    """Write frames that show at `times` (seconds), and silence of `sound_s` seconds; return the path as a string.

    `cover`: a white cover picture with so many pixels a side comes first. `options` and `b_frames` are the codec's.
    """
    height, width = size
    with av.open(str(path), "w") as file:
        picture = add_cover(file, cover) if cover else None
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.time_base = stream.time_base = tick
        stream.codec_context.options = options or {}
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        sound = file.add_stream("aac", rate=16000) if sound_s else None
        if picture:
            write_cover(file, picture)
        for k, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 10 + 8 * k, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time / tick), tick
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound:
            write_silence(file, sound, sound_s)
    return str(path)


def write_silence(file, stream, seconds):
    for k in range(int(seconds * 16000 / 1024)):
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.planes[0].update(bytes(4096))
        frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * k, Fraction(1, 16000)
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def add_cover(file, side):
    stream = file.add_stream("mjpeg", rate=1)
    stream.width, stream.height, stream.pix_fmt = side, side, "yuvj420p"
    stream.disposition = av.stream.Disposition.attached_pic
    return stream


def write_cover(file, stream):
    frame = av.VideoFrame.from_ndarray(np.full((stream.height, stream.width, 3), 255, np.uint8), format="rgb24")
    file.mux(stream.encode(frame.reformat(format="yuvj420p")))
    file.mux(stream.encode(None))


def write_sound(path, seconds=1.0, cover=False):
    """Write a file of sound without a video; with a picture of its cover if wanted."""
    with av.open(str(path), "w") as file:
        picture = add_cover(file, 32) if cover else None
        sound = file.add_stream("aac", rate=16000)
        if picture:
            write_cover(file, picture)
        write_silence(file, sound, seconds)
    return str(path)


def damage(path, packets: slice, change):
    """Change the bytes of these packets of the video, in the order they are decoded."""
    with av.open(str(path)) as file:
        places = [(p.pos, p.pos + p.size) for p in file.demux(video=0) if p.size]
    data = bytearray(Path(path).read_bytes())
    for start, end in places[packets]:
        data[start:end] = change(data[start:end])
    Path(path).write_bytes(data)
    return str(path)


def rename_codec(path, old: bytes, new: bytes):
    """Make the file name a codec that no decoder knows."""
    data = Path(path).read_bytes()
    assert old in data
    Path(path).write_bytes(data.replace(old, new))
    return str(path)
