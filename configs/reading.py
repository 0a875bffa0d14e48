"""From `FILE[:VARIANT]` to a checked config, with an error that names file and line for what is wrong in it."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pathlib
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_collections

from configs import common, schema
from configs.schema import ConfigError, Key

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class LoadedConfig:
    """A config file, its variant that was asked for, the key table of its task and the full locked config."""

    path: pathlib.Path
    variant: str
    module: ModuleType
    keys: Mapping[str, Key]
    config: ml_collections.ConfigDict


def config_files() -> dict[str, str]:
    """Return path -> docstring of every config file of the repository; the files are read, not imported."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "configs").glob("*.py"))}
    return {
        str(path.relative_to(ROOT)): ast.get_docstring(ast.parse(text)) or ""
        for path, text in texts.items()
        if re.search(r"^(def get_config\(|get_config = )", text, re.MULTILINE)
    }


def load_config(spec: str) -> LoadedConfig:
    """Import the file of `FILE[:VARIANT]`, call its get_config and check what it returns.

    Raises:
      ConfigError: no such file or variant, a file that cannot be imported, or a key or value that is wrong.
    """
    name, _, variant = spec.partition(":")
    found = [folder / name for folder in (pathlib.Path.cwd(), ROOT) if (folder / name).is_file()]
    if not found:
        files = config_files()
        near = schema.nearest(name, files) or schema.nearest(f"configs/{pathlib.Path(name).stem}.py", files)
        hint = f" - did you mean '{near}'?" if near else ""
        raise ConfigError(f"there is no config file '{name}'{hint} (there are: {', '.join(files)})")
    path = found[0]
    module = _import(path)
    config = _call(module.get_config, path, variant)
    try:
        keys = common.task_keys(config.get("task"))
        return LoadedConfig(path, variant, module, {key.name: key for key in keys}, schema.complete(config, keys))
    except ConfigError as problem:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(problem).splitlines())) from None


def _import(path: pathlib.Path) -> ModuleType:
    source = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if source is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(source)
    try:
        source.loader.exec_module(module)
    except (SyntaxError, ImportError) as problem:
        raise ConfigError(f"{path}: cannot be imported: {problem}") from problem
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path} has no function get_config(variant)")
    return module


def _call(get_config: Any, path: pathlib.Path, variant: str) -> Mapping[str, Any] | ml_collections.ConfigDict:
    takes_variant = bool(inspect.signature(get_config).parameters)
    if variant and not takes_variant:
        raise ConfigError(f"{path} has no variants, so not '{variant}' either")
    try:
        config = get_config(variant) if takes_variant else get_config()
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        raise ConfigError(f"{where}: {_assignment_problem(problem)}") from problem
    if not isinstance(config, (Mapping, ml_collections.ConfigDict)):
        raise ConfigError(f"{path}: get_config must return a ConfigDict, not {type(config).__name__}")
    return config


def _assignment_problem(problem: Exception) -> str:
    """Return one line for what went wrong in a get_config; ConfigDict's own messages list every other key as well."""
    text = str(problem.args[0]) if problem.args else type(problem).__name__
    near = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text)
    if near:
        return f"unknown key '{near[2]}' - did you mean '{near[1]}'?"
    unknown = re.search(r'^Key "(.+?)" does not exist', text)
    if unknown:
        every = (key.name for task in common.TASKS.values() for key in task.keys)
        return f"unknown key '{unknown[1]}'{schema.did_you_mean(unknown[1], every)}"
    return f"{type(problem).__name__}: {text}"
