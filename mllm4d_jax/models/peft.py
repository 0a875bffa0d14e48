"""Adapters as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`, one pair of matrices per layer.

Names follow the modules of transformers: files are written with those of version 4.52 and later
(`model.language_model.layers.3...`), and read with any prefix that `weight_map.SPELLINGS` has for the decoder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import nnx

from mllm4d_jax.files.cache import copied_file
from mllm4d_jax.files.json_object import real, whole
from mllm4d_jax.files.quoting import plain, shown
from mllm4d_jax.files.remote import place
from mllm4d_jax.files.version import PROGRAM
from mllm4d_jax.models import weight_map
from mllm4d_jax.models.hf import write_tensors
from mllm4d_jax.models.layers import Linear
from mllm4d_jax.models.qwen_vl import QwenVL
from mllm4d_jax.models.split import attach_lora
from mllm4d_jax.models.tensor_files import FLOATS, CheckpointError, counted, mapped, parse_json, read_header
from mllm4d_jax.parallel.place import put

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WRAPPER = "base_model.model."
_PREFIXES = weight_map.SPELLINGS["text"]  # of the decoder; the first is written, each is read
_TENSOR = re.compile(re.escape(_WRAPPER) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Options that are read below, or that do not change what a loaded adapter computes (the tensors say which modules there
# are, not `target_modules`). Every other one, known to this version of PEFT or not, must be off.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias"}
_NO_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "megatron_core", "loftq_config", "eva_config", "qalora_group_size",
    "ensure_weight_tying", "runtime_config",
}  # fmt: skip
# Options that a written file names and that are off.
_NULL = ("auto_mapping", "layers_pattern", "layers_to_transform", "modules_to_save", "revision")
_FALSE = ("fan_in_fan_out", "lora_bias", "use_dora", "use_rslora")
_LARGE = 1e30  # no number of an adapter is; JSON has whole numbers that no float can be
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others begin by changing the base weights


class PeftError(ValueError):
    """An adapter folder that cannot be used exactly, or does not fit the model. The message lists everything."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds."""

    rank: int  # of every pair of matrices
    scale: float  # of the product: `alpha / rank` (`alpha / sqrt(rank)` where the folder says `use_rslora`)
    dropout: float  # share of the adapter's inputs that was dropped in training
    targets: tuple[str, ...]  # last names of the adapted modules, sorted
    base: str  # name or path of the base model as the folder gives it, "" without one


def is_peft_folder(path: str | pathlib.Path) -> bool:
    """Whether a path is a folder with an `adapter_config.json`; "" names nothing."""
    return bool(str(path)) and (place(path) / CONFIG).is_file()


def adapted_linears(model: QwenVL) -> dict[tuple, Linear]:
    """NNX path -> layer, for every layer of the model that carries an adapter."""
    return {path: m for path, m in nnx.iter_modules(model) if isinstance(m, Linear) and m.lora_a is not None}


def save_peft(model: QwenVL, folder: str | pathlib.Path, *, base: str, dropout: float = 0.0) -> int:
    """Writes the model's adapter, matrices in float32.

    Args:
      model: with an adapter.
      folder: created if needed.
      base: what `base_model_name_or_path` says; PEFT loads the base model from there when it is not given one.
      dropout: what `lora_dropout` says.

    Returns:
      The number of tensors.

    Raises:
      PeftError: the model has no adapter, or layers of different rank or scale, which one folder cannot say.
    """
    linears, places = adapted_linears(model), _places(model)
    if not linears:
        raise PeftError("the model carries no adapter that could be saved")
    kinds = {(m.lora_a.shape[-1], m.lora_scale) for m in linears.values()}
    if len(kinds) > 1:
        raise PeftError(f"the model's adapters differ in (rank, scale): {sorted(kinds)}; a folder holds one kind")
    ((rank, scale),) = kinds
    tensors = {}
    for module, (path, layer) in places.items():
        if path in linears:
            name, m = f"{_WRAPPER}{_PREFIXES[0]}{module}", linears[path]
            for side, value in (("A", m.lora_a), ("B", m.lora_b)):
                tensors[f"{name}.lora_{side}.weight"] = np.ascontiguousarray(np.asarray(value[layer], np.float32).T)
    targets = sorted({path[-1] for path in linears})
    alpha = float(f"{scale * rank:.12g}")  # what was given, without the last bits of dividing and multiplying
    config = _config_file(rank, alpha, dropout, _target_modules(model, targets), base)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tensors(tensors, folder / WEIGHTS, {"written_by": PROGRAM})
    return len(tensors)


def _config_file(rank: int, alpha: float, dropout: float, targets: list[str] | str, base: str) -> dict[str, Any]:
    own = dict(
        base_model_name_or_path=base or None,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        lora_dropout=dropout,
        r=rank,
        target_modules=targets,
    )
    constant = dict(peft_type="LORA", task_type="CAUSAL_LM", bias="none", inference_mode=True, init_lora_weights=True)
    off = dict.fromkeys(_NULL) | dict.fromkeys(_FALSE, False) | dict(alpha_pattern={}, rank_pattern={})
    return own | constant | off


