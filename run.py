"""The one command of the project: `python run.py --config=FILE[:VARIANT] [--workdir=DIR] [--config.KEY=VALUE ...]`.

Reads the flags (no other file does), loads the config, checks every key against the task's table and hands config and
workdir to the task. Exit codes: 0 success, 1 the task found a problem the user can act on, 2 the command line or the
config is wrong. Anything unforeseen keeps its traceback.
"""

from __future__ import annotations

import importlib
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from configs import reading, schema
from configs.common import TASKS
from configs.schema import ConfigError, Key
from mllm4d_jax.files import remote, storage
from mllm4d_jax.files.console import guard_console
from mllm4d_jax.files.ending import EXIT_S, Ending
from mllm4d_jax.files.version import PROGRAM


def main(argv: Sequence[str]) -> int:
    """Runs one command line (`argv[0]` is the program) and returns its exit code."""
    try:
        asked, rest = split_flags(argv)
        if asked.version:
            print(PROGRAM)
            return 0
        if not asked.config:
            refuse_leftovers(rest, {})
            print(reading.overview())
            return 0 if asked.help else 2
        loaded = reading.load_config(asked.config)
        config = override(loaded.config, loaded.keys, rest)
        if asked.help:
            print(reading.config_help(loaded, config))
            return 0
        name = f"{loaded.path.stem}-{loaded.variant}" if loaded.variant else loaded.path.stem
        named = asked.workdir or config.workdir or f"runs/{name}"
        config.workdir = named if remote.is_remote(named) else str(pathlib.Path(named))
        if asked.plan is not None:
            prepare_plan(config.task)
        places = in_buckets(config, loaded.keys)
    except ConfigError as problem:
        return report(problem, 2)
    try:
        flags.FLAGS.mark_as_parsed()  # libraries that ask absl for a flag get its default
        task = TASKS[config.task]
        for place in places:
            remote.require(place)
        if asked.plan is not None:
            return int(importlib.import_module(task.plan).run(config, config.workdir, asked.plan) or 0)
        use_gpu_memory()
        join_processes(config.distributed)
        code = int(importlib.import_module(task.module).run(config, config.workdir) or 0)
        if code == 0 and task.page:
            write_page(config.workdir)
        return code
    except ValueError as problem:
        if not is_addressed_to_user(problem):
            raise
        return report(problem, 2 if isinstance(problem, ConfigError) else 1)
    except Exception as problem:
        disk = storage.of_disk(problem, f"a file of this run (workdir {config.workdir})")
        told = disk or remote.trouble(problem) or of_memory(problem, config)
        if told is None:
            raise
        return report(told, 1)


def of_memory(problem: Exception, config: ml_collections.ConfigDict) -> ValueError | None:
    """An error of the devices' memory with what to change; None for other errors."""
    if "jax" not in sys.modules:
        return None
    from mllm4d_jax.plan import shortage

    return shortage.of_memory(problem, config)


