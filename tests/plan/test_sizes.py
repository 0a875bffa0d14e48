"""Planned sizes against those of full clips that an encoder and a loader have made, and what a plan supposes."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import pytest

from configs import common
from configs.published import published_config
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.encode.example import VideoOptions
from mllm4d_jax.encode.tokenizer import build_byte_level_tokenizer
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.plan.job import TIME_TOKENS, GrpoJob, Lengths, PlanError, PlanJob
from mllm4d_jax.plan.sft import SftPhases
from mllm4d_jax.qa.records import parse_record
from mllm4d_jax.rows.completion_rows import needed_prompt_sizes
from mllm4d_jax.rows.rows import RowSizes, share_prefix
from mllm4d_jax.run.begin import Begun
from mllm4d_jax.run.build import BuildError, build, encoder_of, model_sizes, open_records, processor_of
from mllm4d_jax.run.checkpoint import Checkpoints, Progress
from mllm4d_jax.sft.setup import make_loader
from tests.data.fakes import next_batch

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
QUESTIONS = ("<video>\nWhich way does it go?", "<video>\nAnd where is it now?")


def encoder_for(config):
    return encoder_of(config.model.path, config.video, config.data.max_tokens)


def raw(question: str, answered: bool) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "Left."}]
    return {"video": "a.mp4", "conversations": turns[: 1 + answered]}


@pytest.fixture(scope="module")
def clips(tmp_path_factory, make_video):
    """A folder with questions about a square clip whose frames are above every budget here."""
    folder = tmp_path_factory.mktemp("clips")
    make_video(folder / "a.mp4", 16, 256, 256)
    (folder / "records.json").write_text(json.dumps([raw(q, True) for q in QUESTIONS]))
    return folder


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl"])
def model(request, tmp_path_factory):
    """A folder with all that an encoder reads of a model; its video budget is 65,536 pixels."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = build_byte_level_tokenizer(["<0.3 seconds> system user assistant", *QUESTIONS], 400)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    config = json.loads((GOLDEN / request.param / "config.json").read_text())
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {f"{name}_token_id": name for name in ("vision_start", "vision_end")}
    config |= {key: ids[f"<|{name}|>"] for key, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config))
    v = config["vision_config"]
    processor = dict(size=dict(shortest_edge=64, longest_edge=65536), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor |= dict(patch_size=v["patch_size"], temporal_patch_size=2, merge_size=v["spatial_merge_size"])
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps(processor))
    return folder


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(("rule", "bound"), [("per_frame", 4096), ("total", 16384), ("qwen_vl_utils", 16384)])
def test_planned_sizes_are_those_of_full_clips(model, clips, tmp_path, rule, bound, bounded):
    sft, grpo = common.config("sft"), common.config("grpo")
    for config in (sft, grpo):
        config.model.path, config.data.path, config.data.root = str(model), str(clips / "records.json"), str(clips)
        config.data.prefix_buckets, config.model.dtype = (64, 512, 2048, 4096, 8192), "float32"
        config.video.num_frames, config.video.resize_rule, config.video.max_pixels = 4, rule, bound * bounded
    with encoder_for(sft) as encoder:
        examples, prompts = (
            [encoder.encode(parse_record(raw(q, a), "k", clips), add_generation_prompt=not a) for q in QUESTIONS]
            for a in (True, False)
        )
        visual = encoder.config.video_token_id
    # Rows of two clips whose slots have room for one branch each.
    (group,) = share_prefix(examples, [visual])
    sft.data.questions_per_video, sft.train.batch_size, sft.data.rows = 2, 4, 1
    longest = max(group.branches)
    sft.data.branch_buckets = (longest,)
    parts = build(sft, devices=jax.devices()[:1], abstract=True)
    with (
        encoder_of(sft.model.path, sft.video, sft.data.max_tokens) as encoder,
        Checkpoints(tmp_path / "checkpoints", 1) as checkpoints,
    ):
        begun = Begun(tmp_path, checkpoints, open_records(sft), {}, Progress(), parts, encoder)
        loader = make_loader(begun)
        with loader.stream:
            batch = next_batch(loader).batch
    job = PlanJob.of(sft, Lengths(branch=longest, answer=int(examples[0].supervised.sum())))
    planned = SftPhases(job, jax.devices()[:1]).step(1).lower.args[-1]
    assert job.shape == parts.shape and job.rows == 1
    assert jax.tree.structure(planned) == jax.tree.structure(batch) and shapes(planned) == shapes(batch)

    text = len(prompts[0].tokens) - int((prompts[0].tokens == visual).sum())
    job = GrpoJob.of(grpo, Lengths(text=text))
    sizes = job.shape.sizes(needed_prompt_sizes(prompts))
    assert (job.sizes.prefix, job.sizes.frames, job.sizes.frame_patches) == (
        sizes.prefix,
        sizes.frames,
        sizes.frame_patches,
    )


