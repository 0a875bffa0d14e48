"""The results of an evaluation as tables of text: in Markdown, and in results.json for the page of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm4d_jax.files.atomic import write_atomic
from mllm4d_jax.report.reading import RESULTS

TITLES = {"all": "All questions", "split": "By split", "category": "By category", "subtask": "By subtask"}
EXPLANATION = {
    "strict": "the rules of this project: the last answer block, else what follows the thinking; a letter, an option's "
    "text, a stated answer, or the only option that is mentioned",
    "official": "the release's own reading as far as it is known: the stripped text of the last answer block, or else "
    "of the whole response, must be a letter and nothing more. Its final figures leave the rest to a judge that is "
    "shown the truth; no judge is asked here",
}
BLANKS = "'blanks credited' counts empty responses as right, as a judge that is shown the truth may do."
PUBLISHED = (
    "The paper's 59.7 % on the real split are the published responses of its fine-tuned model with the blank ones "
    "credited (819 of 1371); strictly they are 58.6 % (804)."
)

Results = Mapping[str, Any]
Row = list[str]
Block = tuple[str, str, list[str], list[Row]]  # title, note, heads, rows of text


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
        lines = ["| " + " | ".join(line) + " |" for line in (heads, *map(_escaped, rows))]
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
    mean = f" Mean over {macro['subtasks']} subtasks: {_with_interval(macro, 'accuracy')}." if macro else ""
    return (
        f"{whole['n']} questions about {whole['clusters']} videos, {whole['correct']} right: "
        f"{_with_interval(whole, 'accuracy')}.{left_out}{mean}{control} Extractor: {results['extractor']}. Unparsed "
        f"answers are wrong. Brackets: {results['level']:.0%} intervals, bootstrap over videos "
        f"({bootstrap['samples']} draws, seed {bootstrap['seed']})."
    )


def blocks(results: Results) -> list[Block]:
    """Every table as text."""
    found = []
    for table, title in TITLES.items():
        groups = [group for group in results["groups"] if group["table"] == table]
        if groups:
            found.append(_groups_block(title, groups))
    if results["comparison"]:
        found.append(_comparison_block(results["comparison"]))
    found += [_extractors_block(results), _letters_block(results["letters"])]
    rules = [[rule, str(n)] for rule, n in results["rules"].items()]
    return [*found, ("How answers were found", "", ["rule", "answers"], rules)]


def _groups_block(title: str, groups: Sequence[Mapping[str, Any]]) -> Block:
    heads = ["", "n", "videos", "right", "accuracy %", "unparsed (%)", "conflicts", "truncated"]
    heads += ["chance %", "best letter %"]
    kinds = [f"{control['control']} %" for control in groups[0]["controls"]]
    rows = []
    for group in groups:
        counts = [str(group[name]) for name in ("n", "clusters", "correct")]
        rows.append(
            [
                group["name"],
                *counts,
                _with_interval(group, "accuracy"),
                f"{group['unparsed']} ({_percent(_share(group['unparsed'], group['n']))})",
                str(group["conflicts"]),
                str(group["truncated"]),
                _percent(group["chance"]),
                _percent(group["best_letter"]),
                *(f"{_percent(control['accuracy'])} (n = {control['n']})" for control in group["controls"]),
            ]
        )
    return title, "", [*heads, *kinds], rows


def _comparison_block(comparison: Mapping[str, Any]) -> Block:
    note = (
        "Second (this run) less first, on the questions that both answered "
        f"({comparison['only_in_first']} only in the first, {comparison['only_in_second']} only in the second). An "
        "interval without 0 is a difference at the 5 % level; 'detectable' is the true difference that a comparison of "
        "this size finds in 80 of 100 cases. McNemar's test takes questions about one video for independent."
    )
    heads = ["", "n", "first %", "second %", "difference", "detectable", "only first right", "only second right", "p"]
    rows = [
        [
            row["name"],
            str(row["n"]),
            _percent(row["first"]),
            _percent(row["second"]),
            _with_interval(row, "difference", signed=True),
            _percent(row["detectable"]),
            str(row["only_first"]),
            str(row["only_second"]),
            f"{row['mcnemar_p']:.3g}",
        ]
        for row in comparison["rows"]
    ]
    return "Compared with the other run", note, heads, rows


def _extractors_block(results: Results) -> Block:
    rows = results["extractors"]
    explained = "; ".join(f"{name}: {text}" for name, text in EXPLANATION.items())
    differing = {row["split"]: row["differ"] for row in rows}
    differ = ", ".join(f"{n} in {split}" for split, n in differing.items())
    ids = [one for split in differing for row in rows if row["split"] == split for one in row["differ_ids"]]
    named = f", among them {', '.join(list(dict.fromkeys(ids))[:5])}" if ids else ""
    note = f"{explained}. Answers on which the two differ: {differ}{named}. {BLANKS}"
    if results["benchmark"] == "vlm4d" and results["prompt_modes"] == ["published"]:
        note += f" {PUBLISHED}"
    heads = ["", "extractor", "n", "right", "accuracy %", "unparsed", "blanks credited (%)"]
    made = []
    for row in rows:
        credited = f"{row['correct_with_blanks']} ({_percent(_share(row['correct_with_blanks'], row['n']), 2)})"
        share = _percent(_share(row["correct"], row["n"]), 2)
        counts = [str(row["n"]), str(row["correct"]), share, str(row["unparsed"])]
        made.append([row["split"], row["extractor"], *counts, credited])
    return "Both extractors", note, heads, made


def _letters_block(letters: Sequence[Mapping[str, Any]]) -> Block:
    rows = [[row["letter"], str(row["right"]), str(row["given"])] for row in letters]
    return "Letters", "How often each letter is right, and how often it was given.", ["letter", "right", "given"], rows


def _with_interval(values: Mapping[str, Any], name: str, *, signed: bool = False) -> str:
    form = "+.1f" if signed else ".1f"
    if values[name] is None:
        return "–"
    value = format(100 * values[name], form)
    if values["low"] is None:
        return value
    return f"{value} [{format(100 * values['low'], form)}, {format(100 * values['high'], form)}]"


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"


def _share(part: int, n: int) -> float | None:
    return part / n if n else None


def _escaped(row: Row) -> Row:
    """Cells for a Markdown table: no line breaks, no bars."""
    return [" ".join(text.split()).replace("|", "\\|") for text in row]
