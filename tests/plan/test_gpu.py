"""Plans for GPUs that are not here: their names, their compiler, and where it is installed what it makes."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from packaging.requirements import Requirement

from configs import common, sft
from mllm4d_jax.models.layers import REMAT
from mllm4d_jax.parallel import topology
from mllm4d_jax.parallel.chips import CHIPS, GIB, Chip
from mllm4d_jax.parallel.topology import GPU_OPTIONS, PLANNED, TopologyError, open_topology, split_name
from mllm4d_jax.plan import task
from mllm4d_jax.plan.compile import Compiled, Phase, compile_phase
from mllm4d_jax.plan.job import Lengths, PlanJob
from mllm4d_jax.plan.memory import policies
from mllm4d_jax.plan.tables import TopologyPlan
from tests.plan.grpo_jobs import paper_job

ROOT = Path(__file__).parents[2]


def test_names_of_gpus():
    assert [split_name(n) for n in ("h100", "h200:1", " h100:8", "h100:16")] == [
        ("h100", "1"),
        ("h200", "1"),
        ("h100", "8"),
        ("h100", "16"),
    ]
    assert split_name("v5p:2x2x1") == ("v5p", "2x2x1")
    for name in ("h100:0", "h100:9", "h100:2x4", "h100:", "h100:8+", "h100x8", "l4", "v5e:8"):
        with pytest.raises(TopologyError):
            split_name(name)


def test_what_programs_can_have():
    """Nine tenths of a GPU, 95 % of a TPU; a GPU shows more than its advertised gigabytes."""
    assert {chip.plan for chip in PLANNED.values() if chip.net_rate} == {"h100", "h200"}
    assert [round(PLANNED[name].usable / PLANNED[name].hbm, 3) for name in ("v5e", "h100", "h200")] == [0.95, 0.9, 0.9]
    assert [round(PLANNED[name].hbm / GIB, 1) for name in ("h100", "h200")] == [79.1, 139.8]
    assert all(chip.hbm_rate and chip.ici_rate for chip in PLANNED.values()) and CHIPS["A100 80 GB"].usable > 71 * GIB


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("jax_plugins", "there is no jax-cuda13-pjrt: pip"),
        ("nvidia", "no nvidia-cuda-nvcc and no nvidia-nvvm"),
        ("", "no jax-cuda13-pjrt and no nvidia-cuda-nvcc and no nvidia-nvvm"),
    ],
)
def test_without_the_compiler_one_line_says_what_to_install(gone, message, monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ptxas").touch()
    (tmp_path / "nvvm" / "libdevice").mkdir(parents=True)

    def found(package):
        return None if package.startswith(gone) else [str(tmp_path)]

    monkeypatch.setattr(topology, "_spec", found)
    monkeypatch.setattr(topology.shutil, "which", lambda name: None)
    with pytest.raises(TopologyError) as error:
        open_topology("h100:8")
    text = str(error.value)
    assert message in text and "\n" not in text
    assert f'-r requirements-plan-gpu.txt "jax-cuda13-pjrt=={jax.__version__}"' in text
    lines = (ROOT / "requirements-plan-gpu.txt").read_text().splitlines()
    named = {Requirement(line).name for line in lines if line and line[0] not in "#-"}
    assert named == {"jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"}


def test_packages_are_found_without_being_imported():
    assert topology._spec("mllm4d_jax.plan") == [str(ROOT / "mllm4d_jax" / "plan")]
    assert topology._spec("mllm4d_jax.none") is None and topology._spec("none.of_this") is None


def test_a_program_that_is_too_large_is_told_by_its_size():
    """A compiler for GPUs refuses none."""
    lower = jax.jit(lambda x: (x @ x.T) @ x).lower(jax.ShapeDtypeStruct((512, 4), jnp.float32))
    one, _ = compile_phase(Phase("step", "step", lambda: lower, {"batch": 4 * 512 * 4}, 1, 1), 7, {})
    assert one.needed > 4 * 512 * 512
    assert one.fits(one.needed) and not one.fits(one.needed - 1)


def test_options_reach_the_compiler():
    lower = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((4,), jnp.float32))
    phase = Phase("step", "step", lambda: lower, {}, 1, 1)
    compile_phase(phase, 7, GPU_OPTIONS)  # known to every compiler
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        compile_phase(phase, 7, {"xla_no_such_option": True})


@pytest.mark.parametrize(
    "problem",
    [
        jax.errors.JaxRuntimeError("UNIMPLEMENTED: no mosaic_gpu_v2 here"),
        AttributeError("'Device' object has no attribute 'core_count'"),
    ],
)
def test_kernels_that_need_a_gpu_here_are_told(problem):
    """The first is of the plugin without a driver, the second of JAX's kernel for the gradient of experts."""

    def lower():
        raise problem

    with pytest.raises(TopologyError, match="plan where there is such a GPU, or by --plan=memory"):
        compile_phase(Phase("step", "step", lower, {}, 1, 1), 7, {})


