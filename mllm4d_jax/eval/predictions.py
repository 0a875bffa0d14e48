"""The record of an evaluation: one line per answered question, only ever appended to.

A run that is killed at any moment and started again answers what is not in its files yet: nothing is lost, nothing is
asked twice. Every host of a run writes a file of its own and reads all of them. Published responses are read as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import ml_collections

from configs.common import task_keys
from configs.schema import fixed
from mllm4d_jax import __version__
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.data.table_file import TABLES
from mllm4d_jax.eval.questions import BenchmarkError, question_files, read_benchmark
from mllm4d_jax.files import jsonl
from mllm4d_jax.files.cache import copied_file
from mllm4d_jax.files.lock import NAME, LockError, WriterLock
from mllm4d_jax.files.mirror import copied_logs
from mllm4d_jax.files.quoting import shown
from mllm4d_jax.files.remote import is_remote
from mllm4d_jax.files.storage import storing
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.judging import read_answer, worth
from mllm4d_jax.qa.media_paths import named_part
from mllm4d_jax.qa.questions import AskedQuestion, BenchmarkQuestion
from mllm4d_jax.report.reading import PREDICTIONS, QUARANTINE


class PredictionError(ValueError):
    """A file of predictions that cannot be used, or that belongs to another run."""


@dataclass(frozen=True)
class Prediction(AskedQuestion):
    """One answered question.

    Attributes:
      prompt_mode: how it was asked: "direct", "st_cot", "file"; "published" for responses that others made.
      control: "" for an ordinary answer, "blind" without the video, "shuffled" with its frames in random order.
      response: the raw text.
      tokens: how many were generated; finish: "stop", "length" or "stop_string". None = not known.
      letter, rule, conflict, number: what `judging.read_answer` found by the strict rules.
      correct: the letter is one of `truth`, or the number is worth full marks.
      config: hash of the configuration that the answer depends on (`config_hash`).
      version: of this project that asked; '' for published responses, and before 0.1.0.
    """

    prompt_mode: str
    control: str
    response: str
    tokens: int | None
    finish: str | None
    letter: str | None
    rule: str
    conflict: bool
    correct: bool
    config: str
    number: float | None = None
    version: str = ""

    @classmethod
    def of(
        cls,
        item: BenchmarkQuestion,
        response: str,
        *,
        prompt_mode: str,
        config: str,
        version: str = __version__,
        control: str = "",
        tokens: int | None = None,
        finish: str | None = None,
    ) -> Self:
        """The prediction for a question whose response has come in."""
        found = read_answer(item, response)
        asked = {field: getattr(item, field) for field in _OF_ITEM}
        asked["media"] = item.media and named_part(item.media, item.span)
        made = {"prompt_mode": prompt_mode, "control": control, "tokens": tokens, "finish": finish, "config": config}
        made["version"], correct = version, worth(item, found) == 1
        return cls(**asked, **made, response=response, **dataclasses.asdict(found), correct=correct)

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str) -> Self:
        """Return the prediction of a file's line. Raises PredictionError, beginning with `where`, for anything else."""
        row = {"control": "", "number": None, "true_number": None, "version": ""} | row  # earlier files are without
        missing = [field for field in _FIELDS if field not in row]
        if missing:
            raise PredictionError(f"{where}: has no {', '.join(missing)}")
        for field, kinds in _TYPES.items():
            if not isinstance(row[field], kinds):
                raise PredictionError(f"{where}: '{field}' cannot be {shown(row[field])}")
        truth, choices, number = row["truth"], row["choices"], row["true_number"]
        if number is None:
            usable = bool(truth) and all(isinstance(letter, str) and letter in choices for letter in truth)
        else:
            usable = not truth and not choices and 0 < number < float("inf")
        if not usable:
            raise PredictionError(
                f"{where}: 'truth' is {shown(truth)}, the choices {shown(list(choices))}, 'true_number' {shown(number)}"
            )
        values = {field: row[field] for field in _FIELDS}
        choices = MappingProxyType({letter: str(text) for letter, text in choices.items()})
        return cls(**(values | {"truth": tuple(truth), "choices": choices}))

    def to_row(self) -> dict[str, Any]:
        """The line for the file, as JSON values."""
        values = {field: getattr(self, field) for field in _FIELDS}
        return values | {"truth": list(self.truth), "choices": dict(self.choices)}


