"""The task `quickstart`: every stage that is not done yet, one after the other; at the end the table and the page."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_collections

from configs.tables.quickstart import BENCH, MACHINES, NEW_SEED
from mllm4d_jax.files.ending import StopSignal
from mllm4d_jax.files.lock import WriterLock
from mllm4d_jax.files.quoting import cut
from mllm4d_jax.files.remote import is_remote
from mllm4d_jax.files.storage import storing
from mllm4d_jax.quickstart.done import QuickstartError, StageRecords, results_of
from mllm4d_jax.quickstart.page import write_page
from mllm4d_jax.quickstart.process import Ended, run_process
from mllm4d_jax.quickstart.progress import StatusLine, TimeLeft, share_of, span
from mllm4d_jax.quickstart.results import read_results
from mllm4d_jax.quickstart.stages import Stage, in_groups, own, stages
from mllm4d_jax.quickstart.tables import text

_MOST_SAID = 2000  # characters of a stage's own error
# Programs of a small model spend much of a CPU's time on fresh memory. In large pages, and kept when it is freed, it
# costs less; other C libraries than glibc do not look at the variable.
_LARGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"


def run(config: ml_collections.ConfigDict, workdir: str) -> int:
    """Do what is not done yet, and show what came of it.

    Args:
      config: every key of the "quickstart" task.
      workdir: gets a folder for each stage, logs/, stages.json and report.html.

    Returns:
      0, also when it was asked to stop (SIGINT, SIGTERM): the same command goes on from there.

    Raises:
      QuickstartError: a stage failed, or was made with other settings; says which command does it alone.
      ConfigError: a stage's settings. LockError, StorageError: the workdir.
    """
    check(config, workdir)
    listed, path = stages(config, workdir), Path(workdir)
    with storing(path):
        (path / "logs").mkdir(parents=True, exist_ok=True)
    with WriterLock.of(path):
        records, line = StageRecords(path), StatusLine()
        what, where = f"quickstart ({config.size})", MACHINES[config.size]
        if do_stages(listed, records, line, what, where, workdir):
            results = read_results(path, listed, records)
            line.say(f"\n{text(results)}\n")
            line.say(f"report: {write_page(path, results)}")
    return 0


def do_stages(
    listed: list[Stage], records: StageRecords, line: StatusLine, what: str, where: str, workdir: str
) -> bool:
    """Do the stages that are not done, those of a group at the same time; False when asked to stop (SIGINT, SIGTERM).

    Args:
      records: of `workdir`, whose lock is held, and which has a folder logs/.
      what: the stages are of, and where their times were measured, for people.

    Raises:
      QuickstartError, ConfigError: as `run`.
    """
    groups = in_groups(listed)
    with StopSignal() as stop:
        clock = TimeLeft([max(stage.seconds for stage in group) for group in groups])
        about = span(clock.left(0, 0.0, None, None)[1])
        line.say(f"{what}: {len(listed)} stages, about {about} on {where}; all in {workdir}")
        for turn, group in enumerate(groups):
            numbers = [listed.index(stage) for stage in group]
            under_way = _UnderWay({number: stage.seconds for number, stage in zip(numbers, group, strict=True)})
            turns = [_Turn(listed, n, turn, records, clock, line, stop, under_way) for n in numbers]
            if not all(done := _take_all(turns, under_way)):
                first = numbers[done.index(False)] + 1
                line.say(f"stopped in stage {first} of {len(listed)}; the same command goes on from there")
                return False
            clock.done(turn, max(records[stage.name].seconds for stage in group))
    return True


def _take_all(turns: Sequence[_Turn], under_way: _UnderWay) -> list[bool]:
    """Take turns at the same time. Once one fails, or a second Ctrl-C comes, all others are ended at once."""
    if len(turns) == 1:
        return [turns[0].take()]
    with concurrent.futures.ThreadPoolExecutor(len(turns)) as pool:
        taken, ended = [pool.submit(turn.take) for turn in turns], ()
        try:
            ended, _ = concurrent.futures.wait(taken, return_when=concurrent.futures.FIRST_EXCEPTION)
            for one in ended:
                one.result()  # raises what it raised
        finally:
            under_way.abandoned = len(ended) < len(taken)
        return [one.result() for one in taken]


def check(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Raise QuickstartError for what no stage could be run with."""
    if is_remote(workdir) or config.distributed != "off":
        raise QuickstartError(
            "the quickstart runs as one process in a folder of this machine: no bucket, no distributed"
        )
    if BENCH["seed"] in (config.seed, config.seed + NEW_SEED):
        raise QuickstartError(
            f"seed = {config.seed} is that of the worlds to be examined on, or would make those of reinforcement the "
            "same: take another"
        )
    if not Path(own(config.base), "config.json").is_file():
        raise QuickstartError(
            f"base = {config.base} is no folder of a model: name one with --config.base=DIR, or make one with the "
            "commands that stand in configs/pretrain_tiny.py"
        )


