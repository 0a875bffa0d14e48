"""The one command of the project: `python run.py --config=FILE[:VARIANT] [--workdir=DIR] [--config.KEY=VALUE ...]`.

Reads the flags (no other file does), loads the config, checks every key against the task's table and hands config and
workdir to the task. Exit codes: 0 success, 1 the task found a problem the user
can act on, 2 the command line or the config is wrong. Anything unforeseen keeps its traceback.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from configs import common, schema
from configs.schema import ConfigError

ROOT = pathlib.Path(__file__).resolve().parent
# task -> the module whose run(config, workdir, targets) plans it
PLAN = {"sft": "mllm4d_jax.plan.sft", "grpo": "mllm4d_jax.plan.grpo"}
REPORTED = ("sft", "grpo", "eval")  # tasks whose workdir gets a page at the end
FLAG_HELP = (
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


def main(argv: Sequence[str]) -> int:
    """Runs one command line (`argv[0]` is the program) and returns its exit code."""
    try:
        spec, workdir, plan, wants_help, rest = split_flags(argv)
        if not spec:
            refuse_leftovers(rest, ())
            print(overview())
            return 0 if wants_help else 2
        module, path, variant = load_module(spec)
        keys, config = read_config(module, path, variant)
        config = override(config, keys, rest)
        if wants_help:
            print(config_help(module, path, config, keys))
            return 0
        folder = pathlib.Path(workdir or config.workdir or default_workdir(path, variant))
        config.workdir = str(folder)
        if plan is not None:
            prepare_plan(config.task)
    except ConfigError as problem:
        return report(problem, 2)
    try:
        flags.FLAGS.mark_as_parsed()  # libraries that ask absl for a flag get its default
        if plan is not None:
            return int(importlib.import_module(PLAN[config.task]).run(config, str(folder), plan) or 0)
        join_processes(config.distributed)
        task = importlib.import_module(common.TASKS[config.task][1])
        code = int(task.run(config, str(folder)) or 0)
        if code == 0 and config.task in REPORTED:
            write_page(folder)
        return code
    except ValueError as problem:
        if not is_addressed_to_user(problem):
            raise
        return report(problem, 2 if isinstance(problem, ConfigError) else 1)


def write_page(folder: pathlib.Path) -> None:
    """Write the page of a run and say its figures, on the first of several processes; without a step it has none."""
    from mllm4d_jax.parallel import multihost
    from mllm4d_jax.report import build, reading

    if multihost.is_primary() and folder.is_dir():
        try:
            print(build.close_run(folder), flush=True)
        except reading.ReportError as problem:
            print(f"no report: {problem}", file=sys.stderr, flush=True)


def split_flags(argv: Sequence[str]) -> tuple[str, str, str | None, bool, list[str]]:
    """(--config, --workdir, --plan or None, --help given, all other arguments), in any order on the command line."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", "", "", flag_values=values)
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    flags.DEFINE_string("plan", None, "", flag_values=values)
    flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
    try:
        rest = values(list(argv), known_only=True)[1:]
    except flags.Error as problem:
        raise ConfigError(str(problem)) from None
    return values.config, values.workdir, values.plan, values.help, rest


def refuse_leftovers(rest: Sequence[str], known: Sequence[str]) -> None:
    """Raises ConfigError for the first argument that is no flag of ours; `known` are the keys of the config, if any."""
    skip = False
    for arg in rest:
        name, equals, _ = arg.lstrip("-").partition("=")
        if skip:
            skip = False
        elif not arg.startswith("-"):
            files = [str(path) for path, _ in config_files()]
            near = arg if pathlib.Path(arg.partition(":")[0]).suffix == ".py" else schema.nearest(arg, files)
            hint = f" - did you mean --config={near}?" if near else ""
            raise ConfigError(f"unexpected argument '{arg}'{hint} (quote a value that has spaces in it)")
        elif name.startswith(("config.", "noconfig.")):
            if not known:
                raise ConfigError(f"'{arg}' needs --config=FILE as well, e.g. --config=configs/sft.py:tiny")
            key = name.partition(".")[2]
            if key not in known:
                raise ConfigError(f"{schema.unknown_key(key, known)} (on the command line: '{arg}')")
            skip = not equals and known[key].default is not True and known[key].default is not False
        else:
            near = schema.nearest(name, ["config", "workdir", "plan", "help", *(f"config.{key}" for key in known)])
            hint = f" - did you mean '--{near}'?" if near else ""
            raise ConfigError(f"unknown flag '{arg}'{hint} (see: python run.py --help)")


