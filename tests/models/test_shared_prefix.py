"""Shared-prefix rows compute what separate samples compute, branches do not see each other, and mistakes are noticed.

Metrics: logits by their largest absolute difference over max(1, largest logit); each gradient tensor by its largest
absolute difference over its largest entry. Both must stay below 1e-5 (fp32).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm4d_jax.encode.example import Example, Grid
from mllm4d_jax.encode.positions import mrope_positions
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.generate.decoding import prefill, prefill_rows
from mllm4d_jax.models import shared_prefix, text
from mllm4d_jax.models.attention import masked_attention
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.models.split import attach_lora
from mllm4d_jax.rows.batch import collate
from mllm4d_jax.rows.rows import RowBatch, collate_rows, needed_sizes, share_prefix

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
FAMILIES = ("qwen3_vl", "qwen2_5_vl")
TOLERANCE = 1e-5
WORDS = 300  # tokens below are plain words in every golden model
QUICK = {"xla_backend_optimization_level": 0}  # compiling costs more than running here
# Row 0 is a video with 20 questions; row 1 has a video with 3, two images of different size with 1, and text with 1.
VIDEO, IMAGES = (Grid("video", 2, 4, 4),), (Grid("image", 1, 4, 4), Grid("image", 1, 2, 4))
ROWS = (((VIDEO, 20),), ((VIDEO, 3), (IMAGES, 1), ((), 1)))


def clip_tokens(rng, config, grids) -> list[int]:
    """Everything up to the question: random text, and the media between their markers."""

    def words(n):
        return rng.integers(10, WORDS, n).tolist()

    tokens = words(4)
    for grid in grids:
        pad = config.image_token_id if grid.modality == "image" else config.video_token_id
        per_frame = config.family == "qwen3_vl" and grid.modality == "video"
        runs, count = (grid.t, 1) if per_frame else (1, grid.t)
        for _ in range(runs):
            visual = [pad] * (count * grid.h * grid.w // config.merge_size**2)
            tokens += [*words(2), config.vision_start_token_id, *visual, config.vision_end_token_id]
    return tokens + words(3)


def make_examples(rng, config, grids, count) -> list[Example]:
    """`count` random questions about one random clip."""
    start = clip_tokens(rng, config, grids)
    pixels = 3 * config.temporal_patch_size * config.patch_size**2
    patches = rng.normal(size=(sum(g.t * g.h * g.w for g in grids), pixels)).astype(np.float32)
    examples = []
    for i in range(count):
        question, answer = rng.integers(1, 5), rng.integers(1, 4)
        tokens = np.array([*start, *rng.integers(10, WORDS, question + answer)], np.int32)
        positions, delta = mrope_positions(
            tokens, grids, image_token_id=config.image_token_id, video_token_id=config.video_token_id,
            merge_size=config.merge_size, family=config.family, tokens_per_second=config.tokens_per_second,
            second_per_grid=[1.0] * sum(g.modality == "video" for g in grids) if config.family != "qwen3_vl" else (),
        )  # fmt: skip
        supervised = np.arange(len(tokens)) >= len(tokens) - answer
        examples.append(Example(f"q{i}", tokens, positions, delta, supervised, patches, grids, (), ""))
    return examples


def flattened(batch: RowBatch) -> RowBatch:
    row, entry = np.nonzero(batch.loss_weight)
    index, target, weight = (x[row, entry] for x in batch[1:])
    return RowBatch(batch.inputs, (row * batch.inputs.tokens.shape[1] + index).astype(np.int32), target, weight)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with random adapters and one batch in both forms; `owner` is the example of each loss entry.

    The loss lists of either form are flat, of real entries alone: `row * S + s`, row after row.
    The frozen tower has run: `inputs.vision` holds its features, `frames` the frames it ran on in either form.
    """

    graphdef: nnx.GraphDef
    lora: nnx.State
    frozen: nnx.State
    rows: RowBatch
    separate: RowBatch
    owner: np.ndarray
    frames: tuple[int, int]

    def losses(self, lora, batch: RowBatch):
        """Losses of the examples, and with them the logits [M, V] of all targets; vision features are there already."""
        model = nnx.merge(self.graphdef, lora, self.frozen)
        hidden = model(batch.inputs, batch.inputs.vision)
        logits = model.logits(hidden.reshape(-1, hidden.shape[-1])[batch.loss_index])
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.loss_target[:, None], 1)[:, 0]
        each = jax.ops.segment_sum(nll * batch.loss_weight, jnp.asarray(self.owner), int(self.owner.max()) + 1)
        return each, logits

    @functools.cached_property
    def differentiated(self):
        """Compiled (lora, batch, weights [G, examples]) -> logits, losses, G gradients of weighted sums of losses."""

        def both(lora, batch, weights):
            each, pull, logits = jax.vjp(lambda p: self.losses(p, batch), lora, has_aux=True)
            return logits, each, jax.lax.map(pull, weights)[0]

        return jax.jit(both, compiler_options=QUICK)

    def run(self, batch: RowBatch, weights: np.ndarray):
        with jax.default_matmul_precision("highest"):
            logits, each, grads = self.differentiated(self.lora, batch, weights)
        return jax.tree.map(np.asarray, (logits, each, jax.tree.leaves(grads)))

    def fresh_logits(self, *batches: RowBatch) -> list[np.ndarray]:
        """Traced anew, so that a function replaced by a test takes part."""
        logits = jax.jit(lambda *a: self.losses(*a)[1], compiler_options=QUICK)
        with jax.default_matmul_precision("highest"):
            return [np.asarray(logits(self.lora, batch)) for batch in batches]


