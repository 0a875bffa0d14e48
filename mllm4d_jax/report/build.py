"""Writes the page of a run, or of two runs side by side: `report.html`, which needs nothing beside itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm4d_jax.files.atomic import write_atomic
from mllm4d_jax.files.remote import place, size
from mllm4d_jax.report import compare, page, scores, summary
from mllm4d_jax.report.browser import MAP_NOTE, BrowserOptions, Entry, browser, overview, spread
from mllm4d_jax.report.curves import curve_section
from mllm4d_jax.report.items import completion_item, prediction_item
from mllm4d_jax.report.page import Section, join, shortened, tag
from mllm4d_jax.report.reading import CompletionPlace, PredictionPlace, ReportError, Run, read_at, read_run

REPORT = "report.html"
_DEFAULT = BrowserOptions()


def run(config: Any, workdir: str) -> int:
    """The task `report`; see `configs/report.py`. Returns the exit code.

    Raises:
      ReportError: no run is named, or one of them cannot be shown.
    """
    if not config.run:
        raise ReportError("config.run is not set: name the workdir of a run, as in --config.run=runs/sft-tiny")
    options = BrowserOptions(config.answers, config.frames, config.clip_s, config.pictures_s)
    out = config.out or (os.path.join(workdir, REPORT) if config.other else None)
    path = write_report(config.run, out, config.other or None, options)
    print(f"{path} ({size(path) / 1e6:.1f} MB)")
    return 0


def write_report(
    workdir: str | Path,
    out: str | Path | None = None,
    other: str | Path | None = None,
    options: BrowserOptions = _DEFAULT,
) -> Path:
    """Write the page of a run, whole or not at all, and return where.

    Args:
      workdir: of the run.
      out: the file; None = `report.html` in the workdir.
      other: workdir of a run to compare with; the page then shows both.

    Raises:
      ReportError: a workdir with nothing to show, or a file that cannot be written.
    """
    found = read_run(workdir)
    html = render(found, options) if other is None else render_pair(found, read_run(other), options)
    return write_page(place(out) if out is not None else place(found.home) / REPORT, html)


def close_run(workdir: str | Path) -> str:
    """Write the page of a run that has ended; return its figures in a few lines for a terminal, and where the page is.

    Raises:
      ReportError: see `write_report`.
    """
    found = read_run(workdir)
    path = write_page(place(found.home) / REPORT, render(found, _DEFAULT))
    return "\n".join([*(f"{name}: {said}" for name, said in summary.findings(found).items()), f"report: {path}"])


def write_page(path: Path, html: str) -> Path:
    """Write a page, whole or not at all. Raises ReportError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, html.encode("utf-8"))
    except OSError as problem:
        raise ReportError(f"the report cannot be written to {path}: {problem}") from problem
    return path


def render(found: Run, options: BrowserOptions) -> str:
    """The page of one run."""
    sections = []
    if found.metrics or found.evals:
        sections.append(Section("curves", "Curves", curve_section({found.name: found})))
    sections += _evaluation(found)
    chosen = choose_completions(found.completions, options.answers)
    entries = [{"": completion_item(read_at(one.place))} for one in chosen]
    how = "whole groups of a prompt, evenly over the steps"
    sections += _answers("completions", "Completions", entries, len(found.completions), how, options)
    chosen = choose_predictions(found.predictions, options.answers)
    entries = [{"": prediction_item(read_at(one.place))} for one in chosen]
    how = "evenly over the file, those first that are wrong, unparsed or contradictory"
    sections += _answers("predictions", "Predictions", entries, len(found.predictions), how, options)
    if found.metrics or found.evals or found.facts:
        sections.append(Section("figures", "Figures", summary.figure_tables(found)))
    if found.quarantine:
        sections.append(Section("quarantine", "Quarantine", summary.quarantine_section(found.quarantine)))
    sections.append(Section("files", "Files", summary.file_table(found)))
    if found.config:
        sections.append(Section("config", "Configuration", summary.config_table(found.config)))
    sections += _notes([found])
    task = str(found.config.get("task", "run"))
    return page.page(f"{found.name} ({task})", sections, subtitle=str(found.path), tiles=summary.tiles(found))


