"""Plans of reinforcement learning: closed forms, shapes against those of a run, the command on fake devices."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from configs import common
from configs import grpo as grpo_config
from mllm4d_jax.generate.decoding import empty_branches
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.generate.slots import Ladder, Packing
from mllm4d_jax.generate.weights import SamplingWeights, sampling_mesh
from mllm4d_jax.models.flops import Tuning
from mllm4d_jax.models.split import merge_model, split_model
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.parallel import topology
from mllm4d_jax.parallel.mesh import MeshError, make_mesh
from mllm4d_jax.parallel.rules import replicated, row_shardings
from mllm4d_jax.plan import compile as plan_compile
from mllm4d_jax.plan import (
    grpo as plan,
)
from mllm4d_jax.plan import (
    grpo_job as plan_job,
)
from mllm4d_jax.plan import (
    grpo_programs as plan_programs,
)
from mllm4d_jax.plan import (
    grpo_reckon as plan_reckon,
)
from mllm4d_jax.plan.compile import USABLE, Compiled
from mllm4d_jax.plan.memory import parameter_table
from mllm4d_jax.plan.step import PlanError
from mllm4d_jax.run.build import load_trainable
from tests.grpo.learner_cases import completions, laid_out, parts, prompts

GIB = 1 << 30


def paper_job(**settings) -> plan_job.GrpoJob:
    config = common.config("grpo")
    config.model.published = "8b"
    config.update_from_flattened_dict(settings)
    return plan_job.plan_job(config)


@pytest.fixture
def config(tiny_world):
    """The tiny run: 4 prompts x 8 completions."""
    model, world = tiny_world
    config = grpo_config.get_config("tiny")
    config.model.path, config.data.path, config.data.root = str(model), str(world / "r1.jsonl"), str(world)
    config.model.adapter, config.rollout.prompts = "", 4
    return config


@pytest.fixture
def quick_compiles():
    """What is looked at here does not depend on how good the code for a CPU is."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize(
    ("chunk", "longest", "cap"), [(32, 768, 4096), (7, 100, 100), (32, 1, 64), (1, 5, 600), (3, 2, 2)]
)
def test_decode_rungs_are_what_the_sampler_goes_through(chunk, longest, cap):
    ladder, most, found, step = Ladder(first_slots=16), max(cap - 1, 1), {}, 1
    packing = Packing.whole(1, 1, 2, ladder.slots(min(chunk, most), most))
    while step < longest:
        packing = ladder.pack(packing, np.ones((1, 2), bool), min(step + chunk - 1, most), most)
        steps = min(chunk, longest - step)
        found[packing.slots] = found.get(packing.slots, 0) + steps
        step += steps
    assert dict(plan_job.decode_rungs(ladder, chunk, longest, cap)) == found
    assert sum(found.values()) == longest - 1


def test_decode_bytes():
    assert plan_reckon.decode_bytes(100, 10, 2, [(4, 3), (8, 5)]) == 3 * (100 + 10 + 2 * 4) + 5 * (100 + 10 + 2 * 8)


def test_cache_bytes_are_those_of_the_caches(config):
    job = plan_job.plan_job(config)
    model = plan_programs.abstract_model(config, job.model, make_mesh({"data": 1}, jax.devices()[:1]))
    caches = jax.eval_shape(lambda: empty_branches(model, 3, 8, 40))
    assert plan_reckon.cache_bytes(job, 3, 40, 8) == sum(x.size * x.dtype.itemsize for x in caches)
    # 36 layers, 8 key heads of 128 in bfloat16: 144 KiB for a token of the 8B model
    assert plan_reckon.cache_bytes(paper_job(), 1, 1) == 144 * 1024


