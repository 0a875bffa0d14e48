"""The curate task end to end: rendered clips to record files, the same bytes for any number of workers."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import tensorflow_datasets as tfds

from configs import common
from data_prep import curate
from data_prep.questions.balance import BalanceError
from data_prep.questions.propose import QuestionRules
from data_prep.scenes.scene import load_scene
from data_prep.sources.base import LoadedClip
from data_prep.store.export import check_result
from data_prep.store.parts import StoreError
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.qa.rewards import score
from tests.data_prep.scenes.random_scenes import random_scene

ROOT = Path(__file__).resolve().parents[2]
FILES = ("train.json", "train_r1.jsonl", "bench.json", "rejected.jsonl", "chosen.json", "manifest.json", "report.html")

CLIPS = 60


def run(workdir, **values) -> int:
    return curate.run(common.config("curate", {"synthetic.clips": CLIPS, "bench_share": 0.4, **values}), str(workdir))


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


def test_four_workers_and_a_second_run_give_the_same_bytes(made, tmp_path):
    assert run(tmp_path, workers=4) == 0
    first = {name: (tmp_path / name).read_bytes() for name in FILES}
    assert first == {name: (made / name).read_bytes() for name in FILES}
    assert run(tmp_path) == 0  # nothing left to do
    assert first == {name: (tmp_path / name).read_bytes() for name in FILES}


def test_stereo4d_files_are_read_and_damaged_clips_are_rejected_with_their_reason(made, tmp_path, capsys):
    clips = made / "clips"
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
    reasons = {r["clip_id"]: r["reason"] for r in rejected if not r["reason"].startswith("object_")}
    assert reasons == {stems[0]: "bad_scene", stems[1]: "missing_file"}
    assert all({"object_id", "caption"} <= r.keys() for r in rejected if r["reason"].startswith("object_"))
    records = json.loads((tmp_path / "out" / "train.json").read_text())
    assert records and all((folder / r["video"]).is_file() for r in records)
    # What is mended is tried again, and nothing else.
    for path in (damaged, alone):
        path.unlink(missing_ok=True)
        path.symlink_to(clips / path.name)
    capsys.readouterr()
    assert run(tmp_path / "out", source="stereo4d", input=str(folder)) == 0
    assert "2 clips done now" in capsys.readouterr().out
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert not [r for r in rejected if r["reason"] in ("bad_scene", "missing_file")]


def test_where_nothing_can_be_asked_the_reasons_are_written(made, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    (folder / "a.npz").write_bytes(b"not an npz")
    with pytest.raises(curate.CurateError, match=r'could be asked: \{"missing_file": 1\}.*rejected.jsonl'):
        run(tmp_path / "out", source="stereo4d", input=str(folder))
    (line,) = (json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert line["clip_id"] == "a" and "-left_rectified.mp4" in line["detail"]


def test_what_is_chosen_may_change_without_asking_anew(made, tmp_path, capsys):
    clips = str(made / "clips")
    with pytest.raises(BalanceError, match="ask for fewer"):
        run(tmp_path, source="stereo4d", input=clips, total=100_000)
    assert run(tmp_path, source="stereo4d", input=clips, total=14) == 0
    assert "0 clips done now" in capsys.readouterr().out
    assert json.loads((tmp_path / "manifest.json").read_text())["config"]["total"] == 14
    assert len(json.loads((tmp_path / "train.json").read_text())) <= 14
    assert run(tmp_path, source="stereo4d", input=clips, preset="all", **{"balance.slack": 0.5}) == 0
    config = json.loads((tmp_path / "manifest.json").read_text())["config"]
    assert config["preset"] == "all" and config["balance"]["slack"] == 0.5


def test_a_video_that_is_damaged_inside_ends_neither_records_nor_report(made, tmp_path, capsys):
    """Its packets are all there, so that it is found only when its frames are decoded."""
    folder = tmp_path / "input"
    folder.mkdir()
    for file in (made / "clips").iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    for video in folder.glob("*-left_rectified.mp4"):
        content = bytearray(video.read_bytes())
        with av.open(io.BytesIO(bytes(content))) as opened:
            for packet in [packet for packet in opened.demux(video=0) if packet.size][4:]:
                content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
        video.unlink()
        video.write_bytes(content)
    settings = {"source": "stereo4d", "input": str(folder), "preset": "all", "tfds.write": True, "report.clips": 2}
    with pytest.raises(StoreError, match="cannot be decoded.*Mend its video, or take its files out"):
        run(tmp_path / "out", **settings)
    assert capsys.readouterr().out.count("is not shown, and cannot be trained on") == 2
    assert (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "train.json").exists()


@dataclasses.dataclass(frozen=True)
class OneClip:
    """A source of one clip that is there already."""

    clip: LoadedClip
    root: Path = Path("/media")

    def load(self, clip_id: str) -> LoadedClip:
        return self.clip


def test_every_object_without_a_question_has_a_line_of_its_own():
    scene = random_scene(3, objects=3)
    names = ("a red box moving left", "walking", "<b>")
    objects = tuple(
        dataclasses.replace(o, description=name, category="") for o, name in zip(scene.objects, names, strict=True)
    )
    scene = dataclasses.replace(scene, objects=objects)
    left_out = ({"reason": "object_dropped", "object_id": "x", "detail": "x: never in view"},)

    def ask(scene, **rules):
        clip = LoadedClip(scene, Path("/media/a.mp4"), left_out)
        result = curate.ask_clip(OneClip(clip), QuestionRules(**rules), 0, 0.1, scene.clip_id)
        check_result(result)
        return result, [(line["reason"], line.get("object_id")) for line in result.rejected]

    unnamed = [("object_unnamed", "object1"), ("object_unnamed", "object2")]
    result, lines = ask(scene)
    assert lines == [("object_dropped", "x"), *unnamed]
    assert {row["object_id"] for row in result.rows} == {"", "object0"}
    assert result.rejected[1]["caption"] == "walking" and "names no thing" in result.rejected[1]["detail"]
    # A clip without questions lists its objects, too.
    result, lines = ask(scene, min_points=10_000, min_motion=1e6, options="independent", tau=1e6)
    assert {row["question_type"] for row in result.rows} <= {"camera_absolute_distance"}
    assert [line for line in lines if line[1]] == [("object_dropped", "x"), ("object_unasked", "object0"), *unnamed]
    poses = np.repeat(scene.camera_to_world[:1], scene.num_frames, axis=0)
    still = dataclasses.replace(scene, camera_to_world=poses, world_to_camera=None)
    result, lines = ask(still, min_points=10_000)
    assert (
        not result.rows and lines[0] == ("no_questions", None) and set(lines[1:]) > {("object_dropped", "x"), *unnamed}
    )
    result, lines = ask(dataclasses.replace(scene, scale="relative"))
    assert not result.rows and lines == [("relative_scale", None), ("object_dropped", "x")]


def test_a_workdir_does_not_mix_the_results_of_two_inputs(made, tmp_path):
    clips = made / "clips"
    assert run(tmp_path / "out", source="stereo4d", input=str(clips)) == 0
    with pytest.raises(StoreError, match="another seed or config"):
        run(tmp_path / "out", source="stereo4d", input=f"{clips}/../clips")


@pytest.mark.parametrize(
    ("source", "message"),
    [("stereo4d", "Stereo4D annotations"), ("stereo", "-right.mp4"), ("monocular", "-spatialtracker.npz")],
)
def test_no_clips_is_an_error_that_says_what_is_expected(tmp_path, source, message):
    with pytest.raises(curate.CurateError, match=message):
        run(tmp_path, source=source, input=str(tmp_path))
    with pytest.raises(curate.CurateError, match="input is not set"):
        run(tmp_path, source=source)


def test_both_layouts_hold_the_same_questions(made):
    plain = json.loads((made / "train.json").read_text())
    released = [json.loads(line) for line in (made / "train_r1.jsonl").read_text().splitlines()]
    assert [r["id"] for r in plain] == [r["id"] for r in released]
    for conversation, r1 in zip(plain, released, strict=True):
        assert conversation["conversations"][-1]["value"] == r1["solution"][0]["answer"]
        assert [conversation["video"]] == r1["videos"]


def test_the_dataset_holds_the_chosen_questions_with_their_frames(made, tmp_path):
    assert run(tmp_path, **{"tfds.write": True, "tfds.clips_per_shard": 8}) == 0
    builder = tfds.builder_from_directory(tmp_path / "tfds" / "mllm4d" / "1.0.0")
    for split, name in (("train", "train.json"), ("bench", "bench.json")):
        source = builder.as_data_source(split)
        rows = [row_id.decode() for i in range(len(source)) for row_id in source[i]["questions"]["id"]]
        assert sorted(rows) == sorted(r["id"] for r in json.loads((made / name).read_text()))
        assert all(len(source[i]["frames"]) == 16 for i in range(len(source)))


def test_stereo_videos_alone_through_the_whole_command(tmp_path):
    clips = {"synthetic.clips": 5, "synthetic.height": 256, "synthetic.width": 256, "synthetic.frames": 6}
    rig = {"synthetic.stereo": True, "synthetic.baseline": 0.1, "synthetic.fov": 55.0}
    assert run(tmp_path / "made", **clips, **rig, **{"bench_share": 0.0, "report.clips": 0}) == 0
    folder = tmp_path / "made" / "clips"
    for file in [p for p in folder.glob("*.npz") if not p.stem.endswith("-masks")]:
        file.unlink()  # poses and tracks
    out = tmp_path / "out"
    assert run(out, source="stereo", input=str(folder), bench_share=0.0, preset="all") == 0
    for kept in sorted((out / "scenes").iterdir()):  # metres are those of the world: the cards say baseline and lens
        truth, found = load_scene(folder / f"{kept.name}-truth"), load_scene(kept)
        np.testing.assert_allclose(found.intrinsics, truth.intrinsics, rtol=1e-12)
        travelled = [np.linalg.norm(one.camera_centers[-1] - one.camera_centers[0]) for one in (truth, found)]
        assert found.source_id == truth.source_id and abs(travelled[1] - travelled[0]) < 0.03 + 0.05 * travelled[0]
    records = json.loads((out / "train.json").read_text())
    assert len(records) > 10 and all((folder / r["video"]).is_file() for r in records)
    page = (out / "report.html").read_text()
    assert (
        "valid disparity" in page and ">metric<" in page
    )  # the scale is text; figures that are missing are said to be


def test_cold_start_data_is_made_from_a_curation_and_read_by_the_trainer(made, tmp_path):
    config = {"source": "cold_start", "cold_start.records": str(made / "train_r1.jsonl"), "cold_start.total": 0}
    assert curate.run(common.config("curate", config), str(tmp_path)) == 0
    records = RecordFile(tmp_path / "cold_start.json", made)
    assert len(records) > 20
    for i in range(len(records)):
        system, user, assistant = records[i].messages
        assert system["role"] == "system" and user["content"][0]["type"] == "video"
        assert score(assistant["content"], {"answer": assistant["content"][-10]})["tags"] == 1.0


def test_a_run_that_is_killed_again_and_again_loses_no_clip_and_makes_none_twice(made, tmp_path):
    """kill -9 of the whole command at five moments of its progress; then it ends as if nothing had happened."""
    command = [sys.executable, "run.py", "--config=configs/curate.py:synthetic", f"--workdir={tmp_path}"]
    command += [f"--config.synthetic.clips={CLIPS}", "--config.bench_share=0.4", "--config.workers=2"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    for enough in (1, 9, 20, 33, 50):
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
        while process.poll() is None and len(list(tmp_path.glob("parts/*.json"))) < enough:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)  # its workers too, as when a machine dies
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    assert len(list(tmp_path.glob("parts/*.json"))) == CLIPS
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == {n: (made / n).read_bytes() for n in FILES}
