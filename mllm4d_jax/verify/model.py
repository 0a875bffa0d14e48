"""Parity of the model with a recorded reference: every stage of every case, then loss, gradients and generation."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mllm4d_jax.encode.positions import RULES
from mllm4d_jax.generate.decoding import decode, empty_branches, prefill
from mllm4d_jax.models import weight_map
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.sparse import load_balancing_loss
from mllm4d_jax.models.text import DecoderOutput
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.rows.batch import ModelInputs
from mllm4d_jax.verify.checks import SHIFT, CaseChecks, Check, Comparison, chosen_alike
from mllm4d_jax.verify.recorded import RecordingError, read_json
from mllm4d_jax.verify.reference import VARIANTS, Case, build_case, read_arrays

_NO_GRADIENT = 1e-6  # of the largest gradient: a norm below is rounding of an exact zero (the router at top-1)
_SHORT = {"image": "img", "video": "vid"}


@dataclasses.dataclass(frozen=True)
class Tolerances:
    """Largest accepted differences in fp32 at highest matmul precision; where rounding alone makes more, that counts.

    Shares of the tensor's own size (`Comparison.near`), of a gradient's norm, and of the loss; `patches`, of normalised
    pixels, is absolute.
    """

    vision: float = 2e-5
    hidden: float = 5e-5
    logits: float = 5e-5
    loss: float = 5e-6
    grad_rel: float = 1e-3
    patches: float = 1e-6


def shifted(values: jax.Array | np.ndarray) -> np.ndarray:
    """Return f32 values, each moved by `SHIFT` of its rounding steps, up or down at random (the same every time)."""
    values = np.asarray(values, np.float32)
    up = np.random.default_rng(0).random(values.shape, np.float32) < 0.5
    return values + values * np.where(up, 1, -1).astype(np.float32) * np.float32(SHIFT * 2.0**-23)


def _moved(model: QwenVL, case: Case) -> tuple[jax.Array, ModelInputs]:
    """Return token embeddings and inputs that differ from the case's in its embeddings and pixels, see `shifted`."""
    used = np.unique(np.concatenate([case.arrays[k].ravel() for k in ("input_ids", "gen_ids") if k in case.arrays]))
    embed = model.text.embed[...]
    embed = embed.at[used].set(shifted(embed[used]))
    vision = case.inputs.vision
    if vision is not None:
        vision = vision._replace(patches=shifted(vision.patches))
    return embed, case.inputs._replace(vision=vision)


def _twice(run: Callable, model: QwenVL, case: Case):
    """Return (what `run` gives for the case, what it gives for the one of `_moved`), on the host."""
    made = []
    for embed, inputs in ((model.text.embed[...], case.inputs), _moved(model, case)):
        made.append(jax.device_get(run(embed, jax.tree.map(jnp.asarray, inputs))))
    return tuple(made)


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
    (vision, out, logits, loss), (vision2, out2, logits2, _) = _run(model, case)
    if vision is not None:
        _vision(model, case, found, tol, vision, vision2)
    _text(case, found, tol, out, out2)
    logits, logits2 = case.at_real_tokens(logits), case.at_real_tokens(logits2)
    found.group("logits", tol.logits).near("logits", logits, case.real(f"logits{variant}"), logits2)
    _loss(found.group("loss", tol.loss), loss, case.arrays.get(f"loss{variant}"), logits, logits2)


def _loss(group: Comparison, ours: float, recorded, logits: np.ndarray, moved: np.ndarray) -> None:
    # One number may by chance not move at all; no logit moves it further than itself moves.
    group.near("loss", ours, recorded, ours if recorded is None else ours + np.abs(moved - logits).max())


