"""Parity of the model with a recorded reference: every stage of every case, then loss, gradients and generation."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm4d_jax.encode.positions import RULES
from mllm4d_jax.generate.decoding import decode, empty_branches, prefill
from mllm4d_jax.models import weight_map
from mllm4d_jax.models.layers import load_balancing_loss
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.text import DecoderOutput
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.rows.batch import ModelInputs
from mllm4d_jax.verify.checks import CaseChecks, Check, Comparison
from mllm4d_jax.verify.reference import VARIANTS, Case, RecordingError, build_case, read_arrays

_NO_GRADIENT = 1e-6  # of the largest gradient: a norm below is rounding of an exact zero (the router at top-1)
_SHORT = {"image": "img", "video": "vid"}


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """Largest accepted differences; absolute, in fp32 at highest matmul precision, except `grad_rel`."""

    vision: float = 2e-5
    hidden: float = 2e-4
    logits: float = 1e-4
    loss: float = 1e-5
    grad_rel: float = 1e-3
    patches: float = 1e-6


def case_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The recorded cases of a model folder, cheapest first."""
    order = ["text", "image", "video"]
    return sorted(folder.glob("*.npz"), key=lambda p: (order.index(p.stem) if p.stem in order else len(order), p.stem))


def verify_case(model: QwenVL, path: pathlib.Path, label: str, tol: Tolerances, rule: str) -> Iterable[Check]:
    """Checks one npz; yields checks in the order the model computes.

    Args:
      label: name of the case in the report.
      rule: position rule for Qwen2.5-VL; "auto" takes the first of `positions.RULES` that reproduces the recording.
    """
    arrays = read_arrays(path)
    variants = [v for v in VARIANTS if f"position_ids{v}" in arrays]
    if not variants:
        raise RecordingError(f"{path} records no position_ids")
    for variant in variants:
        named = variant.removeprefix("_")
        case = _choose_rule(path.stem, arrays, model, named or rule, variant)
        found = CaseChecks(label if model.config.family != "qwen2_5_vl" else f"{label}[{case.rule}]")
        _positions(case, found, variant)
        _forward(model, case, found, tol, variant)
        if "gen_ids" in arrays and not variant:
            _generation(model, case, found, tol)
        yield from found.checks()


def _choose_rule(name: str, arrays: Mapping, model: QwenVL, rule: str, variant: str) -> Case:
    if rule != "auto":
        return build_case(name, arrays, model.config, rule)
    mask = arrays["attention_mask"].astype(bool)
    candidates = RULES if model.config.family == "qwen2_5_vl" else RULES[:1]
    cases = [build_case(name, arrays, model.config, r) for r in candidates]
    recorded = arrays[f"position_ids{variant}"]
    return next((c for c in cases if np.array_equal(c.inputs.positions[:, mask], recorded[:, mask])), cases[0])


def _positions(case: Case, found: CaseChecks, variant: str) -> None:
    group, mask, arrays = found.group("positions"), case.mask, case.arrays
    group.equal("position_ids", case.inputs.positions[:, mask], arrays[f"position_ids{variant}"][:, mask])
    if f"rope_deltas{variant}" in arrays:
        # One more than the largest position, less the length; some releases count from the padded length.
        recorded, padded = arrays[f"rope_deltas{variant}"].reshape(-1), mask.shape[1] - mask.sum(1)
        deltas = _after_largest(case) - mask.sum(1)
        group.equal("rope_deltas", np.where(recorded == deltas, deltas, deltas - padded), recorded)


def _after_largest(case: Case) -> np.ndarray:
    """i32[B], one more than the largest position of each prompt."""
    return np.where(case.mask, case.inputs.positions, -1).max((0, 2)) + 1


def _forward(model: QwenVL, case: Case, found: CaseChecks, tol: Tolerances, variant: str) -> None:
    vision, out, logits, loss = jax.device_get(_run(model, case))
    if vision is not None:
        _vision(model, case, found, tol, *vision)
    _text(case, found, tol, out)
    found.group("logits", tol.logits).close("logits", case.at_real_tokens(logits), case.real(f"logits{variant}"))
    found.group("loss", tol.loss).close("loss", loss, case.arrays.get(f"loss{variant}"))


