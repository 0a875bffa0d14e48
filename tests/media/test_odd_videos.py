"""Videos as phones, browsers, screen recorders and cutters leave them, and what is refused by its own reason."""

from __future__ import annotations

import json
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from mllm4d_jax.media.frame_sampling import SampleRule, nearest_in_time
from mllm4d_jax.media.video import probe, read_video
from mllm4d_jax.qa.errors import MediaError
from tests.media.movies import rename_codec, write_movie, write_sound

CASES = Path(__file__).parents[1] / "cases/video"
TRUTH = json.loads((CASES / "truth.json").read_text())  # times and mean grey of every frame, by FFmpeg
ALL = SampleRule("uniform", 10_000, None)
TENTHS = [k / 10 for k in range(20)]


def levels(clip) -> list[int]:
    return [round((float(f.mean()) - 10) / 8) for f in clip.frames]


def refusal(path, call=read_video) -> str:
    with pytest.raises(MediaError) as caught:
        call(str(path), *([ALL] if call is read_video else []))
    assert Path(path).name in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_frames_and_times_are_those_of_ffmpeg(name):
    truth = TRUTH[name]
    clip = read_video(str(CASES / name), ALL)
    np.testing.assert_allclose(clip.times, truth["pts"], atol=1e-3)
    np.testing.assert_allclose(clip.frames.mean((1, 2, 3)), truth["mean"], atol=0.5)
    np.testing.assert_array_equal(probe(str(CASES / name)).times, clip.times)


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_sampled_frames_stand_nearest_to_even_moments(name):
    truth = np.array(TRUTH[name]["pts"])
    clip = read_video(str(CASES / name), SampleRule("uniform", 8, None))
    even = np.linspace(truth[0], truth[-1], 8)
    # Half the largest gap between frames, and half a mean step: the rule's own rounding to frame numbers.
    away = (np.diff(truth).max() + np.diff(truth).mean()) / 2
    assert np.abs(clip.times - even).max() <= away + 1e-3 and (np.diff(clip.times) > 0).all()
    np.testing.assert_allclose(clip.times, truth[clip.indices], atol=1e-3)


def test_the_nearest_frames_are_taken_once_each():
    times = np.array([0.0, 5.0, 5.1, 5.2, 5.3, 10.0])
    assert nearest_in_time(times, np.array([0, 2, 3, 5])).tolist() == [0, 1, 4, 5]
    assert nearest_in_time(times, np.arange(6)).tolist() == list(range(6))
    still = np.array([0.0, 0.1, 0.2, 0.3, 9.0])  # a screen on which nothing happens for long
    assert nearest_in_time(still, np.array([0, 1, 3, 4])).tolist() == [0, 2, 3, 4]
    jitter = np.arange(50) / 30 + np.random.default_rng(0).uniform(-0.01, 0.01, 50)
    assert nearest_in_time(jitter, np.arange(0, 50, 7)).tolist() == list(range(0, 50, 7))


CONTAINERS = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.avi", "libx264"), ("b.avi", "mpeg4")]
CONTAINERS += [
    ("a.flv", "libx264"),
    ("a.wmv", "wmv2"),
    ("a.webm", "libvpx-vp9"),
    ("a.mov", "prores_ks"),
    ("a.nut", "ffv1"),
]


@pytest.mark.parametrize("name, codec", CONTAINERS, ids=lambda v: v)
def test_containers(name, codec, tmp_path):
    pixels = "yuva444p10le" if codec == "prores_ks" else "yuv420p"
    clip = read_video(write_movie(tmp_path / name, TENTHS, codec, pixels), ALL)
    assert levels(clip) == list(range(20)) and clip.source_fps == 10.0
    np.testing.assert_allclose(clip.times, TENTHS, atol=2e-3)


def test_sound_may_begin_before_the_picture_and_outlast_it(tmp_path):
    for name in ("a.mp4", "a.mkv", "a.ts"):
        late = [2 + t for t in TENTHS]
        clip = read_video(write_movie(tmp_path / name, late, sound_s=6.0), ALL)
        assert levels(clip) == list(range(20))
        np.testing.assert_allclose(clip.times, late, atol=0.1)


