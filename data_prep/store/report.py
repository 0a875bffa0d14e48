"""The curation report: one HTML file that shows what was made, so that a person can judge it without code.

Counts and hashes, shares wanted against got, what a guesser without the video reaches, and, for some sampled clips, the
questions over their frames and a top-down map. A function of its inputs alone: the same data set gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.scenes.relations import LABELS
from data_prep.scenes.scene import Scene, SceneObject
from mllm4d_jax.files.atomic import write_atomic
from mllm4d_jax.report import page
from mllm4d_jax.report.charts import bars, histogram
from mllm4d_jax.report.maps import MapPath, MapPoint, top_map
from mllm4d_jax.report.page import Card, Cell, Column, Markup, Section, number, tag

# With 40 kB a thumbnail at most, these keep the file below 10 MB whatever the frames look like.
MAX_CLIPS, MAX_QUESTIONS = 12, 6
MAX_OBJECTS = 10  # drawn on a map
_SMALL = 0.5  # of the map: a shorter camera path gets a map of its own
MARGIN = 0.03  # a guesser may be this much above chance

Row = Mapping[str, Any]


@dataclass(frozen=True)
class SampledClip:
    """A clip to show.

    Attributes:
      scene: of the clip.
      frames: source frame number -> u8[H, W, 3] RGB, for the frames that questions name; the report says which of them
        are missing.
      rows: question rows as `Question.record` makes them; those chosen for the data set are shown first.
      quality: figures of the stereo stage, {} if there are none; None or NaN = not measured.
    """

    scene: Scene
    frames: Mapping[int, np.ndarray]
    rows: Sequence[Row]
    quality: Mapping[str, Any]


@dataclass(frozen=True)
class CurationSummary:
    """Everything the report shows.

    Attributes:
      manifest: as `export.assemble` returns it.
      rows: all chosen questions with the fields id, source_id, question_type, subtask, template, answer, options,
        label, rank, motion, frames and split.
      blind: split -> `blind.baselines` of its rows.
      letters: split -> `blind.letter_test` of its rows with four options.
      clips: `MAX_CLIPS` of them are shown.
      shares: weight per scenario that the preset of the training split asks for; normalised here.
    """

    manifest: Mapping[str, Any]
    rows: Sequence[Row]
    blind: Mapping[str, Mapping[str, Mapping[str, float]]]
    letters: Mapping[str, tuple[float, float]]
    clips: Sequence[SampledClip]
    shares: Mapping[str, float]


def write_report(path: str | Path, summary: CurationSummary) -> None:
    """Writes the report, whole or not at all. Raises OSError if the file cannot be written."""
    write_atomic(path, render(summary).encode("utf-8"))


def render(summary: CurationSummary) -> str:
    """The report's HTML."""
    manifest, clips = summary.manifest, summary.clips[:MAX_CLIPS]
    splits = sorted(manifest["questions"], key=lambda s: (s != "train", s))
    chosen = {row["id"]: row["split"] for row in summary.rows}
    shown = [(clip, _shown_rows(clip.rows, chosen)) for clip in clips]
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
        Section("made", "What was made", _made(manifest, splits)),
        Section("shares", "Shares wanted and got", _shares(summary, splits)),
        Section("histograms", "Histograms", _histograms(summary.rows, splits), "All chosen questions together."),
        Section("blind", "What can be guessed without the video", _blind(summary, splits), _blind_note()),
        Section("samples", "Sample questions", page.cards(cards, label="questions"), sample_note),
        Section("maps", "Maps", _maps(shown), _MAP_NOTE),
    ]
    return page.page("Curation report", sections, subtitle=_subtitle(manifest), tiles=tiles)


def _subtitle(manifest: Mapping[str, Any]) -> str:
    config = manifest["config"]
    named = [f"{key}: {config[key]}" for key in ("source", "preset", "input") if config.get(key)]
    return "; ".join(named)


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
    config = json.dumps(manifest["config"], indent=2, sort_keys=True, ensure_ascii=False)
    counts = [[reason, number(n)] for reason, n in reasons]
    heads = [Column("file"), Column("records", True), Column("bytes", True), Column("SHA-256")]
    tables = [
        page.table(columns, rows, caption="Questions"),
        page.table([Column("reason"), Column("count", True)], counts, caption="Rejections"),
        page.table([Column("split"), Column("source videos", True)], videos, caption="Source videos"),
        page.table(heads, files, caption="Files"),
    ]
    details = tag("details", tag("summary", "Configuration"), tag("pre", config))
    return page.join([tag("div", *tables, class_="tables"), details])


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