def _run(model: QwenVL, case: Case):
    """Two passes of one jitted program that keeps the intermediate tensors, see `_twice`."""
    graphdef, state = nnx.split(model)
    labels = case.arrays.get("labels")
    recorded = _recorded_block_inputs(model, case)
    given = iter((recorded, None if recorded is None else shifted(recorded)))

    @jax.jit
    def run(state, embed, inputs: ModelInputs, labels, block_inputs):
        model = nnx.merge(graphdef, state)
        model.text.embed[...] = embed
        features, vision = None, None
        if inputs.vision is not None:
            features, collected = model.vision(inputs.vision, model.backend, collect=True)
            if block_inputs is not None:
                collected["blocks"] = model.vision.blocks_from(block_inputs, inputs.vision, model.backend)
            vision = (features, collected)
        out = model.forward(inputs, features=features, collect=True)
        logits = model.logits(out.hidden)
        return vision, out, logits, None if labels is None else _shifted_loss(logits, labels)

    return _twice(lambda embed, inputs: run(state, embed, inputs, labels, next(given)), model, case)


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
    model: QwenVL,
    case: Case,
    found: CaseChecks,
    tol: Tolerances,
    ours: tuple[VisionFeatures, Mapping],
    moved: tuple[VisionFeatures, Mapping],
) -> None:
    names = ("patch embedding", "vision blocks", "vision features")
    embedding, blocks, merged = (found.group(name, tol.vision) for name in names)
    for modality, rows in case.patch_rows.items():
        windowed = case.patch_rows_windowed[modality]
        index = case.inputs.vision_index[case.visual_places(modality, model.config)]

        def add(group: Comparison, name: str, pick: Callable, at: tuple, short: str = _SHORT[modality]) -> None:
            one, two = (pick(*part) for part in (ours, moved))
            one, two = (x.reshape(-1, x.shape[-1])[at] for x in (one, two))
            group.near(f"{short}_{name}", one, case.arrays.get(f"{short}_{name}"), two)

        for name in ("patch_embed", "rope_cos", "rope_sin"):
            add(embedding, name, lambda _, kept, name=name: kept[name], rows)
        add(embedding, "block_in", lambda _, kept: kept["block_in"], windowed)
        for i in range(len(ours[1]["blocks"])):
            add(blocks, f"block_{i}", lambda _, kept, i=i: kept["blocks"][i], windowed)
        add(merged, "merged", lambda features, _: features.merged, index)
        for j in range(len(ours[0].deepstack)):
            add(merged, f"deepstack_{j}", lambda features, _, j=j: features.deepstack[j], index)


def _text(case: Case, found: CaseChecks, tol: Tolerances, ours: DecoderOutput, moved: DecoderOutput) -> None:
    def add(group: str, name: str, pick: Callable[[DecoderOutput], np.ndarray]) -> np.ndarray | None:
        one, two = (case.at_real_tokens(pick(out)) for out in (ours, moved))
        return found.group(group, tol.hidden).near(name, one, case.real(name), two)

    for name in ("inputs_embeds", "text_cos", "text_sin"):
        add("embeddings", name, lambda out, name=name: out.collected[name])
    for i in range(len(ours.collected["layers"])):
        add("decoder layers", f"layer_{i}_out", lambda out, i=i: out.collected["layers"][i])
        add("decoder layers", f"layer_{i}_out_ds", lambda out, i=i: out.collected["layers_deepstack"][i])
    sparse = [i for i in range(len(ours.collected["layers"])) if f"router_{i}_logits" in case.arrays]
    for row, i in enumerate(sparse):
        allowed = add("router", f"router_{i}_logits", lambda out, row=row: out.collected["router_logits"][row])
        add("router", f"router_{i}_weights", lambda out, row=row: out.collected["router_weights"][row])
        recorded = case.real(f"router_{i}_index")
        chosen, scores = (case.at_real_tokens(ours.collected[f"router_{k}"][row]) for k in ("index", "logits"))
        chosen = chosen_alike(chosen, recorded, scores, allowed)
        found.group("router choice").equal(f"router_{i}_index", chosen, recorded)
    add("final norm", "final_norm", lambda out: out.hidden)


def _generation(model: QwenVL, case: Case, found: CaseChecks, tol: Tolerances) -> None:
    """Decode greedily on the prompt's cache, fed with the recorded tokens; end tokens do not stop the recorded rows.

    What is likeliest after every recorded beginning is the recorded token if and only if free greedy decoding gives the
    recorded tokens, and the logits of later steps stay comparable where an earlier one differs. Of two tokens that
    rounding cannot tell apart either may be the likeliest.
    """
    recorded = case.arrays["gen_ids"]
    (logits, first), (moved, _) = _decode_recorded(model, case, recorded)
    ids, group = found.group("greedy ids"), found.group("greedy logits", tol.logits)
    allowed = group.near("gen_logits", logits, case.arrays.get("gen_logits"), moved)
    ours, theirs = first[:, None] + np.arange(recorded.shape[1]), case.arrays.get("gen_position")
    name, largest = "gen_position", _after_largest(case)
    if theirs is not None and (largest != first).any() and np.array_equal(theirs[:, 0], largest):
        name += ", counted from the largest position as `generate` does not: record it again"
    ids.equal(name, ours, theirs)
    best = chosen_alike(logits.argmax(-1)[..., None], recorded[..., None], logits, allowed)
    ids.equal("gen_ids", best[..., 0], recorded)


