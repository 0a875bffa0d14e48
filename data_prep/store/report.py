"""The curation report: one HTML file that shows what was made, so that a person can judge it without code.

Counts and hashes, shares wanted against got, what a guesser without the video reaches, and, for some sampled clips, the
questions over their frames and a top-down map. A function of its inputs alone: the same data set gives the same bytes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from data_prep.questions import blind
from data_prep.questions.balance import PRESETS, SPLITS
from data_prep.questions.propose import QuestionRow
from data_prep.questions.tally import Guessed, Tally, guess, table, tally
from data_prep.scenes.relations import LABELS
from data_prep.sources.base import ClipSource
from data_prep.store.clip_maps import MAP_NOTE, clip_maps
from data_prep.store.sampled_clips import SampledClip, sample_clips
from mllm4d_jax.files.atomic import write_atomic
from mllm4d_jax.report import page
from mllm4d_jax.report.charts import bars, histogram
from mllm4d_jax.report.page import Card, Cell, Column, Markup, Section, number, tag

# With 40 kB a thumbnail at most, these keep the file below 10 MB whatever the frames look like.
MAX_CLIPS, MAX_QUESTIONS = 12, 6
MARGIN = 0.03  # a guesser may be this much above chance
# What `Scene.scale` means for a question's answer; questions are never asked of a "relative" one.
_SCALES = {
    "metric": "measured with a known baseline, or brought to metres by a metric depth",
    "assumed_baseline": "as for eyes 63 mm apart; another camera makes all distances of the clip wrong by one factor",
    "unknown": "not recorded",
}


@dataclass(frozen=True)
class CurationSummary:
    """Everything the report shows.

    Attributes:
      manifest: as `export.assemble` returns it.
      rows: all chosen questions with the fields id, source_id, question_type, subtask, template, answer, options,
        label, rank, motion, frames and split.
      blind: see `tally.guess`.
      letters: split -> `blind.letter_test` of its rows with four options.
      clips: `MAX_CLIPS` of them are shown.
      shares: weight per scenario that the preset of the training split asks for; normalised here.
      tallies: per split and scenario what was proposed and kept.
    """

    manifest: Mapping[str, Any]
    rows: Sequence[QuestionRow]
    blind: Guessed
    letters: Mapping[str, tuple[float, float]]
    clips: Sequence[SampledClip]
    shares: Mapping[str, float]
    tallies: Sequence[Tally] = ()


def write_curation_report(
    config: ml_collections.ConfigDict,
    root: Path,
    source: ClipSource,
    manifest: Mapping[str, Any],
    proposed: Sequence[QuestionRow],
    chosen: Collection[str],
) -> None:
    """Print what was proposed and kept, with the blind guessers' figures, and write `<root>/report.html`.

    Args:
      root: the workdir; its parts hold the questions.
      proposed: see `curate.judged_rows`.
      chosen: ids of the questions that are kept.
    """
    guessed = guess(proposed, chosen, config.seed)
    tallies = tally(proposed, guessed)
    print(table(tallies))
    rows = [row for row in proposed if row["id"] in chosen]
    by_split = {split: [row for row in rows if row["split"] == split] for split in SPLITS}
    four = {split: [row for row in group if len(row["options"]) == 4] for split, group in by_split.items()}
    letters = {split: blind.letter_test(group) for split, group in four.items() if group}
    clips = sample_clips(config, root, source, rows)
    shares = PRESETS[config.preset].shares if config.preset in PRESETS else {}
    page_text = render(CurationSummary(manifest, rows, guessed, letters, clips, shares, tallies))
    write_atomic(root / "report.html", page_text.encode("utf-8"))


def _guessers(figures: Mapping[str, float]) -> list[str]:
    return [name for name in figures if name not in blind.NO_GUESSER]


def render(summary: CurationSummary) -> str:
    """Return the report's HTML."""
    manifest, clips = summary.manifest, summary.clips[:MAX_CLIPS]
    splits = sorted(manifest["questions"], key=lambda s: (s != "train", s))
    chosen = {row["id"]: row["split"] for row in summary.rows}
    # Those of the data set come first.
    shown = [(clip, sorted(clip.rows, key=lambda row: row["id"] not in chosen)[:MAX_QUESTIONS]) for clip in clips]
    tiles = [(f"{s} questions", f"{sum(manifest['questions'][s].values()):,}") for s in splits]
    tiles += [("clips", f"{manifest['clips'].get('total', 0):,}")]
    tiles += [("clips without questions", f"{manifest['clips'].get('without_questions', 0):,}")]
    tiles += [("source videos", f"{sum(manifest['source_videos'].values()):,}"), ("seed", manifest["seed"])]
    cards = [card for clip, rows in shown for card in _cards(clip, rows, chosen)]
    sample_note = (
        f"{len(clips)} of {len(summary.clips)} sampled clips, at most {MAX_QUESTIONS} questions each. The right option "
        "is marked. Centres are in metres in the axes of the first camera: right, down, forward."
    )
    sections = [
        Section("made", "What was made", page.join([_made(manifest, splits), _tallied(summary.tallies)])),
        Section("shares", "Shares wanted and got", _shares(summary, splits)),
        Section("histograms", "Histograms", _histograms(summary.rows, splits), "All chosen questions together."),
        Section("blind", "What can be guessed without the video", _blind(summary, splits), _BLIND_NOTE),
        Section("samples", "Sample questions", page.cards(cards, label="questions"), sample_note),
        Section("maps", "Maps", _maps(shown), MAP_NOTE),
    ]
    config = manifest["config"]
    named = [f"{key}: {config[key]}" for key in ("source", "preset", "input") if config.get(key)]
    return page.page("Curation report", sections, subtitle="; ".join(named), tiles=tiles)


