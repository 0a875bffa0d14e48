"""What is said about balancing, counted by hand."""

from __future__ import annotations

import math

import pytest

from configs import common
from data_prep import curate
from data_prep.questions.balance import BalanceError, split_of
from data_prep.questions.blind import NO_GUESSER, baselines
from data_prep.questions.propose import QuestionRules
from data_prep.questions.rules import question_rules
from data_prep.questions.scenarios import SCENARIOS, KindError, kind_weights
from data_prep.questions.tally import guess, table, tally
from tests.data_prep.questions.test_caps import skewed_rows

DIRECTION = "camera_relative_direction"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [row | {"split": split_of(row["source_id"], bench_share=0.2)} for row in skewed_rows(2_100, 3)]


def choose(rows, **values) -> set[str]:
    config = common.config("curate", {key.replace("__", "."): value for key, value in values.items()})
    return curate.choose(config, rows, kind_weights(config.questions.kinds))


def test_each_scenario_says_proposed_kept_short_and_blind(rows):
    chosen = choose(rows)
    found = {(one.split, one.scenario): one for one in tally(rows, guess(rows, chosen, 0))}
    assert set(found) == {(split, scenario) for split in ("train", "bench") for scenario in SCENARIOS}
    for (split, scenario), one in found.items():
        ours = [row for row in rows if row["split"] == split and row["question_type"] == scenario]
        kept = [row for row in ours if row["id"] in chosen]
        assert (one.proposed, one.kept) == (len(ours), len(kept))
        if scenario == DIRECTION:
            label, count = one.short.split(", ")[0].split(": ")
            assert int(count) == sum(row["label"] == label for row in ours) <= len(ours) / 20
        if kept:
            figures = baselines(kept, 0, "question_type")[scenario]
            best = max(value for name, value in figures.items() if name not in NO_GUESSER)
            assert (one.accuracy, one.chance) == (best, figures["chance"])
            assert one.noise == pytest.approx(2 * math.sqrt(one.chance * (1 - one.chance) / len(kept)))
            assert split == "bench" or best <= one.chance + 0.03
    lines = table(list(found.values())).splitlines()
    one = found["train", "object_absolute_distance"]
    line = next(text for text in lines if text.startswith("train object_absolute_distance ")).split()
    assert line[2:4] == [str(one.proposed), str(one.kept)] and one.short in " ".join(line)
    assert line[4:6] == [f"{one.accuracy:.3f}", "0.250"] and one.guesser in line
    kept = sum(row["id"] in chosen for row in rows if row["split"] == "train")
    assert f"{kept}  {kept / sum(row['split'] == 'train' for row in rows):.0%} of the proposed" in lines[-2]


def test_a_scenario_of_which_nothing_can_be_kept_says_what_is_missing(rows, capsys):
    only = [row for row in rows if row["question_type"] != DIRECTION or row["label"] in ("forward", "right")]
    chosen = choose(only)
    kept = {row["question_type"] for row in only if row["id"] in chosen and row["split"] == "train"}
    assert kept == set(SCENARIOS) - {DIRECTION}  # the others do not go with it
    one = next(one for one in tally(only, guess(only, chosen, 0)) if one.scenario == DIRECTION)
    assert one.kept == 0 and one.short == "left: 0, down: 0, up: 0, backward: 0"
    assert "left: 0, down: 0, up: 0, backward: 0" in table([one])
    bench = [row for row in only if row["split"] == "train" or row["question_type"] == DIRECTION]
    assert choose(bench) == {name for name in chosen if any(r["id"] == name for r in only if r["split"] == "train")}
    assert "no held-out questions: preset bench wants some questions" in capsys.readouterr().out
    with pytest.raises(BalanceError, match="preset bench wants 60 questions"):
        choose(bench, bench_total=60)


def test_a_total_is_reached_with_others_in_the_place_of_what_is_screened_out(rows):
    chosen = choose(rows, total=140)
    assert sum(row["id"] in chosen for row in rows if row["split"] == "train") == 140


def test_slack_and_stretch_are_those_of_the_config(rows):
    def count(**values) -> int:
        chosen = choose(rows, **values)
        return sum(row["id"] in chosen for row in rows if row["split"] == "train")

    assert (
        count(balance__slack=0.0, balance__stretch=1.0)
        < count(balance__slack=0.0)
        < count()
        < count(balance__slack=0.1)
    )


def test_kinds_are_asked_about_and_shared_by_weight(rows):
    chosen = choose(rows, questions__kinds=("object_absolute_distance=3", "camera_absolute_distance"), total=80)
    sizes = [sum(row["id"] in chosen for row in rows if row["question_type"] == name and row["split"] == "train")
             for name in ("object_absolute_distance", "camera_absolute_distance")]  # fmt: skip
    assert sizes == [60, 20] and all(
        row["question_type"].endswith("_absolute_distance") for row in rows if row["id"] in chosen
    )


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("camera_direction",), "no scenario 'camera_direction' - did you mean 'camera_relative_direction'"),
        ((f"{DIRECTION}=0",), "needs a weight above 0 and up to 1000, not '0'"),
        ((f"{DIRECTION}=much",), "needs a weight above 0 and up to 1000, not 'much'"),
        ((f"{DIRECTION}=nan",), "not 'nan'"),
        ((DIRECTION, f"{DIRECTION}=2"), "is there twice"),
        ((3,), "no scenario '3'"),
    ],
)
def test_kinds_that_cannot_be_read_are_refused(kinds, message):
    with pytest.raises(KindError, match=message):
        kind_weights(kinds)


def test_the_config_reaches_the_rules():
    assert question_rules(common.config("curate")) == QuestionRules()  # one default, stated in both places
    changed = {
        "num_frames": 9, "per_clip": 5, "pairs": 7, "min_gap": 0.2, "min_points": 6, "min_motion": 0.3,
        "dominance": 2.0, "tau": 0.4, "margin": 0.2,
    }  # fmt: skip
    config = common.config("curate", {f"questions.{name}": value for name, value in changed.items()})
    assert question_rules(config) == QuestionRules(**changed)
    with pytest.raises(KindError, match=r"margin = 0.3 must be below questions.tau = 0.25"):
        question_rules(common.config("curate", {"questions.margin": 0.3}))
