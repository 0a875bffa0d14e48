"""Sampling against recorded tables; decoding of healthy, odd and damaged files; the decoder processes."""

from __future__ import annotations

import copy
import os
import signal
import struct
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule, SamplingError, sample_indices
from mllm4d_jax.media.images import read_image
from mllm4d_jax.media.resize import ResizeRule, resize_bicubic
from mllm4d_jax.media.video import probe, read_video
from mllm4d_jax.qa.errors import MediaError
from mllm4d_jax.qa.media_paths import resolve_media

ALL = SampleRule("uniform", 10_000, None)
SMALL = ResizeRule("per_frame", 32, 2, 784, 50176)


def boxes(data: bytes) -> dict[bytes, bytes]:
    """Top-level boxes of an MP4, in order."""
    found, start = {}, 0
    while start < len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        found[name] = data[start : start + length]
        start += length
    return found


def streamable(data: bytes) -> bytes:
    """The same MP4 with its index in front, so that cutting the end leaves a file that opens."""
    parts = boxes(data)
    index = bytearray(parts.pop(b"moov"))
    table = index.find(b"stco")
    for i in range(struct.unpack_from(">I", index, table + 8)[0]):
        offset = struct.unpack_from(">I", index, table + 12 + 4 * i)[0]
        struct.pack_into(">I", index, table + 12 + 4 * i, offset + len(index))
    head = parts.pop(b"ftyp")
    return head + bytes(index) + b"".join(parts.values())


def with_edit(data: bytes, start_s: float, seconds: float) -> bytes:
    """The same MP4 showing only `seconds` from `start_s`, as a cut without re-encoding leaves it."""
    out = bytearray(data)
    movie = struct.unpack_from(">I", out, out.find(b"mvhd") + 16)[0]
    media = struct.unpack_from(">I", out, out.find(b"mdhd") + 16)[0]
    struct.pack_into(">Ii", out, out.find(b"elst") + 12, round(seconds * movie), round(start_s * media))
    return bytes(out)


def levels(clip) -> list[int]:
    """Number of each frame, read back from its grey level."""
    return [round((float(f.mean()) - 10) / 8) for f in clip.frames]


def reason(call, *args, **kwargs) -> str:
    with pytest.raises(MediaError) as caught:
        call(*args, **kwargs)
    assert str(caught.value)
    return caught.value.reason


@pytest.fixture(scope="module")
def pool():
    with DecodePool(timeout_s=60.0) as p:
        yield p


@pytest.mark.parametrize("table, rule", [("qwen3_vl", "qwen3_vl"), ("qwen2_5_vl_hf", "qwen2_5_vl")])
def test_recorded_sampling(table, rule, golden):
    rows = golden("frame_sampling.json")[table]
    assert rows
    for row in rows:
        how = {k: row[k] for k in ("fps", "num_frames") if k in row}
        if isinstance(row.get("indices"), dict):
            with pytest.raises(SamplingError):
                sample_indices(rule, row["total"], row["video_fps"], **how)
            continue
        found = sample_indices(rule, row["total"], row["video_fps"], **how).tolist()
        if "indices" in row:
            assert found == row["indices"], row
        else:
            assert (len(found), found[:8], found[-8:], sum(found)) == (row["n"], row["head"], row["tail"], row["sum"])


def test_recorded_sampling_of_the_training_package(golden):
    for row in golden("frame_sampling.json")["qwen_vl_utils"]:
        ele = row["ele"]
        how = {"num_frames": ele["nframes"]} if "nframes" in ele else {"fps": ele.get("fps", 2.0)}
        if "max_frames" in ele:
            how["max_frames"] = ele["max_frames"]
        if isinstance(row["nframes"], dict):
            with pytest.raises(SamplingError):
                sample_indices("qwen_vl_utils", row["total"], row["video_fps"], **how)
            continue
        found = sample_indices("qwen_vl_utils", row["total"], row["video_fps"], **how).tolist()
        assert len(found) == row["nframes"] and found == row.get("indices", found), row


