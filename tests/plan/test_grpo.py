"""Plans of reinforcement learning: closed forms, arguments of its programs against those of a run, the command."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm4d_jax.generate.decoding import empty_branches
from mllm4d_jax.generate.joined import fits_twice
from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.generate.stream import Limits
from mllm4d_jax.grpo.settings import completions_per_row, division_problems
from mllm4d_jax.models.flops import Tuning
from mllm4d_jax.models.layers import REMAT
from mllm4d_jax.parallel import topology
from mllm4d_jax.parallel.chips import Chip
from mllm4d_jax.parallel.mesh import make_mesh, mesh_shape
from mllm4d_jax.plan import memory as reckon
from mllm4d_jax.plan import task
from mllm4d_jax.plan.compile import EFFICIENCY, Compiled, Phase, compile_phases, timing
from mllm4d_jax.plan.grpo import GrpoPhases, decode_flops, largest_prompts, program_flops
from mllm4d_jax.plan.job import PlanError
from mllm4d_jax.run.build import abstract_model
from tests.generate.fakes import FakeSampler, run
from tests.plan.grpo_jobs import job_of, paper_job

GIB = 1 << 30


@pytest.mark.parametrize(
    ("chunk", "longest", "cap"), [(32, 768, 4096), (7, 100, 100), (32, 1, 64), (1, 5, 600), (3, 2, 2)]
)
def test_decode_rungs_are_what_the_sampler_goes_through(chunk, longest, cap):
    job = paper_job(**{"rollout.chunk": chunk, "rollout.max_new_tokens": cap})
    sampler = FakeSampler(chunk, Ladder(first_slots=16))
    lengths = np.array([[longest, cap]])  # the caches have room for the cap
    run(sampler, lengths, Limits(1))
    steps = [slots for _, _, slots in sampler.shapes][: longest - 1]
    assert dict(job.rungs(sampler.ladder, longest)) == {slots: steps.count(slots) for slots in steps}


@pytest.mark.parametrize(("rows", "width"), [(4, 12), (2, 12), (1, 12), (2, 4), (4, 3)])
def test_decode_steps_of_places_that_are_filled_again(rows, width):
    """Against the sampler's own count, for lengths around a mean and the longest 1.5 times that."""
    settings = {"rollout.prompts": 4, "rollout.prompts_at_once": rows, "rollout.completions_at_once": width}
    job = paper_job(**settings, **{"rollout.max_new_tokens": 1000})
    lengths = np.random.default_rng(0).permuted(
        np.tile(np.linspace(200, 600, 12).round().astype(np.int32), (4, 1)), axis=1
    )
    sampler = FakeSampler(32)
    stream, _ = run(sampler, lengths, Limits(rows, width))
    planned = job.decode_rungs(sampler.ladder, 400)
    assert sum(steps for _, steps in planned) == pytest.approx(stream.statistics.steps, rel=0.15)
    assert planned[-1][0] == job.rungs(sampler.ladder, 600)[-1][0]


def test_cache_bytes_are_those_of_the_caches(config):
    job = job_of(config)
    model = abstract_model(config, job.model, make_mesh({"data": 1}, jax.devices()[:1]))
    caches = jax.eval_shape(lambda: empty_branches(model, 3, 8, 40))
    assert job.cache_bytes(3, 40, 8) == sum(x.size * x.dtype.itemsize for x in caches)
    # 36 layers, 8 key heads of 128 in bfloat16: 144 KiB for a token of the 8B model
    assert paper_job().cache_bytes(1, 1) == 144 * 1024


