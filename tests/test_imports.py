"""The architecture as a test: who may import whom, and what nobody may do. Reads the syntax tree, imports nothing."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "mllm4d_jax"
# The rooms from the lowest to the highest; a room may import those of the lines below its own, and of its own line
# nothing but itself.
ORDER = (
    {"files"},
    {"qa"},
    {"media"},
    {"encode"},
    {"rows", "parallel"},
    {"models", "data"},
    {"generate"},
    {"run"},
    {"sft", "grpo"},
    {"eval", "export", "verify", "plan"},
    {"quickstart"},
)
WITHOUT_MODEL = {"files", "qa", "media"}
REPORT = "report"  # pages of all kinds: knows files and clips, and no program that made them
MAY_IMPORT = {room: set().union(*ORDER[:n]) | {REPORT} for n, line in enumerate(ORDER) for room in line}
# The tables of keys say which of them count; those who compare configs read them there.
MAY_IMPORT |= {room: MAY_IMPORT[room] | {"configs"} for line in ORDER[ORDER.index({"run"}) :] for room in line}
MAY_IMPORT |= {
    "files": set(),
    "qa": set(),
    "media": {"qa"},
    "encode": {"qa", "media"},
    "rows": {"qa", "media", "encode"},
    "parallel": set(),
}
MAY_IMPORT |= {REPORT: WITHOUT_MODEL, "data_prep": WITHOUT_MODEL | {REPORT, "configs"}, "configs": set()}
MAY_IMPORT |= {room: MAY_IMPORT[room] | {"files"} for room in ("qa", "media", "encode", "rows", "parallel")}
WITHOUT_JAX = ("files", "qa", "media", "encode", "rows", REPORT, "data_prep", "configs")
ENTRY_POINTS = {"run.py", "tools", "tests", "benchmarks"}  # may import anything of the project; nothing imports them
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "grain"}
TORCH = {"torch", "torchvision", "torchaudio", "transformers", "accelerate", "peft"}
FLAG_READERS = {"absl.flags", "absl.app", "ml_collections.config_flags", "argparse", "optparse", "getopt", "click"}
UNSAFE = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def module_name(path: pathlib.PurePath) -> str:
    """Dotted module name of a path relative to the repository root."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def project_part(module: str) -> str:
    """The part of the house a dotted name belongs to ("models", "configs", "run", ...), or "" for other libraries."""
    first, *others = module.split(".")
    if first == PACKAGE:
        return others[0] if others and others[0] in MAY_IMPORT else PACKAGE
    first = "run.py" if first == "run" else first  # a room is called so, too
    return first if first in ENTRY_POINTS or first in ("data_prep", "configs") else ""


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands; `from a import b` gives both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + (1 if is_package else 0)]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def violations(path: str, source: str) -> list[str]:
    """Every rule that the module text `source` breaks when it stands at `path` (relative to the repository root)."""
    where = pathlib.PurePosixPath(path)
    module, tree = module_name(where), ast.parse(source)
    part = project_part(module)
    found = set()
    for line, name in imports(tree, module, where.name == "__init__.py"):
        target, library = project_part(name), name.split(".")[0]
        allowed = MAY_IMPORT.get(part)
        if allowed is not None and target not in allowed | {"", part, PACKAGE}:
            found.add(f"{path}:{line}: {part} may not import {target}")
        if part in WITHOUT_JAX and library in JAX:
            found.add(f"{path}:{line}: {part} may not import {library}")
        beside = path.startswith(("tools/record_reference", "tools/reference/", "benchmarks/"))  # what we compare with
        if part != "tests" and not beside and library in TORCH:
            found.add(f"{path}:{line}: only tests, benchmarks and the reference recorder may import {library}")
        if part not in ENTRY_POINTS:
            found.update(f"{path}:{line}: only run.py reads flags" for flag in FLAG_READERS if within(name, flag))
        if part != "tests" and library in UNSAFE:
            found.add(f"{path}:{line}: {library} can run code from a file")
    found.update(unsafe_expressions(path, tree, part))
    return sorted(found)


def within(name: str, parent: str) -> bool:
    """True if the dotted `name` is `parent` or lies inside it."""
    return name == parent or name.startswith(f"{parent}.")