@pytest.mark.parametrize("rule", ["uniform", "qwen3_vl", "qwen2_5_vl", "qwen_vl_utils"])
@pytest.mark.parametrize("fps", [None, 0.5, 2.0, 30.0])
def test_training_sampling_stays_in_the_clip(rule, fps):
    for total in (2, 3, 7, 31, 32, 33, 397, 1000):
        found = SampleRule(rule, 32, fps).indices(total, 12.5)
        assert 2 <= len(found) <= min(32, total)
        assert (np.diff(found) > 0).all() and found[0] == 0 and found[-1] < total
        if fps is None and rule == "uniform":
            assert len(found) == min(32, total) and found[-1] == total - 1


@pytest.mark.parametrize("codec, name", [("mp4v", "a.mp4"), ("MJPG", "a.avi"), ("mp4v", "a.mkv")])
def test_frames_are_the_right_ones(codec, name, make_video, tmp_path, pool):
    path = make_video(tmp_path / name, 25, codec=codec)
    clip = read_video(path, SampleRule("uniform", 8, None))
    assert clip.indices.tolist() == [0, 3, 7, 10, 14, 17, 21, 24] == levels(clip)
    assert (clip.total_frames, clip.source_fps, clip.frames.shape) == (25, 10.0, (8, 48, 64, 3))
    other = pool.read(path, SampleRule("uniform", 8, None))
    np.testing.assert_array_equal(other.frames, clip.frames)
    assert (other.indices == clip.indices).all() and other.source_fps == 10.0 and other.total_frames == 25
    part = pool.read(path, SampleRule("uniform", 4, None, start=0.5, end=1.1))
    assert part.indices.tolist() == [5, 7, 9, 11] == levels(part) and part.total_frames == 7
    info = pool.probe(path)
    here = probe(path)
    np.testing.assert_array_equal(info.times, here.times)
    for told in (info, here):
        assert (told.height, told.width, told.fps, told.frames) == (48, 64, 10.0, 25)
    np.testing.assert_allclose(clip.times, clip.indices / 10, atol=1e-9)


def test_resizing_while_decoding_changes_nothing(make_video, tmp_path):
    path = make_video(tmp_path / "a.mp4", 6, h=90, w=150)
    plain, resized = read_video(path, ALL), read_video(path, ALL, SMALL)
    assert resized.frames.shape[1:3] == SMALL.size(6, 90, 150)
    np.testing.assert_array_equal(resize_bicubic(plain.frames, *resized.frames.shape[1:3]), resized.frames)


