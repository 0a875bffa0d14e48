"""The curation report of random scenes, read back from its HTML."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from data_prep.questions import blind
from data_prep.questions.balance import PRESETS, split_of
from data_prep.questions.propose import QuestionRules, propose
from data_prep.questions.scenarios import SCENARIOS
from data_prep.questions.tally import Tally
from data_prep.scenes.relations import LABELS
from data_prep.store import report
from data_prep.store.clip_maps import MAX_OBJECTS, clip_maps
from data_prep.store.report import CurationSummary, SampledClip, render
from tests.data_prep.scenes.random_scenes import random_scene
from tests.report.reading import Element, assert_nothing_external, read

NASTY = "<script>alert(1)</script> & 'co'"
RULES = QuestionRules(per_clip=14)
SCENES = [random_scene(seed, frames=40) for seed in range(40)]
ROWS = {
    scene.clip_id: [
        q.record("v.mp4") | {"split": split_of(scene.source_id, bench_share=0.3)} for q in propose(scene, RULES, 0)
    ]
    for scene in SCENES
}
ALL = [row for rows in ROWS.values() for row in rows]


def named_frames(rows) -> list[int]:
    return sorted({n for row in rows for n in row["frames"]["source"]})


def make_clip(scene, rng, size=(48, 64)) -> SampledClip:
    frames = {n: rng.integers(0, 256, (*size, 3), np.uint8) for n in named_frames(ROWS[scene.clip_id])}
    return SampledClip(scene, frames, ROWS[scene.clip_id], {})


def make_summary(**changes) -> CurationSummary:
    rng = np.random.default_rng(0)
    by_split = {s: [r for r in ALL if r["split"] == s] for s in ("train", "bench")}
    manifest = {
        "format": 1,
        "seed": 7,
        "config": {"source": "synthetic", "preset": "mllm4d_2m", "input": "", "note": NASTY},
        "clips": {"total": 41, "without_questions": 1},
        "source_videos": {s: len({r["source_id"] for r in rows}) for s, rows in by_split.items()},
        "questions": {
            s: {name: sum(r["question_type"] == name for r in rows) for name in SCENARIOS}
            for s, rows in by_split.items()
        },
        "scales": {"train": {"assumed_baseline": 1234, "metric": 5}, "bench": {"metric": 6}},
        "rejected": {"no_motion": 3, NASTY: 12},
        "files": {"train.json": {"sha256": "ab" * 32, "bytes": 1234567, "records": 321}},
    }
    fields = {
        "manifest": manifest,
        "rows": ALL,
        "blind": {s: blind.baselines(rows) for s, rows in by_split.items()},
        "letters": {s: blind.letter_test(rows) for s, rows in by_split.items()},
        "clips": [make_clip(scene, rng) for scene in SCENES[:3]],
        "shares": PRESETS["mllm4d_2m"].shares,
    }
    return CurationSummary(**(fields | changes))


def section(root: Element, anchor: str) -> Element:
    return next(s for s in root.all("section") if s.attributes["id"] == anchor)


def table(root: Element, caption: str) -> list[list[str]]:
    """Texts of the body of the table with that caption."""
    found = next(t for t in root.all("table") if t.all("caption")[0].text == caption)
    return [[cell.text for cell in row.all("td")] for row in found.all("tbody")[0].all("tr")]


@pytest.fixture(scope="module")
def html() -> str:
    return render(make_summary())


def test_the_page_holds_all_sections_and_nothing_external(html):
    assert_nothing_external(html)
    root = read(html)
    anchors = [s.attributes["id"] for s in root.all("section")]
    assert anchors == ["made", "shares", "histograms", "blind", "samples", "maps"]
    assert len(root.all("script")) == 1 and NASTY in root.text and "<script>alert" not in html
    assert len(html.encode()) < 2e6


def test_what_was_proposed_and_kept_is_counted():
    tallies = [
        Tally("train", "camera_relative_direction", 400, 100, "up: 7", "class_prior", 0.40, 0.25),
        Tally("bench", "camera_relative_direction", 90, 0, "left: 0, up: 0", "", math.nan, math.nan),
    ]
    rows = table(read(render(make_summary(tallies=tallies, clips=[]))), "Proposed and kept")
    name = "camera relative direction"
    assert rows == [
        ["train", name, "400", "100", "25%", "up: 7", "▲▲ 40.0%", "25.0%", "8.7%"],
        ["bench", name, "90", "0", "0%", "left: 0, up: 0", "–", "–", "–"],
    ]


def test_same_summary_same_bytes(html):
    assert render(make_summary()) == html


def test_counts_hashes_and_rejections_are_those_of_the_manifest(html):
    root, manifest = read(html), make_summary().manifest
    rows = {r[0]: r[1:] for r in table(root, "Questions")}
    for name in SCENARIOS:
        assert rows[name.replace("_", " ")] == [str(manifest["questions"][s][name]) for s in ("train", "bench")]
    metric, assumed = table(root, "Scale")
    assert metric[0].startswith("metric: ") and metric[1:] == ["5", "6"]
    assert assumed[0].startswith("assumed_baseline: ") and assumed[1:] == ["1,234", "0"]
    assert table(root, "Rejections") == [[NASTY, "12"], ["no_motion", "3"]]
    assert table(root, "Files") == [["train.json", "321", "1,234,567", "ab" * 32]]
    tiles = dict(zip([d.text for d in root.all("dt")], [d.text for d in root.all("dd")], strict=True))
    assert tiles["seed"] == "7" and tiles["clips without questions"] == "1"
    assert tiles["train questions"] == f"{sum(r['split'] == 'train' for r in ALL):,}"
    assert json.loads(root.all("pre")[0].text) == manifest["config"]


def test_shares_are_normalised():
    shares = {"camera_absolute_distance": 3.0, "object_absolute_distance": 1.0}
    rows = table(read(render(make_summary(shares=shares, clips=[]))), "Shares")
    wanted = {row[0]: row[1] for row in rows}
    assert wanted["camera absolute distance"] == "75.0%" and wanted["object absolute distance"] == "25.0%"
    assert sum(float(row[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.4)


def test_histograms_count_every_question(html):
    charts = {f.all("figcaption")[0].text: f for f in section(read(html), "histograms").all("figure")}
    for name in (n for n, labels in LABELS.items() if not labels):
        count = sum(row["question_type"] == name for row in ALL)
        assert f"n = {count:,}" in charts[f"True answer: {name.replace('_', ' ')}"].text
    gaps = charts["Frames between the two named"].all("rect", "bar")
    assert sum(int(r.all("title")[0].text.rpartition(" ")[2]) for r in gaps) == len(ALL)
    letters = [r.all("title")[0].text for r in charts["Right letter, 4 options"].all("rect", "bar")]
    answers = [r["answer"] for r in ALL if r["split"] == "train" and len(r["options"]) == 4]
    assert letters[0] == f"A, train: {100 * answers.count('A') / len(answers):.3g}%"
    assert "Rank of the true distance among the options, smallest first" in charts
    assert charts["Questions per clip"].all("p", "note")[0].text == f"n = {sum(map(bool, ROWS.values()))}"


def test_blind_figures_are_marked_when_they_leak():
    found = {"count": 400.0, "chance": 0.25, "letter_prior": 0.27, "class_prior": 0.285, "template_prior": 0.40}
    summary = make_summary(blind={"bench": {"s": found}}, letters={"bench": (30.0, 0.001)}, clips=[])
    root = section(read(render(summary)), "blind")
    body = root.all("tbody")[0]
    assert [c.text for c in body.all("td")] == ["bench", "s", "400", "25.0%", "4.3%", "27.0%", "▲ 28.5%", "▲▲ 40.0%"]
    tones = [c.classes & {"good", "warn", "bad"} for c in body.all("td")[-3:]]
    assert tones == [set(), {"warn"}, {"bad"}]
    assert root.all("tbody")[1].all("td")[-1].classes >= {"bad"}


def test_cards_show_the_question_its_frames_and_the_right_option(html):
    cards = section(read(html), "samples").all("article")
    assert len(cards) == sum(min(report.MAX_QUESTIONS, len(ROWS[s.clip_id])) for s in SCENES[:3])
    by_id = {row["id"]: row for row in ALL}
    for card in cards:
        facts = dict(zip([d.text for d in card.all("dt")], [d.text for d in card.all("dd")], strict=True))
        row = by_id[facts["id"]]
        assert card.all("p")[0].text == row["question"]
        right = [li.text for li in card.all("li") if "good" in li.classes]
        assert right == [f"{row['answer']}. {row['options'][row['answer']]} ✓"]
        assert len(card.all("li")) == len(row["options"]) and len(card.all("img")) == 2
        captions = [c.text for c in card.all("figcaption")]
        for text, seen, source in zip(captions, row["frames"]["seen"], row["frames"]["source"], strict=True):
            assert text == (f"frame {seen}" if seen == source else f"frame {seen} (source frame {source})")
        assert facts["scale"] == "metric"
        numbers = [float(v) for v in re.findall(r"-?\d+\.\d+", facts["camera center"])]
        np.testing.assert_allclose(numbers, np.ravel(row["solution"]["camera_center"]), atol=0.0051)
        assert ("object center" in facts) == bool(row["object_id"])


def test_a_missing_frame_and_hostile_texts_are_shown_as_such():
    scene = SCENES[0]
    row = dict(ROWS[scene.clip_id][0], question=NASTY, options={"A": NASTY, "B": "b"}, answer="A")
    objects = tuple(dataclasses.replace(o, description=NASTY) for o in scene.objects)
    clip = SampledClip(dataclasses.replace(scene, objects=objects), {}, [row], {"static_drift": None, "x": math.nan})
    html = render(make_summary(clips=[clip]))
    assert "<script>alert" not in html
    root = read(html)
    card = section(root, "samples").all("article")[0]
    assert card.all("p")[0].text == NASTY and len(card.all("div", "missing")) == 2
    assert f"frame {row['frames']['seen'][0]}" in card.all("div", "missing")[0].text
    assert NASTY in [li.text for li in section(root, "maps").all("li")]
    assert table(root, "Quality of the reconstruction") == [["static drift", "not measured"], ["x", "not measured"]]


def test_rows_of_the_data_set_come_first():
    rows = ROWS[SCENES[0].clip_id]
    clip = SampledClip(SCENES[0], {}, rows, {})
    html = render(make_summary(rows=[rows[-1]], clips=[clip]))
    cards = section(read(html), "samples").all("article")
    splits = [json.loads(c.attributes["data-facets"])["split"] for c in cards]
    assert splits == [rows[-1]["split"]] + ["not chosen"] * (report.MAX_QUESTIONS - 1)


def test_the_map_is_drawn_in_the_axes_of_the_solutions():
    """The drawn places of the named frames are the solutions' camera centres, seen from above, up to one scale."""
    compared = 0
    for scene in SCENES[:6]:
        rows = ROWS[scene.clip_id]
        drawn = read("".join(clip_maps(scene, rows))).all("figure")[-1]
        places = {}
        for circle in drawn.all("circle"):
            match = re.fullmatch(r"camera at frame (\d+): .*", circle.all("title")[0].text)
            if match:
                places[int(match[1])] = (circle.number("cx"), circle.number("cy"))
        centers = {
            frame: (center[0], center[2])
            for row in rows
            for frame, center in zip(row["frames"]["source"], row["solution"]["camera_center"], strict=True)
        }
        assert places.keys() == centers.keys()
        frames = sorted(centers)
        truth, page = np.array([centers[f] for f in frames]), np.array([places[f] for f in frames]) * (1, -1)
        truth, page = truth - truth.mean(0), page - page.mean(0)
        scale = (truth * page).sum() / (truth**2).sum()
        assert scale > 0
        np.testing.assert_allclose(page, truth * scale, atol=0.02 + 0.001 * scale)
        compared += len(frames)
    assert compared > 30


