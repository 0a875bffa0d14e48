"""What a step keeps: read from its traced program, where every array has its shape, and from the compiled one."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm4d_jax.encode.example import Example, Grid
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.models.split import attach_lora, split_model
from mllm4d_jax.rows.rows import Group, collate_rows, needed_sizes
from mllm4d_jax.sft.step import batch_sums

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "qwen3_vl"
PREFIX, BRANCH, QUESTIONS, ROWS, LAYERS, VOCABULARY = 150, 12, 10, 2, 4, 512
FRAMES, PATCHES, VIDEO = 3, 64, 504
QUICK = {"xla_backend_optimization_level": 0}  # compiling costs more than running here


@functools.cache
def batch(media: bool = False, prefix: int = PREFIX, questions: int = QUESTIONS):
    """Two rows of some questions each; with media, each prefix begins with a clip."""
    rng = np.random.default_rng(0)
    grids = (Grid("video", FRAMES, 8, 8),) if media else ()
    visual = FRAMES * PATCHES // 4 if media else 0
    rows = []
    for _ in range(ROWS):
        start = np.where(np.arange(prefix) < visual, VIDEO, rng.integers(10, 300, prefix))
        patches = rng.normal(size=(4 * visual, 3 * 2 * 4 * 4)).astype(np.float32)
        examples = []
        for i in range(questions):
            tokens = np.concatenate([start, rng.integers(10, 300, BRANCH)]).astype(np.int32)
            positions = np.tile(np.arange(len(tokens), dtype=np.int32), (3, 1))
            supervised = np.arange(len(tokens)) >= len(tokens) - 4
            examples.append(Example(f"{i}", tokens, positions, 0, supervised, patches, grids, (), ""))
        rows.append([Group(tuple(examples), prefix)])
    geometry = vision_geometry(load_model(GOLDEN).config)
    return collate_rows(rows, needed_sizes(rows, geometry), geometry, visual_token_ids=(VIDEO,))


def traced(tokens=(PREFIX, QUESTIONS), media=False, trainable="lora", rank=2, block=32, unroll=False, **settings):
    """(function of the trained tree and the frozen one, these trees): sums over one batch."""
    model = load_model(GOLDEN, dtype=jnp.float32, attention="xla")
    if rank:
        attach_lora(model, rank=rank, alpha=4.0, rngs=nnx.Rngs(0))
    model.backend = dataclasses.replace(model.backend, query_block=block, unroll=unroll)
    for name, value in settings.items():
        setattr(model, name, value)
    graphdef, ours, frozen = split_model(model, trainable)
    ours = jax.tree.map(lambda x: x + 0.05, ours)
    rows = batch(media, *tokens)
    return lambda a, b: batch_sums(graphdef, a, b, rows, 16, jax.random.key(0)), ours, frozen


def equations(jaxpr):
    """All equations of a traced program, those of loops and calls inside included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def shapes(**kwargs) -> set[tuple[int, ...]]:
    """Shapes of all arrays of the traced program, vision tower included."""
    function, *trees = traced(media=True, **kwargs)
    return {tuple(v.aval.shape) for e in equations(jax.make_jaxpr(function)(*trees).jaxpr) for v in e.outvars}


def square(found) -> list[tuple[int, ...]]:
    """Shapes with queries and keys of a whole prefix or row."""
    return [s for s in found if sum(n >= PREFIX - 10 and n != VOCABULARY for n in s) > 1]


def test_no_array_of_all_logits_and_none_of_all_scores():
    found = shapes(remat="full")
    assert square(found) == []
    logits = [s for s in found if VOCABULARY in s and math.prod(s) > 16 * VOCABULARY]
    assert {len(s) for s in logits} == {2}  # the embedding, which is the head as well, either way round
    assert square(shapes(remat="full", block=None))  # the search finds what it looks for


def test_nothing_of_a_frozen_tower_is_kept():
    """Its activations, stacked over its blocks, exist only where the tower is trained."""

    def stacked(**kwargs):
        return [s for s in shapes(**kwargs) if s[:3] == (LAYERS, ROWS * FRAMES, PATCHES)]

    assert stacked(vision_remat="none") == []
    assert stacked(vision_remat="none", trainable=("lora", "vision/merger/.*")) == []
    everything = stacked(vision_remat="none", trainable=("lora", "vision/.*"))
    assert len(everything) > len(stacked(vision_remat="full", trainable=("lora", "vision/.*"))) >= 1


def kept(**kwargs) -> int:
    """Numbers that the forward pass over the decoder's layers leaves for the backward pass."""
    function, *trees = traced(**kwargs)
    scans = [e for e in equations(jax.make_jaxpr(function)(*trees).jaxpr) if e.primitive.name == "scan"]
    layers = [e for e in scans if e.params["length"] == LAYERS]
    assert len(layers) == 2
    outputs = layers[0].outvars[layers[0].params["num_carry"] :]
    return sum(math.prod(v.aval.shape) for v in outputs) // LAYERS


def test_remat_policies_keep_less():
    size = ROWS * (PREFIX + QUESTIONS * BRANCH)
    width, heads, keys, mlp, rank = 48, 128, 64, 96, 2
    full, some, dots, none = (kept(remat=remat) for remat in ("full", "dots_except_mlp", "dots", "none"))
    assert size * width <= full < 1.1 * size * width
    # Its input, q, k, v, attention, hidden states behind it, what the adapters make of their inputs; gate and up. Of
    # base and adapter the sum, not both, and nothing of the layer's last product, which nothing backward needs.
    products = width + heads + 2 * keys + heads + width + 4 * rank
    assert size * products <= some < 1.01 * size * products
    assert size * (products + 2 * mlp) <= dots < 1.01 * size * (products + 2 * mlp)
    assert none > 1.5 * dots


def test_remat_changes_no_gradient():
    results = []
    for remat, unroll in (("none", False), ("full", False), ("dots", False), ("dots_except_mlp", True)):
        function, *trees = traced(remat=remat, unroll=unroll)
        with jax.default_matmul_precision("highest"):
            results.append(jax.jit(function).lower(*trees).compile(QUICK)(*trees))
    for expected, *others in zip(*map(jax.tree.leaves, results), strict=True):
        for other in others:
            np.testing.assert_allclose(other, expected, atol=1e-5 * float(jnp.abs(expected).max()))


def test_adapters_cost_only_their_own_bytes():
    """Beside a gradient through the same layers without adapters, for so few tokens that only weights count."""

    def cost(**kwargs):
        function, ours, frozen = traced(tokens=(2, 1), remat="full", **kwargs)
        memory = jax.jit(function).lower(ours, frozen).compile(QUICK).memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes, sum(x.nbytes for x in jax.tree.leaves(ours))

    with_adapters, size = cost()
    without, _ = cost(rank=0, trainable="text/stacks/0/input_norm/scale")
    stacked = LAYERS * 4 * (48 * 128 + 2 * 48 * 64 + 128 * 48 + 3 * 48 * 96)
    assert 4 * size < stacked / 4
    # Themselves, their gradients, and one copy of either that a loop over layers may make.
    assert size < with_adapters - without < 4 * size