def test_colours_are_rgb(tmp_path):
    path = str(tmp_path / "red.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    for _ in range(3):
        writer.write(np.full((48, 64, 3), (0, 0, 255), np.uint8))
    writer.release()
    red = read_video(path, ALL, SMALL).frames.reshape(-1, 3).mean(0)
    assert red[0] > 200 and red[1:].max() < 50
    cv2.imwrite(str(tmp_path / "red.png"), np.full((4, 4, 3), (0, 0, 255), np.uint8))
    assert read_image(str(tmp_path / "red.png"))[0, 0].tolist() == [255, 0, 0]


def test_portrait_and_tiny_frames(make_video, tmp_path):
    portrait = read_video(make_video(tmp_path / "p.mp4", 4, h=320, w=180), ALL, SMALL).frames
    assert portrait.shape == (4, 288, 160, 3)
    tiny = make_video(tmp_path / "t.mp4", 4, h=16, w=24)
    assert read_video(tiny, ALL, SMALL).frames.shape == (4, 32, 64, 3)
    total = ResizeRule("total", 32, 2, 4096, 25165824)
    assert read_video(tiny, ALL, total).frames.shape == (4, 32, 64, 3)


def test_missing_empty_and_foreign_files(make_video, tmp_path, pool):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is not a video" * 50)
    # Noise that a decoder takes for its own: it opens, with pictures of 0 x 0.
    (tmp_path / "noise.mp4").write_bytes(b"BBCD" + np.random.default_rng(0).bytes(20_000))
    (tmp_path / "pattern_%02d.mp4").write_text("x" * 100)
    for read in (lambda p: read_video(p, ALL), lambda p: pool.read(p, ALL), probe, pool.probe):
        assert reason(read, str(tmp_path / "none.mp4")) == "missing_file"
        assert reason(read, str(tmp_path)) == "missing_file"
        assert reason(read, str(tmp_path / "empty.mp4")) == "empty_file"
        assert reason(read, str(tmp_path / "text.mp4")) == "not_a_video"
        assert reason(read, str(tmp_path / "noise.mp4")) == "not_a_video"
        assert reason(read, str(tmp_path / "pattern_%02d.mp4")) == "not_a_video"


def test_one_frame_is_an_image(make_video, tmp_path):
    path = make_video(tmp_path / "one.mp4", 1)
    with pytest.raises(MediaError, match="as an image") as caught:
        read_video(path, ALL)
    assert caught.value.reason == "one_frame"
    cv2.imwrite(str(tmp_path / "x.jpg"), np.zeros((50, 50, 3), np.uint8))
    assert reason(read_video, str(tmp_path / "x.jpg"), ALL) == "one_frame"
    assert read_video(make_video(tmp_path / "two.mp4", 2), ALL).indices.tolist() == [0, 1]


def test_truncated_files(make_video, tmp_path):
    whole = Path(make_video(tmp_path / "a.mp4", 20)).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])  # the index at the end is gone
    with pytest.raises(MediaError, match="none of its frames can be found") as caught:
        read_video(str(cut), ALL)
    assert caught.value.reason == "truncated_video"
    cut.write_bytes(streamable(whole))
    assert read_video(str(cut), ALL).total_frames == 20
    cut.write_bytes(streamable(whole)[:-600])  # opens and promises 20 frames
    with pytest.raises(MediaError, match=r"truncated.*incomplete") as caught:
        read_video(str(cut), ALL)
    assert caught.value.reason == "truncated_video"
    for name, codec in (("b.avi", "MJPG"), ("c.mkv", "mp4v")):
        part = Path(make_video(tmp_path / name, 40, codec=codec))
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
        assert reason(read_video, str(part), ALL) == "truncated_video"


def test_a_clip_cut_by_edit_list_is_not_truncated(make_video, tmp_path):
    """The file stores 20 frames and shows 12."""
    path = Path(make_video(tmp_path / "a.mp4", 20))
    whole = path.read_bytes()
    path.write_bytes(with_edit(whole, 0.6, 1.2))
    assert probe(str(path)).frames == 12
    clip = read_video(str(path), SampleRule("uniform", 4, None))
    assert clip.total_frames == 12 and clip.indices.tolist() == [0, 4, 7, 11]
    assert levels(clip) == [6, 10, 13, 17]


def test_an_edit_may_end_inside_a_frame(make_video, tmp_path):
    path = Path(make_video(tmp_path / "a.mp4", 20))
    path.write_bytes(with_edit(path.read_bytes(), 0.0, 1.14))
    clip = read_video(str(path), SampleRule("uniform", 4, None))
    assert clip.total_frames == 12 and clip.indices.tolist() == [0, 4, 7, 11] == levels(clip)


def test_hung_decoder_is_killed(make_video, tmp_path):
    path = make_video(tmp_path / "a.mp4", 4)
    with DecodePool(timeout_s=30.0) as pool:
        pool.read(path, ALL)
        process = pool._idle[0].process
        os.kill(process.pid, signal.SIGSTOP)
        pool.timeout_s = 0.3
        start = time.perf_counter()
        with pytest.raises(MediaError, match="0.3 s") as caught:
            pool.read(path, ALL)
        assert caught.value.reason == "timeout" and time.perf_counter() - start < 5
        assert process.poll() is not None  # gone, not left stopped
        pool.timeout_s = 30.0
        assert pool.read(path, ALL).total_frames == 4
        last = pool._idle[0].process
    assert last.poll() is not None


