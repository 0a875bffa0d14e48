"""Runs a transformers model on one case and keeps every tensor and gradient, under the names of the recorded layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

# How much of a case is kept: everything; no vision blocks; only what comes out.
FULL, LAYERS, OUTPUTS = 2, 1, 0
STEPS = 12  # greedy steps after the prompt
COLUMNS = ("l2_norm", "dot_with_cos_0.1_arange_row_major")  # of a recorded gradient


def load(path: str) -> torch.nn.Module:
    """Return the model of a Hugging Face folder in float32 on the CPU, with plain attention, for evaluation."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def to_numpy(value: torch.Tensor) -> np.ndarray:
    """Return a copy on the host: float32 for floating point, int32 for whole numbers."""
    value = value.detach().cpu()
    return value.float().numpy().copy() if value.is_floating_point() else value.numpy().astype(np.int32)


def record(model: torch.nn.Module, inputs: Mapping[str, np.ndarray], detail: int = FULL) -> dict[str, np.ndarray]:
    """Run one forward pass and return its tensors.

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
    with torch.no_grad(), _Recorder(kept) as recorder:
        _watch_vision(recorder, model.model.visual, detail)
        _watch_text(recorder, model.model.language_model, detail)
        out = model(**tensors(inputs), use_cache=False)
    rows, length = inputs["input_ids"].shape
    if "position_ids" not in kept:  # text alone: transformers counts up
        kept["position_ids"] = np.broadcast_to(np.arange(length, dtype=np.int32), (3, rows, length)).copy()
    deltas = model.model.rope_deltas
    kept["rope_deltas"] = np.zeros((rows, 1), np.int32) if deltas is None else to_numpy(deltas).reshape(rows, 1)
    kept["logits"], kept["loss"] = to_numpy(out.logits), to_numpy(out.loss)
    return kept


def tensors(inputs: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Return the inputs as torch takes them: whole numbers as int64."""
    arrays = {k: v if np.issubdtype(v.dtype, np.floating) else v.astype(np.int64) for k, v in inputs.items()}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def generate(model: torch.nn.Module, inputs: Mapping[str, np.ndarray], steps: int = STEPS) -> dict[str, np.ndarray]:
    """Decode a left-padded case greedily with the model's own `generate`; an end-of-text token does not stop it.

    Returns:
      `gen_ids` i32[B,steps]; `gen_logits` f32[B,steps,V], the logits each id was the largest of; `gen_position`
      i32[B,steps], the position (the same on all three axes) of each id when it is fed back.
    """
    from transformers import GenerationConfig

    feed = tensors({name: value for name, value in inputs.items() if name != "labels"})
    model.model.rope_deltas = None
    positions: list[torch.Tensor] = []  # [3, B, 1] of every fed-back id

    def keep(module, args, kwargs):
        positions.append(kwargs["position_ids"][-3:])

    # One token more than is kept: the last one of `generate` is never fed back. No end token is named.
    greedy = GenerationConfig(do_sample=False, max_new_tokens=steps + 1, pad_token_id=0)
    saved, model.generation_config = model.generation_config, greedy
    hook = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            out = model.generate(**feed, return_dict_in_generate=True, output_logits=True)
    finally:
        hook.remove()
        model.generation_config = saved
    fed = torch.cat(positions[1:], -1)  # without the prompt's own
    if fed.shape[-1] != steps or (fed != fed[:1]).any():
        raise RuntimeError(f"generate fed back {fed.shape[-1]} of {steps} ids, or not at one position on all axes")
    ids = out.sequences[:, feed["input_ids"].shape[1] :][:, :steps]
    logits = torch.stack(out.logits[:steps], 1)
    return {"gen_ids": to_numpy(ids), "gen_logits": to_numpy(logits), "gen_position": to_numpy(fed[0])}


def record_gradients(model: torch.nn.Module, inputs: Mapping[str, np.ndarray], case: str) -> dict:
    """Return what grads_<case>.json holds: the loss and, per parameter, the gradient's norm and its dot product with
    cos(0.1 * [0, 1, 2, ...]) over the row-major checkpoint layout, in float64. MoE models add `aux_loss` (router load
    balance) and `loss_with_aux`; the gradients are of the loss without it."""
    model.zero_grad(set_to_none=True)
    model.model.rope_deltas = None
    loss = model(**tensors(inputs), use_cache=False).loss
    loss.backward()
    grads, without = {}, []
    for name, parameter in model.named_parameters():
        published, transposed = published_name(name, model.config.model_type)
        if parameter.grad is None:
            without.append(published)
            continue
        grad = parameter.grad.transpose(-1, -2) if transposed else parameter.grad
        flat = grad.double().numpy().reshape(-1)
        grads[published] = [float(np.linalg.norm(flat)), float(flat @ np.cos(0.1 * np.arange(flat.size)))]
    model.zero_grad(set_to_none=True)
    found = {"case": case, "loss": loss.item(), "columns": list(COLUMNS), "no_grad": without, "grads": grads}
    if model.config.model_type == "qwen3_vl_moe":
        model.model.rope_deltas = None
        with torch.no_grad():
            out = model(**tensors(inputs), use_cache=False, output_router_logits=True)
        found |= {"aux_loss": out.aux_loss.item(), "loss_with_aux": out.loss.item()}
    return found


