"""Gradients of the loss of a case, one norm and one projection per parameter, under published names and layouts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from tools.reference.tensors import tensors

COLUMNS = ("l2_norm", "dot_with_cos_0.1_arange_row_major")


def record_gradients(model: torch.nn.Module, inputs: Mapping[str, np.ndarray], case: str) -> dict:
    """What grads_<case>.json holds: the loss and, per parameter, the gradient's norm and its dot product with
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
    """(name in the published checkpoint, True if its last two axes are swapped there) of a transformers 5 parameter."""
    if model_type == "qwen2_5_vl":
        name = name.removeprefix("model.").replace("language_model.", "model.", 1) if name != "lm_head.weight" else name
        return name, False
    return name, name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))