def unsafe_expressions(path: str, tree: ast.Module, part: str) -> Iterator[str]:
    """eval(), exec(), allow_pickle=... other than False, and sys.argv outside the entry points."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                yield f"{path}:{node.lineno}: {node.func.id}()"
            for keyword in node.keywords:
                safe = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "allow_pickle" and not safe:
                    yield f"{path}:{node.lineno}: allow_pickle"
        elif isinstance(node, ast.Attribute) and node.attr == "argv" and part not in ENTRY_POINTS:
            yield f"{path}:{node.lineno}: only run.py reads flags"


def cycles(sources: dict[str, str]) -> list[str]:
    """Import cycles among modules (path -> text), each as `a -> b -> a`."""
    modules = {module_name(pathlib.PurePosixPath(path)): path for path in sources}
    graph = {}
    for module, path in modules.items():
        named = {name for _, name in imports(ast.parse(sources[path]), module, path.endswith("__init__.py"))}
        graph[module] = {name for name in named if name in modules and name != module}
    found, done = [], set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            found.append(" -> ".join((*trail[trail.index(module) :], module)))
        elif module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return found


def project_sources() -> dict[str, str]:
    """Path (relative, posix) -> text of every Python file of the project."""
    tops = (
        "run.py",
        f"{PACKAGE}/**/*.py",
        "configs/**/*.py",
        "data_prep/**/*.py",
        "tools/**/*.py",
        "benchmarks/**/*.py",
    )
    paths = [path for pattern in (*tops, "tests/**/*.py") for path in sorted(ROOT.glob(pattern))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def test_the_house_stands():
    sources = project_sources()
    assert len(sources) > 15, "the walk must see the project"
    broken = [problem for path, text in sources.items() for problem in violations(path, text)]
    assert not broken, "\n".join(broken)


def test_no_import_cycles():
    assert not cycles(project_sources())


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("mllm4d_jax/models/x.py", "from mllm4d_jax.sft import step", "models may not import sft"),
        ("mllm4d_jax/models/x.py", "from ..data import loader", "models may not import data"),
        ("mllm4d_jax/models/__init__.py", "from ..data import loader", "models may not import data"),
        ("mllm4d_jax/data/x.py", "def f():\n    import mllm4d_jax.models.hf", "data may not import models"),
        ("mllm4d_jax/data/x.py", "from mllm4d_jax import models", "data may not import models"),
        ("mllm4d_jax/models/x.py", "import importlib\nimportlib.import_module('configs.common')", "import configs"),
        ("mllm4d_jax/generate/x.py", "from configs.common import task_keys", "generate may not import configs"),
        ("configs/x.py", "from mllm4d_jax.qa import answers", "configs may not import qa"),
        ("mllm4d_jax/sft/x.py", "from mllm4d_jax.verify.task import run", "sft may not import verify"),
        ("mllm4d_jax/sft/x.py", "from mllm4d_jax.grpo import actor", "sft may not import grpo"),
        ("mllm4d_jax/run/x.py", "from mllm4d_jax.sft import step", "run may not import sft"),
        ("mllm4d_jax/eval/x.py", "import run", "eval may not import run.py"),
        ("mllm4d_jax/encode/x.py", "from mllm4d_jax.parallel import mesh", "may not import parallel"),
        ("mllm4d_jax/encode/x.py", "import jax.numpy as jnp", "encode may not import jax"),
        ("data_prep/x.py", "from flax import nnx", "data_prep may not import flax"),
        ("data_prep/x.py", "from mllm4d_jax.models import hf", "data_prep may not import models"),
        ("data_prep/x.py", "from mllm4d_jax.generate.sampler import generate", "data_prep may not import generate"),
        ("mllm4d_jax/files/x.py", "import jax", "files may not import jax"),
        ("mllm4d_jax/files/x.py", "from mllm4d_jax.qa import records", "files may not import qa"),
        ("mllm4d_jax/qa/rewards.py", "import jax", "qa may not import jax"),
        ("mllm4d_jax/report/x.py", "import jax", "report may not import jax"),
        ("mllm4d_jax/models/x.py", "import torch", "may import torch"),
        ("mllm4d_jax/eval/x.py", "from transformers import AutoModel", "may import transformers"),
        ("tools/make_checkpoint.py", "import torch", "may import torch"),
        ("mllm4d_jax/sft/x.py", "from absl import flags", "only run.py reads flags"),
        ("mllm4d_jax/__init__.py", "import argparse", "only run.py reads flags"),
        ("configs/x.py", "from ml_collections import config_flags", "only run.py reads flags"),
        ("mllm4d_jax/sft/x.py", "import sys\nprint(sys.argv)", "only run.py reads flags"),
        ("mllm4d_jax/eval/x.py", "x = eval('1')", "eval()"),
        ("tools/x.py", "exec('1')", "exec()"),
        ("mllm4d_jax/data/x.py", "import pickle", "pickle can run code"),
        ("mllm4d_jax/data/x.py", "import numpy as np\nnp.load('a', allow_pickle=True)", "allow_pickle"),
    ],
)
def test_a_bad_module_is_caught(path, source, message):
    assert any(message in problem for problem in violations(path, source)), violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mllm4d_jax/eval/x.py", "from mllm4d_jax.generate import sampler\nmodel.eval()"),
        ("mllm4d_jax/models/x.py", "from . import rope\nfrom ..encode.grids import pack_vision"),
        ("mllm4d_jax/data/x.py", "import jax, grain\nimport numpy as np\nnp.load('a', allow_pickle=False)"),
        ("data_prep/x.py", "from mllm4d_jax.qa.rewards import score\nfrom configs.schema import fixed"),
        ("mllm4d_jax/run/x.py", "from configs.common import task_keys"),
        ("mllm4d_jax/eval/x.py", "from configs.common import task_keys"),
        ("run.py", "from absl import flags\nimport sys\nsys.argv"),
        ("tools/record_reference.py", "import argparse, torch, transformers"),
        ("tests/encode/test_x.py", "import pickle\nimport torch"),
    ],
)
def test_a_good_module_passes(path, source):
    assert violations(path, source) == []


def test_a_cycle_is_caught():
    a, b = "mllm4d_jax/models/a.py", "mllm4d_jax/models/b.py"
    assert cycles({a: "from mllm4d_jax.models import b", b: "def f():\n    from . import a"})
    assert not cycles({a: "from mllm4d_jax.models import b", b: "import jax"})