def _made(manifest: Mapping[str, Any], splits: Sequence[str]) -> Markup:
    questions = manifest["questions"]
    names = sorted({name for split in splits for name in questions[split]})
    columns = [Column("scenario"), *(Column(split, numeric=True) for split in splits)]
    rows = [[_words(name), *(number(questions[s].get(name, 0)) for s in splits)] for name in names]
    videos = [[s, number(manifest["source_videos"].get(s, 0))] for s in splits]
    files = [
        [name, number(f["records"]), number(f["bytes"]), tag("code", f["sha256"])]
        for name, f in sorted(manifest["files"].items())
    ]
    reasons = sorted(manifest["rejected"].items(), key=lambda item: (-item[1], item[0]))
    counts = [[reason, number(n)] for reason, n in reasons]
    config = json.dumps(manifest["config"], indent=2, sort_keys=True, ensure_ascii=False)
    heads = [Column("file"), Column("records", True), Column("bytes", True), Column("SHA-256")]
    scales = manifest.get("scales", {})
    metres = [
        [f"{scale}: {meaning}", *(number(scales.get(s, {}).get(scale, 0)) for s in splits)]
        for scale, meaning in _SCALES.items()
        if any(scale in counts for counts in scales.values())
    ]
    tables = [
        page.table(columns, rows, caption="Questions"),
        page.table([Column("metres of the clip"), *columns[1:]], metres, caption="Scale"),
        page.table([Column("reason"), Column("count", True)], counts, caption="Rejections"),
        page.table([Column("split"), Column("source videos", True)], videos, caption="Source videos"),
        page.table(heads, files, caption="Files"),
    ]
    details = tag("details", tag("summary", "Configuration"), tag("pre", config))
    return page.join([tag("div", *tables, class_="tables"), details])


def _tallied(tallies: Sequence[Tally]) -> Markup:
    columns = [
        Column("split"),
        Column("scenario"),
        Column("proposed", True),
        Column("kept", True),
        Column("part", True),
    ]
    columns += [
        Column("fewest proposed of", meaning="Classes that were not proposed at all, or the one that was least often"),
        Column("best blind guess", True, "The best guesser without the video, on what is kept"),
        Column("chance", True),
        Column("noise ±", True, "Twice the standard error of guessing on that many questions"),
    ]
    rows = [
        [
            *(one.split, _words(one.scenario), number(one.proposed), number(one.kept)),
            *(number(one.kept / one.proposed, percent=True), one.short, _guess(one.accuracy, one.chance, one.noise)),
            *(number(value, 1, percent=True) for value in (one.chance, one.noise)),
        ]
        for one in tallies
    ]
    return page.table(columns, rows, caption="Proposed and kept", filter=True)