def test_gaps_and_the_limit_of_objects():
    scene = random_scene(3, frames=40, objects=MAX_OBJECTS + 2)
    points = np.array(scene.objects[0].points)
    points[10:20] = np.nan
    points[20:] = np.nan
    objects = (dataclasses.replace(scene.objects[0], points=points), *scene.objects[1:])
    scene = dataclasses.replace(scene, objects=objects)
    row = {"object_id": "object0", "frames": {"source": [0, 39]}}
    figure = read("".join(clip_maps(scene, [row]))).all("figure")[0]
    assert len(figure.all("li")) == 1 + MAX_OBJECTS and "2 more objects" in figure.text
    name = scene.objects[0].description
    path = next(p for p in figure.all("path", "line") if p.all("title")[0].text == name)
    assert path.attributes["d"].count("L") == 9 and path.attributes["d"].count("M") == 1
    titles = [c.all("title")[0].text for c in figure.all("circle")]
    assert any(t.startswith(f"{name} at frame 0:") for t in titles)
    assert not any(t.startswith(f"{name} at frame 39:") for t in titles)


def test_the_file_stays_below_ten_megabytes_whatever_the_frames():
    noise = np.random.default_rng(1).integers(0, 256, (400, 640, 3), np.uint8)
    clips = [
        SampledClip(scene, dict.fromkeys(named_frames(ROWS[scene.clip_id]), noise), ROWS[scene.clip_id], {})
        for scene in SCENES[: report.MAX_CLIPS + 3]
    ]
    html = render(make_summary(clips=clips))
    assert 1e6 < len(html.encode()) <= 10e6
    assert f"{report.MAX_CLIPS} of {len(clips)} sampled clips" in html


def test_a_run_that_made_nothing_still_has_a_report():
    manifest = {
        "seed": 0,
        "config": {},
        "clips": {},
        "source_videos": {},
        "questions": {"train": {}, "bench": {}},
        "rejected": {},
        "files": {},
    }
    root = read(render(CurationSummary(manifest, [], {}, {}, [], {})))
    assert "No clip was sampled." in root.text and len(root.all("section")) == 6
