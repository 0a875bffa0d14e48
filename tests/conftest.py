"""Test session set-up: JAX on the CPU with eight fake devices, so that sharding is tested on any machine."""

from __future__ import annotations

import os
import sys

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could ask for eight CPU devices")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
