"""Plans of fine-tuning: the planned step against the real one, the search, memory by kind, the command."""

from __future__ import annotations

import importlib.util
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.models.layers import REMAT
from mllm4d_jax.parallel import topology
from mllm4d_jax.parallel.chips import Chip
from mllm4d_jax.parallel.mesh import MeshError, make_mesh
from mllm4d_jax.parallel.place import place_rows
from mllm4d_jax.plan import compile as plan_compile
from mllm4d_jax.plan import memory, task
from mllm4d_jax.plan.compile import EFFICIENCY, Compiled, Phase
from mllm4d_jax.plan.job import Lengths, PlanJob
from mllm4d_jax.plan.sft import SEARCH, SftPhases, search
from mllm4d_jax.plan.tables import step_table
from mllm4d_jax.run.build import abstract_model, build


@pytest.fixture
def config(tiny_world, make_config):
    """The tiny run on a mesh of 2 x 4, two questions a clip."""
    config = make_config(*tiny_world)
    config.mesh.data, config.mesh.fsdp = 2, 4
    config.data.questions_per_video, config.train.batch_size = 2, 16
    return config


@pytest.fixture
def fake(monkeypatch):
    """Returns a function that puts CPU devices in place of a TPU's."""

    def install(devices: int):
        chip = Chip(2**30, 1e12, 1e11, 1e10)
        found = topology.Topology("v5e:1x2", chip, tuple(jax.devices()[:devices]))
        monkeypatch.setattr(task, "open_topology", lambda name: found)

    return install


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype), x.sharding), tree)


def compiled(rows: int, needed: int, fixed: int = 0, limit: float = math.inf, **more) -> Compiled:
    """What a program of so many rows told that wants `needed` bytes, or that it was refused."""
    kinds = dict(frozen=fixed, trainable=0, optimiser=0, temporaries=needed - fixed, peak=needed)
    phase = Phase("step", "step", lambda: None, kinds, rows, 1)
    return Compiled(phase, kinds if needed <= limit else None, needed, 1.0, **more)


@pytest.mark.parametrize("trainable", [("lora",), ("full", "!text/embed")])
def test_the_planned_step_has_the_arrays_of_the_real_one(config, trainable):
    config.train.trainable = trainable
    phase = SftPhases(PlanJob.of(config, Lengths()), jax.devices()).step(1)
    parts = build(config)
    batch = parts.shape.collate([[]] * 8, PlanJob.of(config, Lengths()).sizes)
    real = (parts.trainable, parts.opt_state, parts.frozen, place_rows(batch, parts.mesh))
    assert shapes(phase.lower.args) == shapes(real)
    for kind, tree in zip(("trainable", "optimiser", "frozen", "batch"), real, strict=True):
        assert phase.held[kind] == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
    config.train.batch_size, config.train.accumulation = 2 * config.train.batch_size, 2
    held = SftPhases(PlanJob.of(config, Lengths()), jax.devices()).step(1).held
    assert held["gradient"] == held["trainable"] and "gradient" not in phase.held  # kept between micro-batches


