"""The `verify` task: is this port equal to a recorded Hugging Face reference, stage by stage?

Give it one recorded model folder, a `processor/` folder, or a root with several of them. Record your own from real
weights with `tools/record_reference.py`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections

from mllm4d_jax.encode.positions import RULES
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.files.remote import place
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.verify.checks import Check
from mllm4d_jax.verify.model import Tolerances, case_files, verify_case, verify_gradients
from mllm4d_jax.verify.processor import is_processor_folder, verify_processor
from mllm4d_jax.verify.recorded import RecordingError, read_json

_WIDTH = 52


@dataclasses.dataclass(frozen=True)
class Target:
    """A recorded folder and the checkpoint to hold against it (None for a processor folder)."""

    folder: pathlib.Path
    model: pathlib.Path | None


def find_targets(golden: str, model: str) -> list[Target]:
    """What there is to verify.

    A folder of cases is checked with `model`, or with its own weights when `model` is empty. In a root, `model` (if
    given) replaces the weights of the folders recorded with the same configuration, and must match at least one.

    Raises:
      RecordingError: nothing recorded there, no weights to check, or a model that matches no folder of the root.
    """
    root = pathlib.Path(golden)
    if not golden or not root.is_dir():
        raise RecordingError(f"config.golden = {golden!r} is not a folder: point it at a recorded reference")
    if _is_model_folder(root):
        return [Target(root, _weights(root, model))]
    if is_processor_folder(root):
        return [Target(root, None)]
    children = [d for d in sorted(root.iterdir()) if d.is_dir()]
    models = [d for d in children if _is_model_folder(d)]
    targets = [Target(d, None) for d in children if d not in models and is_processor_folder(d)]
    if not models and not targets:
        raise RecordingError(f"{root} holds no recorded cases (npz with input_ids) and no processor tables")
    matching = [d for d in models if model and _same_model(d, model)]
    if model and models and not matching:
        raise RecordingError(f"{model} has the configuration of none of {[d.name for d in models]} in {root}")
    return targets + [Target(d, _weights(d, model if d in matching else "")) for d in models]


def _is_model_folder(folder: pathlib.Path) -> bool:
    return any(folder.glob("grads_*.json")) or (
        any(folder.glob("*.npz")) and ((folder / "config.json").is_file() or (folder / "text.npz").is_file())
    )


def _weights(folder: pathlib.Path, model: str) -> pathlib.Path:
    path = place(model) if model else folder
    if not any(path.glob("model*.safetensors")):
        raise RecordingError(
            f"{path} holds no weights: give the checkpoint the reference was recorded with by --config.model.path=DIR"
        )
    return path


def _same_model(folder: pathlib.Path, model: str) -> bool:
    if not (folder / "config.json").is_file():
        return False
    a, b = (dataclasses.replace(ModelConfig.from_folder(p), source="", dtype="", tied=None) for p in (folder, model))
    return a == b


def verify_target(target: Target, tol: Tolerances, *, attention: str, rule: str, only: str = "") -> Iterator[Check]:
    """Checks one folder; `only` restricts it to the case of that name."""
    label = target.folder.name or str(target.folder)
    if target.model is None:
        checks = verify_processor(target.folder, label, tol.patches)
        yield from (c for c in checks if only in ("", c.case.split("/")[-1]))
        return
    model = load_model(target.model, dtype=jnp.float32, attention=attention)
    rule = _recorded_rule(target.folder, rule)
    for path in case_files(target.folder):
        if only in ("", path.stem):
            yield from verify_case(model, path, f"{label}/{path.stem}", tol, rule)
    for path in sorted(target.folder.glob("grads_*.json")):
        if only in ("", path.stem):
            yield from verify_gradients(model, target.folder, path, f"{label}/{path.stem}", tol, rule)


def _recorded_rule(folder: pathlib.Path, rule: str) -> str:
    """The position rule a recording declares in its manifest, when the configuration leaves it open.

    Raises:
      RecordingError: the manifest is damaged, or names a rule that is none.
    """
    manifest = folder / "manifest.json"
    if rule != "auto" or not manifest.is_file():
        return rule
    named = read_json(manifest).get("rope_rule") or rule
    if named not in ("auto", *RULES):
        raise RecordingError(f"{manifest}: rope_rule = {shown(named)} is none of {', '.join(RULES)}: record it again")
    return named


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Entry point of the task; 0 only if every check holds.

    Raises:
      RecordingError, ModelConfigError, CheckpointError: nothing comparable was found.
    """
    del workdir  # the report goes to the terminal; nothing is left behind
    started = time.monotonic()
    tol = Tolerances(**{k: float(v) for k, v in config.tol.items()})
    checks: list[Check] = []
    with jax.default_matmul_precision("highest"):
        how = dict(attention=config.model.attention, rule=config.position_rule, only=config.case)
        for target in find_targets(config.golden, config.model.path):
            for check in verify_target(target, tol, **how):
                print(check.line(_WIDTH), flush=True)
                checks.append(check)
    seconds = time.monotonic() - started
    if not checks:
        raise RecordingError(f"no recorded case matches config.case = {config.case!r}")
    total, failed = len(checks), [c for c in checks if not c.passed]
    if failed:
        first = failed[0]
        print(f"\nFAILED: {len(failed)} of {total} checks in {seconds:.0f} s")
        print(f"first stage that deviates: {first.case}: {first.group} ({first.worst})")
        return 1
    print(f"\nPASSED: all {total} checks in {seconds:.0f} s (fp32, matmul precision highest)")
    return 0