def render_pair(first: Run, second: Run, options: BrowserOptions) -> str:
    """The page of two runs side by side."""
    names = compare.labels(first, second)
    runs = dict(zip(names, (first, second), strict=True))
    sections = [Section("runs", "Runs", compare.tile_columns(runs))]
    if any(found.metrics or found.evals for found in runs.values()):
        sections.append(Section("curves", "Curves", curve_section(runs)))
        sections.append(Section("figures", "Figures", join(compare.figure_columns(runs))))
    tables = [compare.accuracy_columns(runs)]
    for name, found in runs.items():  # as they stand, under the run's name
        tables += [tag("h3", name), scores.result_tables(found.results)] if found.results else []
    if any(tables):
        sections.append(Section("evaluation", "Evaluation", join(tables)))
    sections += _answered_by_both(first, second, names, options)
    if any(found.config for found in runs.values()):
        sections.append(Section("config", "Configuration", compare.config_columns(runs)))
    sections += _notes([first, second])
    return page.page(f"{names[0]} and {names[1]}", sections)


def _evaluation(found: Run) -> list[Section]:
    """The tables of results.json; without it they are counted from the predictions; [] without either."""
    if found.results:
        tables, note = scores.result_tables(found.results), "As results.json has it."
    else:
        tables = scores.count_table(scores.counts(found.predictions))
        note = "There is no results.json: these are plain counts. A response without a letter counts as wrong."
    return [Section("evaluation", "Evaluation", tables, note)] if found.results or found.predictions else []


def _answered_by_both(first: Run, second: Run, names: Sequence[str], options: BrowserOptions) -> list[Section]:
    crossed = compare.crossed(first.predictions, second.predictions)
    if not crossed:
        return []
    places = compare.differing(crossed)
    chosen = [places[n] for n in spread(len(places), options.answers)]
    entries = [
        {name: prediction_item(read_at(place)) for name, place in zip(names, pair, strict=True)} for pair in chosen
    ]
    how = "evenly over those that one run got right and the other did not"
    table = Section("outcomes", "Outcomes", compare.crossed_table(crossed, names))
    return [table, *_answers("differences", "Answers that differ", entries, len(places), how, options)]


def _answers(
    anchor: str, title: str, entries: Sequence[Entry], total: int, how: str, options: BrowserOptions
) -> list[Section]:
    """The section of some answers; [] for none."""
    if not entries:
        return []
    items = [item for entry in entries for item in entry.values()]
    shown = f"All {total:,}" if len(entries) == total else f"{len(entries):,} of {total:,}, chosen {how}"
    counted = f": {overview(items)}" if len(items) == len(entries) else ""
    notes = [f"{shown}{counted}. Long texts are cut in the middle."]
    notes += [MAP_NOTE] if any(item.camera.truth or item.objects.truth for item in items) else []
    return [Section(anchor, title, browser(entries, options, label=title.lower()), " ".join(notes))]


def choose_completions(places: Sequence[CompletionPlace], limit: int) -> list[CompletionPlace]:
    """At most `limit` completions: whole groups (one record in one step), evenly over all groups in order."""
    groups: dict[tuple[float, str], list[CompletionPlace]] = {}
    for one in places:
        groups.setdefault((one.step, one.key), []).append(one)
    if len(places) <= limit:
        return [one for group in groups.values() for one in group]
    ordered = list(groups.values())
    size = max(len(group) for group in ordered)
    kept = [ordered[n] for n in spread(len(ordered), max(1, limit // size))]
    return [one for group in kept for one in group][:limit]


def choose_predictions(places: Sequence[PredictionPlace], limit: int) -> list[PredictionPlace]:
    """At most `limit` predictions in order: evenly over the doubtful ones, and what is left of it over the others."""
    kinds: tuple[list[int], list[int]] = [], []
    for n, one in enumerate(places):
        kinds[one.outcome == "correct" and not one.conflict].append(n)
    kept = [kinds[0][n] for n in spread(len(kinds[0]), limit)]
    kept += [kinds[1][n] for n in spread(len(kinds[1]), limit - len(kept))]
    return [places[n] for n in sorted(kept)]


def _notes(runs: Sequence[Run]) -> list[Section]:
    notes = [note for found in runs for note in found.notes]
    listed = tag("ul", *(tag("li", shortened(note, summary.FIELD)) for note in notes))
    return [Section("notes", "What could not be read", listed)] if notes else []