def load_module(spec: str) -> tuple[object, pathlib.Path, str]:
    """Imports the file of `FILE[:VARIANT]` and returns (module, path, variant). Raises ConfigError if it cannot."""
    name, _, variant = spec.partition(":")
    found = [folder / name for folder in (pathlib.Path.cwd(), ROOT) if (folder / name).is_file()]
    if not found:
        files = [str(path) for path, _ in config_files()]
        near = schema.nearest(name, files) or schema.nearest(f"configs/{pathlib.Path(name).stem}.py", files)
        hint = f" - did you mean '{near}'?" if near else ""
        raise ConfigError(f"there is no config file '{name}'{hint} (there are: {', '.join(files)})")
    path = found[0]
    source = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if source is None:
        raise ConfigError(f"{name} is not a Python file")
    module = importlib.util.module_from_spec(source)
    try:
        source.loader.exec_module(module)
    except (SyntaxError, ImportError) as problem:
        raise ConfigError(f"{path}: cannot be imported: {problem}") from problem
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path} has no function get_config(variant)")
    return module, path, variant


def read_config(module, path: pathlib.Path, variant: str) -> tuple[Mapping[str, schema.Key], ml_collections.ConfigDict]:
    """Calls the file's get_config and checks what it returns; (key table of its task, full locked config)."""
    if variant and not takes_variant(module):
        raise ConfigError(f"{path} has no variants, so not '{variant}' either")
    try:
        config = module.get_config(variant) if takes_variant(module) else module.get_config()
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        raise ConfigError(f"{where}: {assignment_problem(problem)}") from problem
    if not isinstance(config, (Mapping, ml_collections.ConfigDict)):
        raise ConfigError(f"{path}: get_config must return a ConfigDict, not {type(config).__name__}")
    try:
        keys = common.task_keys(config.get("task"))
        return {key.name: key for key in keys}, schema.complete(config, keys)
    except ConfigError as problem:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(problem).splitlines())) from None


def takes_variant(module) -> bool:
    """True if get_config can be given a variant."""
    return bool(inspect.signature(module.get_config).parameters)


def assignment_problem(problem: Exception) -> str:
    """One line for what went wrong inside a get_config; ConfigDict's own messages list every other key as well."""
    text = str(problem.args[0]) if problem.args else type(problem).__name__
    near = re.search(r'Did you mean "(.+?)" instead of "(.+?)"', text)
    if near:
        return f"unknown key '{near[2]}' - did you mean '{near[1]}'?"
    unknown = re.search(r'^Key "(.+?)" does not exist', text)
    if unknown:
        every = (key.name for keys, _, _ in common.TASKS.values() for key in keys)
        return f"unknown key '{unknown[1]}'{schema.did_you_mean(unknown[1], every)}"
    return f"{type(problem).__name__}: {text}"


def override(
    config: ml_collections.ConfigDict, keys: Mapping[str, schema.Key], rest: Sequence[str]
) -> ml_collections.ConfigDict:
    """The config with the command line's `--config.KEY=VALUE` laid over it. Raises ConfigError for a key or value."""
    refuse_leftovers(rest, keys)
    values = flags.FlagValues()
    argv = ["run.py", *rest]
    try:
        holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as problem:
        raise ConfigError(value_problem(str(problem), keys)) from None
    return schema.complete(holder.value, keys.values())


def value_problem(message: str, keys: Mapping[str, schema.Key]) -> str:
    """absl's message for a value it cannot read, in the words of `schema.checked`."""
    parts = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if parts is None or parts[1] not in keys:
        return message
    return f"{parts[1]} must be {schema.TYPE_NAMES[type(keys[parts[1]].default)]}, not '{parts[2]}'"


def default_workdir(path: pathlib.Path, variant: str) -> str:
    """runs/<config>[-<variant>], relative to the current folder."""
    return os.path.join("runs", f"{path.stem}-{variant}" if variant else path.stem)


