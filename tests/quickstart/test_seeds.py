"""Several seeds of reinforcement: their stages, and means over seeds on the same questions against hand computation."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.quickstart_seeds import LEARNED, SEED, Worth, averaged, base_of, difference, listed
from configs import common
from configs.tables.quickstart import BASE, BENCH, NEW_SEED
from configs.tables.quickstart_recipe import PRETRAINING_CLIPS
from mllm4d_jax.eval.statistics import mean
from mllm4d_jax.quickstart.done import QuickstartError, StageRecord, StageRecords
from mllm4d_jax.run.workdir import write_config


def test_every_seed_trains_anew_and_all_are_examined_on_the_same_new_worlds(tmp_path):
    found = {stage.name: stage for stage in listed(str(tmp_path), BASE, (4, 5), 300, 1400, 77, 2)}
    assert len({SEED, LEARNED, BENCH["seed"], PRETRAINING_CLIPS["seed"], NEW_SEED, 0}) == 6
    assert len(found) == 1 + 3 + 4 + 2 * (3 + 3) and len({stage.folder for stage in found.values()}) == len(found)
    bench = found["bench"].config()
    assert (bench.seed, bench.synthetic.clips, bench.bench_share) == (SEED, 1400, 1.0)
    worlds = found["worlds_rl"].config()
    assert (worlds.seed, worlds.synthetic.clips, worlds.bench_share) == (LEARNED, 300, 0.0)
    top = f"{tmp_path}/seeds"
    for name in ("grpo_without_st_4", "grpo_5"):
        assert found[name].values["data.path"] == f"{top}/questions_rl/train_r1.jsonl"
        assert found[name].values["model.adapter"] == f"{tmp_path}/cold_start"
    assert found["control_4"].values["data.path"] == f"{top}/reasoning_rl/cold_start.json"
    assert {found[name].values["data.root"] for name in ("grpo_4", "control_4")} == {f"{top}/questions_rl/forms"}
    for seed in (4, 5):
        assert found[f"grpo_{seed}"].config().seed == found[f"control_{seed}"].values["seed"] == seed
        assert found[f"grpo_without_st_{seed}"].config().train.steps == 77
        assert found[f"eval_grpo_{seed}"].values["model.adapter"] == f"{tmp_path}/seeds/grpo_{seed}"
    for name, stage in found.items():
        assert set(stage.inputs) <= set(found), "what is read from `seeds/` is made there"
        if name.startswith("eval_"):
            assert "bench" in stage.inputs
            assert stage.values["data.path"] == f"{tmp_path}/seeds/bench/bench.json"


def test_seeds_are_averaged_question_by_question():
    worlds = {"a": "1.mp4", "b": "1.mp4", "c": "2.mp4", "d": "3.mp4"}

    def measured(*values: float) -> Worth:
        known = {name: value for name, value in zip(worlds, values, strict=True) if value >= 0}
        return Worth(dict.fromkeys(("accuracy", "reward", "camera", "object"), known), worlds)

    whole = averaged([measured(0.0, 1.0, 0.5, 0.2), measured(1.0, 1.0, 0.0, -1.0)])
    assert whole.values["reward"] == {"a": 0.5, "b": 1.0, "c": 0.25}  # d is missing in one
    before = measured(0.25, 0.5, 0.5, 0.5)
    apart = difference(before, whole, "object")
    assert apart == mean([0.25, 0.5, -0.25], ["1.mp4", "1.mp4", "2.mp4"])
    assert apart.value == pytest.approx(np.mean([0.25, 0.5, -0.25]))


def test_they_go_on_from_the_base_of_a_finished_quickstart(tmp_path):
    with pytest.raises(QuickstartError, match="no finished cold start"):
        base_of(str(tmp_path))
    StageRecords(tmp_path).put("cold_start", StageRecord({}, {}, {"a": "b"}))
    (tmp_path / "cold_start").mkdir()
    write_config(tmp_path / "cold_start", common.config("sft", {"model.path": "runs/base"}))
    assert base_of(str(tmp_path)) == "runs/base"
