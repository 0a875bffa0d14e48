"""The results of an evaluation as files, with tables of text: in Markdown, and in results.json for the run's page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_collections

from mllm4d_jax import __version__
from mllm4d_jax.eval import scoring
from mllm4d_jax.eval.predictions import Answers, read_answers
from mllm4d_jax.eval.statistics import Bootstrap
from mllm4d_jax.files import jsonl
from mllm4d_jax.files.atomic import write_atomic
from mllm4d_jax.qa.published_rules import PUBLISHED as PUBLISHED_RULES
from mllm4d_jax.report.reading import RESULTS, SCORED

TITLES = {"all": "All questions", "split": "By split", "category": "By category", "subtask": "By subtask"}
STRICT = (
    "the rules of this project: the last answer block, else what follows the thinking; a letter, an option's text, a "
    "stated answer, or the only option (the only number, where one is asked for) that is mentioned"
)
OFFICIAL = (
    "the release's own reading as far as it is known: the stripped text of the last answer block, or else "
    "of the whole response, must be a letter and nothing more. Its final figures leave the rest to a judge that is "
    "shown the truth; no judge is asked here"
)
BLANKS = "'blanks credited' counts empty responses as right, as a judge that is shown the truth may do."
PUBLISHED = (
    "The paper's 59.7 % on the real split are the published responses of its fine-tuned model with the blank ones "
    "credited (819 of 1371); strictly they are 58.6 % (804)."
)

# benchmark -> (source, rows of name, guessing, always the most frequent answer), percent; None = not published.
BASELINES: Mapping[str, tuple[str, tuple[tuple[str, float | None, float | None], ...]]] = {
    "vsi": (
        "Chance levels of arXiv 2412.14171, table 1.",
        (
            ("mean over tasks", None, 34.0),
            ("object_counting", None, 62.1),
            ("object_abs_distance", None, 32.0),
            ("object_size_estimation", None, 29.9),
            ("room_size_estimation", None, 33.1),
            ("object_rel_distance", 25.0, 25.1),
            ("object_rel_direction", 36.1, 47.9),
            ("route_planning", 28.3, 28.4),
            ("obj_appearance_order", 25.0, 25.2),
        ),
    ),
    "mmsi_video": ("From the benchmark's leaderboard.", (("all", 24.1, None),)),
}

Results = Mapping[str, Any]
Block = tuple[str, str, list[str], list[list[str]]]  # title, note, heads, rows of text


def publish(answers: Answers, config: ml_collections.ConfigDict, workdir: str | Path) -> None:
    """Score predictions, write `write_results` and scored.jsonl, and print the tables.

    scored.jsonl has the predictions with what the extractor made of them, for the page of the run.

    Questions that could not be asked are in no figure, but said, and in the results as "unusable" (of the run compared
    with and of the controls, too).

    Args:
      config: of an evaluation: extractor, bootstrap, controls and the run to compare with.

    Raises:
      PredictionError, BenchmarkError, ScoringError, RecordFileError: files that cannot be used.
    """
    controls = [read_answers(path, config.benchmark) for path in config.controls]
    first = read_answers(config.compare, config.benchmark) if config.compare else Answers((), None)
    found = scoring.results(
        answers.predictions,
        extractor=config.extractor,
        bootstrap=Bootstrap(config.bootstrap.samples, config.seed),
        controls=[control.predictions for control in controls],
        compare=first.predictions,
    )
    beside = [{"control": one.predictions[0].control, "unusable": one.unusable} for one in controls]
    found |= {"unusable": answers.unusable, "controls": beside, "version": __version__}
    if found["comparison"]:
        found["comparison"] |= {"unusable_in_first": first.unusable}
    write_results(workdir, found)
    scored = scoring.score(answers.predictions, config.extractor)
    judged = ({"correct": one.correct, "score": one.score} for one in scored)
    rows = (one.prediction.to_row() | asdict(one.found) | made for one, made in zip(scored, judged, strict=True))
    write_atomic(Path(workdir) / SCORED, jsonl.encoded(rows))
    print(markdown(found), flush=True)


def write_results(folder: str | Path, results: Results) -> None:
    """Write results.json, with its tables as text beside the figures, and results.md, each whole or not at all.

    Args:
      folder: the workdir, made if needed.
      results: as `scoring.results` gives them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = [dict(zip(("title", "note", "heads", "rows"), block, strict=True)) for block in blocks(results)]
    whole = {**results, "summary": summary(results), "tables": tables}
    texts = {RESULTS: json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "results.md": markdown(results)}
    for name, text in texts.items():
        # Responses may hold halves of surrogate pairs; the tables show them as "?".
        write_atomic(folder / name, text.encode("utf-8", "replace"))


