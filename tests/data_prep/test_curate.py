"""The curate task end to end: rendered clips to record files, the same bytes for any number of workers."""

from __future__ import annotations

import json

import pytest

from configs import common
from configs.schema import build
from data_prep import curate
from data_prep.parts import ExportError
from mllm4d_jax.data.records import RecordFile

CLIPS = 60


def run(workdir, **values) -> int:
    return curate.run(build(common.CURATE_KEYS, {"synthetic.clips": CLIPS, "bench_share": 0.4, **values}), str(workdir))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curated")
    assert run(folder) == 0
    return folder


def test_records_read_back_and_videos_are_there(made):
    records = RecordFile(made / "train.json", made)
    assert len(records) > 20
    for i in range(len(records)):
        user, assistant = records[i].messages
        kinds = [part["type"] for part in user["content"]]
        assert kinds == ["video", "text"] and assistant["content"] in "ABCD"
        assert (made / records.raw(i)["video"]).is_file()


def test_splits_share_no_source_video_and_the_manifest_counts(made):
    train, bench = (json.loads((made / name).read_text()) for name in ("train.json", "bench.json"))
    assert bench and not {r["video"] for r in train} & {r["video"] for r in bench}
    manifest = json.loads((made / "manifest.json").read_text())
    assert sum(manifest["questions"]["train"].values()) == len(train)
    assert sum(manifest["questions"]["bench"].values()) == len(bench)
    assert manifest["files"]["train.json"]["records"] == len(train)


def test_two_workers_and_a_second_run_give_the_same_bytes(made, tmp_path):
    assert run(tmp_path, workers=2) == 0
    names = ("train.json", "bench.json", "rejected.jsonl", "manifest.json")
    first = {name: (tmp_path / name).read_bytes() for name in names}
    assert first == {name: (made / name).read_bytes() for name in names}
    assert run(tmp_path) == 0  # nothing left to do
    assert first == {name: (tmp_path / name).read_bytes() for name in names}


def test_stereo4d_files_are_read_and_damaged_clips_are_rejected_with_their_reason(made, tmp_path):
    clips = made / curate.CLIPS
    stems = sorted(p.stem for p in clips.glob("*.npz") if not p.stem.endswith("-masks"))
    folder = tmp_path / "input"
    folder.mkdir()
    for file in clips.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    damaged, alone = folder / f"{stems[0]}.npz", folder / f"{stems[1]}-captions.json"
    damaged.unlink()
    damaged.write_bytes(b"not an npz")
    alone.unlink()
    assert run(tmp_path / "out", source="stereo4d", input=str(folder)) == 0
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {r["clip_id"]: r["reason"] for r in rejected if r["reason"] != "object_dropped"}
    assert reasons == {stems[0]: "bad_scene", stems[1]: "missing_file"}
    records = json.loads((tmp_path / "out" / "train.json").read_text())
    assert records and all((folder / r["video"]).is_file() for r in records)


def test_a_workdir_does_not_mix_the_results_of_two_inputs(made, tmp_path):
    clips = made / curate.CLIPS
    assert run(tmp_path / "out", source="stereo4d", input=str(clips)) == 0
    with pytest.raises(ExportError, match="another seed or config"):
        run(tmp_path / "out", source="stereo4d", input=f"{clips}/../{curate.CLIPS}")


def test_no_clips_is_an_error_that_says_what_is_expected(tmp_path):
    with pytest.raises(curate.CurateError, match="holds no Stereo4D annotation files"):
        run(tmp_path, source="stereo4d", input=str(tmp_path))
