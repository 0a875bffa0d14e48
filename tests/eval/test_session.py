"""A clip that is seen once: every answer is that of the question asked alone, and nothing is done twice."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from configs import common
from data_prep.sample import write_sample_world
from mllm4d_jax.eval.asking import Manner
from mllm4d_jax.eval.clip_questions import typed_question
from mllm4d_jax.eval.session import ClipSession, OneClip
from mllm4d_jax.generate.policy import SamplingOptions, banned_token_ids
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.media.video import probe, read_video
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.qa.reasoning import with_prompt
from mllm4d_jax.rows.batch import collate
from mllm4d_jax.run.build import encoder_of
from mllm4d_jax.run.tiny import write_tiny_model

ASKED = (
    "Which way does the camera move? | left | right | up",
    "What moves?",
    "Say in " + "many " * 60 + "words what the camera does.",  # longer than one multiple of a question's length
)
LIMIT = 18


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(model, encoder, path of a clip)."""
    folder = tmp_path_factory.mktemp("session")
    records = write_sample_world(folder / "world", seed=0, clips=1)
    write_tiny_model(folder / "model", [records.read_text()])
    config = common.config("infer", {"video.num_frames": 7})
    with encoder_of(folder / "model", config.video) as encoder:
        yield load_model(folder / "model", attention="xla"), encoder, folder / "world/videos/clip_000.mp4"


def encoded(setting, clip=None, system=None):
    _, encoder, path = setting
    clip, media = clip or OneClip(), [{"type": "video", "path": str(path)}]
    manner = Manner("direct", system, False)
    return [clip.encode(encoder, typed_question(text, "q", media, manner).record) for text in ASKED]


def asked_alone(setting, examples, **options):
    """Every question as a prompt of its own from its first token to its last, padded in front."""
    model, encoder, _ = setting
    ids, tokenizer = (model.config.image_token_id, model.config.video_token_id), encoder.tokenizer
    how = SamplingOptions(
        eos_ids=tokenizer.eos_ids, banned_ids=banned_token_ids(tokenizer, model.config.text.vocab_size), **options
    )
    length, graphdef = max(len(e.tokens) for e in examples), nnx.split(model)[0]
    sampler, texts = Sampler(graphdef, model.mesh), []
    for example in examples:
        inputs = collate([example], vision_geometry(model.config), visual_token_ids=ids, length=length, pad_side="left")
        out = sampler.generate(
            (nnx.state(model),), inputs, prompt_ids=[0], branches=1, max_new_tokens=LIMIT, options=how, seed=3
        )
        texts.append(with_prompt(example.text, tokenizer.decode(out.ids(0, 0))))
    return texts


# The greedy answers of a run are compared in `test_infer`.
@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.2])
def test_answers_are_those_of_each_question_alone_over_one_prefix(setting, temperature, monkeypatch):
    clip = OneClip()
    examples = encoded(setting, clip)
    assert len(examples[2].tokens) - len(examples[1].tokens) > 64
    model, encoder, _ = setting
    config = common.config("infer", {"max_new_tokens": LIMIT, "temperature": temperature, "seed": 3})
    session = ClipSession(model, encoder, config)
    seen, prefix = [], session._sampler.prefix
    monkeypatch.setattr(session._sampler, "prefix", lambda *args: seen.append(args) or prefix(*args))
    session.see(examples[0])
    answers = [session.answer(example) for example in examples]
    found = [answer.text for answer in answers]
    assert found == asked_alone(setting, examples, temperature=temperature) and len(set(found)) == 3
    again = [session.answer(example).text for example in reversed(examples)]
    assert again == found[::-1]  # company and order change nothing
    assert (
        len(seen) == 1
        and answers[0].visual_tokens == np.isin(examples[0].tokens, [encoder.config.video_token_id]).sum()
    )
    other = encoded(setting, clip, system="You are terse.")[0]
    assert session.see(other) > session.see(examples[0])
    assert len(seen) == 3  # another beginning is run anew, and only the last one is kept


def test_the_clip_is_decoded_once(setting, monkeypatch):
    _, encoder, _ = setting
    decoded, read = [], encoder._pool.read
    monkeypatch.setattr(encoder._pool, "read", lambda *args: decoded.append(args) or read(*args))
    examples = encoded(setting)
    assert len(decoded) == 1 and all(e.patches is examples[0].patches for e in examples)


def test_frames_are_those_that_the_model_saw_with_their_times(setting):
    _, encoder, path = setting
    clip = OneClip()
    encoded(setting, clip)
    frames = clip.frames(encoder)
    info = probe(str(path))
    picked = read_video(str(path), encoder._sample, encoder._resize)
    assert [one.time for one in frames] == [float(info.times[n]) for n in (0, 2, 5, 8, 10, 12, 15)]
    np.testing.assert_array_equal(np.stack([one.pixels for one in frames]), picked.frames)
