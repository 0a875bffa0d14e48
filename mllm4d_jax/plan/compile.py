"""The phases of a step: compiled for devices that are not here, what their programs say, and how long they take."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from mllm4d_jax.parallel import collectives as hlo
from mllm4d_jax.parallel.chips import Chip
from mllm4d_jax.parallel.place import local_bytes, placed
from mllm4d_jax.parallel.topology import TopologyError
from mllm4d_jax.run.build import Parts
from mllm4d_jax.run.fitting import out_of_memory, wanted_bytes

EFFICIENCY = 0.5  # share of peak FLOP/s that the matrix products of a step are taken to reach
FORMULA = (
    "The seconds of a phase are the largest of: its FLOPs with recomputation / devices / "
    f"({EFFICIENCY:.0%} of peak), bytes to and from memory / its rate, bytes received / rate of one ring. Bytes to and "
    "from memory: the decoder's weights once for each pass (forward, once again, backward), with the inputs and "
    "results of its matrix products; bytes received: collectives of the compiled program, each as often as its loop "
    "runs. Overlap and waiting are not modelled: it is a rough estimate, more likely too short than too long."
)
# Said where kernels of sparse layers cannot be compiled: by the plugin, and by JAX, which asks a GPU how large it is.
_OF_KERNELS = ("mosaic_gpu", "core_count")
_KERNEL = re.compile(r"tpu_custom_call|__cudnn\$fmha|mosaic_gpu")  # of attention: Pallas on either, cuDNN


@dataclasses.dataclass(frozen=True)
class Phase:
    """One jitted program of a step.

    Attributes:
      name: for people.
      kind: the same for programs that differ only in the sizes of their arrays.
      lower: lowers the run's own function for shapes that lie as in the run.
      held: bytes on a device of all that is there besides what the program makes, by kind.
      rows: of the learner, or prompts of the sampler, on a device.
      size: positions of a row, all of whose logits or scores must not exist.
      prompts: over all devices, filled-up rows of the sampler among them; 0 where their number does not matter.
      mean: tokens of the completions it is for, 0 for any.
    """

    name: str
    kind: str
    lower: Callable[[], jax.stages.Lowered]
    held: dict[str, int]
    rows: int
    size: int
    prompts: int = 0
    mean: int = 0


Phases = Generator[Phase, Any, None]  # is sent the placed shapes of each phase's results, None where it was refused


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compilation of a phase told.

    Attributes:
      phase: what was compiled.
      memory: bytes on a device by kind; "peak" is their sum less what results share with arguments. None when the
        compiler itself refused for lack of memory.
      needed: bytes the program wants, also when it was refused.
      seconds: of lowering and compiling.
      kernels: calls of attention kernels in the program.
      received: bytes a device receives in a run, by collective.
      gathered: the largest array that a gather makes, as text.
      largest: the largest arrays made, as text.
      whole: arrays that must not exist: all logits of a row, or all scores.
    """

    phase: Phase
    memory: dict[str, int] | None
    needed: int
    seconds: float
    kernels: int = 0
    received: dict[str, int] = dataclasses.field(default_factory=dict)
    gathered: str = ""
    largest: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()

    def fits(self, limit: int) -> bool:
        """Return whether it can run on devices that let programs have so many bytes, see `Chip.usable`."""
        return self.memory is not None and self.needed <= limit


def compile_phases(phases: Phases, vocabulary: int, options: Mapping[str, bool]) -> Iterator[Compiled]:
    """Compile the phases of a step one after the other. Arguments as for `compile_phase`."""
    results = None
    with contextlib.suppress(StopIteration):
        while True:
            compiled, results = compile_phase(phases.send(results), vocabulary, options)
            yield compiled


def results_of(program: jax.stages.Compiled) -> Any:
    """Return the shapes of what a program returns, placed as it leaves them."""
    return jax.tree.map(placed, program.out_info, program.output_shardings)


