"""Containers of video files, opened with FFmpeg's demuxers (PyAV): which are read, and when their frames show.

A file is opened by one of the demuxers in `DEMUXERS`, whatever its name says, and reads no other file: a playlist, a
script or a pattern of numbered images is refused, and so is everything that is not a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np

from mllm4d_jax.media.gif import has_trailer
from mllm4d_jax.media.orientation import Orientation, read_orientation
from mllm4d_jax.qa.errors import MediaError

# Demuxers of containers that hold their own pictures and say when to show them.
DEMUXERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "ogg", "asf", "gif", "apng", "ivf", "mxf", "nut", "dv")
_BROADCAST = ("mpegts", "mpeg")
_MAX_BACK = 0.5  # seconds
MAX_PIXELS = 1 << 27  # of a frame; 16K is 133 million
_COMMON = "MP4/MOV, Matroska/WebM, AVI, MPEG-TS/PS, FLV, Ogg, ASF/WMV, MXF, GIF"
# First bytes, with their offset, of the files whose index can be missing or cut off.
_MAGIC = [(4, name) for name in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")]
_MAGIC += [(0, b"\x1aE\xdf\xa3"), (0, b"RIFF"), (0, b"OggS"), (0, b"FLV")]
_IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
# What PyAV raises on damaged bytes: FFmpeg's own errors, and Python's where it converts what they say.
DECODER_ERRORS = (av.FFmpegError, ValueError, ArithmeticError, LookupError, TypeError)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """When the frames of a video show, by its packets; nothing of it was decoded but the first frame.

    Attributes:
      pts: i64[N], presentation times of the frames to be shown, ascending, in units of `time_base` seconds.
      time_base: seconds of one unit.
      start: seconds at which the file's presentation starts (that of its sound included), on the clock of `pts`.
      headless: the file is damaged at its start: what its index says is a key frame cannot be decoded.
      by_order: the file has one time for each frame but does not say whose it is: the k-th that shows has the k-th.
      rates: frame rates that the file declares, the likeliest first.
      stored: (height, width) of the first frame that can be decoded, as stored; None if none can.
      orientation: how it is to be shown.
      aspect: width of a stored pixel / its height.
      damage: what says that the end of the file is missing, in words; "" if nothing does.
    """

    pts: np.ndarray
    time_base: Fraction
    start: Fraction
    headless: bool
    by_order: bool
    rates: tuple[Fraction, ...]
    stored: tuple[int, int] | None
    orientation: Orientation
    aspect: Fraction
    damage: str

    def seconds(self, pts: np.ndarray) -> np.ndarray:
        """Return f64[N], seconds after the start of the presentation."""
        units = np.asarray(pts, np.float64)
        return units * self.time_base.numerator / self.time_base.denominator - float(self.start)


def check_file(path: str, kind: str) -> None:
    """Check that there is a file with bytes. Raises MediaError: "missing_file", "empty_file"."""
    if not os.path.exists(path):
        raise MediaError(f"{kind} file {path} does not exist", "missing_file")
    if not os.path.isfile(path):
        raise MediaError(f"{path} is not a regular file", "missing_file")
    if not os.path.getsize(path):
        raise MediaError(f"{kind} file {path} is empty (0 bytes)", "empty_file")


@contextlib.contextmanager
def open_video(path: str, threads: int = 1) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Yield (container, its video stream), ready to decode with so many threads.

    The stream is the one FFmpeg would show: the largest, and no cover art.

    Raises:
      MediaError: "missing_file", "empty_file", "not_a_video", "one_frame" (an image), "truncated_video" (a container
        without its index), "no_video_stream", "no_decoder", "too_large".
    """
    check_file(path, "video")
    only = {"protocol_whitelist": "file", "format_whitelist": ",".join(DEMUXERS)}
    try:
        container = av.open("file:" + os.path.abspath(path), metadata_errors="replace", container_options=only)
    except MemoryError:
        raise
    except DECODER_ERRORS as error:
        raise _not_opened(path, error) from error
    with container:
        pictures = [s for s in container.streams if s.type == "video"]
        covers = [s for s in pictures if s.disposition & av.stream.Disposition.attached_pic]
        moving = [s for s in pictures if s not in covers]
        if not moving:
            kinds = ", ".join(sorted({s.type for s in container.streams if s not in covers})) or "nothing"
            cover = " and a cover picture" if covers else ""
            raise MediaError(f"{path} holds no video: {kinds}{cover}", "no_video_stream")
        best = container.streams.best("video")
        stream = best if best in moving else moving[0]
        codec = stream.codec_context
        if codec is None:
            raise MediaError(f"{path}: this FFmpeg has no decoder for its video stream", "no_decoder")
        if codec.width * codec.height > MAX_PIXELS:
            raise MediaError(f"{path}: frames of {codec.width}x{codec.height} pixels are too large", "too_large")
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        codec.thread_count = threads
        codec.thread_type = "AUTO"
        yield container, stream


def decoded(packet: av.Packet) -> list[av.VideoFrame] | None:
    """Return the frames that a packet brings; None where it is damaged, which decoding them all tells.

    Raises MemoryError: the codec's own, which says nothing about the file.
    """
    try:
        return packet.decode()
    except MemoryError:
        raise
    except DECODER_ERRORS:
        return None


def said(error: Exception) -> str:
    """Return what a decoder's error says, without the file, which the message around it names."""
    return (error.strerror if isinstance(error, av.FFmpegError) else "") or str(error)


