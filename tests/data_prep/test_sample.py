"""The sample world tells the truth: its answers against the exact scene, its files against each other."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import av
import numpy as np
import pytest

from data_prep import sample
from data_prep.questions.wording import ANCHORS
from data_prep.sample import RULES, WORLD, sample_clips, write_sample_world
from data_prep.scenes.relations import NOT_MOVING
from mllm4d_jax.data.record_file import RecordFile
from mllm4d_jax.qa.options import split_question
from mllm4d_jax.qa.rewards import score

SEED, CLIPS = 0, 3
TAU = 0.25  # metres below which the questions call a change no motion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sample_world(tmp_path_factory.mktemp("made") / "world", seed=SEED, clips=CLIPS).parent


@pytest.fixture(scope="module")
def clips():
    return list(itertools.islice(sample_clips(SEED), 6))


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def nearest(scene, track, camera_frame, frame):
    """Metres from the camera's place at one frame to the nearest point that is seen at another."""
    return float(np.nanmin(np.linalg.norm(track[frame] - scene.camera_to_world[camera_frame, :, 3], axis=-1)))


def answer_by_geometry(scene, question):
    """What is asked, worked out anew in float64 from the camera's path and the object's points: a label or metres."""
    i, j = question.source
    rotation, centers = scene.camera_to_world[i, :, :3], scene.camera_to_world[:, :, 3]
    if question.scenario.startswith("camera_"):
        move = centers[j] - centers[i]
        if question.scenario == "camera_absolute_distance":
            return float(np.linalg.norm(move))
        local = rotation.T @ move
        axis = int(np.abs(local).argmax())
        return (("right", "left"), ("down", "up"), ("forward", "backward"))[axis][int(local[axis] < 0)]
    track = next(o.points for o in scene.objects if o.object_id == question.object_id).astype(np.float64)
    if question.scenario == "object_camera_absolute_distance":
        return nearest(scene, track, i, j)
    if question.scenario == "object_camera_relative_distance":
        change = nearest(scene, track, j, j) - nearest(scene, track, i, i)
        return NOT_MOVING if abs(change) < TAU else ("farther" if change > 0 else "closer")
    move = np.nanmean(track[j] - track[i], axis=0)  # of the points that both frames show
    if question.scenario == "object_absolute_distance":
        return float(np.linalg.norm(move))
    local = rotation.T @ move
    lateral = question.scenario == "object_camera_lateral_direction"
    change, names = (local[0], ("right", "left")) if lateral else (local[2], ("farther", "closer"))
    return NOT_MOVING if abs(change) < TAU else names[int(change < 0)]


def test_answers_follow_from_the_exact_scene(clips):
    scenarios = Counter()
    for clip, asked in clips:
        assert clip.left.shape == (16, 64, 64, 3) and len(asked) == 4
        for question in asked:
            scenarios[question.scenario] += 1
            truth, chosen = answer_by_geometry(clip.scene, question), question.options["ABCD".index(question.answer)]
            if isinstance(truth, str):
                assert chosen == truth, question
            else:
                far = [abs(float(option) - truth) for option in question.options]
                assert chosen == question.options[int(np.argmin(far))], (truth, question)
                assert min(far) < 0.1, (truth, question)
    assert len(scenarios) == 7


def test_questions_count_the_frames_that_a_tiny_run_sees(clips):
    for _, asked in clips:
        for question in asked:
            assert question.count == 8 and 0 <= question.frames[0] < question.frames[1] < 8
            # Frames k of 8 of a clip of 16 are, both ends included, at 15 k / 7.
            seen = np.round(np.array(question.frames) * 15 / 7)
            np.testing.assert_allclose(question.source, seen, atol=0.5)
            i, j = question.frames
            said = [anchor.format(i=i, j=j, last=7) in question.text for anchor in ANCHORS]
            assert any(said) or f"at frame {j}" in question.text
        assert len({(q.scenario, q.object_id, q.frames) for q in asked}) == len(asked)


