"""Markdown, JSON and the page of the run say what the figures are."""

from __future__ import annotations

import json

import pytest

from mllm4d_jax.eval import tables
from mllm4d_jax.eval.scoring import results
from mllm4d_jax.eval.statistics import Bootstrap
from mllm4d_jax.report.build import write_report
from tests.eval.question_fixtures import prediction
from tests.report.reading import assert_nothing_external, read


@pytest.fixture
def found():
    made = [
        prediction(f"q{n}", "A" if n % 3 else "", video=f"v{n // 2}", subtask=("x", "y|z")[n % 2], benchmark="mllm4d")
        for n in range(12)
    ]
    blind = [prediction(f"q{n}", "B", control="blind") for n in range(6)]
    first = [prediction(f"q{n}", "A" if n % 2 else "B", video=f"v{n // 2}", config="old") for n in range(12)]
    return results(made, controls=[blind], compare=first, bootstrap=Bootstrap(200, 1))


def rows_of(markdown, title):
    """Cells of the table under a heading, the heads first."""
    part = markdown.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.replace("\\|", "&").split("|")[1:-1]] for line in lines]


def test_markdown(found):
    text = tables.markdown(found)
    assert text.startswith("# Results: mllm4d\n\n12 questions about 6 videos, 8 right: 66.7 [")
    assert "Mean over 2 subtasks: 66.7 [" in text and "(200 draws, seed 1)" in text
    heads, whole = rows_of(text, "All questions")
    cells = dict(zip(heads, whole, strict=True))
    assert cells["n"] == "12" and cells["videos"] == "6" and cells["right"] == "8"
    assert cells["accuracy %"].startswith("66.7 [") and cells["unparsed (%)"] == "4 (33.3)"
    assert cells["chance %"] == "25.0" and cells["best letter %"] == "100.0" and cells["blind %"] == "0.0 (n = 6)"
    assert [row[0] for row in rows_of(text, "By subtask")] == ["", "x", "y&z"]
    heads, row = rows_of(text, "Compared with the other run")[:2]
    cells = dict(zip(heads, row, strict=True))
    assert (cells["first %"], cells["second %"]) == ("50.0", "66.7") and cells["difference"].startswith("+16.7 [")
    assert (cells["only first right"], cells["only second right"], cells["p"]) == ("2", "4", "0.688")
    extractors = rows_of(text, "Both extractors")
    assert extractors[1] == ["test", "strict", "12", "8", "66.67", "4", "12 (100.00)"]
    assert "strict: the rules" in text and "official: the release's own" in text
    assert "819" not in text, "what holds for the published responses is said of these alone"


def test_every_table_is_rectangular(found):
    for title, _, heads, rows in tables.blocks(found):
        assert rows and all(len(row) == len(heads) for row in rows), title


def test_files(found, tmp_path):
    tables.write_results(tmp_path / "new", found)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["results.json", "results.md"]
    written = json.loads((tmp_path / "new" / "results.json").read_text(encoding="utf-8"))
    blocks = [(one["title"], one["note"], one["heads"], one["rows"]) for one in written.pop("tables")]
    assert blocks == tables.blocks(found) and written.pop("summary") == tables.summary(found) and written == found
    assert (tmp_path / "new" / "results.md").read_text(encoding="utf-8") == tables.markdown(found)


def test_the_page_of_the_run_has_every_table(found, tmp_path):
    tables.write_results(tmp_path, found)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert_nothing_external(html)
    (section,) = [one for one in read(html).all("section") if one.attributes["id"] == "evaluation"]
    assert tables.summary(found) in section.text
    for (title, note, heads, rows), table in zip(tables.blocks(found), section.all("table"), strict=True):
        assert table.all("caption")[0].text == title and note in section.text
        body = table.all("tbody")[0]
        assert [[cell.text for cell in row.all("td")] for row in body.all("tr")] == rows
        assert len(table.all("th")) == len(heads)
    accuracies = [cell for cell in section.all("table")[0].all("td") if cell.text.startswith("66.7 [")]
    assert accuracies[0].number("data-sort") == 66.7, "sorted by the figure, not by its text"
    assert [one.all("figcaption")[0].text for one in section.all("figure")] == ["Accuracy by subtask"]


def test_what_is_not_known_is_a_dash():
    found = results([prediction("q0")], compare=[prediction("q0")], bootstrap=Bootstrap(200, 0))
    text = tables.markdown(found)
    assert rows_of(text, "All questions")[1][4] == "100.0"
    assert rows_of(text, "Compared with the other run")[1][5] == "\u2013"
    blind = [prediction("elsewhere", control="blind")]
    apart = results([prediction("q0")], controls=[blind], bootstrap=Bootstrap(200, 0))
    assert rows_of(tables.markdown(apart), "All questions")[1][-1] == "\u2013 (n = 0)"