def published_name(name: str, model_type: str) -> tuple[str, bool]:
    """Return (published name, True if published files swap the last two axes) of a transformers 5 parameter."""
    if model_type == "qwen2_5_vl":
        name = name.removeprefix("model.").replace("language_model.", "model.", 1) if name != "lm_head.weight" else name
        return name, False
    return name, name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))


class _Recorder(ExitStack):
    """Hooks on submodules that write into `kept`, under names that begin with `prefix`, while the context lasts."""

    def __init__(self, kept: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.kept, self.prefix = kept, ""

    def keep(self, names: str, *values: torch.Tensor) -> None:
        for name, value in zip(names.split(), values, strict=True):
            self.kept[f"{self.prefix}{name}"] = to_numpy(value)

    def on_output(self, module: torch.nn.Module, action: Callable[[Any], None]) -> None:
        self.callback(module.register_forward_hook(lambda _, args, out: action(out)).remove)

    def on_input(self, module: torch.nn.Module, action: Callable[[tuple, dict], None]) -> None:
        hook = module.register_forward_pre_hook(lambda _, args, kwargs: action(args, kwargs), with_kwargs=True)
        self.callback(hook.remove)

    def keep_output(self, module: torch.nn.Module, names: str) -> None:
        self.on_output(module, lambda out: self.keep(names, *(out if isinstance(out, tuple) else (out,))))


def _watch_vision(recorder: _Recorder, visual: torch.nn.Module, detail: int) -> None:
    """The tower runs once for all images, then once for all videos."""
    runs = [p for p, name in (("img_", "pixel_values"), ("vid_", "pixel_values_videos")) if name in recorder.kept]

    def start(args: tuple, kwargs: dict) -> None:
        recorder.prefix = runs.pop(0)

    def result(out: Any) -> None:
        recorder.keep("merged", out.pooler_output)
        for j, feature in enumerate(getattr(out, "deepstack_features", None) or ()):
            recorder.keep(f"deepstack_{j}", feature)

    recorder.on_input(visual, start)
    recorder.on_output(visual, result)
    if detail < FULL:
        return
    recorder.keep_output(visual.patch_embed, "patch_embed")
    recorder.keep_output(visual.rotary_pos_emb, "rope_cos rope_sin")
    recorder.on_input(visual.blocks[0], lambda args, kwargs: recorder.keep("block_in", args[0]))
    for i, block in enumerate(visual.blocks):
        recorder.keep_output(block, f"block_{i}")


def _watch_text(recorder: _Recorder, decoder: torch.nn.Module, detail: int) -> None:
    depth = 0  # how many layers get a DeepStack sum in this call

    def start(args: tuple, kwargs: dict) -> None:
        nonlocal depth
        depth, recorder.prefix = len(kwargs.get("deepstack_visual_embeds") or ()), ""
        if kwargs.get("position_ids") is not None:
            recorder.keep("position_ids", kwargs["position_ids"][-3:])
        if detail >= LAYERS:
            recorder.keep("inputs_embeds", kwargs["inputs_embeds"])

    def after_deepstack(i: int, hidden: torch.Tensor) -> None:
        if i < depth:
            recorder.keep(f"layer_{i}_out_ds", hidden)

    recorder.on_input(decoder, start)
    recorder.keep_output(decoder.norm, "final_norm")
    if detail < LAYERS:
        return
    recorder.keep_output(decoder.rotary_emb, "text_cos text_sin")
    followers = [*decoder.layers[1:], decoder.norm]
    for i, (layer, follower) in enumerate(zip(decoder.layers, followers, strict=True)):
        recorder.keep_output(layer, f"layer_{i}_out")
        recorder.on_input(follower, lambda args, kwargs, i=i: after_deepstack(i, args[0]))
        if hasattr(layer.mlp, "gate"):
            recorder.keep_output(layer.mlp.gate, f"router_{i}_logits router_{i}_weights router_{i}_index")