def prepare_plan(task: str) -> None:
    """Sets what a plan needs before JAX is imported: the TPU compiler, and no accelerator.

    Raises:
      ConfigError: there are no plans for this task.
    """
    if task not in PLAN:
        raise ConfigError(f"--plan is for {', '.join(PLAN)}, not for '{task}'")
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")


def join_processes(mode: str) -> None:
    """Makes this process part of a multi-process JAX run, if the config asks for it (see the key `distributed`)."""
    if mode == "off":
        return
    import jax

    if mode == "auto":
        jax.distributed.initialize()
        return
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"distributed='explicit' needs the environment variable(s) {', '.join(missing)}")
    address, count, index = (os.environ[name] for name in names)
    if not (count.isdecimal() and index.isdecimal()):
        raise ConfigError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers, not '{count}' and '{index}'")
    jax.distributed.initialize(address, int(count), int(index))


def is_addressed_to_user(problem: ValueError) -> bool:
    """True for the error classes this project defines itself: their message says what to do, a traceback would not."""
    homes = (cls.__module__.partition(".")[0] for cls in type(problem).__mro__)
    return any(home in ("mllm4d_jax", "data_prep", "configs") for home in homes)


def report(problem: Exception, code: int) -> int:
    """Prints `error: message` to stderr and returns the exit code."""
    print(f"error: {problem}", file=sys.stderr)
    return code


def config_files() -> list[tuple[pathlib.Path, str]]:
    """Every config file of the repository with the first line of its docstring; read, not imported."""
    found = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "get_config" for node in tree.body):
            found.append((path.relative_to(ROOT), (ast.get_docstring(tree) or "").partition("\n")[0]))
    return found


def columns(rows: Sequence[tuple[str, str]], indent: int = 2, width: int = 110) -> str:
    """Two aligned columns, the second wrapped."""
    left = max(len(row[0]) for row in rows) + 2
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - indent - left) or [""]
        lines.append(" " * indent + name.ljust(left) + wrapped[0])
        lines.extend(" " * (indent + left) + line for line in wrapped[1:])
    return "\n".join(lines)


def overview() -> str:
    """What `python run.py` and `python run.py --help` print."""
    configs = [(str(path), summary) for path, summary in config_files()]
    tasks = [(name, summary) for name, (_, _, summary) in common.TASKS.items()]
    examples = [line for path, _ in config_files() for line in usage_lines(ROOT / path)]
    return "\n".join(
        (
            "Usage: python run.py --config=FILE[:VARIANT] [--workdir=DIR] [--config.KEY=VALUE ...]",
            "",
            "Flags:",
            columns(FLAG_HELP),
            "",
            "Tasks (a config's key 'task'):",
            columns(tasks),
            "",
            "Configs:",
            columns(configs),
            "",
            "Examples:",
            *(f"  {line}" for line in examples),
            "",
            "New here? `python run.py --config=configs/sft.py:tiny` needs no data and no weights.",
            "All keys of a config, with defaults: python run.py --config=configs/sft.py --help",
        )
    )


def usage_lines(path: pathlib.Path) -> list[str]:
    """The example commands in a config file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return [line.strip() for line in text.splitlines() if line.strip().startswith("python run.py")]


def config_help(module, path: pathlib.Path, config, keys: Mapping[str, schema.Key]) -> str:
    """What `--config=FILE[:VARIANT] --help` prints: the docstring, the variants and every key with its value."""
    values = dict(schema.flatten(config))
    rows = []
    for name, key in keys.items():
        choices = f" ({' | '.join(repr(choice) for choice in key.choices)})" if len(key.choices) > 1 else ""
        rows.append((f"{name} = {values[name]!r}", f"{key.help}{choices}"))
    parts = [f"{path}", "", (module.__doc__ or "").strip(), ""]
    variants = getattr(module, "VARIANTS", None)
    if variants:
        shown = [(f"{path.name}:{name}" if name else path.name, text) for name, text in variants.items()]
        parts += ["Variants:", columns(shown), ""]
    return "\n".join((*parts, "Keys, their values here and what they mean:", key_rows(rows)))


def key_rows(rows: Sequence[tuple[str, str]]) -> str:
    """`columns`, except that a long left side gets a line of its own."""
    lines = []
    for name, text in rows:
        lines.append(
            columns([(name.ljust(40), text)]) if len(name) <= 40 else f"  {name}\n{columns([(' ' * 40, text)])}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