def _histograms(rows: Sequence[Row], splits: Sequence[str]) -> Markup:
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
        letters = sorted({letter for row in rows if len(row["options"]) == size for letter in row["options"]})
        found = {
            s: [row["answer"] for row in rows if row["split"] == s and len(row["options"]) == size] for s in splits
        }
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


def _blind_note() -> str:
    return (
        "Share of questions that a guesser gets right from the text alone, learned on half of the source videos and "
        f"scored on the other half. Marked with ▲: more than {100 * MARGIN:.0f} points above chance; with ▲▲ and red: "
        "also by more than the noise, twice the standard error of guessing on that many questions. The letters of the "
        "right answers are compared with the uniform distribution; red: p is 0.01 or less."
    )


def _blind(summary: CurationSummary, splits: Sequence[str]) -> Markup:
    tables = [found for split in splits for found in summary.blind.get(split, {}).values()]
    guessers = list(dict.fromkeys(name for found in tables for name in found if name not in ("chance", "count")))
    columns = [Column("split"), Column("subtask"), Column("n", True), Column("chance", True), Column("noise ±", True)]
    columns += [Column(_words(name), True) for name in guessers]
    rows = []
    for split in splits:
        for subtask, found in sorted(summary.blind.get(split, {}).items()):
            chance, count = found["chance"], found["count"]
            noise = 2 * math.sqrt(chance * (1 - chance) / count) if count else math.nan
            row = [split, _words(subtask), number(count), number(chance, 1, percent=True)]
            row += [number(noise, 1, percent=True)]
            rows.append(row + [_guess(found.get(name, math.nan), chance, noise) for name in guessers])
    letters = [
        [split, number(statistic, 2), number(p, 3, tone="good" if p > 0.01 else "bad")]
        for split, (statistic, p) in sorted(summary.letters.items(), key=lambda item: splits.index(item[0]))
    ]
    heads = [Column("split"), Column("chi-square", True), Column("p", True)]
    return page.join(
        [
            page.table(columns, rows, caption="Blind baselines", filter=True),
            page.table(heads, letters, caption="Letters, four options"),
        ]
    )


def _guess(accuracy: float, chance: float, noise: float) -> Cell:
    cell = number(accuracy, 1, percent=True)
    if not accuracy > chance + MARGIN:
        return cell
    far = accuracy > chance + MARGIN and accuracy > chance + noise
    return Cell(f"{'▲▲' if far else '▲'} {cell.value}", cell.sort, "bad" if far else "warn")


def _shown_rows(rows: Sequence[Row], chosen: Mapping[str, str]) -> list[Row]:
    """Up to `MAX_QUESTIONS` rows, those of the data set first."""
    return sorted(rows, key=lambda row: row["id"] not in chosen)[:MAX_QUESTIONS]


def _cards(clip: SampledClip, rows: Sequence[Row], chosen: Mapping[str, str]) -> list[Card]:
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
        facts = [("value", _metres(row["value"])), ("motion", _metres(row["motion"]))]
        for name in ("camera_center", "object_center"):
            if any(center is not None for center in solution[name]):
                facts.append((_words(name), _states(solution[name])))
        facts += [("phrasing", row["template"]), ("split", split), ("id", row["id"])]
        body = page.join(
            [
                tag("div", *frames, class_="pair"),
                tag("p", row["question"]),
                tag("ul", *options, class_="options"),
                tag(
                    "dl",
                    *(tag(e, t) for pair in facts for e, t in zip(("dt", "dd"), pair, strict=True)),
                    class_="facts",
                ),
            ]
        )
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


_MAP_NOTE = (
    "Seen from above, in the axes of the first camera: right to the right, forward up; metres. Open circles are "
    "starts, filled ones ends; short strokes show where the camera looks; numbers are source frames that the questions "
    "above name. An object's path is the mean of those of its points that are seen, with a gap where none is."
)