def _target_modules(model: QwenVL, targets: list[str]) -> list[str] | str:
    """A list of last names; a regular expression where the vision tower has modules of these names as well."""
    names = (name for leaf in weight_map.leaves(model) if leaf.path[0] == "vision" for name in leaf.names)
    if set(targets).isdisjoint(name.rpartition(".")[0].rpartition(".")[2] for name in names):
        return targets
    return rf"(.*\.)?layers\.\d+\.(self_attn|mlp)\.({'|'.join(targets)})"


def _places(model: QwenVL) -> dict[str, tuple[tuple, int]]:
    """`layers.3.self_attn.q_proj` -> (NNX path of the stacked layer, number within the stack), for the decoder."""
    linears = {path for path, m in nnx.iter_modules(model) if isinstance(m, Linear)}
    return {
        name[name.index("layers.") :].removesuffix(".weight"): (leaf.path[:-1], layer)
        for leaf in weight_map.leaves(model)
        if leaf.path[0] == "text" and leaf.path[-1] == "kernel" and leaf.path[:-1] in linears
        for layer, name in enumerate(leaf.names)
    }


def load_peft(folder: str | pathlib.Path, model: QwenVL) -> Adapter:
    """Puts the adapter of a PEFT folder on the model, in place; matrices in float32, placed like the weights.

    A model without an adapter gets one. A model that has one already (a run that is about to train it) keeps it with
    the folder's values; its rank, scale and targets have to be the folder's.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      model: the base model the adapter was trained on (that it is the same one shows in the shapes alone).

    Raises:
      PeftError: an option this port does not compute exactly, tensors that are missing, unknown, of another shape or
        not finite, or another adapter on the model; everything that is wrong is in one message.
    """
    folder = place(folder)
    config, problems = _read_config(folder)
    if problems:
        raise _refusal(folder, problems)
    places = _places(model)
    stored, problems = _read_tensors(copied_file(folder / WEIGHTS), places)
    targets = tuple(sorted({module.rpartition(".")[2] for module, _ in stored}))
    adapter = dataclasses.replace(config, targets=targets)
    problems += _shape_problems(stored, places, adapter, dict(nnx.iter_modules(model)))
    if not problems and adapted_linears(model):
        problems = _fit_problems(model, adapter)
    if problems:
        raise _refusal(folder, problems)
    if not adapted_linears(model):
        alpha, drop = adapter.scale * adapter.rank, adapter.dropout
        how = dict(targets=targets, dropout=drop, rngs=nnx.Rngs(0), mesh=model.mesh)
        attach_lora(model, rank=adapter.rank, alpha=alpha, **how)
    by_path: dict[tuple, list[str]] = {}
    for module, (path, _) in places.items():  # in the order of the layers
        by_path.setdefault(path, []).append(module)
    for path, linear in adapted_linears(model).items():
        for side, variable in (("A", linear.lora_a), ("B", linear.lora_b)):
            value = np.stack([stored[module, side].T for module in by_path[path]])
            variable.set_value(put(value, variable.get_value().sharding))
    return adapter


def _refusal(folder: pathlib.Path, problems: list[str]) -> PeftError:
    return PeftError(
        f"{folder} cannot be used as an adapter of this model:\n" + "\n".join(f"  - {p}" for p in problems)
    )


def _read_config(folder: pathlib.Path) -> tuple[Adapter | None, list[str]]:
    """(what adapter_config.json says, targets not yet known, or None; what is wrong with the folder)."""
    if not (folder / CONFIG).is_file():
        return None, [f"there is no {CONFIG}: name the folder that PEFT's save_pretrained wrote"]
    try:
        config = parse_json((folder / CONFIG).read_bytes())
    except (ValueError, OSError) as error:
        return None, [f"{CONFIG} is not JSON: {plain(error)}"]
    if not isinstance(config, dict):
        return None, [f"{CONFIG} holds a {type(config).__name__}, not an object"]
    problems = list(_option_problems(config))
    if not (folder / WEIGHTS).is_file():
        pickled = [p.name for p in folder.glob("adapter_model*.bin")]
        advice = (
            f"and {' and '.join(pickled)}, a pickle, can run code when it is opened and is not read: load it with PEFT "
            "where you trust it and call save_pretrained(folder, safe_serialization=True)"
        )
        problems.append(f"{WEIGHTS} is missing" + (f", {advice}" if pickled else ": is the download complete?"))
    if problems:
        return None, problems
    rank, alpha = config["r"], float(config["lora_alpha"])
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    base = config.get("base_model_name_or_path") or ""
    return Adapter(rank, scale, float(config.get("lora_dropout") or 0.0), (), str(base)), []