def test_flops_of_the_8b_model():
    job = paper_job()
    found = plan_reckon.flops(job, Tuning(attention="splash"), 512, 2)
    width, inner, layers, q, k, vocabulary = 4096, 12288, 36, 4096, 1024, 151936
    layer = 2 * (width * (2 * q + 2 * k) + 3 * width * inner)
    visible = job.prompt.length + 1024
    token = layers * (layer + 4 * q * visible) + 2 * width * vocabulary
    assert found.decode(1024) == pytest.approx(2 * 12 * token)
    rows, p, slot = 2, job.prompt.length, 768
    pairs = p * (p + 1) // 2 + 12 * (slot * p + slot * (slot + 1) // 2)
    score = rows * (layers * ((p + 12 * slot) * layer + 4 * q * pairs) + 6144 * 2 * width * vocabulary)
    assert found.score == pytest.approx(score)
    assert found.add == found.score  # nothing is trained without an adapter
    trained = plan_reckon.flops(job, Tuning(rank=128, targets=("q_proj",), attention="splash"), 512, 2)
    # backward to the inputs of all products, and most of them once more
    assert 2.8 < trained.add / trained.score < 3.1


def test_sizes_of_the_paper_run():
    job = paper_job()
    assert (job.prompt.length, job.prompt.frames, job.prompt.frame_patches) == (1536, 16, 196)
    assert (job.rows, job.parts, job.at_once, job.scored) == (2, 1, 2, 1)
    sizes = job.row_sizes(job.cap)
    assert (sizes.slots, sizes.length, sizes.supervised) == (12, 4096, 12 * 4096)
    job = job.with_settings({"learner.completions_per_row": 3, "train.accumulation": 2})
    sizes = job.row_sizes(500)
    # the longest has 750 tokens; the longest of the rows' three may all be that long
    assert (sizes.slots, sizes.length, sizes.supervised) == (3, 768, 3072)
    assert (job.rows, job.scored) == (8, 2)


def test_settings_that_can_run_are_left_alone():
    job = paper_job(**{"learner.completions_per_row": 6})
    assert plan_reckon.choose(job, 4, 95 * GIB) == (job, "")


@pytest.mark.parametrize(("devices", "hbm"), [(4, 95), (16, 16), (16, 32), (1, 95)])
def test_other_settings_are_named(devices, hbm):
    job = paper_job()
    if devices == 1:
        job = paper_job(**{"mesh.fsdp": 3})
    other, note = plan_reckon.choose(job, devices, hbm * GIB)
    shape = plan_job.mesh_shape(dict(other.config.mesh), devices)
    assert plan_job.division_problem(other, shape) == ""
    wanted = plan_reckon.memory(other, shape, "full", parameter_table(other.config, other.model))
    assert plan_reckon.needed(wanted) <= plan_reckon.MARGIN * hbm * GIB
    # what the note says to set, and nothing else, makes the config the planned one
    flags = dict(part.removeprefix("--config.").split("=") for part in note.split() if part.startswith("--config."))
    again = job.with_settings({name: int(value) for name, value in flags.items()})
    assert plan_job.mesh_shape(dict(again.config.mesh), devices) == shape
    assert (again.per_row, again.parts) == (other.per_row, other.parts)
    assert again.config.rollout.tensor == other.config.rollout.tensor
    assert job.config.mesh.fsdp == (3 if devices == 1 else 1)  # the config itself is as it was


def test_nothing_fits():
    with pytest.raises(PlanError, match="no mesh of 4 devices"):
        plan_reckon.choose(paper_job(), 4, 2 * GIB)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learner.completions_per_row": 5}, "learner.completions_per_row"),
        ({"rollout.prompts_at_once": 3}, "3 at a time"),
        ({"objective.eps_low": 7.0}, "eps_low"),
    ],
)
def test_what_cannot_be_planned(settings, message):
    with pytest.raises(PlanError, match=message):
        paper_job(**settings)


def test_memory_counts_both_copies_and_the_reference():
    job = paper_job()
    table = parameter_table(job.config, job.model)
    shape = {"data": 1, "fsdp": 4, "tensor": 1}
    apart = job.with_settings({"rollout.tensor": 4, "learner.completions_per_row": 6})
    both = plan_reckon.memory(apart, shape, "full", table)
    for kinds in both.values():
        assert kinds["weights"] == pytest.approx(kinds[plan_reckon.COPY], rel=0.01)
    assert both["sampling"]["branch cache"] == plan_reckon.cache_bytes(job, 2, 4095, 12) / 4
    still = dataclasses.replace(apart, objective=dataclasses.replace(job.objective, beta=0.0))
    without = plan_reckon.memory(still, shape, "full", table)["learning"]
    trained = 4 * sum(np.prod(s) for name, s, _ in table if "lora" in name)
    assert trained / 4 < both["learning"]["reference"] - without["reference"] < trained  # most of it is split


