"""The page of the quickstart: its tables, how the runs went, and answers of all models to the same questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from mllm4d_jax.files.atomic import write_atomic
from mllm4d_jax.qa.reasoning import parse
from mllm4d_jax.quickstart.progress import span
from mllm4d_jax.quickstart.results import KINDS, ROWS, Examined, Results
from mllm4d_jax.quickstart.stages import in_groups
from mllm4d_jax.quickstart.tables import HEADS, NOTE, Table, tables
from mllm4d_jax.report import page
from mllm4d_jax.report.browser import BrowserOptions, Entry, browser, spread
from mllm4d_jax.report.charts import bars
from mllm4d_jax.report.curves import curve_section
from mllm4d_jax.report.items import Centers, ShownAnswer, prediction_item
from mllm4d_jax.report.page import Cell, Column, Markup, Section, join, tag
from mllm4d_jax.report.reading import read_run

REPORT = "report.html"
_QUESTIONS = 24  # of which answers are shown
_SHOWN = ("eval_base", "eval_sft", "eval_cold_start", "eval_grpo_without_st", "eval_grpo")
_TRAINED = {"fine-tuning": ("sft", "cold_start", "control"), "reinforcement": ("grpo_without_st", "grpo")}
_MAPS = (
    "Maps are seen from above, in metres and in the axes of the camera at the first frame: x to the right, z, which is "
    "forward, up. Open circles are starts, filled ones ends; what the model wrote is dashed."
)


def write_page(workdir: Path, results: Results) -> Path:
    """Write `report.html` and return where it is."""
    sections = [Section("results", "Results", join([*map(_table, tables(results)), *_charts(results)]), NOTE)]
    sections += [
        Section(f"curves-{name}", f"Curves: {name}", curve_section({stage: read_run(workdir / stage) for stage in of}))
        for name, of in _TRAINED.items()
    ]
    options = BrowserOptions(answers=_QUESTIONS, frames=4)
    sections.append(Section("answers", "Answers", browser(list(_entries(results)), options, label="answers"), _MAPS))
    sections.append(Section("stages", "Stages", _stages(results)))
    took = {stage.name: record.seconds for stage, record in results.stages}
    seconds = sum(max(took[stage.name] for stage in group) for group in in_groups(stage for stage, _ in results.stages))
    last = results.examined["eval_grpo"].accuracy()
    tiles = [
        ("after GRPO with ST-reward", f"{last.value:.1%}"),
        ("after fine-tuning", f"{results.examined['eval_sft'].accuracy().value:.1%}"),
        ("base model", f"{results.examined['eval_base'].accuracy().value:.1%}"),
        ("questions", f"{last.n:,}"),
        ("time", span(seconds)),
    ]
    path = workdir / REPORT
    write_atomic(path, page.page("The paper in miniature", sections, subtitle=str(workdir), tiles=tiles).encode())
    return path


def _table(one: Table) -> Markup:
    caption, heads, rows = one
    columns = [Column(head, numeric=n > 0) for n, head in enumerate(heads)]
    return page.table(columns, rows, caption=caption)


def _charts(results: Results) -> list[Markup]:
    """Accuracy of every subtask, a bar for each model."""
    series = {
        ROWS[name]: [100 * one.accuracy(subtask).value for subtask in HEADS if subtask in one.subtasks]
        for name in _SHOWN
        for one in (results.examined[name],)
    }
    labels = [subtask.replace("_", " ") for subtask in HEADS if subtask in results.examined["eval_sft"].subtasks]
    return [tag("div", bars(labels, series, title="Accuracy by subtask", unit=" %"), class_="charts")]


def _entries(results: Results) -> Iterator[Entry]:
    """What the models answered to some questions, evenly over the subtasks."""
    last = results.examined["eval_grpo"]
    by_subtask = {s: [name for name, one in last.answers.items() if one.subtask == s] for s in last.subtasks}
    each = max(1, _QUESTIONS // len(by_subtask))
    for names in by_subtask.values():
        for n in spread(len(names), each):
            yield {
                ROWS[stage]: _item(results, results.examined[stage], names[n])
                for stage in _SHOWN
                if names[n] in results.examined[stage].answers
            }


def _item(results: Results, one: Examined, name: str) -> ShownAnswer:
    """An answer; one with centres has the true ones beside them."""
    prediction, solution = one.answers[name], results.solutions[name]
    read, shown = parse(prediction.response), prediction_item(prediction.to_row())
    if not (read.camera_centers or read.object_centers):
        return shown
    centers = [Centers(getattr(solution, f"{kind}_center"), getattr(read, f"{kind}_centers")) for kind in KINDS]
    return dataclasses.replace(shown, camera=centers[0], objects=centers[1])


def _stages(results: Results) -> Markup:
    """Seconds, memory and command of every stage."""
    columns = [
        Column("stage"),
        Column("does"),
        Column("time", True),
        Column("peak memory, MiB", True),
        Column("command"),
    ]
    rows = [
        [
            stage.name,
            stage.title,
            Cell(span(record.seconds), record.seconds),
            page.number(record.peak_mib),
            tag("code", " ".join(stage.command().split(" \\\n  "))),
        ]
        for stage, record in results.stages
    ]
    return page.table(columns, rows, caption="Stages")
