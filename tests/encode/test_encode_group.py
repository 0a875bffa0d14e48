"""Groups of records about one clip: decoded once, each record judged on its own, and frames that are stored as JPEG."""

from __future__ import annotations

import contextlib

import cv2
import numpy as np
import pytest

from mllm4d_jax.encode import encoder as encoder_module
from mllm4d_jax.encode.example import Example, VideoOptions
from mllm4d_jax.encode.grids import patchify
from mllm4d_jax.media import video
from mllm4d_jax.media.frame_sampling import SampleRule
from mllm4d_jax.media.resize import ResizeRule, image_size, resize_bicubic
from mllm4d_jax.media.stored_frames import StoredFrames
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.records import Record
from tests.encode.decoding import in_process

ARRAYS = ("tokens", "positions", "supervised", "patches")


def make_record(key, question, media, answer="it moves"):
    parts = [*media, {"type": "text", "text": question}]
    turns = ({"role": "user", "content": parts}, {"role": "assistant", "content": answer})
    return Record(key, turns[: 2 if answer else 1])


def same(a, b):
    assert (a.key, a.rope_delta, a.grids, a.timestamps, a.text) == (b.key, b.rope_delta, b.grids, b.timestamps, b.text)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.fixture
def decodes(monkeypatch):
    """Counts the clips that are decoded."""
    seen = []
    read = video.read_video

    def counted(path, *args):
        seen.append(path)
        return read(path, *args)

    monkeypatch.setattr(video, "read_video", counted)
    return seen


@pytest.fixture
def make_encoder(qwen3, tokenizer):
    def make(max_tokens=None, **options):
        return in_process(qwen3, tokenizer, VideoOptions(num_frames=4, **options), max_tokens)

    return make


@pytest.fixture
def clip(make_video, tmp_path):
    return {"type": "video", "path": make_video(tmp_path / "a.mp4", 9)}


def test_a_group_is_decoded_once_and_equals_its_records_alone(make_encoder, clip, decodes):
    encoder = make_encoder()
    records = [make_record(f"k{i}", f"What moves {i}?" * (i + 1), [clip]) for i in range(5)]
    group = encoder.encode_group(records)
    assert len(decodes) == 1
    assert all(e.patches is group[0].patches for e in group) and not group[0].patches.flags.writeable
    for example, record in zip(group, records, strict=True):
        same(example, encoder.encode(record))
    assert len(decodes) == 6


def test_a_bad_record_costs_only_itself(make_encoder, clip, decodes):
    encoder = make_encoder(max_tokens=120)
    good = make_record("good", "What moves?", [clip])
    late = Record("late", (*good.messages, {"role": "system", "content": "x"}))
    nameless = make_record("nameless", "What?", [{"type": "video", "path": ""}])
    records = [late, make_record("long", "very " * 200, [clip]), good, nameless, make_record("too", "What?", [clip])]
    found = encoder.encode_group(records)
    assert [r.reason if isinstance(r, RecordError) else "" for r in found] == [
        "late_system",
        "too_long",
        "",
        "placeholder_mismatch",
        "",
    ]
    assert [r.key for r in found] == ["late", "long", "good", "nameless", "too"]
    assert len(decodes) == 1
    for record, outcome in zip(records, found, strict=True):
        if isinstance(outcome, RecordError):
            with pytest.raises(type(outcome)) as caught:
                encoder.encode(record)
            assert str(caught.value) == str(outcome)


def test_nothing_is_decoded_for_a_group_without_a_good_record(make_encoder, clip, decodes):
    found = make_encoder(max_tokens=20).encode_group([make_record(f"k{i}", "What moves?", [clip]) for i in range(2)])
    assert [r.reason for r in found] == ["too_long"] * 2 and not decodes


def test_a_bad_clip_costs_every_record(make_encoder, tmp_path):
    absent = {"type": "video", "path": str(tmp_path / "absent.mp4")}
    found = make_encoder().encode_group([make_record(f"k{i}", "What?", [absent]) for i in range(3)])
    assert [(r.key, r.reason) for r in found] == [(f"k{i}", "missing_file") for i in range(3)]


def test_files_are_fetched_and_decoded_off_the_clock(make_encoder, clip, tmp_path, monkeypatch):
    """Whoever watches how long a group takes does not count what has a limit of its own."""
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    encoder, off, done = make_encoder(), [], []

    @contextlib.contextmanager
    def unwatched():
        off.append(True)
        yield
        off.pop()

    def noted(name, call):
        return lambda *args: done.append((name, bool(off))) or call(*args)

    encoder.unwatched = unwatched
    monkeypatch.setattr(encoder_module, "on_disk", noted("fetched", encoder_module.on_disk))
    for name in ("probe", "read", "image"):
        monkeypatch.setattr(encoder._pool, name, noted(name, getattr(encoder._pool, name)))
    monkeypatch.setattr(encoder_module, "patchify", noted("patchify", encoder_module.patchify))
    media = [clip, {"type": "image", "path": str(tmp_path / "a.png")}]
    assert isinstance(encoder.encode_group([make_record("k", "What?", media)])[0], Example)
    assert sorted(done) == [("fetched", True)] * 2 + [("image", True)] + [("patchify", False)] * 2 + [
        ("probe", True),
        ("read", True),
    ]


