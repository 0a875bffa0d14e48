"""Devices that are not here, to compile for: TPU topologies and hosts of NVIDIA GPUs."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import jaxlib.version

from mllm4d_jax.parallel.chips import CHIPS, Chip


class TopologyError(ValueError):
    """A topology that does not exist, or a compiler for it that is not installed."""


PLANNED: Mapping[str, Chip] = MappingProxyType({chip.plan: chip for chip in CHIPS.values() if chip.plan})
GPU_REQUIREMENTS = "requirements-plan-gpu.txt"
HOST = 8  # GPUs of a host
# On the device, products are timed and the fastest kernel is taken, mostly the library's; where none can be timed the
# compiler writes all of them itself and the program looks 5 to 12 % smaller than it is. With this it takes the library.
GPU_OPTIONS: Mapping[str, bool] = MappingProxyType({"xla_gpu_enable_triton_gemm": False})

# What XLA asks of a GPU, a GpuTargetConfig in the text form of protobuf; the cores are those of Hopper in SXM form.
_TARGET = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 {features} }}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  l2_cache_size: 52428800 clock_rate_ghz: 1.98 memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as given, e.g. "v5e:4x4" or "h100:8".
      chip: figures of one device.
      devices: all of them, in no host's possession.
      options: with which its programs are compiled.
      host: devices of one of several hosts, as if there were no others: compilers take a part of a topology for the
        whole of it, and refuse it or not by its numbers. () for one host.
    """

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]
    options: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    host: tuple[jax.Device, ...] = ()


def split_name(name: str) -> tuple[str, str]:
    """("v5e", "4x4") of "v5e:4x4", ("h100", "8") of "h100:8", ("h100", "1") of "h100".

    Raises:
      TopologyError: not of that form, an unknown kind of device, or hosts that are not full.
    """
    kind, colon, shape = name.strip().partition(":")
    gpus = [word for word, chip in PLANNED.items() if chip.net_rate]
    if kind in gpus:
        count = shape if colon else "1"
        if not re.fullmatch(r"[1-9]\d{0,4}", count) or (int(count) > HOST and int(count) % HOST):
            raise TopologyError(f"'{name}': {kind} or {kind}:COUNT, up to {HOST} of a host or a multiple of {HOST}")
        return kind, count
    if kind not in PLANNED or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        tpus = ", ".join(word for word in PLANNED if word not in gpus)
        raise TopologyError(
            f"'{name}' is no TPU topology and no GPU: CHIP:SHAPE with one of {tpus}, e.g. v5e:4x4 or v5p:2x2x1, or "
            f"{' or '.join(gpus)}, for several of a host e.g. {gpus[0]}:8; for other GPUs memory, without compiling"
        )
    return kind, shape


def open_topology(name: str) -> Topology:
    """The devices of a topology such as "v5e:4x4" or "h100:8"; needs the compiler for them, but none of them.

    Raises:
      TopologyError: the compiler is not installed, or there is no such topology.
    """
    kind, shape = split_name(name)
    make = _gpus if PLANNED[kind].net_rate else _tpus
    try:
        return make(name.strip(), PLANNED[kind], shape)
    except jax.errors.JaxRuntimeError as problem:
        raise TopologyError(f"there is no topology {name}: {str(problem).splitlines()[0]}") from None


def _tpus(name: str, chip: Chip, shape: str) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f'compiling for {name} needs the TPU compiler, no TPU: pip install "jax[tpu]=={jax.__version__}"'
        )
    from jax.experimental import topologies

    devices, host = tuple(topologies.get_topology_desc(name, "tpu").devices), ()
    own = [device.coords for device in devices if device.process_index == devices[0].process_index]
    if len(own) < len(devices):
        sizes = [max(along) - min(along) + 1 for along in zip(*own, strict=True)][: len(shape.split("x"))]
        part = f"{chip.plan}:{'x'.join(map(str, sizes))}"
        host = tuple(topologies.get_topology_desc(part, "tpu").devices)
    return Topology(name, chip, devices, host=host)


def _gpus(name: str, chip: Chip, shape: str) -> Topology:
    missing = [what for what, there in _cuda_compiler().items() if not there]
    if missing:
        raise TopologyError(
            f"compiling for {name} needs NVIDIA's compiler, no GPU; there is no {' and no '.join(missing)}: "
            f'pip install -r {GPU_REQUIREMENTS} "jax-cuda13-pjrt=={jax.__version__}"'
        )
    from jax.experimental import topologies

    count = int(shape)
    hosts, each = max(1, count // HOST), min(count, HOST)
    # jaxlib 0.10 does not know the field, and compiles for what the plain capability has.
    known = jaxlib.version.__version_info__ >= (0, 11)
    target = _TARGET.format(
        features="feature_extension: ACCELERATED_FEATURES" if known else "",
        bandwidth=round(chip.hbm_rate),
        memory=chip.hbm,
        name=f"NVIDIA {chip.plan.upper()}",
    )

    def of(hosts: int) -> tuple[jax.Device, ...]:
        found = topologies.get_topology_desc(platform="cuda", topology=f"1x{hosts}x{each}", target_config=target)
        return tuple(found.devices)

    if hosts > 1:
        chip = dataclasses.replace(chip, ici_rate=chip.net_rate)
    return Topology(name, chip, of(hosts), GPU_OPTIONS, of(1) if hosts > 1 else ())


def _cuda_compiler() -> dict[str, bool]:
    """Return the parts of NVIDIA's compiler, by name, and whether they are there."""
    roots = [Path(where) for spec in map(_spec, ("nvidia.cu13", "nvidia.cuda_nvcc")) if spec for where in spec]
    ptxas = shutil.which("ptxas") or any((root / "bin" / "ptxas").is_file() for root in roots)
    library = shutil.which("ptxas") or any((root / "nvvm" / "libdevice").is_dir() for root in roots)
    plugin = any(_spec(f"jax_plugins.xla_cuda{version}") for version in (13, 12))
    return {"jax-cuda13-pjrt": plugin, "nvidia-cuda-nvcc": bool(ptxas), "nvidia-nvvm": bool(library)}


def _spec(package: str) -> list[str] | None:
    """Return the folders of a package, None where it is not installed."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return None
    return None if spec is None else list(spec.submodule_search_locations or [])