def test_flops_of_the_8b_model():
    job = paper_job()
    found = program_flops(job, Tuning(attention="splash"), 512, 2)
    width, inner, layers, q, k, vocabulary = 4096, 12288, 36, 4096, 1024, 151936
    layer = 2 * (width * (2 * q + 2 * k) + 3 * width * inner)
    visible = job.sizes.prefix + 1024
    token = layers * (layer + 4 * q * visible) + 2 * width * vocabulary
    assert decode_flops(job, Tuning(attention="splash"), 1024, 2) == pytest.approx(2 * 12 * token)
    rows, p, slot = 2, job.sizes.prefix, 768
    pairs = p * (p + 1) // 2 + 12 * (slot * p + slot * (slot + 1) // 2)
    score = rows * (layers * ((p + 12 * slot) * layer + 4 * q * pairs) + 6144 * 2 * width * vocabulary)
    assert found["score"] == pytest.approx(score)
    assert found["gradient"] == found["score"]  # nothing is trained without an adapter
    trained = program_flops(job, Tuning(rank=128, targets=("q_proj",), attention="splash"), 512, 2)
    # backward to the inputs of all products, and most of them once more
    assert 2.8 < trained["gradient"] / trained["score"] < 3.1


def test_sizes_of_the_paper_run():
    job = paper_job()
    assert (job.sizes.prefix, job.sizes.frames, job.sizes.frame_patches) == (1536, 16, 196)
    assert (job.rows, job.at_once, job.reference) == (2, 2, True)
    sizes = job.row_sizes(4096)
    assert (sizes.slots, sizes.length, sizes.supervised) == (12, 4096, 12 * 4096)
    job = job.with_settings({"learner.completions_per_row": 3, "train.accumulation": 2})
    sizes = job.row_sizes(500)
    # the longest has 750 tokens; the longest of the rows' three may all be that long
    assert (sizes.slots, sizes.length, sizes.supervised) == (3, 768, 3072) and job.rows == 8 // 2


def test_settings_that_can_run_are_left_alone():
    job = paper_job(**{"learner.completions_per_row": 6})
    assert reckon.choose(job, 4, 95 * GIB) == (job, "")


@pytest.mark.parametrize(("devices", "hbm"), [(4, 95), (16, 16), (16, 32), (1, 95)])
def test_other_settings_are_named(devices, hbm):
    job = paper_job(**{"mesh.fsdp": 3} if devices == 1 else {})
    other, note = reckon.choose(job, devices, hbm * GIB)
    assert not list(division_problems(other.config, devices))
    shape = mesh_shape(dict(other.config.mesh), devices)
    wanted = reckon.rollout_memory(other, shape, "full", reckon.parameter_table(other))
    assert reckon.needed(wanted) <= reckon.MARGIN * hbm * GIB
    # what the note says to set, and nothing else, makes the config the planned one
    flags = dict(part.removeprefix("--config.").split("=") for part in note.split() if part.startswith("--config."))
    again = job.with_settings({name: int(value) for name, value in flags.items()}).config
    assert mesh_shape(dict(again.mesh), devices) == shape
    assert completions_per_row(again) == completions_per_row(other.config)
    assert again.train.accumulation == other.config.train.accumulation
    assert again.rollout.tensor == other.config.rollout.tensor
    assert job.config.mesh.fsdp == (3 if devices == 1 else 1)  # the config itself is as it was


def test_what_several_hosts_cannot_divide():
    """Each draws its own prompts on its own devices: v5e-16 has four hosts of four."""
    settings = {"mesh.fsdp": 16, "rollout.tensor": 8, "rollout.prompts": 6, "learner.completions_per_row": 3}
    config = paper_job(**settings, **{"mesh.data": 1}).config
    found = " ".join(division_problems(config, 16, 4))
    assert "rollout.tensor = 8 spans several hosts, which have 4 devices each" in found
    assert "rollout.prompts = 6 cannot be divided evenly over 4 hosts" in found
    other, note = reckon.choose(paper_job(**{"rollout.prompts": 4}), 16, 16 * GIB, 4)
    assert other.config.rollout.tensor <= 4 and not list(division_problems(other.config, 16, 4)) and note
    with pytest.raises(PlanError, match="rollout.prompts = 6 cannot be divided evenly over 4 hosts"):
        reckon.choose(paper_job(**{"rollout.prompts": 6}), 16, 95 * GIB, 4)


