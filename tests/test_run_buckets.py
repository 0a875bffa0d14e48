"""Command lines with places in a bucket: what is not supported or cannot be used is said before any work."""

from __future__ import annotations

import json

import pytest

import run
from mllm4d_jax.files import remote
from mllm4d_jax.qa.errors import ProcessorError
from mllm4d_jax.qa.system_prompt import resolve_system_prompt
from tests.buckets import BUCKET, put_folder

ROOT = f"gs://{BUCKET}/commands"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def said(capsys, *arguments: str) -> tuple[int, str]:
    code = run.main(["run.py", *arguments])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--config.lora.targets=('gs://b-b/a',)",), 2, "lora.targets = gs://b-b/a: this is not supported in a bucket"),
        (("--workdir=s3://b-b/a",), 1, "s3://b-b/a: only gs://BUCKET/... and local paths are supported"),
        (("--config.data.mixture=('/a::gs://none-such/a::1',)",), 1, "there is no bucket gs://none-such"),
        (("--workdir=gs://none-such/a",), 1, "error: gs://none-such/a: there is no bucket gs://none-such: correct the"),
    ],
)
def test_places_that_cannot_be_used(front, capsys, arguments, code, text):
    got = said(capsys, "--config=configs/sft.py:tiny", *arguments)
    assert got[0] == code and text in got[1] and got[1].count("\n") == 1, got


def test_a_plan_is_written_to_a_bucket(front, tiny_world, monkeypatch):
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "cpu")  # restored afterwards
    model = f"--config.model.path={tiny_world[0]}"
    assert run.main(["run.py", "--config=configs/sft.py:tiny", model, f"--workdir={ROOT}/plan", "--plan=memory"]) == 0
    assert remote.found(f"{ROOT}/plan").keys() == {"plan.md", "plan.json"}


@pytest.mark.parametrize(("status", "text"), [(403, "permission denied (403)"), (401, "no credentials are accepted")])
def test_a_bucket_that_may_not_be_read_or_written(front, capsys, status, text):
    for refused in (("GET", "POST"), ("POST",)):
        front.refuse = lambda method, name, refused=refused: status if method in refused else None
        got = said(capsys, "--config=configs/sft.py:tiny", f"--workdir={ROOT}/refused")
        assert got[0] == 1 and text in got[1] and f"{ROOT}/refused" in got[1] and got[1].count("\n") == 1, got
    front.reset()
    assert not remote.found(f"{ROOT}/refused")


def test_without_the_driver_the_error_names_it(capsys, monkeypatch):
    remote._driver.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    code, text = said(capsys, "--config=configs/sft.py:tiny", "--workdir=gs://b-b/a")
    assert code == 1 and "pip install -r requirements-cloud.txt" in text
    remote._driver.cache_clear()


def test_missing_places_are_all_in_one_error(front, capsys):
    keys = ("model.path", "data.path", "data.root", "model.adapter")
    arguments = [f"--config.{key}={ROOT}/none/{key}" for key in keys]
    code, text = said(capsys, "--config=configs/sft.py", f"--workdir={ROOT}/missing", *arguments)
    assert code == 1 and "this run cannot start yet" in text
    assert all(f"{ROOT}/none/{key}" in text for key in keys), text


def test_curation_in_a_bucket_makes_the_files_of_a_folder(front, capsys, tmp_path):
    more = ["--config.synthetic.clips=2", "--config.preset=all"]
    for place in (str(tmp_path / "here"), f"{ROOT}/curated"):
        assert run.main(["run.py", "--config=configs/curate.py:synthetic", f"--workdir={place}", *more]) == 0
    for name in ("train.json", "train_r1.jsonl", "rejected.jsonl", "run.json"):
        assert remote.place(f"{ROOT}/curated/{name}").read_bytes() == (tmp_path / "here" / name).read_bytes(), name
    assert f"media root: {ROOT}/curated" in capsys.readouterr().out
    rows = json.loads(remote.place(f"{ROOT}/curated/train.json").read_bytes())
    assert all(remote.is_file(f"{ROOT}/curated/{row['video']}") for row in rows) and rows
    reasoned = [tmp_path / "cold", f"{ROOT}/cold"]
    for root, place in zip((tmp_path / "here", f"{ROOT}/curated"), reasoned, strict=True):
        records = f"--config.cold_start.records={root}/train_r1.jsonl"
        assert run.main(["run.py", "--config=configs/curate.py:cold_start", records, f"--workdir={place}"]) == 0
    assert f"records: {ROOT}/cold/cold_start.json; media root: {ROOT}/curated" in capsys.readouterr().out
    for name in ("cold_start.json", "cold_start_rejected.jsonl", "manifest.json"):
        same = remote.place(f"{ROOT}/cold/{name}").read_bytes() == (tmp_path / "cold" / name).read_bytes()
        assert same, name
    none = (f"--config.cold_start.records={ROOT}/none.jsonl", f"--workdir={ROOT}/none")
    code, text = said(capsys, "--config=configs/curate.py:cold_start", *none)
    assert code == 1 and f"cold_start.records = {ROOT}/none.jsonl: there is no such file" in text
    code, text = said(capsys, "--config=configs/curate.py:describe", f"--config.input={ROOT}/curated")
    assert code == 1 and "is not supported in a bucket yet" in text


def test_a_report_of_a_run_in_a_bucket(front, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    rows = [{"step": n, "loss": 1.0 / n} for n in (1, 2, 3)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    there = put_folder(tmp_path / "run", "commands/report")
    remote.upload(f"{there}/checkpoints/1/large", b"not to be fetched")
    front.reset()
    assert run.main(["run.py", "--config=configs/report.py", f"--config.run={there}"]) == 0
    assert f"{there}/report.html (" in capsys.readouterr().out
    assert b"</html>" in remote.place(f"{there}/report.html").read_bytes()
    assert not [name for name in front.requests if "large" in name]


def test_a_system_prompt_in_a_bucket(front):
    remote.upload(f"{ROOT}/prompt.txt", b"Say\r\nA.\n")
    assert resolve_system_prompt(file=f"{ROOT}/prompt.txt") == "Say\nA."
    with pytest.raises(ProcessorError, match="commands/none.txt cannot be read"):
        resolve_system_prompt(file=f"{ROOT}/none.txt")