def _run(model: QwenVL, case: Case):
    """One jitted pass that keeps the intermediate tensors."""
    graphdef, state = nnx.split(model)
    labels = case.arrays.get("labels")
    block_inputs = _recorded_block_inputs(model, case)

    @jax.jit
    def run(state, inputs: ModelInputs, labels, block_inputs):
        model = nnx.merge(graphdef, state)
        features, vision = None, None
        if inputs.vision is not None:
            features, collected = model.vision(inputs.vision, model.backend, collect=True)
            if block_inputs is not None:
                collected["blocks"] = model.vision.blocks_from(block_inputs, inputs.vision, model.backend)
            vision = (features, collected)
        out = model.forward(inputs, features=features, collect=True)
        logits = model.logits(out.hidden)
        return vision, out, logits, None if labels is None else _shifted_loss(logits, labels)

    return run(state, jax.tree.map(jnp.asarray, case.inputs), labels, block_inputs)


def _recorded_block_inputs(model: QwenVL, case: Case) -> np.ndarray | None:
    """f32[depth, F, L, D] inputs of the vision blocks as recorded, None if any is missing.

    Each block is judged from its recorded input: end to end, fp32 rounding compounds so much that even float64
    arithmetic is further than the tolerance from a recorded fp32 block. The merged features are judged end to end.
    """
    config = model.config.vision
    if case.inputs.vision is None:
        return None
    frames, length = case.inputs.vision.frame_segments.shape
    out = np.zeros((config.depth, frames * length, config.hidden_size), np.float32)
    for modality, rows in case.patch_rows_windowed.items():
        short = _SHORT[modality]
        names = [f"{short}_block_in", *(f"{short}_block_{i}" for i in range(config.depth - 1))]
        if any(name not in case.arrays for name in names):
            return None
        out[:, rows] = np.stack([case.arrays[name] for name in names])
    return out.reshape(config.depth, frames, length, -1)