class _Abandoned(Exception):
    """A stage is ended because of another one of its group."""


class _UnderWay:
    """Which stages of a group are under way; the one that takes longest speaks for all.

    Attributes:
      size: of the group.
      abandoned: they are to be ended at once.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        """`seconds` that each takes, by its number."""
        self.size, self._seconds, self._changing = len(seconds), dict(seconds), threading.Lock()
        self.abandoned = False

    def ended(self, number: int) -> None:
        with self._changing:
            self._seconds.pop(number, None)

    def others(self, number: int) -> int | None:
        """Return how many others are under way; None for a stage that does not speak."""
        with self._changing:
            longest = max(self._seconds, key=self._seconds.__getitem__, default=-1)
            return len(self._seconds) - 1 if number == longest else None


@dataclasses.dataclass(frozen=True)
class _Turn:
    """The turn of one stage, of the group with the number `group`."""

    listed: list[Stage]
    number: int
    group: int
    records: StageRecords
    clock: TimeLeft
    line: StatusLine
    stop: StopSignal
    under_way: _UnderWay

    @property
    def stage(self) -> Stage:
        return self.listed[self.number]

    @property
    def head(self) -> str:
        return f"[{self.number + 1:2}/{len(self.listed)}]"

    def take(self) -> bool:
        """Do the stage unless it is done; return False once asked to stop. Raises QuickstartError."""
        try:
            return self._take()
        finally:
            self.under_way.ended(self.number)

    def _take(self) -> bool:
        if self.stop:
            return False
        stage, records = self.stage, self.records
        expected = records.expected(stage)
        later = " ".join(one.folder for one in self.listed[self.number :] if Path(one.folder).exists())
        if records.is_done(stage, expected, later):
            self._over("done before")
            return True
        known = records.get(stage.name)
        spent = (known.seconds, known.peak_mib) if known and Path(stage.folder).exists() else (0.0, 0.0)
        records.put(stage.name, dataclasses.replace(expected, seconds=spent[0], peak_mib=spent[1]))
        self.line.say(f"{self.head} {stage.title}\n{stage.command()}")
        ended = self._run()
        results = {} if self.stop or ended.code else results_of(stage)
        times = {"seconds": spent[0] + ended.seconds, "peak_mib": max(spent[1], ended.peak_mib)}
        records.put(stage.name, dataclasses.replace(expected, results=results, **times))
        if not results and not self.stop:
            raise QuickstartError(self._problem(ended))
        if results:
            self._over("done")
        return bool(results)

    def _run(self) -> Ended:
        stage = self.stage
        share = share_of(stage.config(), Path(stage.folder))
        before = share()

        def look(elapsed: float) -> None:
            if self.under_way.abandoned:
                raise _Abandoned
            now, others = share(), self.under_way.others(self.number)
            if others is None:
                return
            own, whole = self.clock.left(self.group, elapsed, before, now)
            known = "" if now is None else f"{now:4.0%}, "
            asked = "stopping (Ctrl-C again: at once); " if self.stop else ""
            name = f"{stage.name} and {others} more" if others else stage.name
            self.line.show(
                f"{self.head} {asked}{name} {known}{span(elapsed)}, about {span(own)} left; of all {span(whole)}"
            )

        # Programs that one stage has compiled are found by the others.
        settings = {"JAX_COMPILATION_CACHE_DIR": str(self._below("compiled").absolute())}
        settings |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3", "GLIBC_TUNABLES": _LARGE_PAGES}
        if self.under_way.size > 1:  # several processes have to find room on one device
            settings["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        settings = {name: value for name, value in settings.items() if name not in os.environ}
        return run_process(stage.flags(), self._log, settings, lambda: bool(self.stop), look)

    def _below(self, *names: str) -> Path:
        return Path(self.stage.folder).parent.joinpath(*names)

    @property
    def _log(self) -> Path:
        return self._below("logs", f"{self.stage.name}.log")

    def _over(self, how: str) -> None:
        record = self.records[self.stage.name]
        page = Path(self.stage.folder) / "report.html"
        where = f"; {page}" if page.exists() else ""
        self.line.say(
            f"{self.head} {self.stage.name}: {how}, {span(record.seconds)}, {record.peak_mib:,.0f} MiB{where}"
        )

    def _problem(self, ended: Ended) -> str:
        """The message for a stage that did not come to its end."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [n for n, line in enumerate(lines) if line.startswith("error: ")]
        why = "\n".join(lines[said[-1] :] if said else lines[-5:])
        return (
            f"stage {self.number + 1} of {len(self.listed)} ({self.stage.name}, in {self.stage.folder}) did not come "
            f"to its end (exit code {ended.code}):\n{cut(why, _MOST_SAID)}\nAll that it said: {self._log}. To repeat "
            f"it alone:\n{self.stage.command()}\nThen the command of the quickstart goes on."
        )