@functools.lru_cache
def case(name: str) -> Case:
    rng = np.random.default_rng(7)
    model = load_model(GOLDEN / name, dtype=jnp.float32, attention="xla")
    attach_lora(model, rank=2, alpha=4.0, targets=("q_proj", "v_proj", "o_proj"), rngs=nnx.Rngs(0))
    graphdef, lora, frozen = nnx.split(model, nnx.LoRAParam, ...)
    # B starts at zero, which would leave A without a gradient.
    lora = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.1, jnp.float32), lora)
    config, geometry = ProcessorConfig.from_folder(GOLDEN / name), vision_geometry(model.config)
    ids = (config.image_token_id, config.video_token_id)
    clips = [[make_examples(rng, config, grids, n) for grids, n in row] for row in ROWS]
    rows = [[group for examples in row for group in share_prefix(examples, ids)] for row in clips]
    assert [[len(g.examples) for g in row] for row in rows] == [[20], [3, 1, 1]]
    examples = [e for row in clips for clip in row for e in clip]
    targets = [np.flatnonzero(e.supervised) for e in examples]
    owner = np.concatenate([np.full(len(t), i) for i, t in enumerate(targets)])
    batch = flattened(collate_rows(rows, needed_sizes(rows, geometry), geometry, visual_token_ids=ids))
    inputs = collate(examples, geometry, visual_token_ids=ids)
    index = np.concatenate([i * inputs.tokens.shape[1] + t - 1 for i, t in enumerate(targets)])
    words = np.concatenate([e.tokens[t] for e, t in zip(examples, targets, strict=True)])
    separate = RowBatch(inputs, index.astype(np.int32), words, np.ones(len(index), np.float32))
    np.testing.assert_array_equal(batch.loss_target, words)
    frames = (len(batch.inputs.vision.patches), len(inputs.vision.patches))
    encode = jax.jit(lambda f, v: nnx.merge(graphdef, lora, f).encode_vision(v), compiler_options=QUICK)
    with jax.default_matmul_precision("highest"):
        batch, separate = (
            b._replace(inputs=b.inputs._replace(vision=encode(frozen, b.inputs.vision))) for b in (batch, separate)
        )
    return Case(graphdef, lora, frozen, batch, separate, owner, frames)