def compile_phase(phase: Phase, vocabulary: int, options: Mapping[str, bool]) -> tuple[Compiled, Any]:
    """Compile a phase; return what the program says, and the shapes of its results, None if there is no memory.

    Args:
      vocabulary: of the model.
      options: of the compiler for these devices, besides the program's own, see `Topology`.

    Raises:
      TopologyError: there are kernels in the program that this machine cannot compile.
    """
    started = time.perf_counter()
    try:
        program = phase.lower().compile(compiler_options=dict(options))
    except (jax.errors.JaxRuntimeError, AttributeError) as problem:
        if any(part in str(problem) for part in _OF_KERNELS):
            raise TopologyError(
                "a sparse model's kernels for GPUs are compiled by parts of jax-cuda13-plugin that need a driver: "
                "plan where there is such a GPU, or by --plan=memory"
            ) from None
        if isinstance(problem, AttributeError) or not out_of_memory(problem):
            raise
        return Compiled(phase, None, wanted_bytes(str(problem)), time.perf_counter() - started), None
    seconds = time.perf_counter() - started
    memory = memory_by_kind(phase.held, program.memory_analysis())
    text = program.as_text()
    found = hlo.collectives(text)
    most = max((c for c in found if c.kind == "all-gather"), key=lambda c: c.received, default=None)
    arrays = {(n, dtype, dims) for _, dtype, dims, n in hlo.arrays(text)}
    made = sorted({(n, f"{dtype}{list(dims)}") for n, dtype, dims in arrays}, reverse=True)
    whole = [f"{dtype}{list(dims)}" for _, dtype, dims in arrays if whole_row(phase.size, vocabulary, dtype, dims)]
    compiled = Compiled(
        phase=phase,
        memory=memory,
        needed=memory["peak"],
        seconds=seconds,
        kernels=len(_KERNEL.findall(text)),
        received=hlo.received_bytes(found),
        gathered="" if most is None else " ".join(f"{d}{list(s)}" for d, s in most.shapes),
        largest=tuple(name for _, name in made[:5]),
        whole=tuple(sorted(whole)),
    )
    return compiled, results_of(program)


def whole_row(size: int, vocabulary: int, dtype: str, dims: tuple[int, ...]) -> bool:
    """Return whether an array holds the logits of every position of a row of `size`, or a score for every pair."""
    logits = dtype == "f32" and vocabulary in dims and math.prod(dims) >= size * vocabulary
    return logits or dims.count(size) >= 2


def memory_by_kind(held: dict[str, int], stats: Any) -> dict[str, int]:
    """Return the bytes on a device: what is there, what the compiler adds, and the sum that has to fit.

    Args:
      held: see `Phase`.
      stats: of the compiled program (`memory_analysis`).
    """
    kinds = dict(held)
    # Arguments are padded to tiles. A program is not handed those that it never reads, but they are in memory, too.
    kinds["layout"] = max(0, stats.argument_size_in_bytes - sum(held.values()))
    kinds["temporaries"] = stats.temp_size_in_bytes
    kinds["results"] = stats.output_size_in_bytes - stats.alias_size_in_bytes  # beyond the donated
    kinds["program"] = stats.generated_code_size_in_bytes
    return kinds | {"peak": sum(kinds.values())}


def held_by(parts: Parts) -> dict[str, int]:
    """Return the bytes on a device of the trees of a run."""
    return {
        "frozen": local_bytes(parts.frozen),
        "trainable": local_bytes(parts.trainable),
        "optimiser": local_bytes(parts.opt_state),
    }


@dataclasses.dataclass(frozen=True)
class PhaseWork:
    """What a phase does in a step.

    Attributes:
      phase: what it is counted as.
      kind: of the program.
      times: how often the program runs in a step.
      flops: of one run, over all devices, with recomputation.
      traffic: bytes that a device reads and writes in one run.
      loops: how often what the program receives is received in one run: the text of a decode program does not show how
        often its loop runs.
    """

    phase: str
    kind: str
    times: int
    flops: float
    traffic: float
    loops: int = 1


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a step.

    Attributes:
      mean, longest: tokens of a completion and of a step's longest; of an answer in fine-tuning.
      seconds: lower bounds by phase, and within one by what bounds it: "compute", "memory", "network".
      flops: of a step with recomputation, over all devices.
      received: bytes that a device receives in a step.
    """

    mean: int
    longest: int
    seconds: dict[str, dict[str, float]]
    flops: float
    received: float

    @property
    def step(self) -> float:
        """Seconds of the whole step: the largest bound of each phase."""
        return sum(max(bounds.values()) for bounds in self.seconds.values())


def timing(
    calls: Iterable[PhaseWork], compiled: Sequence[Compiled], devices: int, chip: Chip, mean: int, longest: int
) -> Timing:
    """Return the seconds of a step; see `FORMULA`.

    Args:
      calls: of a step with such completions.
      compiled: of its phases.
      devices: that share the FLOPs.
      chip: one of them.
      mean, longest: see `Timing`.
    """
    received = {c.phase.kind: sum(c.received.values()) for c in compiled if c.phase.mean in (0, mean)}
    seconds: dict[str, dict[str, float]] = {}
    total = moved = 0.0
    for call in calls:
        bounds = seconds.setdefault(call.phase, {"compute": 0.0, "memory": 0.0, "network": 0.0})
        network = call.times * call.loops * received.get(call.kind, 0)
        bounds["compute"] += call.times * call.flops / devices / (EFFICIENCY * chip.flops)
        bounds["memory"] += call.times * call.traffic / chip.hbm_rate
        bounds["network"] += network / chip.ici_rate
        total, moved = total + call.times * call.flops, moved + network
    return Timing(mean, longest, seconds, total, moved)