def markdown(results: Results) -> str:
    """All tables as Markdown."""
    parts = [f"# Results: {results['benchmark']}", summary(results)]
    for title, note, heads, rows in blocks(results):
        cells = [[" ".join(text.split()).replace("|", "\\|") for text in row] for row in rows]  # on one line, no bars
        lines = ["| " + " | ".join(line) + " |" for line in (heads, *cells)]
        lines.insert(1, "|" + "|".join("---" if n == 0 else "---:" for n in range(len(heads))) + "|")
        parts += [f"## {title}", *([note] if note else []), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """One paragraph: what was scored and how."""
    whole, bootstrap = results["groups"][0], results["bootstrap"]
    control = f" Control run: {results['control']}." if results["control"] else ""
    macro = results["macro"]
    missing = results.get("unusable", 0)
    left_out = f" {missing} more could not be asked and are in no figure (see quarantine.jsonl)." if missing else ""
    left_out = " How many more could not be asked is not known." if missing is None else left_out
    parts = [(f"the {one['control']} control", one["unusable"]) for one in results.get("controls", ())]
    left_out += "".join(f" In {run} {_not_asked(number)}." for run, number in parts if number != 0)
    mean = f" Mean over {macro['subtasks']} subtasks: {_with_interval(macro, 'accuracy')}." if macro else ""
    numbers = " Numbers count by mean relative accuracy." if "vsi" in results["benchmark"] else ""
    return (
        f"{whole['n']} questions about {whole['clusters']} videos, {whole['correct']} right: "
        f"{_with_interval(whole, 'accuracy')}.{left_out}{mean}{numbers}{control} Extractor: {results['extractor']}. "
        f"Unparsed answers are wrong. Brackets: {results['level']:.0%} intervals, bootstrap over videos "
        f"({bootstrap['samples']} draws, seed {bootstrap['seed']})."
        + (f" Scored by mllm4d-jax {results['version']}." if "version" in results else "")
    )


def blocks(results: Results) -> list[Block]:
    """Every table as text."""
    parts = {title: [one for one in results["groups"] if one["table"] == table] for table, title in TITLES.items()}
    found = [_groups_block(title, groups) for title, groups in parts.items() if groups]
    found += [_comparison_block(results["comparison"])] if results["comparison"] else []
    found += [_baselines_block(results["benchmark"])] if results["benchmark"] in BASELINES else []
    letters = [[row["letter"], str(row["right"]), str(row["given"])] for row in results["letters"]]
    note = "How often each letter is right, and how often it was given."
    rules = [[rule, str(n)] for rule, n in results["rules"].items()]
    return [
        *found,
        _extractors_block(results),
        *([("Letters", note, ["letter", "right", "given"], letters)] if letters else []),
        ("How answers were found", "", ["rule", "answers"], rules),
    ]


def _not_asked(number: int | None) -> str:
    return "it is not known how many could not be asked" if number is None else f"{number} could not be asked"


def _groups_block(title: str, groups: Sequence[Mapping[str, Any]]) -> Block:
    heads = ["", "n", "videos", "right", "accuracy %", "unparsed (%)", "conflicts", "truncated"]
    heads += ["chance %", "best letter %", *(f"{control['control']} %" for control in groups[0]["controls"])]
    rows = [
        [
            group["name"],
            *(str(group[name]) for name in ("n", "clusters", "correct")),
            _with_interval(group, "accuracy"),
            f"{group['unparsed']} ({_percent(group['unparsed'] / group['n'])})",
            *(str(group[name]) for name in ("conflicts", "truncated")),
            *(_percent(group[name]) for name in ("chance", "best_letter")),
            *(f"{_percent(control['accuracy'])} (n = {control['n']})" for control in group["controls"]),
        ]
        for group in groups
    ]
    return title, "", heads, rows


def _comparison_block(comparison: Mapping[str, Any]) -> Block:
    missing = comparison.get("unusable_in_first", 0)
    unusable = "" if missing == 0 else f"; in the first {_not_asked(missing)}"
    note = (
        "Second (this run) less first, on the questions that both answered "
        f"({comparison['only_in_first']} only in the first, {comparison['only_in_second']} only in the second{unusable}"
        "). An "
        "interval without 0 is a difference at the 5 % level; 'detectable' is the true difference that a comparison of "
        "this size finds in 80 of 100 cases. McNemar's test takes questions about one video for independent."
    )
    heads = ["", "n", "first %", "second %", "difference", "detectable", "only first right", "only second right", "p"]
    rows = [
        [
            *(row["name"], str(row["n"]), _percent(row["first"]), _percent(row["second"])),
            _with_interval(row, "difference", signed=True),
            *(_percent(row["detectable"]), str(row["only_first"]), str(row["only_second"])),
            f"{row['mcnemar_p']:.3g}",
        ]
        for row in comparison["rows"]
    ]
    return "Compared with the other run", note, heads, rows


def _baselines_block(benchmark: str) -> Block:
    source, rows = BASELINES[benchmark]
    cells = [[name, *("–" if value is None else f"{value:.1f}" for value in values)] for name, *values in rows]
    return "Published baselines", source, ["", "guessing %", "most frequent answer %"], cells


def _extractors_block(results: Results) -> Block:
    rows, benchmark = results["extractors"], results["benchmark"]
    official = PUBLISHED_RULES[benchmark].said if benchmark in PUBLISHED_RULES else OFFICIAL
    explained = f"strict: {STRICT}; official: {official}"
    differ = ", ".join(dict.fromkeys(f"{row['differ']} in {row['split']}" for row in rows))
    ids = list(dict.fromkeys(one for row in rows for one in row["differ_ids"]))[:5]
    named = f", among them {', '.join(ids)}" if ids else ""
    note = f"{explained}. Answers on which the two differ: {differ}{named}. {BLANKS}"
    if results["benchmark"] == "vlm4d" and results["prompt_modes"] == ["published"]:
        note += f" {PUBLISHED}"
    macro = any(row["macro"] is not None for row in rows)
    heads = ["", "extractor", "n", "right", "accuracy %", *(["mean over subtasks %"] if macro else [])]
    heads += ["unparsed", "blanks credited (%)"]
    cells = []
    for row in rows:
        score, credited = (_percent(row[name] / row["n"], 2) for name in ("score", "correct_with_blanks"))
        counts = [str(row["n"]), str(row["correct"]), score, *([_percent(row["macro"], 2)] if macro else [])]
        counts += [str(row["unparsed"]), f"{row['correct_with_blanks']:.6g} ({credited})"]
        cells.append([row["split"], row["extractor"], *counts])
    return "Both extractors", note, heads, cells


def _with_interval(values: Mapping[str, Any], name: str, *, signed: bool = False) -> str:
    if values[name] is None:
        return "–"
    known = [v for v in (values[name], values["low"], values["high"]) if v is not None]
    value, *ends = (format(100 * v, "+.1f" if signed else ".1f") for v in known)
    return f"{value} [{', '.join(ends)}]" if ends else value


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"