EACH = np.eye(25, dtype=np.float32)
# Some of 20, 3, 1 (images) and 1 (text); last, all at once with weights that nothing else would give.
SOME = np.concatenate([EACH[[0, 4, 19, 21, 23, 24]], np.random.default_rng(0).normal(size=(1, 25)).astype(np.float32)])


@functools.lru_cache
def results(name: str):
    """(shared rows, separate samples), each (logits, losses, gradients for SOME)."""
    return case(name).run(case(name).rows, SOME), case(name).run(case(name).separate, SOME)


def deviation(ours, expected, floor: float = 0.0) -> float:
    return float(np.abs(ours - expected).max() / max(floor, np.abs(expected).max()))


def edited(batch: RowBatch, where, token) -> RowBatch:
    """The batch with `token` put at flat positions `where`."""
    tokens = batch.inputs.tokens.copy()
    tokens.reshape(-1)[where] = token
    return batch._replace(inputs=batch.inputs._replace(tokens=tokens))


def compare(shared, separate):
    (logits, losses, grads), (logits_apart, losses_apart, grads_apart) = shared, separate
    assert deviation(logits, logits_apart, 1.0) < TOLERANCE
    assert deviation(losses, losses_apart) < TOLERANCE
    assert len(losses) == 25 and losses.min() > 0.5
    for ours, apart in zip(grads, grads_apart, strict=True):
        for branch in range(len(ours)):
            assert np.abs(apart[branch]).max() > 1e-4
            assert deviation(ours[branch], apart[branch]) < TOLERANCE


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_equal_separate_samples(name):
    compare(*results(name))
    assert case(name).frames == (2 * (2 + 2), 25 * 2)  # each row has as many as the fullest one


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, "qwen3_vl_moe"])
def test_every_branch_equals_its_sample(name):
    c = case(name)
    compare(c.run(c.rows, EACH), c.run(c.separate, EACH))


@pytest.mark.parametrize("edit", ["4 in a row of its clip alone", "24 behind another clip's", "22 before another's"])
def test_a_branch_does_not_touch_another(edit):
    c, changed = case("qwen3_vl"), int(edit.split()[0])
    (_, before, grads), _ = results("qwen3_vl")
    first, neighbours = first_token(c, changed)
    assert bool(neighbours) == ("another" in edit)  # 24 is in a slot with one of the three of its row's first clip
    token = int(c.rows.inputs.tokens.reshape(-1)[first]) + 1
    _, after, other = c.run(edited(c.rows, first, token), SOME)
    rest = np.arange(25) != changed
    np.testing.assert_array_equal(before[rest], after[rest])
    assert abs(before[changed] - after[changed]) > 1e-3
    own = SOME[:-1, changed] > 0
    for a, b in zip(grads, other, strict=True):
        np.testing.assert_array_equal(a[:-1][~own], b[:-1][~own])
        assert not own.any() or np.abs(a[:-1][own] - b[:-1][own]).max() > 1e-5


def first_token(c: Case, owner: int) -> tuple[int, set[int]]:
    """Flat position of the first token of a branch, and the other clips that its slot holds."""
    layout, size = c.rows.inputs.layout, c.rows.inputs.tokens.shape[1]
    row, place = divmod(int(c.rows.loss_index[c.owner == owner][-1]), size)
    start = layout.prefix + (place - layout.prefix) // layout.length * layout.length
    slot = c.rows.inputs.segment_ids[row, start : start + layout.length]
    clip = slot[place - start]
    return row * size + start + int(np.argmax(slot == clip)), set(slot.tolist()) - {0, int(clip)}