def test_nothing_fits():
    with pytest.raises(PlanError, match="no mesh of 4 devices"):
        reckon.choose(paper_job(), 4, 2 * GIB)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learner.completions_per_row": 5}, "learner.completions_per_row"),
        ({"objective.eps_low": 7.0}, "eps_low"),
    ],
)
def test_what_cannot_be_planned(settings, message):
    with pytest.raises(PlanError, match=message):
        paper_job(**settings)


def test_memory_counts_both_copies_and_the_reference():
    job = paper_job()
    table = reckon.parameter_table(job)
    shape = {"data": 1, "fsdp": 4, "tensor": 1}
    apart = job.with_settings({"rollout.tensor": 4, "learner.completions_per_row": 6})
    both = reckon.rollout_memory(apart, shape, "full", table)
    for kinds in both.values():
        assert kinds["weights"] == pytest.approx(kinds[reckon.COPY], rel=0.01)
    assert both["sampling"]["branch cache"] == job.cache_bytes(2, 4095, 12) / 4
    # the cache that it grew from, which is there as well for a moment
    assert both["sampling"]["cache before growth"] == job.cache_bytes(2, 2048, 12) / 4
    still = apart.with_settings({"objective.beta": 0.0})
    without = reckon.rollout_memory(still, shape, "full", table)["learning"]
    trained = 4 * sum(np.prod(s) for name, s, _ in table if "lora" in name)
    assert trained / 4 < both["learning"]["reference"] - without["reference"] < trained  # most of it is split


def test_gpus_with_room_have_the_layers_twice():
    """8B in 16 bits: 36 layers of attention (four projections), the other half (three) and norms; adapters are few."""
    job, shape = paper_job(), {"data": 1, "fsdp": 1, "tensor": 1}
    table = reckon.parameter_table(job)
    without, small, large = (reckon.rollout_memory(job, shape, "full", table, gpu * GIB) for gpu in (0, 40, 80))
    assert without == small and without["sampling"][reckon.APART] == 0
    layers = 36 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128)
    trained = sum(np.prod(s) for name, s, _ in table if "lora" in name)
    copied = large["sampling"].pop(reckon.APART)
    assert copied == 2 * (layers + trained) and large["learning"] == without["learning"]
    assert large["sampling"].items() <= without["sampling"].items()
    # The same rule as in a run, for the weights that it has.
    assert fits_twice(int(2 * 8.8e9), 80 * GIB) and not fits_twice(int(2 * 8.8e9), 40 * GIB)


def compiled(kind: str, needed: int = 1, memory: dict | None = None, *, prompts=0, mean=0, held=None, received=0):
    phase = Phase(kind, kind, lambda: None, held or {}, 1, 1, prompts, mean)
    return Compiled(phase, memory, needed, 1.0, received={"all-reduce": received})


def test_largest_prompts_follow_the_line():
    job = paper_job(**{"learner.completions_per_row": 6})
    memory = {"frozen": 40, "reference": 10, "temporaries": 20, "branch cache": 5, "peak": 75}
    one = compiled("gradient", 75, memory, prompts=2)
    # (95 - 50) / 25 x 2 prompts = 3.6, in multiples of 2 for 4 devices with 2 rows a prompt
    assert largest_prompts(job, [one], 95, 4) == 2
    assert largest_prompts(job, [one], 95, 1) == 3
    refused = compiled("score", 150, prompts=2, held={"frozen": 50, "batch": 1})
    assert largest_prompts(job, [one, refused], 95, 1) == 0
    few = paper_job(**{"learner.completions_per_row": 6, "rollout.prompts_at_once": 1})
    decode = compiled("decode", 150, prompts=2, held={"frozen": 50, "batch": 1})
    assert largest_prompts(few, [one, decode], 95, 1) == 3