def test_different_media_are_refused(make_encoder, clip, make_video, tmp_path):
    other = {"type": "video", "path": make_video(tmp_path / "b.mp4", 9)}
    with pytest.raises(ValueError, match="different media"):
        make_encoder().encode_group([make_record("a", "What?", [clip]), make_record("b", "What?", [other])])
    assert make_encoder().encode_group([]) == []


def test_a_cache_saves_the_second_decoding(make_encoder, clip, decodes):
    class Cache(dict):
        put = dict.__setitem__

    cache, encoder = Cache(), make_encoder(max_tokens=120)
    first = encoder.encode_group([make_record("a", "What moves?", [clip])], cache=cache)[0]
    again, long = encoder.encode_group(
        [make_record("a", "What moves?", [clip]), make_record("b", "very " * 200, [clip])], cache=cache
    )
    assert len(decodes) == len(cache) == 1 and again.patches is first.patches and long.reason == "too_long"
    same(first, again)


def jpegs(levels, size=(48, 64)):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 40, (*size, 3))
    return tuple(cv2.imencode(".jpg", (noise + level).astype(np.uint8))[1].tobytes() for level in levels)


def stored(**changes):
    values = dict(name="s#0", jpegs=jpegs([10, 60, 110, 160]), indices=(0, 3, 6, 8), source_fps=10.0, total_frames=9)
    values |= changes
    values.setdefault("times", tuple(i / 10 for i in values["indices"]))
    return StoredFrames(**values)


def test_stored_frames_are_dated_and_sized_like_those_of_a_video(make_encoder, clip):
    """A clip of nine frames whose sampled four were stored gives the prompt and positions of the clip itself."""
    part = {"type": "video", "frames": stored(indices=tuple(int(i) for i in np.linspace(0, 8, 4).round()))}
    example = make_encoder().encode(make_record("k", "What moves?", [part]))
    video = make_encoder().encode(make_record("k", "What moves?", [clip]))
    assert isinstance(example, Example) and example.timestamps == video.timestamps and example.text == video.text
    np.testing.assert_array_equal(example.positions, video.positions)
    assert example.patches.shape == video.patches.shape


def test_the_pixels_of_stored_frames_are_theirs(make_encoder, qwen3):
    frames = stored()
    example = make_encoder().encode(make_record("k", "What?", [{"type": "video", "frames": frames}]))
    decoded = [cv2.imdecode(np.frombuffer(j, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for j in frames.jpegs]
    size = image_size(48, 64, qwen3.factor, 784, 50176)
    want, _ = patchify(np.stack([resize_bicubic(np.ascontiguousarray(d), *size) for d in decoded]), qwen3)
    np.testing.assert_array_equal(example.patches, want)


def test_more_stored_frames_than_wanted_are_thinned_by_the_rule():
    frames = stored(jpegs=jpegs(range(0, 160, 10)), indices=tuple(range(0, 48, 3)), total_frames=48)
    resize = ResizeRule("per_frame", 32, 2, 784, 50176)
    picked, size = frames.plan(SampleRule("uniform", 4, None), resize)
    assert picked.tolist() == [0, 5, 10, 15] and size == resize.size(4, 48, 64)
    assert frames.plan(SampleRule("uniform", 32, None), resize)[0].tolist() == list(range(16))


def test_a_part_of_stored_frames_is_the_ones_inside_it(make_encoder):
    """16 frames, three apart, of 48 at 10 per second; 0.9 to 2.4 s holds numbers 9, 12, ... 24."""
    frames = stored(jpegs=jpegs(range(0, 160, 10)), indices=tuple(range(0, 48, 3)), total_frames=48)
    example = make_encoder().encode(make_record("k", "?", [{"type": "video", "frames": frames, "span": (0.9, 2.4)}]))
    assert example.timestamps == (((0.9 + 1.5) / 2, (1.8 + 2.4) / 2),)
    assert frames.sampled_of(SampleRule("uniform", 4, None, 0.9, 2.4)) == 18


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"source_fps": float("nan")}, "missing_fps"),
        ({"source_fps": 0.0}, "missing_fps"),
        ({"times": ()}, "missing_fps"),
        ({"times": (0.0, 0.3, 0.3, 0.8)}, "missing_fps"),
        ({"times": (0.0, 0.3, 0.6, float("nan"))}, "missing_fps"),
        ({"indices": (0, 3, 6), "times": (0.0, 0.3, 0.6, 0.8)}, "missing_indices"),
        ({"indices": (), "times": (0.0, 0.3, 0.6, 0.8)}, "missing_indices"),
        ({"indices": (0, 3, 3, 8), "times": (0.0, 0.3, 0.6, 0.8)}, "missing_indices"),
        ({"indices": (0, 3, 6, 9)}, "missing_indices"),
        ({"jpegs": jpegs([9]), "indices": (0,)}, "one_frame"),
        ({"jpegs": (*jpegs([9, 9, 9]), b"no jpeg")}, "undecodable_frame"),
        ({"jpegs": (b"", *jpegs([9, 9, 9]))}, "undecodable_frame"),
        ({"jpegs": (*jpegs([9, 9, 9]), *jpegs([9], (64, 48)))}, "varying_size"),
        ({"jpegs": jpegs([9] * 4, (8, 8 * 250))}, "bad_size"),
    ],
)
def test_bad_stored_frames_are_named(make_encoder, changes, reason):
    record = make_record("k#3", "What?", [{"type": "video", "frames": stored(**changes)}])
    with pytest.raises(RecordError) as caught:
        make_encoder().encode(record)
    assert caught.value.reason == reason and caught.value.key == "k#3"
