"""Which stages are done: what each was made with and from, and what its results were, in one file of the workdir.

A stage counts as done while its settings, the results that it was made from and its own results are what they were.
Its results are known by files that the task writes itself, and by digests of them; so a stage whose folder was deleted
is done again, and one that was made with other settings, or from results that have changed, is never passed over.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.common import task_keys
from configs.schema import fixed
from mllm4d_jax.files.atomic import write_json
from mllm4d_jax.files.digests import sampled
from mllm4d_jax.quickstart.stages import Stage
from mllm4d_jax.report.reading import flat

FILE = "stages.json"
_MOST = 1 << 26  # bytes of a file that are read for its digest


class QuickstartError(ValueError):
    """A stage failed, or what is in the workdir does not fit the run."""


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """What is known of a stage that was begun.

    Attributes:
      settings: its config, flat, as JSON values; without what may change.
      inputs: name of another stage -> digests of its results; key of files that came from elsewhere -> theirs.
      results: own file, relative to its folder -> digest; {} while it is not done.
      seconds: that it ran, in all its parts; peak_mib: most memory.
    """

    settings: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]
    results: Mapping[str, str]
    seconds: float = 0.0
    peak_mib: float = 0.0


class StageRecords:
    """The records of a workdir, by the name of the stage."""

    def __init__(self, workdir: Path) -> None:
        """Raises QuickstartError for a file that no run has written."""
        self._path, self._writing = workdir / FILE, threading.Lock()
        self._known: dict[str, StageRecord] = {}
        if self._path.exists():
            try:
                self._known = {name: StageRecord(**row) for name, row in json.loads(self._path.read_bytes()).items()}
            except (ValueError, TypeError, AttributeError) as problem:
                raise QuickstartError(
                    f"{self._path} is damaged ({problem}): delete it or use another workdir"
                ) from None

    def __getitem__(self, name: str) -> StageRecord:
        return self._known[name]

    def get(self, name: str) -> StageRecord | None:
        return self._known.get(name)

    def put(self, name: str, record: StageRecord) -> None:
        """Keep the record of a stage; threads may."""
        with self._writing:
            self._known[name] = record
            write_json(self._path, {name: dataclasses.asdict(one) for name, one in self._known.items()})

    def expected(self, stage: Stage) -> StageRecord:
        """Return a record of what a stage would be made with and from now; all its inputs are done."""
        config = stage.config()
        keys = task_keys(config.task)
        settings = json.loads(json.dumps(dict(flat(fixed(config, keys)))))
        values = dict(flat(config.to_dict()))
        given = {
            key.name: _given(str(values[key.name]), self._path.parent)
            for key in keys
            if key.content and values[key.name]
        }
        made = {name: dict(self[name].results) for name in stage.inputs}
        return StageRecord(settings, {**{name: files for name, files in given.items() if files}, **made}, {})

    def is_done(self, stage: Stage, expected: StageRecord, later: str) -> bool:
        """Return whether a stage is done.

        Args:
          later: folders of this and the later stages, for the message.

        Raises:
          QuickstartError: it was made, or begun, with other settings, or from other results.
        """
        known = self.get(stage.name)
        if known is None:
            return False
        differ = [
            f"{key} = {known.settings.get(key)!r}, now {expected.settings.get(key)!r}"
            for key in sorted(known.settings.keys() | expected.settings.keys())
            if known.settings.get(key) != expected.settings.get(key)
        ]
        differ += [
            f"other results of '{name}'" for name in expected.inputs if known.inputs.get(name) != expected.inputs[name]
        ]
        if differ and Path(stage.folder).exists():
            raise QuickstartError(
                f"stage '{stage.name}' in {stage.folder} was made with {'; '.join(differ[:5])}. Use another --workdir, "
                f"or delete what has to be made anew: {later}"
            )
        return bool(known.results) and not differ and known.results == results_of(stage)


def _given(value: str, workdir: Path) -> dict[str, str]:
    """What the value of a key that names content stands for: digests of a file or of those of a folder, or a text.

    {} for what a stage of this workdir has made.
    """
    path = Path(value)
    if path.is_relative_to(workdir):
        return {}
    if not path.exists():
        return {"": value}
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    return {file.name: sampled(file, _MOST) for file in files}


def results_of(stage: Stage) -> dict[str, str]:
    """Return the digests of a stage's results; {} unless all of them are there."""
    paths = stage.artefacts(stage.config())
    if not all(path.is_file() for path in paths):
        return {}
    return {path.relative_to(stage.folder).as_posix(): sampled(path, _MOST) for path in paths}
