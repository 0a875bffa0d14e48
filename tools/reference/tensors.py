"""Runs a transformers model on one case and keeps every tensor on the way, under the names of the recorded layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

# How much of a case is kept: everything; no vision blocks; only what comes out.
FULL, LAYERS, OUTPUTS = 2, 1, 0
STEPS = 12  # greedy steps after the prompt


def load(path: str) -> torch.nn.Module:
    """The model of a Hugging Face folder in float32 on the CPU, with plain attention, for evaluation."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def to_numpy(value: torch.Tensor) -> np.ndarray:
    """A copy on the host: float32 for floating point, int32 for whole numbers."""
    value = value.detach().cpu()
    return value.float().numpy().copy() if value.is_floating_point() else value.numpy().astype(np.int32)


def record(model: torch.nn.Module, inputs: Mapping[str, np.ndarray], detail: int = FULL) -> dict[str, np.ndarray]:
    """One forward pass.

    Args:
      inputs: the arrays of `cases.batch`.
      detail: FULL, LAYERS or OUTPUTS.

    Returns:
      The inputs (int32/float32) and: `position_ids` i32[3,B,S], `rope_deltas` i32[B,1], `{img,vid}_patch_embed`,
      `_rope_cos`, `_rope_sin`, `_block_in`, `_block_<i>`, `_merged`, `_deepstack_<j>`, `inputs_embeds`, `text_cos`,
      `text_sin`, `layer_<i>_out` (before the DeepStack sum), `layer_<i>_out_ds` (after it, where there is one),
      `router_<i>_{logits,weights,index}` (rows = B*S), `final_norm`, `logits` f32[B,S,V], `loss`.
    """
    kept: dict[str, np.ndarray] = {name: to_numpy(torch.from_numpy(value)) for name, value in inputs.items()}
    model.model.rope_deltas = None  # transformers keeps those of the previous call
    with torch.no_grad(), _hooks(model, kept, detail):
        out = model(**tensors(inputs), use_cache=False)
    rows, length = inputs["input_ids"].shape
    if "position_ids" not in kept:  # text alone: transformers counts up
        kept["position_ids"] = np.broadcast_to(np.arange(length, dtype=np.int32), (3, rows, length)).copy()
    deltas = model.model.rope_deltas
    kept["rope_deltas"] = np.zeros((rows, 1), np.int32) if deltas is None else to_numpy(deltas).reshape(rows, 1)
    kept["logits"], kept["loss"] = to_numpy(out.logits), to_numpy(out.loss)
    return kept


