"""What `python run.py --help` prints, with and without a config."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

import ml_collections

from configs import schema
from configs.common import TASKS
from configs.reading import LoadedConfig, config_files

FLAGS = (
    ("--config=FILE[:VARIANT]", "the run: one of the files below, or your own file with a get_config(variant)"),
    ("--workdir=DIR", "where results go (default: runs/<config>[-<variant>])"),
    ("--config.KEY=VALUE", "change one key of the config"),
    (
        "--plan=CHIP:SHAPE[,...]",
        "do not train: compile the training step for TPU topologies such as v5e:4x4 and say whether it fits and how "
        "long it takes; --plan=memory reckons the memory on GPUs",
    ),
    ("--help", "this text; together with --config=FILE the keys of that config"),
)


def overview() -> str:
    """Return the text without a config: flags, tasks, config files and examples."""
    files = config_files()
    examples = [line for doc in files.values() for line in doc.splitlines() if line.startswith("python run.py")]
    return "\n".join(
        (
            "Usage: python run.py --config=FILE[:VARIANT] [--workdir=DIR] [--config.KEY=VALUE ...]",
            f"\nFlags:\n{columns(FLAGS)}",
            f"\nTasks (a config's key 'task'):\n{columns((name, task.help) for name, task in TASKS.items())}",
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