def _shifted_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token over labels != -100 of the whole batch."""
    targets = labels[:, 1:]
    scores = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), -1)
    picked = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    used = targets != -100
    return -jnp.sum(jnp.where(used, picked, 0)) / jnp.maximum(used.sum(), 1)


def _vision(
    model: QwenVL, case: Case, found: CaseChecks, tol: Tolerances, features: VisionFeatures, collected: Mapping
) -> None:
    names = ("patch embedding", "vision blocks", "vision features")
    embedding, blocks, merged = (found.group(name, tol.vision) for name in names)
    for modality, rows in case.patch_rows.items():
        windowed = case.patch_rows_windowed[modality]
        index = case.inputs.vision_index[case.visual_places(modality, model.config)]

        def add(group: Comparison, name: str, ours: np.ndarray, short: str = _SHORT[modality]) -> None:
            group.close(f"{short}_{name}", ours, case.arrays.get(f"{short}_{name}"))

        flat = {k: v.reshape(-1, v.shape[-1]) for k, v in collected.items() if k != "blocks"}
        for name in ("patch_embed", "rope_cos", "rope_sin"):
            add(embedding, name, flat[name][rows])
        add(embedding, "block_in", flat["block_in"][windowed])
        for i, block in enumerate(collected["blocks"]):
            add(blocks, f"block_{i}", block.reshape(-1, block.shape[-1])[windowed])
        add(merged, "merged", features.merged[index])
        for j, taps in enumerate(features.deepstack):
            add(merged, f"deepstack_{j}", taps[index])


def _text(case: Case, found: CaseChecks, tol: Tolerances, out: DecoderOutput) -> None:
    collected = out.collected

    def add(group: str, name: str, ours: np.ndarray) -> None:
        found.group(group, tol.hidden).close(name, case.at_real_tokens(ours), case.real(name))

    for name in ("inputs_embeds", "text_cos", "text_sin"):
        add("embeddings", name, collected[name])
    for i, (raw, after) in enumerate(zip(collected["layers"], collected["layers_deepstack"], strict=True)):
        add("decoder layers", f"layer_{i}_out", raw)
        add("decoder layers", f"layer_{i}_out_ds", after)
    sparse = [i for i in range(len(collected["layers"])) if f"router_{i}_logits" in case.arrays]
    for row, i in enumerate(sparse):
        add("router", f"router_{i}_logits", collected["router_logits"][row])
        add("router", f"router_{i}_weights", collected["router_weights"][row])
        chosen = case.at_real_tokens(collected["router_index"][row])
        found.group("router choice").equal(f"router_{i}_index", chosen, case.real(f"router_{i}_index"))
    add("final norm", "final_norm", out.hidden)


def _generation(model: QwenVL, case: Case, found: CaseChecks, tol: Tolerances) -> None:
    """Decode greedily on the prompt's cache, fed with the recorded tokens; end tokens do not stop the recorded rows.

    What is likeliest after every recorded beginning is the recorded token if and only if free greedy decoding gives the
    recorded tokens, and the logits of later steps stay comparable where an earlier one differs.
    """
    recorded = case.arrays["gen_ids"]
    logits, first = jax.device_get(_decode_recorded(model, case.inputs, recorded))
    ids = found.group("greedy ids")
    ours, theirs = first[:, None] + np.arange(recorded.shape[1]), case.arrays.get("gen_position")
    name, largest = "gen_position", _after_largest(case)
    if theirs is not None and (largest != first).any() and np.array_equal(theirs[:, 0], largest):
        name += ", counted from the largest position as `generate` does not: record it again"
    ids.equal(name, ours, theirs)
    ids.equal("gen_ids", logits.argmax(-1), recorded)
    found.group("greedy logits", tol.logits).close("gen_logits", logits, case.arrays.get("gen_logits"))


def _decode_recorded(model: QwenVL, inputs: ModelInputs, recorded: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(logits f32[B, N, V] before each recorded token i32[B, N], position i32[B] of the first)."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, inputs: ModelInputs, tokens: jax.Array):
        model = nnx.merge(graphdef, state)
        prompt = prefill(model, inputs)
        rows, steps = tokens.shape

        def step(own, fed):
            index, token = fed
            positions = (prompt.next_position + index)[:, None]
            hidden, own = decode(model, token[:, None], positions, prompt.cache, own, index)
            return own, model.logits(hidden[:, 0])

        fed = (jnp.arange(steps - 1), tokens[:, :-1].T)
        _, later = jax.lax.scan(step, empty_branches(model, rows, 1, steps), fed)
        logits = jnp.concatenate([model.logits(prompt.hidden)[None], later])
        return logits.swapaxes(0, 1), prompt.next_position

    return run(state, jax.tree.map(jnp.asarray, inputs), jnp.asarray(recorded, jnp.int32))


def verify_gradients(model: QwenVL, folder: pathlib.Path, path: pathlib.Path, label: str, tol: Tolerances, rule: str):
    """Checks the gradient fingerprints of a `grads_CASE.json`: per tensor, its norm and its product with cos(0.1 k).

    Differences are relative to the recorded norm (the product of a unit vector cannot exceed its norm). Where the
    recording is zero up to rounding, so must be the gradient here.
    """
    recorded = json.loads(path.read_text())
    arrays = read_arrays(folder / f"{recorded['case']}.npz")
    case = _choose_rule(recorded["case"], arrays, model, rule, "")
    loss, aux, grads = _gradients(model, case)
    checks = CaseChecks(label)
    checks.group("loss", tol.loss).close("loss", loss, recorded["loss"])
    checks.group("loss", tol.loss).close("aux_loss", aux, recorded.get("aux_loss"))
    errors = checks.group("gradients", tol.grad_rel).errors
    zero = _NO_GRADIENT * max((abs(norm) for norm, _ in recorded["grads"].values()), default=0.0)
    for name, (norm, product) in recorded["grads"].items():
        if name not in grads:
            errors.append((f"{name} (no such parameter)", np.inf))
            continue
        ours = grads.pop(name)
        if abs(norm) <= zero and abs(ours[0]) <= zero:
            errors.append((name, 0.0))
            continue
        error = max(abs(ours[0] - norm), abs(ours[1] - product)) / max(abs(norm), 1e-8)
        errors.append((name, np.inf if np.isnan(error) else error))
    none = set(recorded.get("no_grad", ()))
    errors += [(f"{name} (not recorded)", np.inf) for name in grads if name not in none]
    return checks.checks()


def _gradients(model: QwenVL, case: Case) -> tuple[float, float | None, dict[str, tuple[float, float]]]:
    """(loss, auxiliary loss, name -> (norm, product)) in the published layout."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params, inputs, labels):
        def objective(params):
            model = nnx.merge(graphdef, params, rest)
            out = model.forward(inputs)
            aux = None if out.router is None else load_balancing_loss(out.router)
            return _shifted_loss(model.logits(out.hidden), labels), aux

        return jax.value_and_grad(objective, has_aux=True)(params)

    (loss, aux), grads = run(params, jax.tree.map(jnp.asarray, case.inputs), case.arrays["labels"])
    flat = dict(nnx.to_flat_state(grads))
    found = {}
    for leaf in weight_map.leaves(model):
        value = np.asarray(flat[leaf.path].get_value())
        for layer, name in enumerate(leaf.names):
            g = leaf.to_published(value[layer] if leaf.stacked else value).reshape(-1).astype(np.float64)
            found[name] = (float(np.linalg.norm(g)), float(g @ np.cos(0.1 * np.arange(g.size))))
    return float(loss), None if aux is None else float(aux), found
