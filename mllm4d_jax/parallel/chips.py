"""THE table of accelerators: figures of one JAX device of each kind. A new one is a line here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

GIB = 1 << 30
_GB = 10**9  # GPUs are sold by decimal gigabytes


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device. Sources: the Cloud TPU documentation, page "TPU versions", per chip; NVIDIA's data sheets.

    Attributes:
      hbm: bytes of memory.
      flops: dense bfloat16 FLOP/s (float16 where there is no bfloat16).
      hbm_rate: bytes/s of that memory; None for chips that nothing is compiled for ahead of time, as is `ici_rate`.
      ici_rate: bytes/s a device receives over one ring, that is over two of its links: the documented bidirectional
        rate of the chip divided by its number of links.
      kinds: words of `jax.Device.device_kind`, lower case; of all entries of the table whose words are all in a
        device's kind, the one of most words is meant.
      reckoned: `--plan=memory` says how much fits.
    """

    hbm: int
    flops: float
    hbm_rate: float | None = None
    ici_rate: float | None = None
    kinds: tuple[str, ...] = ()
    reckoned: bool = False


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v4": Chip(32 * GIB, 275e12, kinds=("tpu v4",)),
        "v5e": Chip(16 * GIB, 197e12, 0.82e12, 400e9 / 4, kinds=("tpu v5 lite", "tpu v5e")),
        "v5p": Chip(95 * GIB, 459e12, 2.765e12, 1200e9 / 6, kinds=("tpu v5", "tpu v5p")),
        "v6e": Chip(32 * GIB, 918e12, 1.64e12, 800e9 / 4, kinds=("tpu v6 lite", "tpu v6e")),
        # A v7x chip is two devices with half of it each.
        "tpu7x": Chip(96 * GIB, 1153.5e12, 3.69e12, 1200e9 / 6, kinds=("tpu7x",)),
        "V100 16 GB": Chip(16 * _GB, 125e12, kinds=("v100",)),
        "A100 40 GB": Chip(40 * _GB, 312e12, kinds=("a100",), reckoned=True),
        "A100 80 GB": Chip(80 * _GB, 312e12, kinds=("a100 80gb",), reckoned=True),
        "L4 24 GB": Chip(24 * _GB, 121e12, kinds=("l4",)),
        "L40 48 GB": Chip(48 * _GB, 181e12, kinds=("l40",)),
        "L40S 48 GB": Chip(48 * _GB, 362e12, kinds=("l40s",)),
        "H100 80 GB": Chip(80 * _GB, 989.5e12, kinds=("h100",), reckoned=True),
        "H100 PCIe 80 GB": Chip(80 * _GB, 756e12, kinds=("h100 pcie",)),
        "H100 NVL 94 GB": Chip(94 * _GB, 835.5e12, kinds=("h100 nvl",)),
        "H200 141 GB": Chip(141 * _GB, 989.5e12, kinds=("h200",), reckoned=True),
        "GH200 96 GB": Chip(96 * _GB, 989.5e12, kinds=("gh200",)),
        "B200 180 GB": Chip(180 * _GB, 2250e12, kinds=("b200",)),
        "GB200 186 GB": Chip(186 * _GB, 2500e12, kinds=("gb200",)),
    }
)


def chip_of(device_kind: str) -> Chip | None:
    """Return the entry of a device, None for a kind that is not in the table, such as a CPU."""
    words = set(re.findall(r"[a-z0-9]+", device_kind.lower()))
    meant = [(kind.split(), chip) for chip in CHIPS.values() for kind in chip.kinds]
    return max((m for m in meant if words.issuperset(m[0])), key=lambda m: len(m[0]), default=((), None))[1]


def peak_flops(device_kind: str) -> float | None:
    """Return the peak of one device, None for a kind that is not in the table."""
    chip = chip_of(device_kind)
    return chip and chip.flops