def test_timing_of_a_step(config):
    """By hand from the programs' bytes and collectives, for a step of several parts and iterations."""
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor, config.objective.iterations = 1, 2, 2, 3
    config.train.accumulation, config.rollout.prompts_at_once = 2, 2
    job = job_of(config, completion=100)
    programs = GrpoPhases(job, jax.devices()[:2])
    phases = [compiled("encode", received=1), compiled("decode", received=10), compiled("optimiser", received=3)]
    phases += [compiled("gradient", received=100, mean=100), compiled("gradient", received=999, mean=256)]
    phases += [compiled("score", received=7, mean=100)]
    chip = Chip(GIB, 1e12, 1e11, 1e10)
    assert programs.lengths == {100: 150, 256: 256}
    found = timing(programs.calls(100), phases, 2, chip, 100, 150)
    # 150 tokens are 149 steps; two calls of the sampler; two parts, scored for reference and policy; three iterations
    assert found.received == 1 + 2 * 149 * 10 + 2 * 2 * 7 + 3 * 2 * 100 + 3 * 3
    assert found.seconds["decode"]["network"] == pytest.approx(2 * 149 * 10 / 1e10)
    cost = program_flops(job, programs.parts.tuning, 100, 1)
    assert found.seconds["update"]["compute"] == pytest.approx(6 * cost["gradient"] / 2 / (EFFICIENCY * 1e12))
    # 149 steps fit the first cache of 255 positions, split over two devices like the key heads
    caches = job.cache_bytes(2, job.sizes.prefix) + job.cache_bytes(2, 255, 8)
    assert found.seconds["decode"]["memory"] == pytest.approx(2 * 149 * (programs.decoded() + caches / 2) / 1e11)
    assert found.step == pytest.approx(sum(max(b.values()) for b in found.seconds.values()))
    assert set(found.seconds) == {"vision", "prefill", "decode", "score", "update"}


def test_a_decode_step_reads_weights_prompts_and_the_whole_cache(config):
    config.rollout.chunk, config.rollout.max_new_tokens, config.rollout.buckets = 32, 1024, (1024,)
    job = job_of(config, completion=600)
    programs = GrpoPhases(job, jax.devices()[:1])
    (decode,) = (call for call in programs.calls(600) if call.kind == "decode")
    # 899 steps: 256 fit the first cache, as many the next; the last one has what the longest can need
    fixed, each = programs.decoded() + job.cache_bytes(4, job.sizes.prefix), job.cache_bytes(4, 1, 8)
    read = 256 * (fixed + 256 * each) + 256 * (fixed + 512 * each) + 387 * (fixed + 1023 * each)
    assert (decode.loops, decode.traffic) == (899, pytest.approx(read))


def test_decoding_reads_the_decoder_alone(config):
    programs = GrpoPhases(job_of(config), jax.devices()[:1])
    held, text = programs.held(sampling=True), programs.job.model.text
    table = 0 if programs.job.model.tied else 4 * text.vocab_size * text.hidden_size
    vision = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(programs.parts.frozen["vision"]))
    assert 0 < vision < held["frozen"]
    assert programs.decoded() == held["frozen"] + held["trainable"] - vision - table


