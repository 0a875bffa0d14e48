"""Plans: the abstract step against the real one, the search, memory by kind, and the command on fake devices."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from configs import common
from configs.published import published_config
from mllm4d_jax.encode.example import Example, Grid
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.models.split import split_model
from mllm4d_jax.parallel import topology
from mllm4d_jax.parallel.mesh import MeshError, make_mesh
from mllm4d_jax.plan import compile as plan_compile
from mllm4d_jax.plan import memory as plan_memory
from mllm4d_jax.plan import sft as plan
from mllm4d_jax.plan import step as plan_step
from mllm4d_jax.rows.rows import Group, RowSizes, collate_rows
from mllm4d_jax.run.optimizer import init_optimizer, make_optimizer
from mllm4d_jax.sft import job as real


@pytest.fixture
def config(tiny_world, make_config):
    """The tiny run on a mesh of 2 x 4, two questions a clip."""
    config = make_config(*tiny_world)
    config.mesh.data, config.mesh.fsdp = 2, 4
    config.data.questions_per_video, config.train.batch_size = 2, 16
    return config


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding), tree)


@pytest.mark.parametrize("trainable", [("lora",), ("full", "!text/embed")])
def test_the_planned_step_has_the_arrays_of_the_real_one(config, trainable):
    config.train.trainable = trainable
    mesh = make_mesh(dict(config.mesh))
    planned = plan_step.abstract_step(plan_step.plan_job(config), mesh, 8)
    graphdef, trainable, frozen = split_model(real.load_trainable(config, mesh), trainable)
    assert shapes(planned.trees["trainable"]) == shapes(trainable)
    assert shapes(planned.trees["frozen"]) == shapes(frozen)
    o = config.optim
    optimizer = make_optimizer(
        np.ones(3, np.float32), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm
    )
    state = init_optimizer(optimizer, trainable, mesh)
    assert shapes(planned.trees["optimiser"]) == shapes(state)
    on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert planned.bytes()["optimiser"] == on_one


@pytest.mark.parametrize("size", ["8b", "qwen2_5_vl_7b"])
def test_the_planned_batch_has_the_arrays_of_a_real_one(size):
    model = ModelConfig.from_dict(published_config(size))
    v = model.vision
    grid = Grid("video", 2, 4, 4)
    visual = 2 * 16 // v.merge_size**2
    tokens = np.array([1, *[model.video_token_id] * visual, 5, 6, 7], np.int32)
    example = Example(
        key="a#0", tokens=tokens, positions=np.zeros((3, len(tokens)), np.int32), rope_delta=0,
        supervised=np.arange(len(tokens)) > visual + 1, patches=np.zeros((32, v.patch_dim), np.float32),
        grids=(grid,), timestamps=((0.0, 1.0),), text="",
    )  # fmt: skip
    sizes = RowSizes(16, 2, 8, 2, 16, 8)
    row = [Group((example, example), visual + 1)]
    real_batch = collate_rows([row, row], sizes, vision_geometry(model), visual_token_ids=(model.video_token_id,))
    planned = plan_step.abstract_batch(model, sizes, 2)
    assert jax.tree.structure(planned) == jax.tree.structure(real_batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(lambda x: (x.shape, x.dtype), real_batch)


def test_worst_sizes_of_the_paper_run():
    config = common.config("sft")
    config.model.published, config.data.questions_per_video, config.train.batch_size = "8b", 20, 320
    job = plan_step.plan_job(config)
    # 16 temporal patches of 49 tokens with their times, and the system text
    assert job.sizes == RowSizes(prefix=1024, slots=20, length=96, frames=16, frame_patches=196, supervised=1024)
    assert (job.rows, job.questions) == (16, 20)
    long = plan_step.plan_job(config, plan.parse_texts(["branch=200", "answer=100", "system=300"])).sizes
    assert (long.prefix, long.length, long.supervised) == (1280, 256, 2048)
    config.video.resize_rule, config.video.max_pixels = "total", 32 * 2 * 32**2
    assert plan_step.plan_job(config).sizes.frame_patches == 8
    config.video.max_pixels = 0
    sizes = plan_step.plan_job(config).sizes
    assert sizes.prefix == 8192 and sizes.frame_patches == 4 * (8192 // 16 - plan_step.TIME_TOKENS)
    config.model.published = ""
    with pytest.raises(plan_step.PlanError, match="model.published=8b"):
        plan_step.plan_job(config)


@pytest.mark.parametrize("words", [["branch=x"], ["branch=0"], ["prefix=3"], ["branch=8", "answer=9"]])
def test_lengths_of_texts_that_cannot_be(words):
    with pytest.raises(plan_step.PlanError, match="--plan"):
        plan.parse_texts(words)


def linear(fixed: int, each: int, limit: int, seen: list[int]):
    """A stand-in for the compiler whose program wants `fixed + rows * each` bytes."""

    def compile_rows(job, mesh, rows):
        seen.append(rows)
        needed = fixed + rows * each
        parts = dict(frozen=fixed // 2, trainable=0, optimiser=0, temporaries=needed - fixed // 2, peak=needed)
        return plan_compile.Compiled(rows, parts if needed <= limit else None, needed, 1.0)

    return compile_rows


@pytest.mark.parametrize(("fixed", "each", "start", "most"), [(100, 50, 1, 17), (400, 7, 4, 78), (100, 50, 30, 17)])
def test_the_search_finds_the_largest_batch(monkeypatch, fixed, each, start, most):
    hbm, seen = 1000, []
    monkeypatch.setattr(plan_compile, "compile_rows", linear(fixed, each, hbm, seen))
    first = plan_compile.compile_rows(None, None, start)
    assert most == (plan_compile.USABLE * hbm - fixed) // each
    rows, certainty = plan_compile.search(None, None, first, hbm)
    assert len(seen) <= 1 + plan_compile.SEARCH
    assert rows == most or (rows < most and certainty == "at least")
    assert certainty != "seen" or most + 1 in seen


def test_nothing_fits(monkeypatch):
    seen = []
    monkeypatch.setattr(plan_compile, "compile_rows", linear(2000, 10, 1000, seen))
    assert plan_compile.search(None, None, plan_compile.compile_rows(None, None, 1), 1000) == (0, "seen")
    assert seen == [1]


def test_the_compiler_refusing_for_memory_is_read():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 24.50G of 15.75G hbm. Exceeded by 8.75G."
    assert plan_compile._wanted(message) == int(24.5 * 2**30)
    assert plan_compile._wanted("INVALID_ARGUMENT: something else") is None


def test_the_command_on_fake_devices(config, tmp_path, monkeypatch, capsys):
    """The whole plan with two CPU devices in place of a TPU's."""
    config.mesh.data, config.mesh.fsdp = 1, 2
    chip = topology.Chip(2**30, 1e12, 1e11, 1e10)
    fake = topology.Topology("v5e:1x2", chip, tuple(jax.devices()[:2]))
    monkeypatch.setattr(plan_compile, "open_topology", lambda name: fake)
    assert plan.run(config, str(tmp_path), "v5e:1x2,memory,answer=8") == 0
    out, written = capsys.readouterr().out, (tmp_path / "plan.md").read_text()
    assert "to have 96 tokens, 8 of them supervised" in written
    assert "| v5e:1x2 | fsdp 2 | 4 | 16 |" in out and plan.table([]).splitlines()[0] in written
    found = json.loads((tmp_path / "plan.json").read_text())
    (one,) = found["plans"]
    memory = one["compiled"]["memory"]
    assert memory["peak"] == sum(n for kind, n in memory.items() if kind != "peak") and one["fits"]
    assert memory["layout"] == 0 and memory["frozen"] > memory["trainable"] > 0
    assert one["compiled"]["whole"] == [] and one["compiled"]["received"]["all-gather"] > 0
    seconds = one["seconds"]
    assert seconds["compute"] == pytest.approx(one["hardware_flops"] / 2 / (plan_compile.EFFICIENCY * 1e12))
    assert one["hours"] == pytest.approx(max(seconds.values()) * config.train.steps / 3600)
    assert [r["devices"] for r in found["memory"]] == [1, 1, 1, 8, 8, 8]