def test_letters_and_ranks_are_not_favoured():
    """Each letter and each rank about equally."""
    letters, ranks = Counter(), Counter()
    for _, asked in itertools.islice(sample_clips(11), 40):
        for question in asked:
            assert len(set(question.options)) == len(question.options) in (3, 4)
            if len(question.options) == 4:
                letters[question.answer] += 1
            if question.rank >= 0:
                ranks[question.rank] += 1
    # Of n draws with p = 1/4 the standard deviation is sqrt(3 n) / 4: four of them.
    for counts in (letters, ranks):
        n = counts.total()
        assert n > 40
        for k in "ABCD" if counts is letters else range(4):
            assert abs(counts[k] - n / 4) < 4 * np.sqrt(3 * n) / 4, counts


def test_the_files_are_of_one_world(folder, clips):
    """Each question in three forms; the reasoning comes to the solution's letter and earns the whole reward."""
    records = RecordFile(folder / "records.json", folder)
    asked, reasoned = (json.loads((folder / name).read_text()) for name in ("records.json", "cold_start.json"))
    prompts, questions = lines(folder / "r1.jsonl"), [q for _, several in clips[:CLIPS] for q in several]
    assert len(records) == len(asked) == len(reasoned) == len(prompts) == len(questions) == 4 * CLIPS
    for n, (question, record, prompt, taught) in enumerate(zip(questions, asked, prompts, reasoned, strict=True)):
        text = record["conversations"][0]["value"]
        assert prompt["messages"] == [{"role": "user", "content": text}]
        assert taught["conversations"][1]["value"] == text
        video = f"videos/clip_{n // 4:03d}.mp4"
        assert record["video"] == taught["video"] == video and prompt["videos"] == [video]
        said, options = split_question(text.removeprefix("<video>\n"))
        assert said == question.text and tuple(options.values()) == question.options
        assert record["conversations"][-1]["value"] == question.answer == prompt["solution"][0]["answer"]
        found = score(taught["conversations"][-1]["value"], prompt["solution"], "paper")
        # Centres with one decimal are within 0.05 sqrt(3) m of the solution's.
        assert found["accuracy"] == 1 and found["total"] > 0.97
    assert reasoned[0]["conversations"][0]["from"] == "system"


def test_videos_show_the_clips(folder, clips):
    for n, (clip, _) in enumerate(clips[:CLIPS]):
        with av.open(str(folder / f"videos/clip_{n:03d}.mp4")) as file:
            decoded = [(float(f.time), f.to_ndarray(format="rgb24")) for f in file.decode(video=0)]
        frames = np.array([frame for _, frame in decoded])
        assert frames.shape == clip.left.shape
        assert np.abs(frames.astype(int) - clip.left).mean() < 12  # lossy codec
        np.testing.assert_allclose([time for time, _ in decoded], np.arange(16) / WORLD.fps, atol=1e-3)


def test_the_same_arguments_give_the_same_bytes(folder, tmp_path):
    def content(place):
        return {p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*") if p.is_file()}

    again = write_sample_world(tmp_path / "b", seed=SEED, clips=CLIPS).parent
    assert content(again) == content(folder)
    other = write_sample_world(tmp_path / "c", seed=SEED + 1, clips=1)
    assert other.read_bytes() != (folder / "records.json").read_bytes()


def test_clips_about_which_too_little_is_clear_are_left_out(monkeypatch):
    propose, made = sample.propose, []

    def short_of_one(scene, rules, seed):
        made.append(scene.clip_id)
        return propose(scene, rules, seed)[: 3 if len(made) == 1 else None]

    monkeypatch.setattr(sample, "propose", short_of_one)
    clip, asked = next(sample_clips(SEED))
    assert len(asked) == RULES.per_clip and clip.scene.clip_id == made[-1] != made[0]