@pytest.mark.parametrize("name, codec", [("a.ts", "libx264"), ("a.mpg", "mpeg2video")])
def test_joined_files_are_refused_not_halved(name, codec, tmp_path):
    path = Path(write_movie(tmp_path / name, [k / 25 for k in range(20)], codec, tick=Fraction(1, 25)))
    assert levels(read_video(str(path), ALL)) == list(range(20))
    path.write_bytes(path.read_bytes() * 2)
    assert refusal(path) == "times_go_back" == refusal(path, probe)


def test_times_that_cannot_be_are_refused(tmp_path):
    path = Path(write_movie(tmp_path / "a.ivf", [k / 25 for k in range(6)], "libvpx-vp9", tick=Fraction(1, 25)))
    data = bytearray(path.read_bytes())
    last = 32  # a frame: its bytes u32, its time u64 in 25ths of a second, they themselves
    for _ in range(5):
        last += 12 + struct.unpack_from("<I", data, last)[0]
    data[last + 11] = 0x40
    path.write_bytes(data)
    assert refusal(path) == "bad_times" == refusal(path, probe)


def test_of_frames_at_one_moment_the_first_is_taken(tmp_path):
    clip = read_video(write_movie(tmp_path / "a.mkv", [0, 0.0001, 0.1, 0.1004, 0.2, 0.3]), ALL)
    assert levels(clip) == [0, 2, 4, 5]
    np.testing.assert_allclose(clip.times, [0, 0.1, 0.2, 0.3], atol=1e-3)


def test_a_cover_picture_is_not_the_video(tmp_path):
    path = write_movie(tmp_path / "a.mp4", TENTHS, cover=400)
    with av.open(path) as file:
        assert len(file.streams.video) == 2
    clip = read_video(path, ALL)
    assert levels(clip) == list(range(20)) and clip.frames.shape[1:3] == (48, 64)


def test_pixels_are_made_square(tmp_path):
    path = write_movie(tmp_path / "a.mp4", TENTHS, aspect=Fraction(4, 3))
    assert (probe(path).height, probe(path).width) == (48, 85)
    assert read_video(path, ALL).frames.shape == (20, 48, 85, 3)


def test_transparency_is_dropped(tmp_path):
    clip = read_video(write_movie(tmp_path / "a.webm", TENTHS, "libvpx-vp9", "yuva420p"), ALL)
    assert clip.frames.shape[-1] == 3 and levels(clip) == list(range(20))


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx265")])
def test_frames_that_a_decoder_holds_back_to_its_end(name, codec, tmp_path):
    """With B-frames a decoder gives the first frame when it has seen a third one, or that there is none."""
    options = {"x265-params": "bframes=4:b-adapt=0:log-level=none"} if codec == "libx265" else {}
    two = write_movie(tmp_path / name, [0, 0.1], codec, options=options, b_frames=4)
    assert (probe(two).frames, probe(two).height) == (2, 48) and levels(read_video(two, ALL)) == [0, 1]
    one = write_movie(tmp_path / f"one-{name}", [0], codec, options=options, b_frames=4)
    assert probe(one).frames == 1 and refusal(one) == "one_frame"


@pytest.mark.parametrize("call", [read_video, probe])
def test_no_video_and_no_decoder_have_their_own_reasons(call, tmp_path):
    assert refusal(write_sound(tmp_path / "a.mp4"), call) == "no_video_stream"
    assert refusal(write_sound(tmp_path / "cover.mp4", cover=True), call) == "no_video_stream"
    path = rename_codec(write_movie(tmp_path / "b.mp4", TENTHS), b"avc1", b"zzz1")
    assert refusal(path, call) == "no_decoder"


PLAYLISTS = {
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\n{target}\n#EXT-X-ENDLIST\n",
    "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\n{target}\n#EXT-X-ENDLIST\n",
    "list.ffconcat": "ffconcat version 1.0\nfile '{target}'\n",
    "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><BaseURL>{target}</BaseURL></MPD>',
    "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "list.asx": '<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
}


@pytest.mark.parametrize("name", sorted(PLAYLISTS))
def test_a_file_that_names_others_is_refused(name, tmp_path):
    target = write_movie(tmp_path / "secret.ts", TENTHS)
    path = tmp_path / name
    path.write_text(PLAYLISTS[name].format(target=target))
    assert refusal(path) == "not_a_video" == refusal(path, probe)
