"""From `FILE[:VARIANT]` to a checked config, with an error that names file and line; and what --help prints."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import pathlib
import re
import textwrap
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ml_collections

from configs import common, schema
from configs.schema import ConfigError, Key

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLAGS = (
    ("--config=FILE[:VARIANT]", "the run: one of the files below, or your own file with a get_config(variant)"),
    ("--workdir=DIR", "where results go (default: runs/<config>[-<variant>])"),
    ("--config.KEY=VALUE", "change one key of the config"),
    (
        "--plan=TARGET[,...]",
        "do not train (sft, grpo): say whether the run fits and how long it takes. v5e:4x4, v5p:2x2x1 (also v6e, "
        "tpu7x) and h100, h200, h100:8 compile the step for devices that need not be here; memory reckons GPUs without "
        "compiling; v5e:4x4+ (sft) looks for the largest batch as well. Lengths of texts in tokens go into the same "
        "list: branch=120, answer=, system= (sft), text=, completion= (grpo). See docs/train/plans.md",
    ),
    ("--version", "the version of this program"),
    ("--help", "this text; together with --config=FILE the keys of that config"),
)


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
    except SystemExit as problem:
        raise ConfigError(f"{path}: cannot be imported: it ends the program ({problem!r})") from problem
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
    except SystemExit as problem:
        raise ConfigError(f"{path}: get_config ends the program ({problem!r})") from problem
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


def overview() -> str:
    """Return the text without a config: flags, tasks, config files and examples."""
    files = config_files()
    examples = [line for doc in files.values() for line in doc.splitlines() if line.startswith("python run.py")]
    return "\n".join(
        (
            "Usage: python run.py --config=FILE[:VARIANT] [--workdir=DIR] [--config.KEY=VALUE ...]",
            f"\nFlags:\n{columns(FLAGS)}",
            f"\nTasks (a config's key 'task'):\n{columns((name, task.help) for name, task in common.TASKS.items())}",
            f"\nConfigs:\n{columns((path, doc.partition(chr(10))[0]) for path, doc in files.items())}",
            "\nExamples:",
            *(f"  {line}" for line in examples),
            "\nNew here? `python run.py --config=configs/sft.py:tiny` needs no data and no weights.",
            "All keys of a config, with defaults: python run.py --config=configs/sft.py --help",
        )
    )


def config_help(loaded: LoadedConfig, config: ml_collections.ConfigDict) -> str:
    """Return the text for a config: its file's docstring, the variants, and every key with its value in `config`."""
    values, rows = dict(schema.flatten(config)), []
    for name, key in loaded.keys.items():
        choices = f" ({' | '.join(repr(choice) for choice in key.choices)})" if len(key.choices) > 1 else ""
        rows.append((f"{name} = {values[name]!r}", f"{key.help}{choices}"))
    parts = [f"{loaded.path}\n\n{(loaded.module.__doc__ or '').strip()}\n"]
    presets = loaded.module.get_config
    if isinstance(presets, schema.Presets):
        shown = columns((presets.spell(name), text) for name, (text, _) in presets.variants.items())
        parts.append(f"Variants:\n{shown}\n")
    return "\n".join((*parts, "Keys, their values here and what they mean:", columns(rows, widest=40)))


def columns(rows: Iterable[tuple[str, str]], widest: int = 110) -> str:
    """Return two aligned columns, the second wrapped; a left side longer than `widest` gets a line of its own."""
    rows, lines = list(rows), []
    left = min(widest, max(len(name) for name, _ in rows)) + 2
    for name, text in rows:
        if len(name) > left - 2:
            lines.append(f"  {name}")
            name = ""
        first, *others = textwrap.wrap(text, 108 - left) or [""]
        lines.append(f"  {name:<{left}}{first}".rstrip())
        lines.extend(" " * (left + 2) + line for line in others)
    return "\n".join(lines)