def test_padding_changes_nothing():
    c = case("qwen3_vl")
    inputs = c.rows.inputs
    padding = inputs.segment_ids == 0
    assert padding.mean() > 0.3
    tokens = np.where(padding, np.arange(padding.size).reshape(padding.shape) % 400, inputs.tokens)
    positions = np.where(padding, 17, inputs.positions)
    changed = c.rows._replace(inputs=inputs._replace(tokens=tokens.astype(np.int32), positions=positions))
    for before, after in zip(
        jax.tree.leaves(results("qwen3_vl")[0]), jax.tree.leaves(c.run(changed, SOME)), strict=True
    ):
        np.testing.assert_array_equal(before, after)


def dense(visible):
    """`row_attention` by a whole mask: visible(q, k, slot of q, slot of k, layout) for index arrays."""

    def attend(q, k, v, *, segment_ids, layout, backend):
        index = np.arange(layout.size)
        slot = (index - layout.prefix) // layout.length
        seen = visible(index[:, None], index[None], slot[:, None], slot[None], layout)
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :]) & seen
        return masked_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)

    return attend


def sound(q, k, q_slot, k_slot, layout):
    return (k <= q) & ((k < layout.prefix) | (q_slot == k_slot))


def all_slots(q, k, q_slot, k_slot, layout):
    return k <= q


def prefix_sees_branches(q, k, q_slot, k_slot, layout):
    return sound(q, k, q_slot, k_slot, layout) | ((q < layout.prefix) & (k >= layout.prefix))


@pytest.mark.parametrize(("visible", "same"), [(sound, True), (all_slots, False), (prefix_sees_branches, False)])
def test_a_wrong_mask_is_noticed(monkeypatch, visible, same):
    expected, _, _ = results("qwen3_vl")[1]
    monkeypatch.setattr(text, "row_attention", dense(visible))
    c = case("qwen3_vl")
    assert (deviation(c.fresh_logits(c.rows)[0], expected, 1.0) < TOLERANCE) == same


def test_keys_of_another_slot_are_noticed(monkeypatch):
    expected, _, _ = results("qwen3_vl")[1]
    original = shared_prefix._two_parts

    def rolled(q, prefix_k, prefix_v, see_prefix, own_k, own_v, see_own):
        return original(q, prefix_k, prefix_v, see_prefix, jnp.roll(own_k, 1, 1), jnp.roll(own_v, 1, 1), see_own)

    monkeypatch.setattr(shared_prefix, "_two_parts", rolled)
    c = case("qwen3_vl")
    assert deviation(c.fresh_logits(c.rows)[0], expected, 1.0) > 100 * TOLERANCE


def test_positions_that_do_not_continue_are_noticed():
    """Branches that start again at 0, or that go on where their slot lies in the row."""
    c = case("qwen3_vl")
    expected, _, _ = results("qwen3_vl")[1]
    p, length = c.rows.inputs.layout.prefix, c.rows.inputs.layout.length

    def moved(places):
        positions = c.rows.inputs.positions.copy()
        positions[..., p:] = places(np.arange(positions.shape[2] - p))
        return c.rows._replace(inputs=c.rows.inputs._replace(positions=positions))

    for logits in c.fresh_logits(moved(lambda i: i % length), moved(lambda i: p + i)):
        assert deviation(logits, expected, 1.0) > 100 * TOLERANCE


def test_rows_and_caches_are_checked():
    c = case("qwen3_vl")
    inputs = c.rows.inputs._replace(vision=None)

    def model():
        return nnx.merge(c.graphdef, c.lora, c.frozen)

    with pytest.raises(ValueError, match="every row must be one prompt"):
        jax.eval_shape(lambda x: prefill(model(), x), inputs)
    with pytest.raises(ValueError, match="shared-prefix rows are needed"):
        jax.eval_shape(lambda x: prefill_rows(model(), x), inputs._replace(layout=None))
    with pytest.raises(ValueError, match="tokens for RowLayout"):
        wrong = dataclasses.replace(inputs.layout, slots=3)
        jax.eval_shape(lambda x: model().forward(x), inputs._replace(layout=wrong))