@pytest.mark.slow
def test_the_command_on_fake_devices(config, tmp_path, monkeypatch, capsys, quick_compiles):
    """The whole plan with two CPU devices in place of a TPU's."""
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor = 1, 2, 2
    config.rollout.max_new_tokens, config.rollout.buckets, config.rollout.chunk = 32, (32,), 8
    chip = Chip(GIB, 1e12, 1e11, 1e10)
    fake = topology.Topology("v5e:1x2", chip, tuple(jax.devices()[:2]))
    monkeypatch.setattr(task, "open_topology", lambda name: fake)
    assert task.run(config, str(tmp_path), "v5e:1x2,memory") == 0
    out, written = capsys.readouterr().out, (tmp_path / "plan.md").read_text()
    assert "| v5e:1x2 | fsdp 2 | tensor 2 | 4 x 8 |" in out and "| v5e:1x2 | fsdp 2 | tensor 2 | 4 x 8 |" in written
    assert "A decode step reads" in written
    found = json.loads((tmp_path / "plan.json").read_text())
    (one,) = found["plans"]
    assert [p["kind"] for p in one["phases"]] == ["encode", "prefill", "decode", "score", "gradient", "optimiser"]
    for phase in one["phases"]:
        memory = phase["memory"]
        assert memory["peak"] == sum(n for kind, n in memory.items() if kind != "peak")
        assert memory[reckon.COPY] > 0 and memory["frozen"] > 0 and memory["optimiser"] > 0
    _, prefill, decode, score, gradient, _ = one["phases"]
    job = job_of(config)
    assert decode["memory"]["branch cache"] == job.cache_bytes(4, 31, 8) / 2
    assert decode["memory"]["results"] < decode["memory"]["branch cache"]  # written in place
    visible = 4 * job.sizes.prefix  # which slots are real, on both devices
    assert decode["memory"]["prompt cache"] == job.cache_bytes(4, job.sizes.prefix) / 2 + visible
    assert prefill["memory"]["results"] >= job.cache_bytes(1, job.sizes.prefix) / 2  # of one prompt at a time
    assert decode["received"] and gradient["received"]["all-gather"] > score["received"]["all-gather"] > 0
    (timed,) = one["timings"]
    assert timed["mean"] == timed["longest"] == 32
    assert one["hours"] == pytest.approx(one["step_seconds"]["32"] * config.train.steps / 3600)
    assert one["fits"] and one["notes"] == [] and one["largest"] >= 4
    assert [r["devices"] for r in found["memory"]] == [1] * len(REMAT) + [8] * len(REMAT)


def test_reckoned_bytes_are_those_of_the_placed_trees(config):
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor = 1, 4, 2
    job = job_of(config, completion=64)
    held = GrpoPhases(job, jax.devices()[:4]).held(sampling=True)
    shape = {"data": 1, "fsdp": 4, "tensor": 1}
    found = reckon.rollout_memory(job, shape, "none", reckon.parameter_table(job))
    assert found["learning"]["weights"] == held["frozen"] and found["learning"][reckon.COPY] == held[reckon.COPY]
    assert found["learning"]["reference"] == held["reference"]
    assert found["learning"]["adapter, gradient, optimiser"] == 4 * held["trainable"]
    assert found["sampling"]["adapter, optimiser"] == 3 * held["trainable"] + held["sampler's trainable"]


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
        task.run(config, str(tmp_path / "w"), targets)
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_tpu_program_has_the_kernel(config, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor, config.model.dtype = 1, 4, 2, "bfloat16"
    planned = task.plan_topology(job_of(config, completion=64), "v5e:2x2")
    kernels = {c.phase.kind: c.kernels for c in planned.phases}
    assert kernels["gradient"] > kernels["score"] > 0 and planned.fits
    assert not any(c.whole for c in planned.phases)
    assert jnp.isfinite(planned.hours)


@pytest.mark.slow
def test_a_host_of_several_decodes_without_a_gather_of_weights(config, monkeypatch):
    """What is gathered are the tokens drawn; the compiler may refuse a part of a slice, so a host is one of its own."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    config.mesh.data, config.mesh.fsdp, config.rollout.tensor, config.model.dtype = 16, 16, 2, "bfloat16"
    config.rollout.prompts, config.learner.completions_per_row = 64, 2
    found = topology.open_topology("v5e:16x16")
    assert [d.coords for d in found.host] == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]] and len(found.devices) == 256
    assert topology.open_topology("v5e:2x2").host == ()
    programs = GrpoPhases(job_of(config, completion=64), found.devices, host=found.host)
    assert set(programs.sampler_mesh.devices.flat) == set(found.host) and programs.job.hosts == 64
    phases = compile_phases(programs.phases(), programs.job.model.text.vocab_size, found.options)
    decode = next(one for one in phases if one.phase.kind == "decode")
    assert decode.gathered == f"s32[2, 8, {programs.job.rollout.chunk}]" and decode.received["all-gather"] < 10_000
