"""Opens the files of a benchmark: JSON lists, JSONL, Parquet, or tables with tabs between their columns.

All broken questions of all files are reported together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.table_file import TABLES, TableFile
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.files.remote import is_file, is_folder, place
from mllm4d_jax.qa.benchmarks import PARSERS
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.questions import BenchmarkQuestion, ParseFn

SUFFIXES = (".json", ".jsonl", *TABLES)
_MAX_SHOWN = 20


class BenchmarkError(ValueError):
    """Question files that cannot be used; names every file and question that is wrong."""


def question_files(path: str | Path) -> tuple[Path, ...]:
    """Return a file, or the files of a folder with one of `SUFFIXES`, by name. Raises BenchmarkError without any."""
    path = place(path)
    if is_file(path):
        return (path,)
    inside = path.glob("*.*") if is_folder(path) else ()
    found = tuple(sorted(p for p in inside if p.suffix in SUFFIXES))
    if not found:
        raise BenchmarkError(f"{path}: no such file, and no folder with {', '.join(SUFFIXES)} files")
    return found


def read_benchmark(
    benchmark: str, files: Iterable[Path], root: str | None
) -> Iterator[tuple[BenchmarkQuestion, Mapping[str, Any]]]:
    """Yield (question, its record as the file has it) in the order of the files.

    Args:
      benchmark: key of `PARSERS`.
      root: folder of the videos, which must then exist; None = videos are not needed.

    Raises:
      BenchmarkError: after the last question, if any was wrong: all of them, with file, number and id. Also for an
        id that occurs twice.
      RecordFileError: a file that is missing or cannot be read as its suffix says.
    """
    if benchmark not in PARSERS:
        raise BenchmarkError(f"benchmark must be one of {', '.join(PARSERS)}, not {benchmark!r}")
    problems, seen = [], {}
    for path in files:
        source = TableFile(path) if path.suffix in TABLES else RecordFile(path, root or "")
        for n in range(len(source)):
            key = source.key(n)
            try:
                raw = source.raw(n)
                question = _question(PARSERS[benchmark], raw, path.stem, key, root)
                if question.id in seen:
                    raise RecordError(f"the id {shown(question.id)} is also that of {seen[question.id]}", key=key)
            except RecordError as error:
                problems.append(str(error))
                continue
            seen[question.id] = key
            yield question, raw
    if problems:
        more = f"\nand {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
        listed = "\n".join(problems[:_MAX_SHOWN])
        raise BenchmarkError(f"{len(problems)} of {len(problems) + len(seen)} questions are unusable:\n{listed}{more}")


def load_benchmark(benchmark: str, path: str | Path, root: str | None) -> tuple[BenchmarkQuestion, ...]:
    """Return all questions of a file or folder. Arguments and errors: see `read_benchmark`."""
    return tuple(question for question, _ in read_benchmark(benchmark, question_files(path), root))


def _question(parse: ParseFn, raw: Mapping[str, Any], stem: str, key: str, root: str | None) -> BenchmarkQuestion:
    """The parser's result; errors name the question by key and id, and a video must exist."""
    try:
        question = parse(raw, stem, key, root)
        files = question.files or {"video": (question.media,)}
        for kind, path in ((kind, path) for kind, paths in files.items() for path in paths if path is not None):
            if not is_file(path):  # also for a name that no file can have
                raise RecordError(f"there is no {kind} {shown(path)}; data.root must be the folder it is in")
    except RecordError as error:
        raise error.with_key(f"{key} (id {shown(raw['id'])})" if isinstance(raw.get("id"), str) else key) from None
    return question