def _decode_recorded(model: QwenVL, case: Case, recorded: np.ndarray):
    """(logits f32[B, N, V] before each recorded token i32[B, N], position i32[B] of the first), as of `_twice`."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(state, embed, inputs: ModelInputs, tokens: jax.Array):
        model = nnx.merge(graphdef, state)
        model.text.embed[...] = embed
        prompt = prefill(model, inputs)
        rows, steps = tokens.shape

        def step(own, fed):
            index, token = fed
            positions = (prompt.next_position + index)[:, None]
            slots = jnp.broadcast_to(index, positions.shape)
            hidden, own = decode(model, token[:, None], positions, prompt.cache, own, slots)
            return own, model.logits(hidden[:, 0])

        fed = (jnp.arange(steps - 1), tokens[:, :-1].T)
        _, later = jax.lax.scan(step, empty_branches(model, rows, 1, steps), fed)
        logits = jnp.concatenate([model.logits(prompt.hidden)[None], later])
        return logits.swapaxes(0, 1), prompt.next_position

    tokens = jnp.asarray(recorded, jnp.int32)
    return _twice(lambda embed, inputs: run(state, embed, inputs, tokens), model, case)


def verify_gradients(model: QwenVL, folder: pathlib.Path, path: pathlib.Path, label: str, tol: Tolerances, rule: str):
    """Checks the gradient fingerprints of a `grads_CASE.json`: per tensor, its norm and its product with cos(0.1 k).

    Differences are relative to the recorded norm (the product of a unit vector cannot exceed its norm). Where the
    recording is zero up to rounding, so must be the gradient here.

    Raises:
      RecordingError: the recording, or that of its case, is damaged or incomplete.
    """
    recorded = read_json(path)
    loss, prints = recorded["loss"], recorded["grads"]
    if not (isinstance(loss, (int, float)) and isinstance(prints, dict) and all(map(_is_pair, prints.values()))):
        raise RecordingError(
            f"{path}: loss must be a number, and grads two numbers for each tensor's name: record it again"
        )
    arrays = read_arrays(folder / f"{recorded['case']}.npz")
    case = _choose_rule(recorded["case"], arrays, model, rule, "")
    (loss, aux, logits, first), (_, aux2, logits2, second) = _gradients(model, case)
    checks = CaseChecks(label)
    losses, group = checks.group("loss", tol.loss), checks.group("gradients", tol.grad_rel)
    _loss(losses, loss, recorded["loss"], logits, logits2)
    losses.near("aux_loss", aux, recorded.get("aux_loss"), aux2)
    grads = _published(model, first, second)
    zero = _NO_GRADIENT * max((abs(norm) for norm, _ in prints.values()), default=0.0)
    for name, (norm, product) in prints.items():
        if name not in grads:
            group.add(f"{name} (no such parameter)", np.inf)
            continue
        *ours, moved = grads.pop(name)
        if abs(norm) <= zero and abs(ours[0]) <= zero:
            group.add(name, 0.0)
            continue
        size = max(abs(norm), 1e-8)
        group.add(name, max(abs(ours[0] - norm), abs(ours[1] - product)) / size, moved / size)
    none = set(recorded.get("no_grad", ()))
    for name in grads:
        if name not in none:
            group.add(f"{name} (not recorded)", np.inf)
    return checks.checks()


def _is_pair(value: object) -> bool:
    """Whether a value of JSON is two numbers; what is not finite is a difference, and no damage."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, (int, float)) for x in value)


def _gradients(model: QwenVL, case: Case):
    """(loss, auxiliary loss, logits at real tokens, gradients of the parameters), as of `_twice`."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params, embed, inputs, labels):
        def objective(params):
            model = nnx.merge(graphdef, params, rest)
            out = model.forward(inputs)
            logits = model.logits(out.hidden)
            aux = None if out.router is None else load_balancing_loss(out.router)
            return _shifted_loss(logits, labels), (aux, logits)

        moved = nnx.merge(graphdef, params, rest)
        moved.text.embed[...] = embed
        (loss, (aux, logits)), grads = jax.value_and_grad(objective, has_aux=True)(nnx.state(moved, nnx.Param))
        return loss, aux, logits, grads

    passes = _twice(lambda embed, inputs: run(params, embed, inputs, case.arrays["labels"]), model, case)
    return tuple((loss, aux, case.at_real_tokens(logits), grads) for loss, aux, logits, grads in passes)


def _published(model: QwenVL, grads: nnx.State, moved: nnx.State) -> dict[str, tuple[float, float, float]]:
    """name -> (norm, product, norm of the difference of both gradients) in the published layout."""
    first, second = (dict(nnx.to_flat_state(state)) for state in (grads, moved))
    found = {}
    for leaf in weight_map.leaves(model):
        values = [np.asarray(flat[leaf.path].get_value()) for flat in (first, second)]
        for layer, name in enumerate(leaf.names):
            parts = (leaf.to_published(value[layer] if leaf.stacked else value) for value in values)
            g, other = (part.reshape(-1).astype(np.float64) for part in parts)
            product = float(g @ np.cos(0.1 * np.arange(g.size)))
            found[name] = (float(np.linalg.norm(g)), product, float(np.linalg.norm(other - g)))
    return found