def test_largest_prompts_follow_the_line():
    job = paper_job(**{"learner.completions_per_row": 6})
    memory = {"weights": 40, "reference": 10, "temporaries": 20, "branch cache": 5, "peak": 75}
    found = Compiled(1, memory, 75, 1.0)
    one = plan_programs.Phase("x", "gradient", found, {}, prompts=2)
    # (95 - 50) / 25 x 2 prompts = 3.6, in multiples of 2 for 4 devices with 2 rows a prompt
    assert plan.largest_prompts(job, [one], round(100 * 0.95 / USABLE), 4) == 2
    assert plan.largest_prompts(job, [one], round(100 * 0.95 / USABLE), 1) == 3
    refused = plan_programs.Phase("y", "score", Compiled(1, None, 150, 1.0), {"weights": 50, "batch": 1}, prompts=2)
    assert plan.largest_prompts(job, [one, refused], 100, 1) == 0
    few = paper_job(**{"learner.completions_per_row": 6, "rollout.prompts_at_once": 1})
    decode = dataclasses.replace(refused, kind="decode")
    assert plan.largest_prompts(few, [one, decode], 100, 1) == 3


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding), tree)


@pytest.mark.parametrize("tensor", [0, 2])
def test_the_planned_trees_are_those_of_a_run(config, tensor):
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor = (8, 1, 0) if not tensor else (2, 4, tensor)
    programs = plan_programs.Programs(plan_job.plan_job(config), jax.devices()[:8])
    mesh = make_mesh(dict(config.mesh), jax.devices()[:8])
    graphdef, trainable, frozen = split_model(load_trainable(config, mesh), ("lora",))
    weights = SamplingWeights(
        graphdef,
        trainable,
        frozen,
        sampling_mesh(mesh, tensor),
        learner_mesh=mesh,
        patterns=("lora",),
        attention="auto",
    )
    assert shapes(programs._trainable) == shapes(trainable) and shapes(programs._frozen) == shapes(frozen)
    real = weights.of(trainable)
    assert shapes(programs._sampled) == shapes(real)
    on_one = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(real[1]))
    assert programs.held(sampling=True).get(plan_reckon.COPY, 0) == (on_one if tensor else 0)
    assert programs.held(sampling=False)["reference"] == programs.held(sampling=False)["adapter"]


def test_the_planned_rows_are_those_of_a_run():
    """Against rows laid out from completions, for whole prompts and for parts of them."""
    _, batch = prompts("qwen3_vl", 2)
    for per_row, micro in ((4, 1), (2, 2)):
        (rows, *_) = laid_out(batch, completions(2, 4, 6), 2, per_row, micro)
        mesh = make_mesh({"data": 2}, jax.devices()[:2])
        config = parts("qwen3_vl")[0]
        job = types.SimpleNamespace(
            model=config, rows=2 * 4 // per_row, parts=micro, per_row=per_row, branches=4,
            row_sizes=lambda mean, rows=rows: dataclasses.replace(
                sizes_of(rows), frames=1, frame_patches=16
            ),
        )  # fmt: skip
        planned = plan_programs.Programs._rows(types.SimpleNamespace(job=job, mesh=mesh), 6)
        assert jax.tree.structure(planned) == jax.tree.structure(rows)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), planned) == jax.tree.map(lambda x: (x.shape, x.dtype), rows)
        assert jax.tree.map(lambda x: x.sharding, planned) == row_shardings(rows, mesh)


def sizes_of(rows):
    layout = rows.inputs.layout
    return plan_job.RowSizes(layout.prefix, layout.slots, layout.length, 0, 0, rows.loss_index.shape[1])


