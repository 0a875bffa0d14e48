"""Videos to RGB arrays with PyAV: front to back, sizes reduced while decoding, frames known by their times, no seek.

`probe` and `read_video` run the codec in this process and cannot be interrupted. Use them inside a process that may be
killed; everyone else goes through `decode_pool.DecodePool`, which runs them in such a process.

A frame is shown as a player shows it: turned and mirrored by its metadata, pixels made square. Its colours are
converted by the matrix and range that it names (BT.601 if none); 10 and 12 bits become 8. HDR (HLG, PQ) is not
tone-mapped: code values stay as they are. Interlaced frames are shown whole, both fields woven; transparency is
dropped.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np

from mllm4d_jax.media.container import DECODER_ERRORS, Timeline, decoded, open_video, read_timeline
from mllm4d_jax.media.frame_sampling import SampleRule, SamplingError, nearest_in_time
from mllm4d_jax.media.orientation import read_orientation
from mllm4d_jax.media.resize import ResizeRule, SizeError, resize_bicubic
from mllm4d_jax.qa.errors import MediaError

_MAX_SECONDS = 1e7  # 116 days
_MOST_LOST = 2  # frames in a row: some codecs cannot show the last ones of a clip that was cut between key frames
_MAX_ASPECT = 8  # a pixel that claims to be wider or taller than this is a damaged header


@dataclasses.dataclass(frozen=True, eq=False)
class VideoInfo:
    """What a video is before it is decoded: by its packets and its first frame.

    Attributes:
      height, width: pixels as shown (turned upright, pixels square).
      fps: frames per second: the declared rate that the times follow, else their mean rate.
      times: f64[N], seconds at which each frame shows, from the start of the file's presentation, ascending.
    """

    height: int
    width: int
    fps: float
    times: np.ndarray

    @property
    def frames(self) -> int:
        return len(self.times)


@dataclasses.dataclass(frozen=True, eq=False)
class VideoClip:
    """Sampled frames of a video.

    Attributes:
      frames: u8[T, H, W, 3] RGB.
      indices: i64[T], frame numbers in the source, ascending.
      times: f64[T], seconds at which they show, from the start of the source's presentation.
      source_fps: frames per second of the source.
      total_frames: frames of the source, or of the part of it that was sampled, counted while decoding.
    """

    frames: np.ndarray
    indices: np.ndarray
    times: np.ndarray
    source_fps: float
    total_frames: int


def probe(path: str, timeline: Timeline | None = None) -> VideoInfo:
    """Return size, rate and frame times of a video. Decodes its first frame only.

    Args:
      timeline: what `read_timeline` gave for this file; None reads it.

    Raises:
      MediaError: as `container.read_timeline`, and "zero_frames", "truncated_video" (no frame can be decoded),
        "bad_size", "bad_times".
    """
    return _info(path, timeline or read_timeline(path))


def read_video(
    path: str,
    sample: SampleRule,
    resize: ResizeRule | None = None,
    *,
    threads: int = 1,
    timeline: Timeline | None = None,
) -> VideoClip:
    """Decode a video once from front to back and keep the sampled frames.

    The packets tell beforehand when frames show, so frames are chosen by their times, and each is resized as it comes:
    memory holds one source frame plus the codec's own and the resized clip. All frames are decoded, used or not: only
    that shows whether the file is whole. Where other frames come out than the packets said (a stream that starts
    between key frames), they are chosen anew from those that came and the file is decoded a second time.

    Args:
      resize: sizes of the kept frames; None keeps the source size.
      threads: of the codec; each holds frames of its own in memory.
      timeline: what `read_timeline` gave for this file; None reads it.

    Raises:
      MediaError: as `probe`, and "times_go_back", "one_frame", "truncated_video" (the container or decoding ends before
        its end, or more than two frames in a row do not come), "too_few_frames", "undecodable_frame", "varying_size".
    """
    line = timeline or read_timeline(path)
    if line.damage:
        message = f"{path} is truncated or damaged after {len(line.pts)} frames: {line.damage}"
        raise MediaError(message, "truncated_video")
    job = _Job(path, line, sample, resize, threads)
    clip, seen = _decode(job, line.pts)
    _check_holes(path, line, seen)
    if any(a > b for a, b in itertools.pairwise(seen)):  # a decoder puts frames out in the order they show
        job = dataclasses.replace(job, line=dataclasses.replace(line, by_order=True))
        clip, seen = _decode(job, line.pts)
        _check_holes(path, line, seen)
    if seen != line.pts.tolist():
        clip, again = _decode(job, np.array(seen, np.int64))
        if seen != again:
            raise MediaError(f"{path}: decoding it twice gave {len(seen)} and {len(again)} frames", "undecodable_frame")
    return clip


def plan_frames(
    name: str, info: VideoInfo, sample: SampleRule, resize: ResizeRule | None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the frames i64[n] that a rule takes of a clip, and their (height, width) when resized.

    The rule names frames of a clip whose frames come at equal distances. Where they do not, those nearest to the
    same moments are taken, each at most once.

    Raises:
      MediaError: "too_few_frames", "bad_size", "bad_range" (fewer than two frames are in the part that the rule is
        bound to); `name` says of which clip.
    """
    part = sample.part(info.times)
    times = info.times[part]
    if len(times) < min(2, info.frames):
        bounds = " to ".join("its end" if b is None else f"{b:g} s" for b in (sample.start or 0.0, sample.end))
        shows = f"its {info.frames} frames show from {info.times[0]:.2f} to {info.times[-1]:.2f} s"
        raise MediaError(
            f"{name}: from {bounds} it has {len(times)} frames, at least 2 are needed; {shows}", "bad_range"
        )
    try:
        even = sample.indices(len(times), info.fps) if len(times) > 1 else np.zeros(1, np.int64)
        size = (info.height, info.width)
        return part.start + nearest_in_time(times, even), size if resize is None else resize.size(len(even), *size)
    except SamplingError as error:
        raise MediaError(f"{name}: {error}", "too_few_frames") from error
    except SizeError as error:
        raise MediaError(f"{name}: {error}", "bad_size") from error