def _maps(shown: Sequence[tuple[SampledClip, Sequence[Row]]]) -> Markup:
    if not shown:
        return tag("p", "No clip was sampled.", class_="empty")
    blocks = [tag("div", *clip_maps(clip.scene, rows), _quality(clip.quality), class_="stack") for clip, rows in shown]
    return tag("div", *blocks, class_="charts")


def clip_maps(scene: Scene, rows: Sequence[Row]) -> list[Markup]:
    """Top-down map of camera and objects with the frames that `rows` name marked; where the camera's path is small in
    it, a second one of that path alone."""
    pose = scene.world_to_camera[0]
    asked = {row["object_id"] for row in rows}
    objects = sorted(scene.objects, key=lambda o: o.object_id not in asked)[:MAX_OBJECTS]
    look = scene.camera_to_world[:, :, 2] @ pose[:, :3].T  # f64[T,3] viewing directions
    camera = MapPath("camera", _from_above(scene.camera_centers, pose), look[:, [0, 2]], camera=True)
    paths = [camera, *(MapPath(_name(o), _from_above(_centroids(o), pose)) for o in objects)]
    frames = sorted({n for row in rows for n in row["frames"]["source"]})
    named = [_map_point(camera, 0, frame, str(frame)) for frame in frames]
    number_of = {o.object_id: n for n, o in enumerate(objects, start=1)}
    pairs = {(row["object_id"], n) for row in rows for n in row["frames"]["source"] if row["object_id"] in number_of}
    marks = [_map_point(paths[number_of[o]], number_of[o], frame, "") for o, frame in sorted(pairs)]
    left_out = len(scene.objects) - len(objects)
    note = f"scale: {scene.scale}" + (f"; {left_out} more objects are not drawn" if left_out else "")
    axes = {"x_label": "right, m", "y_label": "forward, m"}
    if _extent([camera]) > _SMALL * _extent(paths):
        return [top_map(paths, [*named, *marks], title=scene.clip_id, note=note, **axes)]
    bare = [dataclasses.replace(point, label="") for point in named]
    return [
        top_map(paths, [*bare, *marks], title=scene.clip_id, note=note, **axes),
        top_map([camera], named, title=f"{scene.clip_id}: the camera's path, larger", **axes),
    ]


def _map_point(path: MapPath, index: int, frame: int, label: str) -> MapPoint:
    x, y = path.points[frame].tolist()
    return MapPoint(x, y, label, f"{path.name} at frame {frame}: {x:.2f}, {y:.2f} m", index)


def _extent(paths: Sequence[MapPath]) -> float:
    """Metres: the longer side of the box around the paths; 0 if nothing is seen."""
    points = np.concatenate([path.points for path in paths])
    known = points[np.isfinite(points).all(1)]
    return float(np.ptp(known, axis=0).max()) if len(known) else 0.0


def _from_above(points: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """World points f64[N, 3] -> f64[N, 2] (right, forward) in the axes of a camera f64[3, 4]."""
    return (points @ pose[:, :3].T + pose[:, 3])[:, [0, 2]]


def _centroids(obj: SceneObject) -> np.ndarray:
    """f64[T, 3] mean of the points seen in each frame, NaN where there are none."""
    seen = obj.seen()
    total = np.where(seen[..., None], obj.points, 0.0).sum(1)
    count = seen.sum(1)[:, None]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _quality(figures: Mapping[str, Any]) -> Markup | None:
    if not figures:
        return None
    rows = []
    for name, value in sorted(figures.items()):
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            value = "not measured"
        rows.append([_words(name), Cell(f"{value:.4g}", value) if isinstance(value, (int, float)) else value])
    return page.table([Column("figure"), Column("value", True)], rows, caption="Quality of the reconstruction")


def _name(obj: SceneObject) -> str:
    return obj.description or obj.category or obj.object_id


def _words(name: str) -> str:
    return name.replace("_", " ")


def _metres(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, (int, float)):
        return f"{value:.2f} m"
    return f"({', '.join(f'{v:.2f}' for v in value)}) m"