_FIELDS = tuple(field.name for field in dataclasses.fields(Prediction))
_OF_ITEM = tuple(field.name for field in dataclasses.fields(AskedQuestion))
_TYPES: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        **{field: (str,) for field in ("id", "benchmark", "split", "video", "question", "answer", "prompt_mode")},
        **{field: (str,) for field in ("control", "response", "rule", "config", "version")},
        **{field: (str, type(None)) for field in ("category", "subtask", "media", "finish", "letter")},
        **{field: (int, float, type(None)) for field in ("number", "true_number")},
        "tokens": (int, type(None)),
        "choices": (Mapping,),
        "truth": (list, tuple),
        "conflict": (bool,),
        "correct": (bool,),
    }
)


def config_hash(config: ml_collections.ConfigDict, content: Mapping[str, Any]) -> str:
    """Return 16 hex digits that stand for all that an answer depends on.

    Args:
      config: of an evaluation; its keys marked `free` or `content` do not count.
      content: JSON values that stand for what the `content` keys name.
    """
    text = json.dumps([fixed(config, task_keys(config.task)), content], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_predictions(path: str | Path) -> tuple[Prediction, ...]:
    """The predictions of a run, in the order of the files.

    Args:
      path: a file, or a workdir with the files of all hosts. A last line that was cut off while it was written is
        left out.

    Raises:
      PredictionError: nothing there, a line that is no prediction, an id twice, predictions of two configurations;
        JsonLinesError: a damaged line.
    """
    path = _copied(path)
    files = [path] if os.path.isfile(path) else jsonl.of_all_hosts(path / PREDICTIONS)
    if not files:
        raise PredictionError(f"{path}: no such file, and no folder with a {PREDICTIONS}")
    found: dict[str, tuple[Prediction, str]] = {}
    for file in files:
        for line in jsonl.read(file):
            where = f"{file}, line {line.number}"
            one = Prediction.from_row(line.row, where)
            if one.id in found:
                raise PredictionError(f"{where}: question {shown(one.id)} is also in {found[one.id][1]}")
            first = next(iter(found.values()), None)
            if first and first[0].config != one.config:
                raise PredictionError(
                    f"{where}: made with config {one.config}, {first[1]} with {first[0].config}; each run needs a "
                    "workdir of its own"
                )
            found[one.id] = (one, where)
    return tuple(one for one, _ in found.values())


def _copied(path: str | Path) -> Path:
    """Return what is read for a path: itself, or a copy of a file or a run's folder in a bucket."""
    if not is_remote(path):
        return Path(path)
    try:
        return copied_file(path)
    except FileNotFoundError:
        return copied_logs(path)


class Answers(NamedTuple):
    """What is scored: predictions, and how many questions besides could not be asked (None: not known)."""

    predictions: tuple[Prediction, ...]
    unusable: int | None


def read_answers(path: str | Path, benchmark: str) -> Answers:
    """`read_any`, and how many questions the run could not ask, which only its workdir says.

    Raises:
      PredictionError, BenchmarkError: as `read_any`; JsonLinesError: a damaged line.
    """
    path = _copied(path)
    predictions, unusable = read_any(path, benchmark), None
    if _is_workdir(path):
        lines = (line.row for file in jsonl.of_all_hosts(path / QUARANTINE) for line in jsonl.read(file))
        unusable = len({(row.get("source"), row.get("index")) for row in lines})
    return Answers(predictions, unusable)


def _is_workdir(path: Path) -> bool:
    return os.path.isdir(path) and bool(jsonl.of_all_hosts(path / PREDICTIONS))


def read_any(path: str | Path, benchmark: str) -> tuple[Prediction, ...]:
    """Predictions of a run (a file or its workdir), or published ones (a file, or a folder of files).

    Args:
      benchmark: how the questions of published files are laid out.

    Raises:
      PredictionError: nothing there, or a published question without a response; BenchmarkError: unusable questions.
    """
    path = _copied(path)
    if _is_workdir(path):
        return read_predictions(path)
    try:
        files = question_files(path)
    except BenchmarkError:
        raise PredictionError(
            f"{path}: no such file, and no folder with predictions*.jsonl or with published files"
        ) from None
    if len(files) == 1 and _is_of_a_run(files[0]):
        return read_predictions(files[0])
    found, silent = [], []
    for item, raw in read_benchmark(benchmark, files, None):
        response = raw.get("response")
        if isinstance(response, str):
            found.append(Prediction.of(item, response, prompt_mode="published", config="published", version=""))
        else:
            silent.append(item.id)
    if silent:
        raise PredictionError(
            f"{path}: {len(silent)} questions have no text 'response', the first are {', '.join(silent[:5])}; a "
            "question without an answer needs an empty one"
        )
    return tuple(found)


def _is_of_a_run(path: Path) -> bool:
    """Whether the file's first readable record is a line that a run wrote."""
    records = RecordFile(path, "") if path.suffix not in TABLES else ()
    for n in range(len(records)):
        try:
            return "truth" in (raw := records.raw(n)) and "config" in raw
        except RecordError:
            continue
    return False


class PredictionStore:
    """Appends predictions to the file of this host. Use it in a `with` block.

    Attributes:
      path: the file.
      done: ids that are answered, by any host of this run or of an earlier one with another number of hosts.
      versions: of this project that gave these answers.
    """

    def __init__(self, folder: str | Path, config: str, *, host: int = 0) -> None:
        """Name the workdir (made if needed), the hash of this run's configuration, and the host's number from 0."""
        self.folder, self.config = Path(folder), config
        self.path, self._host, self._held = jsonl.of_host(self.folder / PREDICTIONS, host), host, contextlib.ExitStack()
        self.done: set[str] = set()
        self.versions: frozenset[str] = frozenset()

    def __enter__(self) -> Self:
        """Takes the folder, for this host, and reads what is there.

        Raises:
          PredictionError, JsonLinesError: another run writes to it, it belongs to another configuration, or see
            `read_predictions`.
          StorageError: it cannot be written.
        """
        with contextlib.ExitStack() as stack:
            with storing(self.path):
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(WriterLock(jsonl.of_host(self.folder / NAME, self._host), self.folder))
                except LockError as problem:
                    raise PredictionError(str(problem)) from None
                self.path.open("ab").close()  # all hosts have a file
            jsonl.rewind(self.path)
            found = read_predictions(self.folder)
            if found and found[0].config != self.config:
                raise PredictionError(
                    f"the predictions in {self.folder} were made with another configuration ({found[0].config}, this "
                    f"run is {self.config}): use another workdir, or delete them to start over"
                )
            self._held = stack.pop_all()
        self.done, self.versions = {one.id for one in found}, frozenset(one.version for one in found)
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Writes predictions; once this returns, the end of the process cannot lose them.

        Raises:
          PredictionError: one of another configuration, or for a question that is answered already; then none of them
            is written.
        """
        predictions = list(predictions)
        new: set[str] = set()
        for one in predictions:
            if one.config != self.config:
                raise PredictionError(
                    f"prediction {shown(one.id)} has the config {one.config}, this store {self.config}"
                )
            if one.id in self.done or one.id in new:
                raise PredictionError(f"question {shown(one.id)} is answered already in {self.folder}")
            new.add(one.id)
        jsonl.append(self.path, [one.to_row() for one in predictions])
        self.done |= new