def tensors(inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The inputs as torch takes them: whole numbers as int64."""
    arrays = {k: v if np.issubdtype(v.dtype, np.floating) else v.astype(np.int64) for k, v in inputs.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def generate(model: torch.nn.Module, inputs: Mapping[str, np.ndarray], steps: int = STEPS) -> dict[str, np.ndarray]:
    """Greedy continuation of a left-padded case through the key-value cache; an end-of-text token does not stop it.

    Returns:
      `gen_ids` i32[B,steps]; `gen_logits` f32[B,steps,V], the logits each id was the largest of; `gen_position`
      i32[B,steps], the position (the same on all three axes) of each id when it is fed back.
    """
    feed = tensors({name: value for name, value in inputs.items() if name != "labels"})
    model.model.rope_deltas = None
    ids, logits, positions = [], [], []
    with torch.no_grad():
        out = model(**feed, use_cache=True)
        mask, deltas = feed["attention_mask"], model.model.rope_deltas
        first = mask.sum(-1, keepdim=True) + (0 if deltas is None else deltas.reshape(-1, 1))  # [B, 1]
        for step in range(steps):
            logits.append(out.logits[:, -1])
            ids.append(logits[-1].argmax(-1))
            positions.append(first[:, 0] + step)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            out = model(
                input_ids=ids[-1][:, None],
                attention_mask=mask,
                position_ids=(first + step)[None].expand(3, -1, -1),
                past_key_values=out.past_key_values,
                use_cache=True,
            )
    stacked = {"gen_ids": ids, "gen_logits": logits, "gen_position": positions}
    return {name: to_numpy(torch.stack(values, 1)) for name, values in stacked.items()}


@contextmanager
def _hooks(model: torch.nn.Module, kept: dict[str, np.ndarray], detail: int) -> Iterator[None]:
    """Hooks on the submodules that write into `kept` while the context lasts."""

    def keep(name: str, value: torch.Tensor) -> None:
        kept[name] = to_numpy(value)

    with ExitStack() as stack:

        def on_output(module: torch.nn.Module, action) -> None:
            stack.callback(module.register_forward_hook(lambda _, args, out: action(out)).remove)

        def on_input(module: torch.nn.Module, action) -> None:
            def call(_, args, kwargs) -> None:
                action(args, kwargs)

            stack.callback(module.register_forward_pre_hook(call, with_kwargs=True).remove)

        _watch_vision(model.model.visual, kept, keep, on_output, on_input, detail)
        _watch_text(model.model.language_model, keep, on_output, on_input, detail)
        yield


def _watch_vision(visual, kept, keep, on_output, on_input, detail: int) -> None:
    """The tower runs once for all images, then once for all videos."""
    waiting = [p for p, name in (("img", "pixel_values"), ("vid", "pixel_values_videos")) if name in kept]
    current = []

    def result(out) -> None:
        keep(f"{current[0]}_merged", out.pooler_output)
        for j, feature in enumerate(getattr(out, "deepstack_features", None) or ()):
            keep(f"{current[0]}_deepstack_{j}", feature)

    def rope(out) -> None:
        keep(f"{current[0]}_rope_cos", out[0])
        keep(f"{current[0]}_rope_sin", out[1])

    on_input(visual, lambda args, kwargs: current.__setitem__(slice(None), [waiting.pop(0)]))
    on_output(visual, result)
    if detail < FULL:
        return
    on_output(visual.patch_embed, lambda out: keep(f"{current[0]}_patch_embed", out))
    on_output(visual.rotary_pos_emb, rope)
    on_input(visual.blocks[0], lambda args, kwargs: keep(f"{current[0]}_block_in", args[0]))
    for i, block in enumerate(visual.blocks):
        on_output(block, lambda out, i=i: keep(f"{current[0]}_block_{i}", out))


def _watch_text(decoder, keep, on_output, on_input, detail: int) -> None:
    depth = []  # how many layers get a DeepStack sum in this call

    def start(args, kwargs) -> None:
        depth[:] = [len(kwargs.get("deepstack_visual_embeds") or ())]
        if kwargs.get("position_ids") is not None:
            keep("position_ids", kwargs["position_ids"][-3:])
        if detail >= LAYERS:
            keep("inputs_embeds", kwargs["inputs_embeds"])

    def rope(out) -> None:
        keep("text_cos", out[0])
        keep("text_sin", out[1])

    def router(i: int, out) -> None:
        for name, value in zip(("logits", "weights", "index"), out, strict=True):
            keep(f"router_{i}_{name}", value)

    def after_deepstack(i: int, hidden: torch.Tensor) -> None:
        if i < depth[0]:
            keep(f"layer_{i}_out_ds", hidden)

    on_input(decoder, start)
    on_output(decoder.norm, lambda out: keep("final_norm", out))
    if detail < LAYERS:
        return
    on_output(decoder.rotary_emb, rope)
    followers = [*decoder.layers[1:], decoder.norm]
    for i, (layer, follower) in enumerate(zip(decoder.layers, followers, strict=True)):
        on_output(layer, lambda out, i=i: keep(f"layer_{i}_out", out))
        on_input(follower, lambda args, kwargs, i=i: after_deepstack(i, args[0]))
        if hasattr(layer.mlp, "gate"):
            on_output(layer.mlp.gate, lambda out, i=i: router(i, out))
