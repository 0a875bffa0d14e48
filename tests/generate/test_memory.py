"""What prefill and decoding hold besides the weights, as compiled for a CPU in bfloat16; nothing is executed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.published import published_config
from mllm4d_jax.generate.decoding import empty_branches
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.sampler import ChunkInputs, KeyNumbers, Sampler
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.weight_map import abstract_model
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


def programs(model):
    """(program of the sampler, its compiled form), for one prompt of text and one completion."""
    graphdef, state = nnx.split(model)
    sampler, options = Sampler(graphdef, chunk=CHUNK), SamplingOptions(eos_ids=(5,))
    one, numbers = (
        np.zeros((1, 1), np.int32),
        KeyNumbers(np.uint32(0), np.zeros((1, 1), np.uint32), np.zeros((1, 1), "i4")),
    )
    blank = np.zeros((1, PROMPT), np.int32)
    inputs = ModelInputs(blank, np.zeros((3, 1, PROMPT), np.int32), blank + 1, blank - 1, None, None)
    start = sampler.lower("start", (state,), inputs, None, numbers, branches=1, options=options)
    cache = start.out_info[0]
    own = jax.eval_shape(lambda state: empty_branches(nnx.merge(graphdef, state), 1, 1, CHUNK), state)
    feed = ChunkInputs(one, one > 0, one, numbers, one + CHUNK, None, np.int32(1))
    yield "start", start.compile()
    yield "decode", sampler.lower("decode", (state,), cache, own=own, feed=feed, options=options, chunk=CHUNK).compile()


def test_weights_are_never_widened_as_a_whole(model):
    """In float32 the layers are 62 MiB and the embedding is 64: neither exists, nor a second embedding of 16 bits."""
    layers = sum(x.size for x in jax.tree.leaves(nnx.state(model.text.stacks)))
    embedding = model.text.embed.shape[0] * model.text.embed.shape[1]
    for name, program in programs(model):
        held = program.memory_analysis().temp_size_in_bytes
        assert held < min(4 * layers, 2 * embedding) / 2, (name, held, layers, embedding)
