"""Questions about one clip: N separate rows against one shared-prefix row, loss and LoRA gradient of a small decoder.

python benchmarks/shared_prefix.py [--prefix=900] [--branch=96] [--questions=1,4,20] [--repeats=3] [--block=0]

Both forms run in one process on the same random tokens. FLOPs are counted from the traced program, loop bodies times
their trip count, because the compiler's own count takes a loop's body once; memory is the compiled program's temporary
buffers. The vision tower is left out; it would run N times in one form and once in the other.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs.published import published_config
from mllm4d_jax.encode.example import Example
from mllm4d_jax.encode.grids import VisionGeometry
from mllm4d_jax.models.attention import Backend
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.split import attach_lora
from mllm4d_jax.rows.batch import collate
from mllm4d_jax.rows.rows import Group, RowBatch, collate_rows, needed_sizes

WIDTH, LAYERS, HEADS, KV_HEADS, VOCABULARY = 256, 3, 4, 2, 2048
GEOMETRY = VisionGeometry(merge_size=2, position_side=4, window=0)
ANSWER = 4  # supervised tokens of a question


class Measured(NamedTuple):
    """Of one form: seconds (the fastest run), counted FLOPs, temporary bytes, the loss, the gradient's leaves."""

    seconds: float
    flops: int
    temporary: int
    loss: float
    gradient: list


def small_config() -> ModelConfig:
    """A Qwen3-VL decoder of the widths above; its tower is never called."""
    config = published_config("2b")
    config["text_config"].update(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=WIDTH // HEADS, intermediate_size=3 * WIDTH, vocab_size=VOCABULARY,
    )  # fmt: skip
    config["text_config"]["rope_scaling"]["mrope_section"] = [12, 10, 10]
    config["vision_config"].update(
        depth=1, deepstack_visual_indexes=[0], hidden_size=32, intermediate_size=32, num_heads=1, out_hidden_size=WIDTH
    )
    return ModelConfig.from_dict(config)


def questions(count: int, prefix: int, branch: int) -> list[Example]:
    """Random questions with `prefix` tokens in common."""
    rng = np.random.default_rng(0)
    start, examples = rng.integers(10, VOCABULARY, prefix), []
    for i in range(count):
        tokens = np.concatenate([start, rng.integers(10, VOCABULARY, branch)]).astype(np.int32)
        positions = np.tile(np.arange(len(tokens), dtype=np.int32), (3, 1))
        supervised = np.arange(len(tokens)) >= len(tokens) - ANSWER
        examples.append(Example(f"q{i}", tokens, positions, 0, supervised, np.zeros((0, 1), np.float32), (), (), ""))
    return examples


def batches(count: int, prefix: int, branch: int) -> dict[str, RowBatch]:
    """The same questions in both forms."""
    examples = questions(count, prefix, branch)
    rows = [[Group(tuple(examples), prefix)]]
    shared = collate_rows(rows, needed_sizes(rows, GEOMETRY), GEOMETRY, visual_token_ids=())
    shared = RowBatch(shared.inputs, *(x[0] for x in shared[1:]))  # one row: its list is that of the batch
    targets = [(i, t) for i, e in enumerate(examples) for t in np.flatnonzero(e.supervised)]
    index = np.array([i * (prefix + branch) + t - 1 for i, t in targets], np.int32)
    inputs = collate(examples, GEOMETRY, visual_token_ids=())
    return {"separate": shared._replace(inputs=inputs, loss_index=index), "shared": shared}


def count_flops(jaxpr) -> int:
    """Multiplications and additions of all matrix products in a traced program, loops unrolled."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted, _ = equation.params["dimension_numbers"][0]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += trips * count_flops(inner) if hasattr(inner, "eqns") else 0
    return total


def measure(model: QwenVL, batch: RowBatch, repeats: int) -> Measured:
    """Compiles and runs the mean loss and its gradient with respect to the adapters."""
    graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def loss(lora, frozen, batch):
        model = nnx.merge(graphdef, lora, frozen)
        hidden = model(batch.inputs)
        logits = model.logits(hidden.reshape(-1, WIDTH)[batch.loss_index])
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.loss_target[:, None], 1)[:, 0]
        return -jnp.sum(picked * batch.loss_weight) / batch.loss_weight.sum()

    traced = jax.jit(jax.value_and_grad(loss)).trace(lora, frozen, batch)
    compiled = traced.lower().compile()
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        started = time.perf_counter()
        value, gradient = jax.block_until_ready(compiled(lora, frozen, batch))
        seconds.append(time.perf_counter() - started)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Measured(
        min(seconds[1:]), count_flops(traced.jaxpr.jaxpr), temporary, float(value), jax.tree.leaves(gradient)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prefix", type=int, default=900, help="tokens that all questions share")
    parser.add_argument("--branch", type=int, default=96, help="tokens of a question with its answer")
    parser.add_argument("--questions", default="1,4,20", help="values of N")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--block", type=int, default=0, help="query block of the blocked form; 0 for whole")
    args = parser.parse_args()
    model = QwenVL(small_config(), dtype=jnp.float32, attention="xla", remat="full", rngs=nnx.Rngs(0))
    attach_lora(model, rank=16, alpha=32.0, rngs=nnx.Rngs(0))
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "lora_b":  # zero at the start, which would leave A without a gradient
            value.set_value(0.02 * jax.random.normal(jax.random.key(0), value.get_value().shape))
    model.backend = Backend("xla", query_block=args.block or None)
    print(f"prefix {args.prefix}, branch {args.branch}, {LAYERS} x {WIDTH}, remat full, fp32, {jax.default_backend()}")
    print("   N      form      s/step   GFLOP   temp MiB   faster  FLOPs less   loss gap  gradient gap")
    for count in map(int, args.questions.split(",")):
        forms = {k: measure(model, b, args.repeats) for k, b in batches(count, args.prefix, args.branch).items()}
        apart, ours = forms["separate"], forms["shared"]
        for name, m in forms.items():
            line = f"{count:4d}  {name:>8}  {m.seconds:10.3f}  {m.flops / 1e9:6.1f}  {m.temporary / 2**20:9.1f}"
            if m is ours:
                line += f"  {apart.seconds / ours.seconds:6.2f}x  {apart.flops / ours.flops:8.2f}x"
                line += f"  {abs(apart.loss - ours.loss):9.1e}  {gradient_gap(apart, ours):12.1e}"
            print(line, flush=True)


def gradient_gap(a: Measured, b: Measured) -> float:
    """Largest difference of an entry over the largest entry of its tensor."""
    pairs = zip(a.gradient, b.gradient, strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.abs(x).max()) for x, y in pairs)


if __name__ == "__main__":
    main()
