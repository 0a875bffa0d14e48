"""Which pairs of flax and jax pip may choose: those that were tried, none that fails at import."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement

LINES = (Path(__file__).parents[1] / "requirements.txt").read_text().splitlines()
REQUIREMENTS = [Requirement(line) for line in LINES if line and not line.startswith("#")]


def allowed(package: str, version: str, python: str) -> bool:
    environment = {"python_version": python}
    found = [r for r in REQUIREMENTS if r.name == package and (not r.marker or r.marker.evaluate(environment))]
    assert len(found) == 1, f"{package} needs one line for Python {python}"
    return version in found[0].specifier


@pytest.mark.parametrize(
    ("python", "flax", "jax", "works"),
    [
        ("3.11", "0.12.8", "0.10.0", True),
        ("3.11", "0.12.8", "0.10.2", True),
        ("3.11", "0.12.8", "0.11.2", False),
        ("3.12", "0.12.10", "0.10.0", True),
        ("3.13", "0.12.12", "0.12.0.1", True),
        ("3.12", "0.12.8", "0.11.2", False),  # AttributeError: jax.experimental.hijax has no attribute HiPrimitive
        ("3.13", "0.12.9", "0.12.0.1", False),
    ],
)
def test_pairs_of_flax_and_jax(python, flax, jax, works):
    assert (allowed("flax", flax, python) and allowed("jax", jax, python)) is works