def test_other_errors_of_a_program_are_its_own():
    def lower():
        raise AttributeError("no such thing")

    with pytest.raises(AttributeError, match="no such thing"):
        compile_phase(Phase("step", "step", lower, {}, 1, 1), 7, {})


@pytest.mark.parametrize(
    ("limit", "remat", "fits", "tried"),
    [(120, "dots", True, 1), (60, "full", True, 2), (10, "full", False, 2)],
)
def test_policies_are_tried_until_one_fits(limit, remat, fits, tried, monkeypatch):
    wanted, seen = {"dots": 100, "full": 50}, []
    chip, devices = Chip(round(limit / 0.9), 1e12), tuple(jax.devices()[:1])
    monkeypatch.setattr(task, "open_topology", lambda name: topology.Topology(name, chip, devices))
    monkeypatch.setattr(task, "policies", lambda *args: tuple(wanted))

    def plan(job, found, searching):
        seen.append(job.config.model.remat)
        needed = wanted[seen[-1]]
        one = Compiled(Phase("step", "step", None, {}, 1, 1), {"peak": needed}, needed, 1.0)
        facts = dict(notes=("as it was",), phases=(one,), timings=(), hours=0.0, largest=1, certainty="seen", facts={})
        return TopologyPlan(found.name, 1, {}, limit, limit, **facts)

    monkeypatch.setattr(task, "_plan", plan)
    config = common.config("sft")
    config.model.published = "2b"
    found = task.plan_topology(PlanJob.of(config, Lengths()), "h100")
    assert (seen, found.fits) == (["dots", "full"][:tried], fits)
    assert found.notes == ("as it was", f"model.remat=auto is '{remat}' here")


@pytest.fixture(scope="module")
def h100():
    if not all(topology._cuda_compiler().values()):
        pytest.skip("NVIDIA's compiler is not installed")
    return open_topology("h100:8")


def test_devices_of_a_host(h100):
    assert len(h100.devices) == 8 and {d.platform for d in h100.devices} == {"gpu"}
    assert {d.compute_capability for d in h100.devices} == {"9.0"}
    two = open_topology("h200:16")
    assert len(two.devices) == 16 and {d.process_index for d in two.devices} == {0, 1}
    assert (two.chip.ici_rate, h100.chip.ici_rate) == (50e9, 450e9)


@pytest.mark.slow
def test_a_step_for_a_gpu_has_the_kernel_and_no_scores(config, h100):
    one = sft.get_config("tiny")
    one.model.path, one.data.path, one.data.root = config.model.path, config.data.path, config.data.root
    one.mesh.data, one.mesh.fsdp, one.model.dtype, one.train.batch_size = 1, 8, "bfloat16", 8
    plan = task.plan_topology(PlanJob.of(one, Lengths()), "h100:8")
    (step,) = plan.phases
    assert step.kernels and not step.whole and step.received["all-gather"] > 0
    assert plan.fits and plan.usable == PLANNED["h100"].usable


def test_policies_that_are_far_from_fitting_are_not_compiled():
    """8 rows of 20 questions of the 8B model: 99 GiB are reckoned under "dots", 60 under "dots_except_mlp"."""
    config = common.config("sft")
    many = {"model.published": "8b", "data.questions_per_video": 20, "train.batch_size": 160}
    config.update_from_flattened_dict(many)
    job = PlanJob.of(config, Lengths())
    assert policies(job, "gpu", 1, PLANNED["h100"].usable) == ("dots_except_mlp", "full")
    assert policies(job, "gpu", 1, PLANNED["h200"].usable) == REMAT[1:]
    assert policies(job, "gpu", 8, PLANNED["h100"].usable)[-1] == "full"
    assert policies(job, "cpu", 1, PLANNED["h200"].usable) == ("none",)
    assert policies(job.with_settings({"model.remat": "dots"}), "gpu", 1, 1) == ("dots",)
    assert policies(job.with_settings({"mesh.fsdp": 3}), "gpu", 4, 1 << 50) == ("full",)  # no such mesh: said later
    rollouts = paper_job(**{"model.published": "2b"})
    assert policies(rollouts, "gpu", 1, PLANNED["h200"].usable)[-1] == "full"
    assert policies(rollouts, "gpu", 1, 1 << 30) == ("full",) and len(policies(rollouts, "gpu", 1, 1 << 50)) > 1
