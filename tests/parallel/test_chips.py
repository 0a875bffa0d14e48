"""Which line of the table a device means: by whole words of its kind, as JAX reports it."""

from __future__ import annotations

import pytest

from mllm4d_jax.parallel.chips import CHIPS, chip_of, peak_flops


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("Tesla V100-SXM2-16GB", "V100 16 GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA L4", "L4 24 GB"),
        ("NVIDIA L40", "L40 48 GB"),
        ("NVIDIA L40S", "L40S 48 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80 GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80 GB"),
        ("NVIDIA H100 NVL", "H100 NVL 94 GB"),
        ("NVIDIA H200", "H200 141 GB"),
        ("NVIDIA H200 NVL", "H200 NVL 141 GB"),
        ("NVIDIA GH200 480GB", "GH200 96 GB"),
        ("NVIDIA GH200 144G HBM3e", "GH200 144 GB"),
        ("NVIDIA B200", "B200 180 GB"),
        ("NVIDIA GB200", "GB200 186 GB"),
    ],
)
def test_the_longest_match_of_whole_words_is_meant(kind, name):
    assert chip_of(kind) is CHIPS[name] and peak_flops(kind) == CHIPS[name].flops


def test_makers_figures():
    assert [CHIPS[name].flops for name in ("L4 24 GB", "L40 48 GB", "L40S 48 GB")] == [121e12, 181e12, 362e12]
    assert [CHIPS[name].flops for name in ("A100 80 GB", "H100 PCIe 80 GB")] == [312e12, 756e12]
    assert [CHIPS[name].flops for name in ("H200 141 GB", "H200 NVL 141 GB", "GH200 144 GB")] == [
        989.5e12,
        835.5e12,
        989.5e12,
    ]
    assert [CHIPS[name].hbm for name in ("H200 NVL 141 GB", "GH200 144 GB")] == [141e9, 144e9]


@pytest.mark.parametrize("kind", ["cpu", "an accelerator of next year", "NVIDIA L400", "TPU v55"])
def test_an_unknown_kind_is_never_guessed(kind):
    assert peak_flops(kind) is None