def test_crashed_decoder(make_video, tmp_path):
    """A decoder that dies at work is the file's fault; one that died idle is replaced; Ctrl-C reaches neither."""
    path = make_video(tmp_path / "a.mp4", 4)
    with DecodePool(timeout_s=30.0) as pool:
        pool.read(path, ALL)
        process = pool._idle[0].process
        for interrupt in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, interrupt)
        assert pool.read(path, ALL).total_frames == 4 and pool._idle[0].process is process
        process.kill()
        process.wait()
        assert pool.read(path, ALL).total_frames == 4
        os.kill(pool._idle[0].process.pid, signal.SIGSTOP)
        killer = threading.Timer(0.3, pool._idle[0].process.kill)
        killer.start()
        assert reason(pool.read, path, ALL) == "decoder_crash"
        killer.join()
        assert pool.read(path, ALL).total_frames == 4


def test_decoders_serve_threads(make_video, tmp_path, pool):
    paths = [make_video(tmp_path / f"{n}.mp4", n) for n in (3, 5, 8)]
    found: dict[int, list[int]] = {}

    def work(i: int) -> None:
        found[i] = [pool.read(paths[i], ALL).total_frames for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == {0: [3] * 4, 1: [5] * 4, 2: [8] * 4}
    assert 1 <= len(pool._idle) <= 3
    assert copy.deepcopy(pool).read(paths[0], ALL).total_frames == 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_8k_video_in_bounded_memory(make_video, tmp_path):
    """Peak memory does not grow with the number of frames kept: six more are 597 MB as they come from the codec."""
    peaks = []
    for n in (2, 8):
        path = make_video(tmp_path / f"{n}.mp4", n, h=4320, w=7680)
        with DecodePool(timeout_s=60.0) as pool:
            clip = pool.read(path, ALL, SMALL)
            status = Path(f"/proc/{pool._idle[0].process.pid}/status").read_text()
        assert clip.frames.shape == (n, 160, 288, 3) and levels(clip) == list(range(n))
        peaks.append(int(status.split("VmHWM:")[1].split()[0]) / 1024)
    assert peaks[1] < peaks[0] + 150, peaks


def test_images(tmp_path):
    rgba = np.zeros((6, 8, 4), np.uint8)
    rgba[..., 2], rgba[..., 3] = 200, 10  # nearly transparent red keeps its colour
    cv2.imwrite(str(tmp_path / "a.png"), rgba)
    assert read_image(str(tmp_path / "a.png")).tolist() == np.full((6, 8, 3), (200, 0, 0)).tolist()
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((5, 7), 90, np.uint8))
    assert (read_image(str(tmp_path / "grey.png")) == np.full((5, 7, 3), 90)).all()
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    (tmp_path / "empty.png").touch()
    assert reason(read_image, str(tmp_path / "bad.png")) == "not_an_image"
    assert reason(read_image, str(tmp_path / "empty.png")) == "empty_file"
    assert reason(read_image, str(tmp_path / "none.png")) == "missing_file"


def test_image_rotation_is_applied(tmp_path):
    image = pytest.importorskip("PIL.Image")
    picture = image.new("RGB", (40, 20))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(str(tmp_path / "a.jpg")).shape == (40, 20, 3)


def test_media_paths_stay_under_their_root(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.mp4").touch()
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "sub" / "up").symlink_to(tmp_path)
    (root / "a.mp4").touch()
    (root / "inside.mp4").symlink_to(root / "a.mp4")
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "alias").symlink_to(root)
    assert resolve_media(root, "sub/../a.mp4") == str((root / "a.mp4").resolve())
    assert resolve_media(root, "inside.mp4") == resolve_media(tmp_path / "alias", "a.mp4")
    assert resolve_media(root, "not/there.mp4").endswith("not/there.mp4")
    outside = ["../secret.mp4", "sub/../../secret.mp4", str(root / "a.mp4"), "link.mp4", "sub/up/secret.mp4", "."]
    for path in outside:
        assert reason(resolve_media, root, path) == "path_outside_root", path
    for path in ("", "  ", "a\0b", None):
        assert reason(resolve_media, root, path) == "bad_path"