def _not_opened(path: str, error: Exception) -> MediaError:
    with open(path, "rb") as file:
        head = file.read(16)
    if any(head.startswith(magic) for magic in _IMAGES):
        return MediaError(f"{path} is a single image: give it as an image, not as a video", "one_frame")
    if any(head[at:].startswith(magic) for at, magic in _MAGIC):
        message = f"{path} is truncated or damaged, none of its frames can be found ({said(error)})"
        return MediaError(message, "truncated_video")
    return MediaError(f"{path} is not a video in a container that is read ({_COMMON}): {said(error)}", "not_a_video")


def read_timeline(path: str) -> Timeline:
    """Read the times of all frames of a video without decoding them, and its first frame.

    Raises:
      MediaError: as `open_video`, and "missing_fps" (frames without times), "times_go_back" (joined files),
        "bad_orientation" (neither a quarter turn nor a mirror of one).
    """
    with open_video(path) as (container, stream):
        scan = _Scan(stream, container.format.name in _BROADCAST)
        try:
            for packet in container.demux():
                scan.take(packet)
            damage = scan.damage
        except MemoryError:
            raise
        except DECODER_ERRORS as error:
            damage = f"reading it stops with: {said(error)}"
        # AVI has decoding times only, what FFmpeg makes of them is a guess; a recorder may leave out the others.
        by_order = not scan.pts or container.format.name == "avi"
        moments = scan.dts if by_order else scan.pts
        if scan.packets and not moments:
            message = f"{path}: its frames have no times, so they cannot be dated; re-encode it into MP4 or Matroska"
            raise MediaError(message, "missing_fps")
        if scan.back * stream.time_base > _MAX_BACK:
            message = f"{path}: its times go back in the middle, as where files were joined; re-encode it"
            raise MediaError(message, "times_go_back")
        pts = np.unique(np.array(moments, np.int64))
        start = Fraction(container.start_time, av.time_base) if container.start_time is not None else None
        if start is None:
            start = int(pts[0]) * stream.time_base if len(pts) else Fraction(0)
        rates = tuple(r for r in (stream.average_rate, stream.guessed_rate, stream.base_rate) if r and r > 0)
        aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
        first = scan.first
        stored = None if first is None else (first.height, first.width)
        shown = (first and read_orientation(first, path)) or Orientation()
        line = Timeline(pts, stream.time_base, start, scan.headless, by_order, rates, stored, shown, aspect, damage)
        if not damage and container.format.name == "gif" and not has_trailer(path):
            damage = "the block is missing that ends a GIF"
        return dataclasses.replace(line, damage=damage or _missing_end(line, container.duration, scan.end))


class _Scan:
    """What the packets of a file say, one after the other."""

    def __init__(self, stream: av.VideoStream, broadcast: bool):
        self.stream, self.broadcast, self.packets, self.damage = stream, broadcast, 0, ""
        self.pts: list[int] = []
        self.dts: list[int] = []
        self.headless = False
        self.first: av.VideoFrame | None = None
        self.end = Fraction(0)  # seconds at which the last picture or sound ends
        self.back = 0  # largest step back of the decoding times, which should ascend

    def take(self, packet: av.Packet) -> None:
        """Note a packet of any stream; decode those of the video up to its first frame."""
        moment = packet.dts if packet.pts is None else packet.pts
        if packet.size and moment is not None and packet.time_base:
            self.end = max(self.end, (moment + (packet.duration or 0)) * packet.time_base)
        if packet.stream is not self.stream:
            return
        if packet.size:
            self._note(packet)
        # The last packet is empty: then a decoder gives what it held back, to put frames in order.
        if self.first is None:
            frames = decoded(packet)
            self.first = next(iter(frames or ()), None)
            self.headless |= frames is None and self.packets == 1 and self._is_key_of_index(packet)

    def _is_key_of_index(self, packet: av.Packet) -> bool:
        """Whether the container's index begins with this packet and says that nothing before it is needed."""
        index = self.stream.index_entries
        return len(index) > 0 and index[0].is_keyframe and index[0].timestamp in (packet.dts, packet.pts)

    def _note(self, packet: av.Packet) -> None:
        """Note the times of a packet of the video, and whether it is whole."""
        # A recording of a broadcast may start, pause and end anywhere; any other file has whole packets to its end.
        self.damage = "its last packet is incomplete" if packet.is_corrupt and not self.broadcast else ""
        self.packets += 1
        if packet.dts is not None:
            self.back = max(self.back, max(self.dts[-1:], default=packet.dts) - packet.dts)
        if not packet.is_discard:
            self.pts += [] if packet.pts is None else [packet.pts]
            self.dts += [] if packet.dts is None else [packet.dts]


def _missing_end(line: Timeline, duration: int | None, end: Fraction) -> str:
    """Return what is wrong if neither picture nor sound reaches the duration (microseconds) that the file declares.

    A duration is rounded, and often an estimate; the last frame may stay as long as any before it.
    """
    if duration is None or len(line.pts) < 2:
        return ""
    # Some count the duration from the start of the presentation, some from zero.
    declared, found = duration / av.time_base, float(end - min(line.start, 0))
    gap = float(np.diff(line.pts).max() * line.time_base)
    if declared - found <= max(2 * gap, min(0.05 * declared, 1.0)):
        return ""
    return f"it ends after {found:.2f} of {declared:.2f} s"
