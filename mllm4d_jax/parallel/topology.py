"""TPU topologies that are not here: their devices, to compile for."""

from __future__ import annotations

import dataclasses
import importlib.util
import re

import jax

from mllm4d_jax.parallel.chips import CHIPS, Chip


class TopologyError(ValueError):
    """A topology that does not exist, or a compiler for it that is not installed."""


TPUS = tuple(name for name, chip in CHIPS.items() if chip.ici_rate)


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
    if parts is None or parts[1] not in TPUS:
        raise TopologyError(
            f"'{name}' is no TPU topology: CHIP:SHAPE with one of {', '.join(TPUS)}, e.g. v5e:4x4 or v5p:2x2x1"
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