def test_forbidden_arrays(config):
    job = plan_step.plan_job(config)
    size, vocabulary = job.sizes.layout.size, job.model.text.vocab_size
    assert plan_compile._forbidden(job, "f32", (1, size, vocabulary))
    assert plan_compile._forbidden(job, "bf16", (1, 4, size, size))
    assert not plan_compile._forbidden(job, "f32", (size // 4, vocabulary))
    assert not plan_compile._forbidden(job, "bf16", (1, size, job.model.text.hidden_size))


def test_rows_that_cannot_be_split_are_planned_rounded_up_and_said(config, monkeypatch):
    config.data.questions_per_video = config.train.batch_size = 2
    fake = topology.Topology("v5e:2x4", topology.CHIPS["v5e"], tuple(jax.devices()[:8]))
    monkeypatch.setattr(plan_compile, "open_topology", lambda name: fake)
    compiled = plan_compile.Compiled(1, dict(frozen=1, trainable=1, optimiser=1, peak=100), 100, 1.0)
    monkeypatch.setattr(plan_compile, "compile_rows", lambda job, mesh, rows: dataclasses.replace(compiled, rows=rows))
    planned = plan_compile.plan_topology(plan_step.plan_job(config), "v5e:2x4")
    assert planned.questions == 16 and "planned with 8" in planned.notes[0]
    config.mesh.fsdp = 3
    with pytest.raises(MeshError):
        plan_compile.plan_topology(plan_step.plan_job(config), "v5e:2x4")


@pytest.mark.parametrize(
    ("name", "message"),
    [("v5e", "no TPU topology"), ("v9:2x2", "v5e, v5p, v6e, tpu7x"), ("4x4", "no TPU topology")],
)
def test_names_of_topologies(name, message, config, tmp_path):
    with pytest.raises(topology.TopologyError, match=message):
        plan.run(config, str(tmp_path / "w"), name)
    assert not (tmp_path / "w").exists()


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(topology.TopologyError) as error:
        topology.open_topology("v5e:4x4")
    assert f'pip install "jax[tpu]=={jax.__version__}"' in str(error.value) and "\n" not in str(error.value)


def test_reckoned_memory_follows_rows_devices_and_policy(config):
    job = plan_step.plan_job(config)
    total = {r: sum(plan_memory.by_kind(job, 4, 1, r).values()) for r in ("full", "dots", "none")}
    assert total["full"] < total["dots"] < total["none"]
    one, two = plan_memory.by_kind(job, 2, 4, "full"), plan_memory.by_kind(job, 4, 4, "full")
    assert two["weights"] == one["weights"] and two["kept activations"] == 2 * one["kept activations"]
    config.mesh.data = 1
    placed = plan_step.abstract_step(job, make_mesh({"fsdp": 4}, jax.devices()[:4]), 4).bytes()
    assert one["weights"] == placed["frozen"]
    assert one["adapter, gradient, optimiser"] == 4 * placed["trainable"]
    assert one["batch"] == pytest.approx(2 * placed["batch"], rel=0.05)
    model = plan_step.abstract_model(config, job.model, make_mesh({"data": 1}, jax.devices()[:1]))
    base = sum(math.prod(v.get_value().shape) for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    adapters = sum(math.prod(v.get_value().shape) for _, v in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
    alone = plan_memory.by_kind(job, 2, 1, "full")
    assert alone["weights"] == 4 * (base - adapters) and alone["adapter, gradient, optimiser"] == 16 * adapters


@pytest.mark.slow
def test_a_tpu_program_has_the_kernel(config, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    config.mesh.data, config.mesh.fsdp, config.model.dtype = 1, 4, "bfloat16"
    planned = plan_compile.plan_topology(plan_step.plan_job(config), "v5e:2x2")
    assert planned.compiled.kernels > 0 and planned.fits and planned.compiled.whole == ()