def _shares(summary: CurationSummary, splits: Sequence[str]) -> Markup:
    questions = summary.manifest["questions"]
    names = sorted({*summary.shares, *(name for split in splits for name in questions[split])})
    whole = sum(summary.shares.values())
    wanted = [summary.shares.get(name, 0.0) / whole if whole else math.nan for name in names]
    got = {}
    for split in splits:
        total = sum(questions[split].values())
        got[split] = [questions[split].get(name, 0) / total if total else math.nan for name in names]
    columns = [Column("scenario"), Column("wanted (training)", True), *(Column(split, True) for split in splits)]
    rows = [
        [_words(name), number(wanted[n], 1, percent=True), *(number(got[s][n], 1, percent=True) for s in splits)]
        for n, name in enumerate(names)
    ]
    drawn = {"wanted (training)": wanted, **got}
    percents = {name: [100 * value for value in values] for name, values in drawn.items()}
    chart = bars([_words(name) for name in names], percents, title="Share of the questions", unit="%")
    return tag("div", page.table(columns, rows, caption="Shares"), chart, class_="tables")


def _histograms(rows: Sequence[QuestionRow], splits: Sequence[str]) -> Markup:
    charts = []
    for scenario in (name for name, labels in LABELS.items() if not labels):
        values = [float(r["options"][r["answer"]]) for r in rows if r["question_type"] == scenario]
        title = f"True answer: {_words(scenario)}"
        charts.append(histogram(values, title=title, x_label="metres", step=0.1, upper=_upper(values)))
    motion = [row["motion"] for row in rows]
    gaps = [row["frames"]["seen"][1] - row["frames"]["seen"][0] for row in rows]
    per_clip = list(Counter(row["id"].rpartition(":")[0] for row in rows).values())
    charts += [
        histogram(motion, title="Motion of what moved more", x_label="metres", upper=_upper(motion)),
        histogram(gaps, title="Frames between the two named", x_label="frames as the model sees them", step=1),
        histogram(per_clip, title="Questions per clip", x_label="questions", step=1),
    ]
    for size in sorted({len(row["options"]) for row in rows}):
        group = [row for row in rows if len(row["options"]) == size]
        found = {s: [row["answer"] for row in group if row["split"] == s] for s in splits}
        letters = sorted({letter for row in group for letter in row["options"]})
        title = f"Right letter, {size} options"
        charts.append(_share_bars(letters, letters, found, title, reference=100 / size))
    ranks = {s: [row["rank"] for row in rows if row["split"] == s and row["rank"] >= 0] for s in splits}
    places = range(1 + max((rank for found in ranks.values() for rank in found), default=-1))
    if places:
        names = [f"{place + 1}." for place in places]
        title = "Rank of the true distance among the options, smallest first"
        charts.append(_share_bars(names, places, ranks, title, reference=100 / len(places)))
    return tag("div", *charts, class_="charts")


def _share_bars(
    names: Sequence[str], values: Iterable[Any], found: Mapping[str, Sequence[Any]], title: str, *, reference: float
) -> Markup:
    """Bars in percent: how often each of `values` occurs in each split."""
    series = {s: [100 * answers.count(v) / len(answers) for v in values] for s, answers in found.items() if answers}
    counts = ", ".join(f"{split} n = {len(answers):,}" for split, answers in found.items())
    return bars(names, series, title=title, unit="%", reference=reference, note=f"{counts}; dashed: uniform")


def _upper(values: Sequence[float]) -> float | None:
    """Where a histogram ends: a few far values would press all others into one bar."""
    if not values:
        return None
    bound = float(np.percentile(values, 99.5))
    return bound if max(values) > 1.5 * bound else None


_BLIND_NOTE = (
    "Share of questions that a guesser gets right from the text alone, learned on half of the source videos and "
    "scored on the other half; for few questions the mean over several halvings. Questions that gave a guesser more "
    f"than balance.slack on the training set were left out before. Marked with ▲: more than {100 * MARGIN:.0f} points "
    "above chance; with ▲▲ and red: also by more than the noise, twice the standard error of guessing on that many "
    "questions. The letters of the right answers are compared with the uniform distribution; red: p is 0.01 or less."
)