def _option_problems(config: Mapping[str, Any]) -> Iterator[str]:
    def number(name: str) -> bool:
        return real(-_LARGE, _LARGE)(config.get(name, 0.0))

    if config.get("peft_type") != "LORA":
        yield f"peft_type is {shown(config.get('peft_type'))}: only LORA adapters are supported"
    if not whole(1, int(_LARGE))(config.get("r")):
        yield f"r is {shown(config.get('r'))}, not a positive whole number"
    if "lora_alpha" not in config or not number("lora_alpha"):
        yield f"lora_alpha is {shown(config.get('lora_alpha'))}, not a finite number"
    if not number("lora_dropout") or not 0 <= config.get("lora_dropout", 0.0) < 1:
        yield f"lora_dropout is {shown(config['lora_dropout'])}, not a number from 0 to below 1"
    if config.get("use_rslora", False) not in (True, False, None):
        yield f"use_rslora is {shown(config['use_rslora'])}, neither true nor false"
    if config.get("bias", "none") != "none":
        yield f"bias is {shown(config['bias'])}: trained biases are not supported; train with bias='none'"
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        yield (
            f"init_lora_weights is {shown(start)}, which trains against changed base weights: let PEFT convert it with "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    for name in sorted(set(config) - _READ - _NO_EFFECT):
        if config[name] not in (None, False, "", [], {}):
            yield f"{name} is {shown(config[name])}: this option is not supported and has to be off"


def _read_tensors(file: pathlib.Path, places: Mapping) -> tuple[dict[tuple[str, str], np.ndarray], list[str]]:
    """((module, "A" or "B") -> f32 matrix as stored; names of the file that mean nothing to this model)."""
    found: dict[tuple[str, str], np.ndarray] = {}
    names: dict[tuple[str, str], str] = {}
    vision, unknown, twice, no_floats = [], [], [], []
    try:
        header = read_header(file)
    except CheckpointError as error:
        return {}, [str(error)]
    for name, entry in header.items():
        match = _TENSOR.fullmatch(name)
        module = _without_prefix(match["module"], places) if match else None
        key = (module, match["side"]) if match else ()
        if module is None:
            (vision if "visual" in name.split(".") else unknown).append(name)
        elif entry.dtype not in FLOATS:
            no_floats.append(f"{name} ({entry.dtype})")
        elif key in found:
            twice.append(f"{names[key]} and {name}")
        else:
            names[key], found[key] = name, np.asarray(mapped(file, entry), np.float32)
    advice = "which carries no adapter here: train without it, or merge the adapter with PEFT"
    offending = {
        f"tensors of the vision tower, {advice}": vision,
        "tensors that name no linear layer of this model's decoder": unknown,
        f"tensors that are not stored as {', '.join(FLOATS)}, as weights are": no_floats,
        "tensors that are there under another name as well": twice,
    }
    problems = counted(offending)
    return found, problems if found or problems else [f"{WEIGHTS} holds no tensors"]


def _without_prefix(module: str, places: Mapping) -> str | None:
    """`layers.3...` of a module that the model has."""
    bare = (module.removeprefix(prefix) for prefix in _PREFIXES if module.startswith(prefix))
    return next((name for name in bare if name in places), None)


def _shape_problems(stored: Mapping, places: Mapping, adapter: Adapter, modules: Mapping) -> list[str]:
    """Missing tensors of the adapted kinds of modules, and tensors of another shape than rank and model ask for."""
    missing, misshapen, infinite = [], [], []
    for module, (path, _) in places.items():
        if path[-1] not in adapter.targets:
            continue
        d_in, d_out = modules[path].kernel.shape[-2:]
        for side, want in (("A", (adapter.rank, d_in)), ("B", (d_out, adapter.rank))):
            name = f"{module}.lora_{side}"
            value = stored.get((module, side))
            if value is None:
                missing.append(name)
            elif value.shape != want:
                misshapen.append(f"{name} {list(value.shape)}, expected {list(want)}")
            elif not np.isfinite(value).all():
                infinite.append(name)
    offending = {
        "tensors missing (a kind of module has to be adapted in every layer)": missing,
        f"tensors of another shape than r = {adapter.rank} and the model ask for": misshapen,
        "tensors with values that are not finite": infinite,
    }
    return counted(offending)


def _fit_problems(model: QwenVL, adapter: Adapter) -> list[str]:
    """Differences from the adapter that is on the model already."""
    linears = adapted_linears(model)
    linear = next(iter(linears.values()))
    rank, targets = linear.lora_a.shape[-1], tuple(sorted({path[-1] for path in linears}))
    alphas = (linear.lora_scale * rank, adapter.scale * adapter.rank)
    differing = [
        ("rank", rank, adapter.rank, rank != adapter.rank),
        ("alpha", *alphas, not math.isclose(*alphas, rel_tol=1e-6)),
        ("targets", targets, adapter.targets, targets != adapter.targets),
    ]
    return [
        f"lora.{name} is {ours!r} in this run and {theirs!r} in the folder: set --config.lora.{name} to that"
        for name, ours, theirs, differs in differing
        if differs
    ]