def test_features_from_devices_in_another_order(quick_compiles):
    """As on a TPU, where the meshes of learner and sampler do not list the devices alike."""
    config, graphdef, trainable, frozen, mesh = parts("qwen3_vl", 2)
    _, batch = prompts("qwen3_vl", 2)
    found = merge_model(graphdef, trainable, frozen).encode_vision(batch.inputs.vision)
    other = Mesh(mesh.devices[::-1], mesh.axis_names)
    assert [d.id for d in other.devices.flat] != [d.id for d in mesh.devices.flat]

    def put(mesh: Mesh) -> VisionFeatures:
        return jax.device_put(VisionFeatures(*map(np.asarray, found)), replicated(mesh))

    inputs = batch.inputs._replace(vision=None)
    how = dict(prompt_ids=[1, 2], branches=2, max_new_tokens=4, options=SamplingOptions())
    sampler = Sampler(graphdef, mesh, chunk=4)
    same, moved = (sampler.generate((trainable, frozen), inputs, features=put(m), **how) for m in (mesh, other))
    assert np.array_equal(same.tokens, moved.tokens) and np.array_equal(same.logprobs, moved.logprobs)


def test_timing_of_a_step(config):
    """By hand from the programs' bytes and collectives, for a step of several parts and iterations."""
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor, config.objective.iterations = 1, 2, 2, 3
    config.train.accumulation, config.rollout.prompts_at_once = 2, 2
    job = plan_job.plan_job(config, plan_job.Lengths(completion=100))
    programs = plan_programs.Programs(job, jax.devices()[:2])

    def phase(kind: str, received: int, mean: int = 0) -> plan_programs.Phase:
        found = Compiled(1, {"peak": 1}, 1, 1.0, received={"all-reduce": received})
        return plan_programs.Phase(kind, kind, found, {}, mean=mean)

    phases = [phase("encode", 1), phase("decode", 10), phase("gradient", 100, 100), phase("gradient", 999, 256)]
    phases += [phase("score", 7, 100), phase("optimiser", 3)]
    chip = topology.Chip(GIB, 1e12, 1e11, 1e10)
    found = plan.timing(job, programs, chip, phases, 100)
    # 150 tokens are 149 steps; two calls of the sampler; two parts, scored for reference and policy; three iterations
    assert found.longest == 150 and found.received == 1 + 2 * 149 * 10 + 2 * 2 * 7 + 3 * 2 * 100 + 3 * 3
    assert found.seconds["decode"]["network"] == pytest.approx(2 * 149 * 10 / 1e10)
    cost = plan_reckon.flops(job, programs.tuning, 100, 1)
    assert found.seconds["update"]["compute"] == pytest.approx(6 * cost.add / 2 / (plan_compile.EFFICIENCY * 1e12))
    # 149 steps fit the first cache of 255 positions, split over two devices like the key heads
    caches = plan_reckon.cache_bytes(job, 2, job.prompt.length) + plan_reckon.cache_bytes(job, 2, 255, 8)
    assert found.seconds["decode"]["memory"] == pytest.approx(2 * 149 * (programs.read + caches / 2) / 1e11)
    assert found.step == pytest.approx(sum(max(b.values()) for b in found.seconds.values()))
    assert set(found.phases) == {"vision", "prefill", "decode", "score", "update"}


def test_decoding_reads_the_decoder_alone(config):
    programs = plan_programs.Programs(plan_job.plan_job(config), jax.devices()[:1])
    held = programs.held(sampling=True)
    text, width = programs.job.model.text, programs.job.model.text.hidden_size
    table = 0 if programs.job.model.tied else 4 * text.vocab_size * width
    assert 0 < programs.vision < held["weights"]
    assert programs.read == held["weights"] + held["adapter"] - programs.vision - table