def _info(path: str, line: Timeline, pts: np.ndarray | None = None) -> VideoInfo:
    """Of the frames that show at `pts`; None: of all that the packets name."""
    pts = line.pts if pts is None else pts
    if line.stored is None or not len(pts):
        if line.damage:
            raise MediaError(
                f"{path} is truncated, none of its frames can be decoded: {line.damage}", "truncated_video"
            )
        raise MediaError(f"{path} holds no decodable frame", "zero_frames")
    height, width = _shown_size(path, line)
    times = line.seconds(pts)
    if np.abs(times).max() > _MAX_SECONDS:
        message = f"{path}: its frames claim to show up to {np.abs(times).max():.3g} s from its start; re-encode it"
        raise MediaError(message, "bad_times")
    return VideoInfo(height, width, _rate(times, line.rates), times)


def _rate(times: np.ndarray, declared: tuple[Fraction, ...]) -> float:
    """Return the first declared rate whose frame numbers the times round to, else the mean rate."""
    if len(times) < 2:
        return float(declared[0]) if declared else 1.0
    steps = np.arange(len(times))
    for rate in map(float, declared):
        if np.abs((times - times[0]) * rate - steps).max() < 0.5:
            return rate
    return (len(times) - 1) / float(times[-1] - times[0])


@dataclasses.dataclass(frozen=True)
class _Job:
    """A video and what is wanted of it."""

    path: str
    line: Timeline
    sample: SampleRule
    resize: ResizeRule | None
    threads: int