@pytest.mark.parametrize(
    ("fixed", "each", "start", "most", "sure"),
    [(100, 50, 1, 18, "at least"), (400, 7, 4, 85, "at least"), (100, 50, 30, 18, "seen")],
)
def test_the_search_finds_the_largest_batch(fixed, each, start, most, sure):
    hbm, seen = 1000, []

    def compile_rows(rows):
        seen.append(rows)
        return compiled(rows, fixed + rows * each, fixed // 2, hbm)

    assert most == (hbm - fixed) // each
    assert search(compile_rows, compile_rows(start), hbm) == (most, sure)
    assert len(seen) <= 1 + SEARCH
    assert sure != "seen" or most + 1 in seen


def test_nothing_fits():
    seen = []
    found = search(lambda rows: seen.append(rows), compiled(1, 2010, 1000, 1000), 1000)
    assert found == (0, "seen") and not seen


def test_the_command_on_fake_devices(config, tmp_path, fake, capsys):
    """The whole plan with two CPU devices in place of a TPU's."""
    config.mesh.data, config.mesh.fsdp = 1, 2
    fake(2)
    assert task.run(config, str(tmp_path), "v5e:1x2,memory,answer=8") == 0
    out, written = capsys.readouterr().out, (tmp_path / "plan.md").read_text()
    assert "in tokens, answer=8, branch=96, system=32" in written
    assert "| v5e:1x2 | fsdp 2 | 4 | 16 |" in out and step_table([]).splitlines()[0] in written
    found = json.loads((tmp_path / "plan.json").read_text())
    (one,) = found["plans"]
    (step,), (timed,) = one["phases"], one["timings"]
    assert step["memory"]["peak"] == sum(n for kind, n in step["memory"].items() if kind != "peak") and one["fits"]
    assert step["memory"]["layout"] == 0 and step["memory"]["frozen"] > step["memory"]["trainable"] > 0
    assert step["whole"] == [] and step["received"]["all-gather"] > 0
    seconds = timed["seconds"]["step"]
    assert seconds["memory"] > 0
    assert seconds["compute"] == pytest.approx(timed["flops"] / 2 / (EFFICIENCY * 1e12))
    assert sum(one["facts"]["flops"].values()) == pytest.approx(timed["flops"]) and one["facts"]["questions"] == 16
    assert one["hours"] == pytest.approx(max(seconds.values()) * config.train.steps / 3600)
    assert one["step_seconds"] == {"8": max(seconds.values())}
    assert [r["devices"] for r in found["memory"]] == [1] * len(REMAT) + [8] * len(REMAT)


def test_what_was_planned_is_written_before_the_next_target(config, tmp_path, fake, monkeypatch):
    config.mesh.data, config.mesh.fsdp = 1, 2
    fake(2)
    monkeypatch.setattr(task, "compile_phases", lambda phases, *how: iter([compiled(4, 100, 10)]))

    def stopped(job):
        raise KeyboardInterrupt

    monkeypatch.setattr(task, "gpu_record", stopped)
    with pytest.raises(KeyboardInterrupt):
        task.run(config, str(tmp_path), "v5e:1x2,memory")
    assert "| v5e:1x2 | fsdp 2 |" in (tmp_path / "plan.md").read_text()
    assert [p["topology"] for p in json.loads((tmp_path / "plan.json").read_text())["plans"]] == ["v5e:1x2"]


def test_forbidden_arrays(config):
    job = PlanJob.of(config, Lengths())
    size, vocabulary = job.sizes.layout.size, job.model.text.vocab_size
    assert plan_compile.whole_row(size, vocabulary, "f32", (1, size, vocabulary))
    assert plan_compile.whole_row(size, vocabulary, "bf16", (1, 4, size, size))
    assert not plan_compile.whole_row(size, vocabulary, "f32", (size // 4, vocabulary))
    assert not plan_compile.whole_row(size, vocabulary, "bf16", (1, size, job.model.text.hidden_size))


def test_rows_that_cannot_be_split_are_planned_rounded_up_and_said(config, fake, monkeypatch):
    config.data.questions_per_video = config.train.batch_size = 2
    fake(8)
    monkeypatch.setattr(task, "compile_phases", lambda phases, *how: iter([compiled(1, 100, 3)]))
    planned = task.plan_topology(PlanJob.of(config, Lengths()), "v5e:2x4")
    assert planned.facts["questions"] == 16 and "it makes 1 rows; planned with 8" in planned.notes[0]
    config.mesh.fsdp = 3
    with pytest.raises(MeshError):
        task.plan_topology(PlanJob.of(config, Lengths()), "v5e:2x4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "no TPU topology"),
        ("v9:2x2", "v5e, v5p, v6e, tpu7x"),
        ("a100", "no TPU topology and no GPU: .* h100 or h200.*memory, without compiling"),
        ("h100:12", "up to 8 of a host or a multiple of 8"),
        ("h100:", "h100:COUNT"),
        ("h200:0", "h200:COUNT"),
        ("4x4", "no TPU topology"),
        ("", "needs a tar"),
    ],
)
def test_names_of_topologies(name, message, config, tmp_path):
    with pytest.raises(ValueError, match=message):
        task.run(config, str(tmp_path / "w"), name)
    assert not (tmp_path / "w").exists()


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(topology.TopologyError) as error:
        topology.open_topology("v5e:4x4")
    assert f'pip install "jax[tpu]=={jax.__version__}"' in str(error.value) and "\n" not in str(error.value)


def test_reckoned_memory_follows_rows_devices_and_policy(config):
    job = PlanJob.of(config, Lengths())
    table = memory.parameter_table(job)

    def reckon(rows, devices, remat):
        shape = {"data": 1, "fsdp": devices, "tensor": 1}
        return memory.learning(job, job.sizes, rows, shape, remat, table)

    total = {r: sum(reckon(4, 1, r).values()) for r in ("full", "dots", "none")}
    assert total["full"] < total["dots"] < total["none"]
    one, two = reckon(2, 4, "full"), reckon(4, 4, "full")
    assert two["weights"] == one["weights"] and two["kept activations"] == 2 * one["kept activations"]
    config.mesh.data = 1
    held = SftPhases(job, jax.devices()[:4]).step(1).held
    assert one["weights"] == held["frozen"]
    assert one["adapter, gradient, optimiser"] == 4 * held["trainable"]
    assert one["batch"] == pytest.approx(2 * held["batch"], rel=0.05)
    model = abstract_model(config, job.model, make_mesh({"data": 1}, jax.devices()[:1]))
    base = sum(math.prod(v.get_value().shape) for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    adapters = sum(math.prod(v.get_value().shape) for _, v in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)))
    alone = reckon(2, 1, "full")
    assert alone["weights"] == 4 * (base - adapters) and alone["adapter, gradient, optimiser"] == 16 * adapters
    config.optim.name = "muon"  # one moment less
    with_muon = PlanJob.of(config, Lengths())
    one = memory.learning(with_muon, job.sizes, 2, {"data": 1, "fsdp": 1, "tensor": 1}, "full", table)
    assert one["adapter, gradient, optimiser"] == 12 * adapters


def test_gpus_hold_as_many_rows_as_their_memory_has_room_for(config):
    record = memory.gpu_record(PlanJob.of(config, Lengths()))[0]
    job, table = PlanJob.of(config, Lengths()), memory.parameter_table(PlanJob.of(config, Lengths()))
    shape = {"data": 1, "fsdp": 1, "tensor": 1}
    one, two = (sum(memory.learning(job, job.sizes, n, shape, "full", table).values()) for n in (1, 2))
    for name, limit in memory.GPUS.items():
        most = record["largest"][name]
        assert one + (most - 1) * (two - one) <= limit < one + most * (two - one)
    assert record["total"] == pytest.approx(np.sum(list(record["bytes"]["step"].values())))


@pytest.mark.slow
def test_a_tpu_program_has_the_kernel(config, monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    config.mesh.data, config.mesh.fsdp, config.model.dtype = 1, 4, "bfloat16"
    planned = task.plan_topology(PlanJob.of(config, Lengths()), "v5e:2x2")
    (step,) = planned.phases
    assert step.kernels > 0 and planned.fits and step.whole == ()