@pytest.mark.slow
def test_the_command_on_fake_devices(config, tmp_path, monkeypatch, capsys, quick_compiles):
    """The whole plan with two CPU devices in place of a TPU's."""
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor = 1, 2, 2
    config.rollout.max_new_tokens, config.rollout.buckets, config.rollout.chunk = 32, (32,), 8
    chip = topology.Chip(GIB, 1e12, 1e11, 1e10)
    fake = topology.Topology("v5e:1x2", chip, tuple(jax.devices()[:2]))
    monkeypatch.setattr(plan, "open_topology", lambda name: fake)
    assert plan.run(config, str(tmp_path), "v5e:1x2,memory") == 0
    out, written = capsys.readouterr().out, (tmp_path / "plan.md").read_text()
    assert "| v5e:1x2 | fsdp 2 | tensor 2 | 4 x 8 |" in out and "| v5e:1x2 | fsdp 2 | tensor 2 | 4 x 8 |" in written
    found = json.loads((tmp_path / "plan.json").read_text())
    (one,) = found["plans"]
    assert [p["kind"] for p in one["phases"]] == ["encode", "prefill", "decode", "score", "gradient", "optimiser"]
    for phase in one["phases"]:
        memory = phase["compiled"]["memory"]
        assert memory["peak"] == sum(n for kind, n in memory.items() if kind != "peak")
        assert memory[plan_reckon.COPY] > 0 and memory["weights"] > 0 and memory["optimiser"] > 0
    _, prefill, decode, score, gradient, _ = (p["compiled"] for p in one["phases"])
    job = plan_job.plan_job(config)
    assert decode["memory"]["branch cache"] == plan_reckon.cache_bytes(job, 4, 31, 8) / 2
    assert decode["memory"]["results"] < decode["memory"]["branch cache"]  # written in place
    visible = 4 * job.prompt.length  # which slots are real, on both devices
    assert decode["memory"]["prompt cache"] == plan_reckon.cache_bytes(job, 4, job.prompt.length) / 2 + visible
    assert prefill["memory"]["results"] >= decode["memory"]["prompt cache"]
    assert decode["received"] and gradient["received"]["all-gather"] > score["received"]["all-gather"] > 0
    (timing,) = one["timings"]
    assert timing["mean"] == timing["longest"] == 32
    assert one["hours"] == pytest.approx(one["step_seconds"]["32"] * config.train.steps / 3600)
    assert one["fits"] and one["note"] == "" and one["largest_prompts"] >= 4
    assert [r["devices"] for r in found["memory"]] == [1, 1, 1, 8, 8, 8]


def test_reckoned_bytes_are_those_of_the_placed_trees(config):
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor = 1, 4, 2
    job = plan_job.plan_job(config, plan_job.Lengths(completion=64))
    held = plan_programs.Programs(job, jax.devices()[:4]).held(sampling=True)
    found = plan_reckon.memory(job, {"data": 1, "fsdp": 4, "tensor": 1}, "none", parameter_table(config, job.model))
    assert (
        found["learning"]["weights"] == held["weights"]
        and found["learning"][plan_reckon.COPY] == held[plan_reckon.COPY]
    )
    assert found["learning"]["reference"] == held["reference"]
    assert found["learning"]["adapter, gradient, optimiser"] == 4 * held["adapter"]
    assert found["sampling"]["adapter, optimiser"] == 3 * held["adapter"] + held["sampler's adapter"]


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ("", PlanError, "needs a target"),
        ("v9:2x2", topology.TopologyError, "v5e, v5p"),
        ("v5e:4x4,branch=3", PlanError, "completion=TOKENS, text=TOKENS"),
        ("v5e:4x4,completion=257", PlanError, "rollout.max_new_tokens = 256"),
        ("v5e:4x4+", topology.TopologyError, "no TPU topology"),
    ],
)
def test_targets_that_are_refused(config, tmp_path, targets, error, message):
    with pytest.raises(error, match=message):
        plan.run(config, str(tmp_path / "w"), targets)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"fsdp": 2}])
def test_meshes_that_do_not_fit(sizes):
    with pytest.raises(MeshError):
        plan_job.mesh_shape(sizes, 4)


@pytest.mark.slow
def test_a_tpu_program_has_the_kernel(config, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor, config.model.dtype = 1, 4, 2, "bfloat16"
    planned = plan.plan_topology(plan_job.plan_job(config, plan_job.Lengths(completion=64)), "v5e:2x2")
    kernels = {p.kind: p.compiled.kernels for p in planned.phases}
    assert kernels["gradient"] > kernels["score"] > 0 and planned.fits
    assert not any(p.compiled.whole for p in planned.phases)
    assert jnp.isfinite(planned.hours)
