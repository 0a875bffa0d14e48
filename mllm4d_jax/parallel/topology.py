"""TPU topologies that are not here: their devices, to compile for, and the figures of their chips."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from types import MappingProxyType

import jax

GIB = 1 << 30


class TopologyError(ValueError):
    """A topology that does not exist, or a compiler for it that is not installed."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a kind of TPU. Sources: the Cloud TPU documentation, page "TPU versions", per chip.

    Attributes:
      hbm: bytes of memory.
      flops: dense bfloat16 FLOP/s.
      hbm_rate: bytes/s of that memory.
      ici_rate: bytes/s a device receives over one ring, that is over two of its links: the documented bidirectional
        rate of the chip divided by its number of links.
    """

    hbm: int
    flops: float
    hbm_rate: float
    ici_rate: float


# A v7x chip is two devices with half of it each.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v5e": Chip(16 * GIB, 197e12, 0.82e12, 400e9 / 4),
        "v5p": Chip(95 * GIB, 459e12, 2.765e12, 1200e9 / 6),
        "v6e": Chip(32 * GIB, 918e12, 1.64e12, 800e9 / 4),
        "tpu7x": Chip(96 * GIB, 1153.5e12, 3.69e12, 1200e9 / 6),
    }
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as given, e.g. "v5e:4x4".
      chip: figures of one device.
      devices: all of them, in no host's possession.
    """

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]


def split_name(name: str) -> tuple[str, str]:
    """("v5e", "4x4") of "v5e:4x4".

    Raises:
      TopologyError: not of that form, or an unknown kind of chip.
    """
    parts = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+){1,2})", name.strip())
    if parts is None or parts[1] not in CHIPS:
        raise TopologyError(
            f"'{name}' is no TPU topology: CHIP:SHAPE with one of {', '.join(CHIPS)}, e.g. v5e:4x4 or v5p:2x2x1"
        )
    return parts[1], parts[2]


def open_topology(name: str) -> Topology:
    """The devices of a topology such as "v5e:4x4" or "v5p:2x2x1"; needs the TPU compiler, but no TPU.

    Raises:
      TopologyError: libtpu is not installed, or there is no such topology.
    """
    kind, _ = split_name(name)
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f'compiling for {name} needs the TPU compiler, no TPU: pip install "jax[tpu]=={jax.__version__}"'
        )
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(name.strip(), "tpu")
    except jax.errors.JaxRuntimeError as problem:
        raise TopologyError(f"there is no topology {name}: {str(problem).splitlines()[0]}") from None
    return Topology(name.strip(), CHIPS[kind], tuple(found.devices))
