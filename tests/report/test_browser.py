"""The page in headless Chromium: nothing is loaded, nothing is complained about, and every control does its work."""

from __future__ import annotations

import json

import pytest

from mllm4d_jax.report.build import write_report
from tests.report.webdriver import Browser, find
from tests.report.workdirs import NASTY, write_eval, write_grpo, write_lines

pytestmark = pytest.mark.skipif(find() is None, reason="needs Chromium and chromedriver on the path")

CARDS = "[...document.querySelectorAll('.card')].filter((card) => !card.hidden)"
TITLES = f"return {CARDS}.map((card) => card.querySelector('h3').textContent)"
SET = """
  const [name, value] = arguments;
  const label = [...document.querySelectorAll('.controls label')].find((l) => l.firstChild.textContent === name);
  const field = label.querySelector('input, select');
  field.value = value;
  field.dispatchEvent(new Event(field.tagName === 'SELECT' ? 'change' : 'input'));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(*find(), log=tmp_path_factory.mktemp("browser") / "driver.log") as made:
        yield made


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = write_grpo(tmp_path_factory.mktemp("grpo"), steps=60, groups=5, branches=4)
    write_lines(folder / "quarantine.jsonl", [{"key": f"k{n}", "reason": "r", "message": NASTY} for n in range(3)])
    write_report(folder)
    return folder


@pytest.fixture
def rows(workdir):
    return [json.loads(line) for line in (workdir / "completions.jsonl").read_text().splitlines()]


@pytest.fixture
def page(browser, workdir):
    browser.size(1280, 900)
    browser.theme("light")
    browser.open(workdir / "report.html")
    return browser


def title(row) -> str:
    return f"step {row['step']}, {row['key']}, branch {row['branch']}"


def outcome(row) -> str:
    return "unparsed" if row["answer"] is None else "correct" if row["answer"] == row["solution"]["answer"] else "wrong"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_loaded_complained_about_or_cut_off(browser, workdir, width, theme):
    browser.size(width, 900)
    browser.theme(theme)
    browser.requests()
    browser.open(workdir / "report.html")
    assert browser.console() == []
    asked = [url for url in browser.requests() if not url.startswith("data:")]
    assert asked == [(workdir / "report.html").resolve().as_uri()]
    assert browser.run("return document.documentElement.scrollWidth") == width
    loaded = browser.run("return [...document.images].map((i) => i.complete && i.naturalWidth > 0)")
    assert len(loaded) == 80 and all(loaded)
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(", "))) < 200) == (theme == "dark")
    wide = browser.run(
        "return [...document.querySelectorAll('.card, .chart, .said, .strip')]"
        ".filter((e) => e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert wide == 0


def test_the_console_and_the_network_are_really_watched(browser, tmp_path):
    (tmp_path / "bad.html").write_text("<img src='file:///none.png'><script>console.error('seen')</script>")
    browser.requests()
    browser.open(tmp_path / "bad.html")
    assert any("seen" in line for line in browser.console())
    assert "file:///none.png" in browser.requests()


def test_outcomes_are_filtered(page, rows):
    for wanted in ("correct", "wrong", "unparsed"):
        page.run(SET, "outcome", wanted)
        expected = [title(row) for row in rows if outcome(row) == wanted]
        assert page.run(TITLES) == expected
        shown = page.run("return document.querySelector('#completions output').value")
        assert shown == f"{len(expected)} of {len(rows)}"
    page.run(SET, "outcome", "")
    assert len(page.run(TITLES)) == len(rows)


def test_steps_are_kept_within_bounds_together_with_other_filters(page, rows):
    page.run(SET, "step from", "10")
    page.run(SET, "step to", "45")
    inside = [row for row in rows if 10 <= row["step"] <= 45]
    assert 0 < len(inside) < len(rows) and page.run(TITLES) == [title(row) for row in inside]
    page.run(SET, "outcome", "correct")
    assert page.run(TITLES) == [title(row) for row in inside if outcome(row) == "correct"]
    page.run(SET, "step from", "")
    assert page.run(TITLES) == [title(r) for r in rows if r["step"] <= 45 and outcome(r) == "correct"]


def test_texts_are_searched(page, rows):
    page.run(SET, "Filter completions", "R1.jsonl#2 BRANCH")
    assert page.run(TITLES) == [title(row) for row in rows if row["key"] == "r1.jsonl#2"]


def test_cards_are_sorted_by_a_reward_and_back(page, rows):
    page.run(SET, "sort by", json.dumps(["object", -1], separators=(",", ":")))
    by_reward = sorted(rows, key=lambda row: -row["rewards"]["object"])
    assert page.run(TITLES) == [title(row) for row in by_reward]
    page.run(SET, "sort by", json.dumps(["", 0], separators=(",", ":")))
    assert page.run(TITLES) == [title(row) for row in rows]


def test_keys_move_between_cards_search_and_change_the_theme(page, rows):
    focus = "return document.activeElement.closest('.card')?.querySelector('h3').textContent ?? null"
    seen = []
    for key in "jjjk":
        page.press(key)
        seen.append(page.run(focus))
    assert seen == [title(rows[n]) for n in (0, 1, 2, 1)]
    page.run(SET, "outcome", "wrong")
    page.press("j")
    assert page.run(focus) in [title(row) for row in rows if outcome(row) == "wrong"]
    page.press("/")
    assert page.run("return document.activeElement.className") == "filter"
    page.press("#3")
    found = page.run("return document.activeElement.value")
    assert found == "#3"
    page.press("\ue00c")  # Escape
    assert page.run("return document.activeElement.tagName") == "BODY"
    page.press("tt")
    assert page.run("return document.documentElement.dataset.theme") == "dark"
    page.press("t")
    assert page.run("return document.documentElement.dataset.theme ?? null") is None


SHOWN = """
  const rows = [...document.querySelectorAll(`#${arguments[0]} tbody tr`)].filter((row) => !row.hidden);
  return rows.map((row) => [...row.cells].map((cell) => cell.textContent));
"""


def test_tables_are_sorted_by_a_click_and_filtered(page):
    before = page.run(SHOWN, "figures")
    values = [float(row[2]) for row in before]
    assert values != sorted(values)
    press = "document.querySelectorAll('#figures th button')[2].click()"
    for expected in (sorted(values), sorted(values, reverse=True), values):
        page.run(press)
        assert [float(row[2]) for row in page.run(SHOWN, "figures")] == expected
    page.run(
        "const b = document.querySelector('#config input'); b.value = 'optim'; b.dispatchEvent(new Event('input'))"
    )
    assert page.run(SHOWN, "config") == [["optim.lr", "1e-06"]]


def test_a_comparison_works_too(browser, tmp_path):
    first, second = (write_eval(tmp_path / n, seed, clips=3) for seed, n in enumerate(("one", "two")))
    path = write_report(first, tmp_path / "pair.html", second)
    browser.open(path)
    assert browser.console() == []
    every = browser.run(TITLES)
    options = browser.run("return [...document.querySelectorAll('#differences option')].map((o) => o.value)")
    browser.run(SET, "outcome", next(o for o in options if o.startswith("one: correct")))
    assert 0 < len(browser.run(TITLES)) < len(every)