def use_gpu_memory() -> None:
    """Has JAX take 92 % of a GPU instead of 75: the rest is enough for context and libraries; TPUs do not ask."""
    if not os.environ.keys() & {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"}:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.92"


def write_page(folder: str) -> None:
    """Write the page of a run and say its figures, on the first of several processes; without a step it has none."""
    from mllm4d_jax.parallel import multihost
    from mllm4d_jax.report import build, reading

    if multihost.is_primary() and remote.is_folder(folder):
        try:
            print(build.close_run(folder), flush=True)
        except reading.ReportError as problem:
            print(f"no report: {problem}", file=sys.stderr, flush=True)


def split_flags(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    """The flags config, workdir, plan (None = not given), version and help, anywhere; all other arguments.

    Raises:
      ConfigError: one of them lacks its value.
    """
    values = flags.FlagValues()
    for name, default in (("config", ""), ("workdir", ""), ("plan", None)):
        flags.DEFINE_string(name, default, "", flag_values=values)
    flags.DEFINE_boolean("version", False, "", flag_values=values)
    flags.DEFINE_boolean("help", False, "", short_name="h", flag_values=values)
    try:
        return values, values(list(argv), known_only=True)[1:]
    except flags.Error as problem:
        raise ConfigError(str(problem)) from None


def refuse_leftovers(rest: Sequence[str], known: Mapping[str, Key]) -> None:
    """Raises ConfigError for the first argument that is no flag of ours; `known` are the keys of the config, if any."""
    skip = False
    for arg in rest:
        name, equals, _ = arg.lstrip("-").partition("=")
        if skip:
            skip = False
        elif not arg.startswith("-"):
            files = reading.config_files()
            near = arg if pathlib.Path(arg.partition(":")[0]).suffix == ".py" else schema.nearest(arg, files)
            hint = f" - did you mean --config={near}?" if near else ""
            raise ConfigError(f"unexpected argument '{arg}'{hint} (quote a value that has spaces in it)")
        elif name.startswith(("config.", "noconfig.")):
            if not known:
                raise ConfigError(f"'{arg}' needs --config=FILE as well, e.g. --config=configs/sft.py:tiny")
            key = name.partition(".")[2]
            if key not in known:
                raise ConfigError(f"{schema.unknown_key(key, known)} (on the command line: '{arg}')")
            skip = not equals and not isinstance(known[key].default, bool)
        else:
            near = schema.nearest(
                name, ["config", "workdir", "plan", "version", "help", *(f"config.{key}" for key in known)]
            )
            hint = f" - did you mean '--{near}'?" if near else ""
            raise ConfigError(f"unknown flag '{arg}'{hint} (see: python run.py --help)")


def override(
    config: ml_collections.ConfigDict, keys: Mapping[str, Key], rest: Sequence[str]
) -> ml_collections.ConfigDict:
    """The config with the command line's `--config.KEY=VALUE` laid over it. Raises ConfigError for a key or value."""
    refuse_leftovers(rest, keys)
    values = flags.FlagValues()
    argv = ["run.py", *rest]
    try:
        holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as problem:
        # absl's message for a value that it cannot read, in the words of `schema.checked`
        parts = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(problem), re.DOTALL)
        if parts is None or parts[1] not in keys:
            raise ConfigError(str(problem)) from None
        wanted = schema.TYPE_NAMES[type(keys[parts[1]].default)]
        raise ConfigError(f"{parts[1]} must be {wanted}, not '{parts[2]}'") from None
    return schema.complete(holder.value, keys.values())


def in_buckets(config: ml_collections.ConfigDict, keys: Mapping[str, Key]) -> list[str]:
    """Return the paths in buckets that a config names, each once. Raises ConfigError where a key can have none."""
    found = {}
    for name, value in schema.flatten(config):
        for path in remote.buckets_in(value):
            if not keys[name].bucket:
                raise ConfigError(
                    f"{name} = {path}: this is not supported in a bucket yet: copy it to this machine and name the copy"
                )
            found[path] = None
    return list(found)


def prepare_plan(task: str) -> None:
    """Sets what a plan needs before JAX is imported: the TPU compiler, and no accelerator.

    Raises:
      ConfigError: there are no plans for this task.
    """
    if not TASKS[task].plan:
        planned = ", ".join(name for name, one in TASKS.items() if one.plan)
        raise ConfigError(f"--plan is for {planned}, not for '{task}'")
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


def report(problem: Exception | str, code: int) -> int:
    """Prints `error: message` to stderr and returns the exit code."""
    print(f"error: {problem}", file=sys.stderr)
    return code


def run_program(argv: Sequence[str]) -> int:
    """Runs `main` as the program itself: a console that goes away does not end it, and nothing keeps it from ending."""
    output, ending, code = guard_console(), Ending(EXIT_S), 1
    try:
        code = main(argv)
        output.flush()
        if output.incomplete:
            print(f"error: {output.incomplete}: what was printed is not complete", file=sys.stderr)
            code = code or 1
        return code
    finally:
        ending.begin(code)


if __name__ == "__main__":
    sys.exit(run_program(sys.argv))
