"""THE table of accelerators: figures of one JAX device of each kind. A new one is a line here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

GIB = 1 << 30
_GB = 10**9
_TPU, _GPU = 0.95, 0.9  # shares of the memory that programs can have; a GPU also holds a context and libraries' own


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device. Sources: the Cloud TPU documentation, page "TPU versions", per chip; NVIDIA's data sheets.

    Attributes:
      hbm: bytes of memory; of reckoned GPUs those that the driver shows, of others the advertised ones.
      flops: dense bfloat16 FLOP/s (float16 where there is no bfloat16).
      hbm_rate: bytes/s of that memory; None for chips that nothing is compiled for ahead of time, as is `ici_rate`.
      ici_rate: bytes/s a device receives over one ring, that is over two of its links: the documented bidirectional
        rate of the chip divided by its number of links. Of a GPU over NVLink, half of its bidirectional rate.
      kinds: words of `jax.Device.device_kind`, lower case; of all entries of the table whose words are all in a
        device's kind, the one of most words is meant.
      reckoned: `--plan=memory` says how much fits.
      plan: what `--plan` calls it; '' where nothing is compiled for it.
      net_rate: bytes/s a GPU receives from GPUs of other hosts: a 400 Gbit/s adapter each, as in NVIDIA's DGX.
    """

    hbm: int
    flops: float
    hbm_rate: float | None = None
    ici_rate: float | None = None
    kinds: tuple[str, ...] = ()
    reckoned: bool = False
    plan: str = ""
    net_rate: float | None = None

    @property
    def usable(self) -> int:
        """Bytes that a program can have; the rest is the runtime's, and what fragmentation leaves."""
        return int((_TPU if self.ici_rate and not self.net_rate else _GPU) * self.hbm)


CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v4": Chip(32 * GIB, 275e12, kinds=("tpu v4",)),
        "v5e": Chip(16 * GIB, 197e12, 0.82e12, 400e9 / 4, kinds=("tpu v5 lite", "tpu v5e"), plan="v5e"),
        "v5p": Chip(95 * GIB, 459e12, 2.765e12, 1200e9 / 6, kinds=("tpu v5", "tpu v5p"), plan="v5p"),
        "v6e": Chip(32 * GIB, 918e12, 1.64e12, 800e9 / 4, kinds=("tpu v6 lite", "tpu v6e"), plan="v6e"),
        # A v7x chip is two devices with half of it each.
        "tpu7x": Chip(96 * GIB, 1153.5e12, 3.69e12, 1200e9 / 6, kinds=("tpu7x",), plan="tpu7x"),
        "V100 16 GB": Chip(16 * _GB, 125e12, kinds=("v100",)),
        "A100 40 GB": Chip(int(39.39 * GIB), 312e12, kinds=("a100",), reckoned=True),
        "A100 80 GB": Chip(int(79.15 * GIB), 312e12, kinds=("a100 80gb",), reckoned=True),
        "L4 24 GB": Chip(24 * _GB, 121e12, kinds=("l4",)),
        "L40 48 GB": Chip(48 * _GB, 181e12, kinds=("l40",)),
        "L40S 48 GB": Chip(48 * _GB, 362e12, kinds=("l40s",)),
        "H100 80 GB": Chip(
            int(79.1 * GIB), 989.5e12, 3.35e12, 450e9, ("h100",), reckoned=True, plan="h100", net_rate=50e9
        ),
        "H100 PCIe 80 GB": Chip(80 * _GB, 756e12, kinds=("h100 pcie",)),
        "H100 NVL 94 GB": Chip(94 * _GB, 835.5e12, kinds=("h100 nvl",)),
        "H200 141 GB": Chip(
            int(139.8 * GIB), 989.5e12, 4.8e12, 450e9, ("h200",), reckoned=True, plan="h200", net_rate=50e9
        ),
        "H200 NVL 141 GB": Chip(141 * _GB, 835.5e12, kinds=("h200 nvl",)),
        "GH200 144 GB": Chip(144 * _GB, 989.5e12, kinds=("gh200 144g",)),
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
