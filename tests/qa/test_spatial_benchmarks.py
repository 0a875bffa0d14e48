"""Public benchmarks of spatial reasoning: their rows in every form, their prompts, and what is wrong with a row."""

from __future__ import annotations

import math

import pytest

from mllm4d_jax.qa.benchmarks import PARSERS
from mllm4d_jax.qa.errors import RecordError
from mllm4d_jax.qa.questions import BenchmarkQuestion
from tests.eval.public_benchmarks import DISTANCES, dsr_row, mmsi_entry, sti_row, vsi_row


def parse(benchmark, raw, root=None) -> BenchmarkQuestion:
    return PARSERS[benchmark](raw, "test-00000-of-00001", "test.parquet#3", root)


def test_vsi_choices():
    one = parse("vsi", vsi_row(7, "object_rel_distance", "C"))
    assert (one.id, one.split, one.category, one.subtask) == ("7", "test", "object_rel_distance", "object_rel_distance")
    assert (one.video, one.media, one.truth, one.true_number) == ("scannet/scene0.mp4", None, ("C",), None)
    assert one.choices == {"A": "sofa", "B": "table", "C": "lamp", "D": "door"}
    # pre-prompt, question, "Options:", the options and post-prompt, a line each, as in the benchmark's program
    assert one.direct_prompt == (
        "<video>\nThese are frames of a video.\nQuestion 7?\nOptions:\nA. sofa\nB. table\nC. lamp\nD. door\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert one.direct_prompt.startswith(one.prompt + "\n") and "directly" not in one.prompt
    hard = parse("vsi", vsi_row(8, "object_rel_direction_hard", "B"))
    assert (hard.category, hard.subtask) == ("object_rel_direction_hard", "object_rel_direction")


def test_vsi_numbers():
    one = parse("vsi", vsi_row(9, "room_size_estimation", "23.5"))
    assert (dict(one.choices), one.truth, one.true_number, one.answer) == ({}, (), 23.5, "23.5")
    assert one.direct_prompt == (
        "<video>\nThese are frames of a video.\nQuestion 9?\nPlease answer the question using a single word or phrase."
    )


def test_vsi_rows_of_vlmevalkit():
    row = {"index": "12", "video": "arkitscenes/4.mp4", "question_type": "object_rel_distance", "question": "Which?"}
    one = parse("vsi", row | {"candidates": str(DISTANCES), "answer": "D"})
    assert (one.id, one.video, one.truth, one.choices["D"]) == ("12", "arkitscenes/4.mp4", ("D",), "door")
    number = parse("vsi", row | {"question_type": "object_counting", "candidates": math.nan, "answer": "4"})
    assert number.true_number == 4


def test_sti():
    one = parse("sti", sti_row(5))
    assert (one.id, one.category, one.subtask) == ("test.parquet#3", "Pose Estimation", "desktop")
    assert one.direct_prompt == (
        "<video>\nFrom 0 s to 12.5 s. How far?\n(A) 1 m\n(B) 2 m\n(C) 3 m\n(D) 4 m\n(E) 5 m\n"
        "Please output only the option letter!"
    )
    assert one.truth == ("B",) and one.span is None
    written = parse("sti", sti_row(5, Candidates='{"A": "1 m", "B": "2 m", "C": null}', Scene="Outdoor"))
    assert dict(written.choices) == {"A": "1 m", "B": "2 m"} and written.subtask == "outdoor"
    row = {"index": "3", "video": "scene1.mp4", "question": "How far?", "time_start": "1", "time_end": "2"}
    listed = parse("sti", row | {"options": "['1 m', '2 m']", "answer": "A", "task_type": "Spatial Relation"})
    assert (listed.id, listed.subtask, dict(listed.choices)) == ("3", "indoor", {"A": "1 m", "B": "2 m"})
    assert parse("sti", sti_row(1, Video="x_camera_2.mp4")).subtask == "outdoor"
    assert parse("sti", sti_row(1, Video="x.mp4")).subtask == "unknown"


def test_dsr():
    one = parse("dsr", dsr_row())
    assert (one.id, one.video, one.category) == ("test.parquet#3", "abc_1.2.mp4", "rel_dis")
    assert one.direct_prompt == (
        "These are the frames of a video. Select the best answer to the following multiple-choice question based on "
        "the video. Respond with only the letter (A, B, C, or D) of the correct option.\n<video>\nQuestion: Between "
        "1.0s and 2.0s, how does it change?\nA. nearer\nB. farther\nC. both\nD. neither\nAnswer:"
    )
    assert "Respond with only" not in one.prompt and "Answer:" not in one.prompt
    assert parse("dsr", dsr_row(videoID=None, video="a.webm")).video == "a.webm"


def test_mmsi_video(tmp_path):
    one = parse("mmsi_video", mmsi_entry(), str(tmp_path))
    assert (one.id, one.video, one.category, one.truth) == ("question_0001", "clip0.mp4", "Planning", ("B",))
    assert one.direct_prompt == (
        "You see clips.\nClips: <video><video>\nWhere is <image>?\nA. here\nB. there\nAnswer with a letter."
    )
    assert one.prompt + "Answer with a letter." == one.direct_prompt
    names = {kind: [path.removeprefix(f"{tmp_path}/") for path in paths] for kind, paths in one.files.items()}
    assert names == {"video": ["videos/clip0.mp4", "videos/clip1.mp4"], "image": ["ref_images/a.jpg"]}
    assert parse("mmsi_video", mmsi_entry()).files is None
    lacking = parse("mmsi_video", mmsi_entry(ori_question=None, format_prompt=None))
    assert lacking.question == mmsi_entry()["user_prompt"].strip() and lacking.prompt == lacking.direct_prompt


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        ("vsi", vsi_row(1, "object_mass", "4"), "'question_type' must be one of object_rel_direction_easy"),
        ("vsi", vsi_row(1, "object_counting", "0"), "must be a number above 0"),
        ("vsi", vsi_row(1, "object_counting", "four"), "must be a number above 0"),
        ("vsi", vsi_row(1, "object_counting", "inf"), "must be a number above 0"),
        ("vsi", vsi_row(1, "object_counting", None), "must be a number above 0"),
        ("vsi", vsi_row(1, "object_rel_distance", "E"), "which is none of the options"),
        ("vsi", vsi_row(1, "object_rel_distance", "A", options=None), "'options' must be a list"),
        ("vsi", vsi_row(1, "object_rel_distance", "A", options="[A, B"), "'options' must be a list"),
        ("vsi", vsi_row(1, "object_rel_distance", "A", options=["x", None, "y"]), "an option is null"),
        ("vsi", vsi_row(1, "object_rel_distance", "A", options="(" * 9000), "'options' must be a list"),
        ("vsi", vsi_row(1, "object_rel_distance", "A", options=["A. x", "C. y"]), r"have the letters \['A', 'C'\]"),
        ("vsi", vsi_row(1, "object_rel_distance", "A", options=["A. x", "y"]), r"have the letters \['A'\]"),
        ("vsi", vsi_row(1, "object_rel_distance", "A", question="Which <image>?"), "placeholder for a file"),
        ("vsi", vsi_row(1, "object_rel_distance", "A", scene_name=None), "'scene_name' must be a text"),
        ("sti", sti_row(1, time_end="later"), "'time_end' must be a number of seconds"),
        ("sti", sti_row(1, Candidates=None), "'Candidates' must be a list"),
        ("dsr", dsr_row(options=[]), "two options or more"),
        ("dsr", dsr_row(answer=None), "which is none of the options"),
        ("dsr", dsr_row(videoID=None), "'videoID' must be a text"),
        ("mmsi_video", mmsi_entry(ref_images=[]), "1 <image> for 0 file"),
        ("mmsi_video", mmsi_entry(video_list=[]), "'video_list' must be a list of objects"),
        ("mmsi_video", mmsi_entry(options=None), "'options' must be a list"),
    ],
)
def test_what_is_wrong_is_said(benchmark, row, message):
    with pytest.raises(RecordError, match=message):
        parse(benchmark, row)


@pytest.mark.parametrize(
    ("benchmark", "row"),
    [
        ("vsi", vsi_row(1, "object_counting", "4", scene_name="../../secret")),
        ("sti", sti_row(1, Video="/etc/passwd")),
        ("dsr", dsr_row(videoID="../x")),
        ("mmsi_video", mmsi_entry(ref_images=["../../x.jpg"])),
    ],
)
def test_no_path_leaves_the_root(tmp_path, benchmark, row):
    with pytest.raises(RecordError, match="leaves the media root"):
        parse(benchmark, row, str(tmp_path))