def _check_holes(path: str, line: Timeline, seen: Sequence[int]) -> None:
    """Raise when several frames in a row did not come, or fewer than two came at all.

    A clip that was cut between key frames begins with frames that cannot be decoded, and nothing is wrong with it.
    """
    came = np.isin(line.pts, seen)
    begins = line.pts[0] if line.headless or not seen else min(seen)
    edges = np.flatnonzero(np.diff(~came & (line.pts >= begins), prepend=False, append=False)).reshape(-1, 2)
    runs = edges[:, 1] - edges[:, 0]
    if runs.max(initial=0) > _MOST_LOST:
        first, end = edges[runs.argmax()]
        whole, lost = len(line.pts), end - first
        if line.by_order:  # it does not say whose times are missing
            what = f"{lost} of its {whole} frames cannot be decoded"
        elif end == whole:
            what = f"its last {lost} of {whole} frames cannot be decoded"
        else:
            low, high = line.seconds(line.pts[[first, end - 1]])
            what = f"its frames {first} to {end - 1} of {whole}, from {low:.2f} to {high:.2f} s, cannot be decoded"
        raise MediaError(f"{path} is truncated or damaged: {what}", "truncated_video")
    if not seen:
        raise MediaError(f"{path} holds no decodable frame", "zero_frames")
    if len(seen) == 1:
        raise MediaError(f"{path} has a single frame: give it as an image, not as a video", "one_frame")


def _decode(job: _Job, pts: np.ndarray) -> tuple[VideoClip | None, list[int]]:
    """Decode all frames. Return (clip sampled as if those at `pts`, i64[N], came; pts of those that did, as they came).

    The clip is None when a sampled frame did not come.
    """
    info = _info(job.path, job.line, pts)
    indices, size = plan_frames(job.path, info, job.sample, job.resize)
    slots: dict[int, list[int]] = {}
    for slot, number in enumerate(indices.tolist()):
        slots.setdefault(int(pts[number]), []).append(slot)
    frames = np.empty((len(indices), *size, 3), np.uint8)
    seen: list[int] = []
    for frame in _all_frames(job.path, job.threads):
        at = frame.pts
        if job.line.by_order:
            if len(seen) == len(pts):
                message = f"{job.path}: more than its {len(pts)} frames come, so they cannot be dated; re-encode it"
                raise MediaError(message, "times_go_back")
            at = int(pts[len(seen)])
        if at is None or seen[-1:] == [at]:  # shown at the same moment as the one before: never seen
            continue
        seen.append(at)
        taken = slots.pop(at, ())
        if taken:
            _check_frame(job, frame, at)
            frames[taken] = resize_bicubic(_upright(frame, job.line), *size)
    sampled_of = len(info.times[job.sample.part(info.times)])
    clip = VideoClip(frames, indices, info.times[indices], info.fps, sampled_of)
    return None if slots else clip, seen


def _check_frame(job: _Job, frame: av.VideoFrame, pts: int) -> None:
    where, found = f"{job.path}: the frame at {job.line.seconds(np.array(pts)):.3f} s", (frame.height, frame.width)
    if found != job.line.stored:
        raise MediaError("{} is {}x{}, the first one {}x{}".format(where, *found, *job.line.stored), "varying_size")
    if frame.is_corrupt:
        raise MediaError(f"{where} is damaged", "undecodable_frame")
    if read_orientation(frame, job.path) not in (None, job.line.orientation):
        raise MediaError(f"{where} is turned or mirrored otherwise than the first one", "varying_size")


def _all_frames(path: str, threads: int) -> Iterator[av.VideoFrame]:
    """Yield what can be decoded; what cannot is missed by who asked for it."""
    with open_video(path, threads) as (container, stream):
        try:
            for packet in container.demux(stream):
                yield from decoded(packet) or ()
        except MemoryError:
            raise
        except DECODER_ERRORS:  # reading failed: there is no more
            return


def _upright(frame: av.VideoFrame, line: Timeline) -> np.ndarray:
    """u8[H, W, 3] RGB, turned upright, pixels as stored."""
    return line.orientation.applied(frame.to_ndarray(format="rgb24", threads=1))


def _shown_size(path: str, line: Timeline) -> tuple[int, int]:
    """(height, width) of the frames, upright and their pixels made square."""
    (height, width), aspect = line.stored, line.aspect
    if aspect > 0 and aspect != 1:
        if not 1 / _MAX_ASPECT <= aspect <= _MAX_ASPECT:
            raise MediaError(f"{path}: its pixels claim to be {float(aspect):g} times as wide as high", "bad_size")
        width = max(1, round(width * aspect))
    return (width, height) if line.orientation.transposed else (height, width)