def test_a_budget_over_all_frames(clips, tokenizer):
    """16 frames of 50,176 pixels: 14 x 14 patches of the 8B model."""
    config = common.config("sft")
    config.model.published, config.video.num_frames = "8b", 16
    config.video.resize_rule, config.video.max_pixels = "total", 802_816
    job = PlanJob.of(config, Lengths())
    with Encoder(processor_of(config), tokenizer, VideoOptions.from_mapping(config.video)) as encoder:
        example = encoder.encode(parse_record(raw(QUESTIONS[0], True), "k", clips))
    (group,) = share_prefix([example], job.shape.visual_token_ids)
    run = job.shape.sizes(job.shape.needed([[group]]))
    assert job.sizes.frame_patches == run.frame_patches == 196 and job.sizes.frames == run.frames == 8


def test_sizes_of_the_paper_run():
    config = common.config("sft")
    config.model.published, config.data.questions_per_video, config.train.batch_size = "8b", 20, 320
    job = PlanJob.of(config, Lengths())
    # 16 temporal patches of 49 tokens with their times, and the system text
    assert job.sizes == RowSizes(1024, 20, 96, frames=16, frame_patches=196, supervised=1024, packed=False)
    assert (job.rows, job.shape.clips * job.shape.branches) == (16, 20)
    long = PlanJob.of(config, Lengths.parse(["branch=200", "answer=100", "system=300"], config)).sizes
    assert (long.prefix, long.length, long.supervised) == (1280, 256, 2048)
    config.video.resize_rule, config.video.max_pixels = "total", 32 * 2 * 32**2
    assert PlanJob.of(config, Lengths()).sizes.frame_patches == 8
    config.video.max_pixels = 0  # then data.max_tokens is what bounds a clip; frames are padded to powers of two
    sizes = PlanJob.of(config, Lengths()).sizes
    assert sizes.prefix == 8192 and 4 * (8192 // 16 - TIME_TOKENS) <= sizes.frame_patches == 4 * 512
    config.video.num_frames, config.video.fps = 0, 2.0
    with pytest.raises(PlanError, match=r"video\.num_frames"):
        PlanJob.of(config, Lengths())
    config.model.published = ""
    with pytest.raises(BuildError, match="model.published=8b"):
        PlanJob.of(config, Lengths())


@pytest.mark.parametrize("words", [["branch=x"], ["branch=0"], ["prefix=3"], ["text=3"], ["branch=8", "answer=9"]])
def test_lengths_of_texts_that_cannot_be(words):
    with pytest.raises(PlanError, match="--plan"):
        Lengths.parse(words, common.config("sft"))


def test_a_mean_completion_is_no_longer_than_the_longest():
    config = common.config("grpo")
    config.rollout.max_new_tokens = 100
    assert Lengths.parse([], config).completion == 100 and Lengths.parse(["completion=7"], config).completion == 7
    with pytest.raises(PlanError, match=r"rollout\.max_new_tokens = 100"):
        Lengths.parse(["completion=101"], config)


def test_a_batch_that_cannot_be_divided_is_not_planned():
    config = common.config("sft")
    config.model.published, config.train.batch_size, config.train.accumulation = "8b", 8, 3
    with pytest.raises(ValueError, match="cannot be divided into train.accumulation = 3"):
        PlanJob.of(config, Lengths())


def test_a_folder_has_to_be_of_the_published_size(model, tmp_path):
    """Neither a plan nor a run is of another model than both names say; what fine-tuning changes is no other model."""
    config = common.config("sft")
    config.model.path, config.model.published = str(model), "8b"
    for plan in (model_sizes, lambda config: PlanJob.of(config, Lengths())):
        with pytest.raises(BuildError, match=r"is not the model of model.published = 8b \(Qwen/Qwen3-VL-8B-Instruct\)"):
            plan(config)
    tuned = published_config("8b")
    tuned["text_config"] |= {"vocab_size": 152_000, "dtype": "float32", "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(tuned))
    config.model.path = str(tmp_path)
    assert model_sizes(config).text.vocab_size == 152_000
    for name in ("32b", "4b", "qwen2_5_vl_7b", "30b_a3b"):
        config.model.published = name
        with pytest.raises(BuildError, match=f"model.path = {tmp_path} is not the model of model.published = {name} "):
            model_sizes(config)
    config.model.path, config.model.published = str(model), ""
    assert model_sizes(config) == dataclasses.replace(ModelConfig.from_folder(model), tied=model_sizes(config).tied)
    assert processor_of(config).family == model_sizes(config).family