def _blind(summary: CurationSummary, splits: Sequence[str]) -> Markup:
    tables = [found for split in splits for found in summary.blind.get(split, {}).values()]
    guessers = list(dict.fromkeys(name for found in tables for name in _guessers(found)))
    columns = [Column("split"), Column("scenario"), Column("n", True), Column("chance", True), Column("noise ±", True)]
    columns += [Column(_words(name), True) for name in guessers]
    rows = []
    for split in splits:
        for subtask, found in sorted(summary.blind.get(split, {}).items()):
            chance, count = found["chance"], found["count"]
            noise = 2 * math.sqrt(chance * (1 - chance) / count) if count else math.nan
            row = [split, _words(subtask), number(count), *(number(v, 1, percent=True) for v in (chance, noise))]
            rows.append(row + [_guess(found.get(name, math.nan), chance, noise) for name in guessers])
    letters = [
        [split, number(statistic, 2), number(p, 3, tone="good" if p > 0.01 else "bad")]
        for split, (statistic, p) in sorted(summary.letters.items(), key=lambda item: splits.index(item[0]))
    ]
    heads = [Column("split"), Column("chi-square", True), Column("p", True)]
    figures = page.table(columns, rows, caption="Blind baselines", filter=True)
    return page.join([figures, page.table(heads, letters, caption="Letters, four options")])


def _guess(accuracy: float, chance: float, noise: float) -> Cell:
    cell = number(accuracy, 1, percent=True)
    if not accuracy > chance + MARGIN:
        return cell
    far = accuracy > chance + noise
    return Cell(f"{'▲▲' if far else '▲'} {cell.value}", cell.sort, "bad" if far else "warn")


def _cards(clip: SampledClip, rows: Sequence[QuestionRow], chosen: Mapping[str, str]) -> list[Card]:
    named = sorted({n for row in rows for n in row["frames"]["source"]})
    pictures = {n: page.thumbnail(clip.frames[n]) for n in named if n in clip.frames}
    made = []
    for row in rows:
        split = chosen.get(row["id"], "not chosen")
        seen, source = row["frames"]["seen"], row["frames"]["source"]
        frames = [_frame(pictures.get(s), f, s) for f, s in zip(seen, source, strict=True)]
        options = [
            tag("li", f"{letter}. {text}", " ✓" if right else None, class_="good" if right else None)
            for letter, text in sorted(row["options"].items())
            for right in (letter == row["answer"],)
        ]
        solution = row["solution"]
        facts = [("value", _metres(row["value"])), ("motion", _metres(row["motion"])), ("scale", row["scale"])]
        for name in ("camera_center", "object_center"):
            if any(center is not None for center in solution[name]):
                facts.append((_words(name), _states(solution[name])))
        facts += [("phrasing", row["template"]), ("split", split), ("id", row["id"])]
        listed = [tag(kind, text) for fact in facts for kind, text in zip(("dt", "dd"), fact, strict=True)]
        pair, choices = tag("div", *frames, class_="pair"), tag("ul", *options, class_="options")
        body = page.join([pair, tag("p", row["question"]), choices, tag("dl", *listed, class_="facts")])
        size = row["value"] if isinstance(row["value"], (int, float)) else math.nan
        keys = {"value": float(size), "motion": float(row["motion"]), "frame gap": float(seen[1] - seen[0])}
        facets = {"scenario": _words(row["question_type"]), "split": split, "clip": clip.scene.clip_id}
        made.append(Card(_words(row["question_type"]), body, facets, keys))
    return made


def _states(centers: Sequence[Any]) -> Markup:
    """Start and end of a solution, each on a line of its own."""
    first, *others = (_metres(center) for center in centers)
    return page.join([first, *(part for other in others for part in (" →", tag("br"), other))])


def _frame(jpeg: bytes | None, seen: int, source: int) -> Markup:
    name = f"frame {seen}" + (f" (source frame {source})" if source != seen else "")
    if jpeg is None:
        return tag("figure", tag("div", f"{name} is not at hand", class_="missing"), tag("figcaption", name))
    return tag("figure", page.image(jpeg, name), tag("figcaption", name))


def _maps(shown: Sequence[tuple[SampledClip, Sequence[QuestionRow]]]) -> Markup:
    if not shown:
        return tag("p", "No clip was sampled.", class_="empty")
    blocks = [tag("div", *clip_maps(clip.scene, rows), _quality(clip.quality), class_="stack") for clip, rows in shown]
    return tag("div", *blocks, class_="charts")


def _quality(figures: Mapping[str, Any]) -> Markup | None:
    if not figures:
        return None
    rows = []
    for name, value in sorted(figures.items()):
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            value = "not measured"
        rows.append([_words(name), Cell(f"{value:.4g}", value) if isinstance(value, (int, float)) else value])
    return page.table([Column("figure"), Column("value", True)], rows, caption="Quality of the reconstruction")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _metres(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, (int, float)):
        return f"{value:.2f} m"
    return f"({', '.join(f'{v:.2f}' for v in value)}) m"
