"""Floating-point operations of a training step, counted from the shapes.

A compiler's own count visits the body of a scan once, so for stacked layers it has to be done by hand. Only matrix
products count (2 m k n each); norms, activations and rotary embeddings are below one percent. Per decoder token and
layer, with width H, q width Q, k/v width K, inner width I and adapters of rank r on projections (in, out):

    projections  2 (H Q + 2 H K + Q H)          feed-forward  2 * 3 H I    (sparse: 2 H E + top_k * 2 * 3 H I_expert)
    attention    4 Q per visible (query, key)   adapters      sum of 2 r (in + out)

The vision tower counts per patch, its attention per pair inside a frame (or window); the head 2 H V per supervised
position. Backward is once the forward for a frozen weight (the gradient of the input alone), twice for a trained one
and for attention; a frozen tower below the first trained weight has none. Recomputation is kept apart: it is work for
the hardware and none for the model, so MFU leaves it out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mllm4d_jax.models.config import ModelConfig, TextConfig, VisionConfig
from mllm4d_jax.rows.batch import ModelInputs, RowLayout

# Score and probability products that a fused attention kernel repeats in backward, as a share of its forward: one
# where a single kernel makes all three gradients, three where queries have a kernel of their own.
_KERNEL_REPEATS: Mapping[str, float] = {"xla": 0.0, "cudnn": 0.5, "splash": 1.5}


@dataclasses.dataclass(frozen=True)
class Work:
    """How much there is to compute in a step."""

    tokens: int  # of the decoder
    pairs: int  # visible (query, key) pairs of the decoder
    patches: int  # of the vision tower, before merging
    frame_pairs: int  # visible pairs of patches when a frame attends to itself whole
    window_pairs: int  # the same inside windows; only read for towers that have them
    supervised: int  # positions the head is applied to


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What is trained and what is kept for the backward pass."""

    rank: int = 0  # of the adapters, 0 for none
    targets: Sequence[str] = ()  # projections that have an adapter
    text: bool = False  # the decoder's own weights are trained
    vision: bool = False  # the tower's own weights are trained
    remat: str = "full"  # see `layers.scan_layers`
    vision_remat: str = "full"
    attention: str = "xla"  # "xla", "cudnn" or "splash"


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of one part of a step: needed forward, needed backward, and repeated to save memory."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.forward * factor, self.backward * factor, self.recompute * factor)

    @property
    def model(self) -> float:
        """Forward and backward: what MFU counts."""
        return self.forward + self.backward

    @property
    def hardware(self) -> float:
        """With recomputation: what the devices execute."""
        return self.model + self.recompute


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step over all devices, by part."""

    vision: Cost
    decoder: Cost
    attention: Cost
    lora: Cost
    head: Cost

    @property
    def total(self) -> Cost:
        return self.vision + self.decoder + self.attention + self.lora + self.head


def row_pairs(layout: RowLayout) -> int:
    """Visible pairs of one full row whose prefix region is one clip."""
    p, n, length = layout.prefix, layout.slots, layout.length
    return p * (p + 1) // 2 + n * (length * p + length * (length + 1) // 2)


def padded_work(layout: RowLayout, rows: int, frames: int, frame_patches: int, supervised: int) -> Work:
    """Work of a batch as the devices execute it, padding included.

    Args:
      layout: of every row; a row without branches (slots 0) is one causal sequence.
      frames, supervised: over the whole batch.
    """
    return Work(
        tokens=rows * layout.size,
        pairs=rows * row_pairs(layout),
        patches=frames * frame_patches,
        frame_pairs=frames * frame_patches**2,
        window_pairs=frames * frame_patches**2,  # masked, not skipped
        supervised=supervised,
    )


def real_work(inputs: ModelInputs, supervised: int) -> Work:
    """Work of a batch without its padding: what MFU counts.

    Args:
      inputs: host arrays.
      supervised: real entries of the loss lists.
    """
    segments, vision = np.asarray(inputs.segment_ids), inputs.vision
    layout = inputs.layout or RowLayout(segments.shape[1], 0, 0)
    pairs = sum(_live_pairs(row, layout) for row in segments)
    patches = frame_pairs = window_pairs = 0
    if vision is not None:
        per_frame = np.count_nonzero(vision.frame_segments, axis=1).astype(np.int64)
        patches, frame_pairs = int(per_frame.sum()), int((per_frame**2).sum())
        if vision.window_segments is not None:
            counts = [np.bincount(w[w > 0]) for w in np.asarray(vision.window_segments)]
            window_pairs = int(sum((c.astype(np.int64) ** 2).sum() for c in counts))
    return Work(int(np.count_nonzero(segments)), pairs, patches, frame_pairs, window_pairs, supervised)


def _live_pairs(row: np.ndarray, layout: RowLayout) -> int:
    """Pairs of one row i32[S]: causal inside each clip's prefix, each branch over that prefix and itself."""
    prefix = np.bincount(row[: layout.prefix], minlength=int(row.max()) + 1).astype(np.int64)
    prefix[0] = 0
    total = int((prefix * (prefix + 1) // 2).sum())
    slots = row[layout.prefix :].reshape(layout.slots, layout.length) if layout.slots else ()
    for slot in slots:  # a clip has at most one branch in a slot
        branches = np.bincount(slot, minlength=len(prefix)).astype(np.int64)
        branches[0] = 0
        total += int((branches * prefix + branches * (branches + 1) // 2).sum())
    return total


def step_flops(config: ModelConfig, work: Work, tuning: Tuning) -> StepFlops:
    """FLOPs of one optimiser step (one micro-batch; multiply for accumulation) over all devices.

    Args:
      config: of the model.
      work: from `padded_work` (hardware) or `real_work` (MFU).
      tuning: what is trained, and the recomputation.
    """
    t = config.text
    trained = tuning.text or tuning.rank > 0 or tuning.vision
    decoder = Cost()
    for layer in range(t.num_layers):
        decoder += _products(_layer_products(t, layer), work.tokens, tuning.text, tuning.remat, not t.sparse(layer))
    attention = _attention(4.0 * t.num_heads * t.head_dim * work.pairs * t.num_layers, tuning.remat, tuning.attention)
    lora = _lora(t, work.tokens, tuning)
    head = Cost(*(2.0 * t.hidden_size * t.vocab_size * work.supervised * k for k in (1, 1 + tuning.text, 1)))
    vision = _vision(config.vision, work, tuning)
    if not trained:
        decoder, attention, lora, head = (Cost(c.forward) for c in (decoder, attention, lora, head))
    return StepFlops(vision, decoder, attention, lora, head)


def pass_bytes(t: TextConfig, item: int, split: int, tokens: float) -> float:
    """Return the bytes a device reads and writes in one pass through the decoder: weights, inputs, results of products.

    Args:
      item: bytes of a weight or an activation.
      split: devices that the weights are split over.
      tokens: of the device.
    """
    q, k = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    shapes = [(t.hidden_size, q), (t.hidden_size, k), (t.hidden_size, k), (q, t.hidden_size)]
    inner = t.moe.intermediate_size if t.moe else t.intermediate_size
    experts, used = (t.moe.num_experts, t.moe.top_k) if t.moe else (1, 1)
    feed = [(t.hidden_size, inner), (t.hidden_size, inner), (inner, t.hidden_size)]
    weights = sum(a * b for a, b in shapes) + experts * sum(a * b for a, b in feed)
    activations = sum(a + b for a, b in shapes) + used * sum(a + b for a, b in feed)
    return float(t.num_layers * (weights + tokens * activations) / split * item)


def passes(remat: str) -> int:
    """Return how often the decoder's weights, or most of them, are read for a gradient: forward, again, backward."""
    return 2 + (remat in ("full", "dots_except_mlp"))


def _layer_products(t: TextConfig, layer: int) -> tuple[float, float, float]:
    """Multiply-adds per token of a decoder layer: of all products, those into the inner width, and the last one."""
    q, k = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    attention = t.hidden_size * (2 * q + 2 * k)
    if t.sparse(layer):
        one = t.hidden_size * t.moe.intermediate_size * t.moe.top_k
        return attention + t.hidden_size * t.moe.num_experts + 3 * one, 2 * one, one
    one = t.hidden_size * t.intermediate_size
    return attention + 3 * one, 2 * one, one


def _products(products: tuple[float, float, float], tokens: int, trained: bool, remat: str, skip_last: bool) -> Cost:
    """Matrix products with weights. The last one of a block is not repeated: backward does not need its result."""
    every, inner, last = products
    again = {"full": every - last * skip_last, "dots_except_mlp": inner}.get(remat, 0.0)
    return Cost(every, every * (1 + trained), again) * (2.0 * tokens)


def _attention(forward: float, remat: str, kernel: str) -> Cost:
    # What keeps products keeps the result, but neither the scores nor what splash hands to its backward pass.
    again = {"none": 0.0, "full": 1.0}.get(remat, {"xla": 0.5, "splash": 1.0, "cudnn": 0.0}[kernel])
    return Cost(forward, 2 * forward, forward * (again + _KERNEL_REPEATS[kernel]))


def _lora(t: TextConfig, tokens: int, tuning: Tuning) -> Cost:
    """Adapters; both gradients of both factors."""
    q, k = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    h, inner = t.hidden_size, t.intermediate_size
    shapes = dict(q_proj=(h, q), k_proj=(h, k), v_proj=(h, k), o_proj=(q, h))
    dense = dict(gate_proj=(h, inner), up_proj=(h, inner), down_proj=(inner, h))
    total = Cost()
    for layer in range(t.num_layers):
        for name, (d_in, d_out) in (shapes if t.sparse(layer) else shapes | dense).items():
            if name in tuning.targets and tuning.rank:
                every = tuning.rank * (d_in + d_out)
                again = every - tuning.rank * d_out * (name == "down_proj") if tuning.remat == "full" else 0
                total += Cost(every, 2 * every, again)
    return total * (2.0 * tokens)


def _vision(v: VisionConfig, work: Work, tuning: Tuning) -> Cost:
    """Patch embedding, blocks, mergers."""
    d, inner = v.hidden_size, v.intermediate_size
    feed_forward = (2 if v.position_side else 3) * d * inner
    full = len(v.full_blocks) if v.window else v.depth
    pairs = full * work.frame_pairs + (v.depth - full) * work.window_pairs
    block = (4 * d * d + feed_forward, feed_forward - d * inner, d * inner)
    blocks = _products(block, work.patches, True, tuning.vision_remat, True) * v.depth
    attention = _attention(4.0 * d * pairs, tuning.vision_remat, tuning.attention)
    width = d * v.merge_size**2
    merged = (1 + len(v.deepstack)) * (width * width + width * v.out_hidden_size)
    mergers = Cost(merged, 2 * merged) * (2.0 * work.patches / v.merge_size**2)
    embedding = Cost(v.patch_dim * d, v.patch_dim * d) * (2.0 * work.patches)  # pixels need no gradient
    total = embedding + blocks + attention + mergers
    return total if tuning.vision else Cost(total.forward)
