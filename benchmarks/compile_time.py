"""Compile time of the scanned model against the same layers unrolled, at a published size. No weights are allocated.

python benchmarks/compile_time.py --size=2b [--tokens=512] [--frames=16] [--train]

Prints seconds to trace and lower, seconds to compile, and the size of the program, for both forms in one process.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs.published import SIZES, published_config
from mllm4d_jax.encode.example import Grid
from mllm4d_jax.encode.grids import pack_vision
from mllm4d_jax.models import text, vision
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.qwen_vl import QwenVL, vision_geometry
from mllm4d_jax.models.split import attach_lora
from mllm4d_jax.rows.batch import ModelInputs

SIDE = 14  # patches per side of a 224 x 224 frame


def unrolled_layers(blocks, step: Callable, carry, xs, *, remat: str = "none"):
    """`layers.scan_layers` as a Python loop: one copy of the body per layer."""
    graphdef, state = nnx.split(blocks)
    count = jax.tree.leaves(xs)[0].shape[0]

    def body(carry, layer_state, x):
        return step(nnx.merge(graphdef, layer_state), carry, x)

    if remat == "full":
        body = jax.checkpoint(body)
    outputs = []
    for i in range(count):
        carry, y = body(carry, *jax.tree.map(lambda a, i=i: a[i], (state, xs)))
        outputs.append(y)
    return carry, jax.tree.map(lambda *a: jnp.stack(a), *outputs)


def abstract_inputs(config: ModelConfig, tokens: int, frames: int) -> ModelInputs:
    """Shapes of one row: a clip of `frames` 224 x 224 frames and text up to `tokens`."""
    grid = Grid("video", frames // config.vision.temporal_patch_size, SIDE, SIDE)
    patches = np.zeros((grid.t * SIDE * SIDE, config.vision.patch_dim), np.float32)
    packed, _ = pack_vision(patches, [grid], vision_geometry(config))
    row = np.zeros((1, tokens), np.int32)
    inputs = ModelInputs(row, np.zeros((3, 1, tokens), np.int32), row, row, packed)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs)


def program(config: ModelConfig, train: bool):
    """(function, abstract state arguments): a forward pass, or the gradient of LoRA adapters with remat."""

    def make():
        remat = "full" if train else "none"
        model = QwenVL(config, dtype=jnp.bfloat16, attention="xla", remat=remat, rngs=nnx.Rngs(0))
        if train:
            attach_lora(model, rank=128, alpha=256.0, rngs=nnx.Rngs(0))
        return model

    graphdef, lora, rest = nnx.split(nnx.eval_shape(make), nnx.LoRAParam, ...)

    def forward(lora, rest, inputs):
        return jnp.sum(nnx.merge(graphdef, lora, rest)(inputs).astype(jnp.float32))

    return (jax.grad(forward) if train else forward), (lora, rest)


def measure(config: ModelConfig, inputs: ModelInputs, train: bool) -> tuple[float, float, int]:
    """(seconds to lower, seconds to compile, characters of the lowered program)."""
    function, state = program(config, train)
    started = time.monotonic()
    lowered = jax.jit(function).lower(*state, inputs)
    lowered_at = time.monotonic()
    lowered.compile()
    return lowered_at - started, time.monotonic() - lowered_at, len(lowered.as_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="2b", choices=SIZES)
    parser.add_argument("--tokens", type=int, default=512, help="row length")
    parser.add_argument("--frames", type=int, default=16, help="frames of 224 x 224 in the clip")
    parser.add_argument("--train", action="store_true", help="gradient of LoRA adapters instead of a forward pass")
    args = parser.parse_args()
    config = ModelConfig.from_dict(published_config(args.size))
    inputs = abstract_inputs(config, args.tokens, args.frames)
    what = "LoRA gradient with remat" if args.train else "forward pass"
    shape = f"{args.tokens} tokens, {args.frames} frames"
    print(f"{args.size}, {what}, {shape}, {jax.default_backend()}, jax {jax.__version__}")
    rows = {"scanned": measure(config, inputs, args.train)}
    with (
        mock.patch.object(text, "scan_layers", unrolled_layers),
        mock.patch.object(vision, "scan_layers", unrolled_layers),
    ):
        rows["unrolled"] = measure(config, inputs, args.train)
    for name, (lower, compile_, size) in rows.items():
        print(f"{name:>9}: lower {lower:6.1f} s  compile {compile_:6.1f} s  program {size / 1e6:6.2f} MB of text")
    a, b = rows["unrolled"], rows["scanned"]
    print(f"    ratio: lower {a[0] / b[0]:6.1f}    compile {a[1] / b[1]:6.1f}    program {a[2] / b[2]:6.1f}")


if __name__ == "__main__":
    main()
