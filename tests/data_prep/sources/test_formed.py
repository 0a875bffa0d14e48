"""Curation with other forms of each clip: their videos show what their records are about."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs import common
from data_prep import curate
from data_prep.curate import CurateError
from mllm4d_jax.media.decode_pool import DecodePool
from mllm4d_jax.media.frame_sampling import SampleRule


def run(workdir, **values) -> int:
    settings = {"synthetic.clips": 8, "preset": "all", "bench_share": 0.0, **values}
    return curate.run(common.config("curate", settings), str(workdir))


def test_every_form_has_its_video_and_questions_of_its_own(tmp_path, capsys):
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        assert run(folder, forms=("mirrored", "backwards"), workers=workers) == 0
        assert f"media root: {folder / 'forms'}" in capsys.readouterr().out
    records = json.loads((tmp_path / "1/train.json").read_text())
    assert records == json.loads((tmp_path / "2/train.json").read_text())
    names = {record["video"] for record in records}
    assert {name.partition("%40")[2] for name in names if "%40" in name} == {"mirrored.mp4", "backwards.mp4"}
    pool, every = DecodePool(60.0), SampleRule("uniform", 100, None)
    folder = tmp_path / "1/forms"
    plain = sorted(path for path in folder.iterdir() if "%40" not in path.name)
    assert len(plain) == 8 and len(list(folder.iterdir())) == 24
    for path in plain[:3]:
        frames = pool.read(str(path), every).frames.astype(int)
        for form, shown in (("mirrored", frames[:, :, ::-1]), ("backwards", frames[::-1])):
            found = pool.read(str(folder / f"{path.stem}%40{form}.mp4"), every).frames.astype(int)
            assert found.shape == shown.shape and np.abs(found - shown).mean() < 6
            assert np.abs(found - frames).mean() > 2 * np.abs(found - shown).mean()
    assert {(folder / name).is_file() for name in names} == {True}
    sources = [json.loads(line) for line in (tmp_path / "1/train_r1.jsonl").read_text().splitlines()]
    assert len({record["source_id"] for record in sources}) <= 8


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"forms": ("mirrord",)}, "'mirrord'.*mirrored, backwards, mirrored_backwards"),
        ({"forms": ("mirrored", "mirrored")}, "a name twice"),
        ({"forms": ("mirrored",), "bench_share": 0.2}, "bench_share = 0.2 is not supported"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, values, told):
    with pytest.raises(CurateError, match=told):
        run(tmp_path, **values)
