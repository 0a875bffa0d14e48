"""What prefill and decoding hold besides the weights, as compiled for a CPU in bfloat16; nothing is executed."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from configs.published import published_config
from mllm4d_jax.generate.joined import choose_form
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.programs import ChunkInputs, KeyNumbers
from mllm4d_jax.generate.sampler import Sampler
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.weight_map import abstract_model
from mllm4d_jax.parallel.place import placed
from mllm4d_jax.parallel.rules import replicated
from mllm4d_jax.parallel.topology import TopologyError, open_topology
from mllm4d_jax.rows.batch import ModelInputs

PROMPT, CHUNK = 16, 8


@pytest.fixture(scope="module")
def model():
    """A decoder whose layers and tied embedding are each far larger than anything computed from a short prompt."""
    raw = published_config("2b")
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=16, vocab_size=1 << 16, head_dim=32)
    heads = dict(num_attention_heads=8, num_key_value_heads=4)
    raw["text_config"] |= sizes | heads
    raw["text_config"]["rope_scaling"]["mrope_section"] = [6, 5, 5]
    raw["vision_config"] |= dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=256)
    raw["vision_config"]["deepstack_visual_indexes"] = [0]
    ids = dict(image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4)
    return abstract_model(ModelConfig.from_dict(raw | ids), dtype=jnp.bfloat16)


def programs(model, apart=False, mesh=None, branches=1):
    """(program of the sampler, traced), for one prompt of text."""
    graphdef, state = nnx.split(model)
    if mesh is not None:
        state = jax.tree.map(lambda x: placed(x, replicated(mesh)), state)
    sampler, options = Sampler(graphdef, chunk=CHUNK), SamplingOptions(eos_ids=(5,))
    one = np.zeros((1, branches), np.int32)
    numbers = KeyNumbers(np.uint32(0), one.astype(np.uint32), one)
    blank = np.zeros((1, PROMPT), np.int32)
    inputs = ModelInputs(blank, np.zeros((3, 1, PROMPT), np.int32), blank + 1, blank - 1, None, None)
    start = sampler.start.trace((state,), inputs, None, numbers, branches=branches, options=options, apart=apart)
    cache, own = sampler.empty.eval_shape((state,), shape=(1, branches, CHUNK), prompt=PROMPT, apart=apart)
    layers = sampler.layers.eval_shape((state,), kernels=False) if apart else None
    feed = ChunkInputs(one, one > 0, one, numbers, one + CHUNK, None, one + 1, np.int32(1))
    yield "start", start
    sent = dict(own=own, feed=feed, layers=layers, options=options, chunk=CHUNK)
    yield "decode", sampler.decode.trace((state,), cache, **sent)


def test_weights_are_never_widened_as_a_whole(model):
    """In float32 the layers are 62 MiB and the embedding is 64: neither exists, nor a second embedding of 16 bits."""
    layers = sum(x.size for x in jax.tree.leaves(nnx.state(model.text.stacks)))
    embedding = model.text.embed.shape[0] * model.text.embed.shape[1]
    for name, program in programs(model):
        held = program.lower().compile().memory_analysis().temp_size_in_bytes
        assert held < min(4 * layers, 2 * embedding) / 2, (name, held, layers, embedding)


def sliced(text, dtype, smallest):
    """Results of slices of at least so many elements in a program's text, with their shapes."""
    shapes = re.findall(rf"(?:dynamic_)?slice\b[^\n]*-> tensor<([\dx]+)x{dtype}>", text)
    return [shape for shape in shapes if math.prod(map(int, shape.split("x"))) >= smallest]


def test_a_gpu_decodes_without_slices_of_weights(model):
    """As lowered for one, with nothing of NVIDIA's installed; XLA would copy what is sliced."""
    smallest = 256 * 4 * 32  # of the key projection
    form = {apart: dict(programs(model, apart))["decode"] for apart in (False, True)}
    texts = {apart: traced.lower(lowering_platforms=("cuda",)).as_text() for apart, traced in form.items()}
    assert len(sliced(texts[False], "bf16", smallest)) == 4  # shapes of weights
    assert not sliced(texts[True], "bf16", smallest)


def test_a_compiled_gpu_program_copies_no_weight(model):
    """Compiled for an H100, where the compiler for it is installed: no result of a kernel is as large as a weight."""
    try:
        mesh = Mesh(np.array(open_topology("h100").devices).reshape(1, 1), ("data", "tensor"))
    except TopologyError as problem:
        pytest.skip(str(problem))
    smallest = 256 * 4 * 32
    for apart in (True, False):
        text = dict(programs(model, apart, mesh, branches=4))["decode"].lower().compile().as_text()
        body = re.split(r"\n(?=%?[\w.-]+ \()", text)
        loops = set(re.findall(r"body=%?([\w.-]+)", text))
        lines = "\n".join(part for part in body if re.match(r"%?([\w.-]+)", part)[1] in loops)
        made = re.findall(r" = \(?bf16\[([\d,]+)\][^=\n]* (?:fusion|copy|dynamic-slice)\(", lines)
        large = [shape for shape in made if math.prod(map(int, shape.split(","))) >= smallest]
        assert bool(large) != apart, large


def test_who_decodes_how(monkeypatch):
    """GPUs that hold the weights twice and have room left have the layers apart; 8B and 30B of 16 bits."""
    here = SingleDeviceSharding(jax.devices()[0])

    def form(platform, kind, billions, limit=None, capability="9.0", count=1):
        stats = dict(bytes_limit=limit * 1e9) if limit else None
        device = SimpleNamespace(
            platform=platform, device_kind=kind, memory_stats=lambda: stats, compute_capability=capability
        )
        weights = jax.ShapeDtypeStruct((int(billions * 1e9),), jnp.bfloat16, sharding=here)
        with monkeypatch.context() as patch:
            if limit is not None:
                patch.setattr(jax, "devices", lambda: [device])
            return choose_form(SimpleNamespace(devices=np.array([[device] * count])), weights)

    # Not here: planned for, or of another process.
    assert form("gpu", "NVIDIA H100 80GB HBM3", 8.8) == form("gpu", "NVIDIA H200", 8.8, count=8) == "apart"
    assert form("gpu", "NVIDIA H100 80GB HBM3", 31) == form("gpu", "NVIDIA L40S", 8.8) == "stacked"
    assert (
        form("gpu", "a GPU of another name", 0.001) == form("tpu", "TPU v5p", 2) == form("cpu", "cpu", 2) == "stacked"
    )
    # Here: by the memory that JAX has.
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    assert form("gpu", "NVIDIA H100 80GB HBM3", 8.8, 64) == "apart"
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    assert (
        form("gpu", "a GPU of another name", 8.8, 64)
        == form("gpu", "NVIDIA A100-SXM4-80GB", 8.8, 64, "8.0")
        == "kernels"
    )
    assert form("gpu", "Tesla V100-SXM2-32GB", 2, 24, "7.0") == form("gpu", "gfx942", 2, 24, "gfx942") == "apart"
    assert form("gpu", "NVIDIA H100 80GB HBM3", 8.8, 64, count=2) == "apart"
    assert form("gpu", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", 8.8, 8) == "stacked"
    # Here, and it does not say, as with an allocator of single arrays: by the memory of its kind.
    assert form("gpu", "NVIDIA H100 80GB HBM3", 8.8, 0) == "kernels"
    assert form("gpu", "NVIDIA H100 80GB HBM3", 31, 0) == form("gpu", "a GPU of another name", 0.001, 0) == "stacked"
