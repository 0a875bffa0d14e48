"""Curated files as the release's programs read them, field by field; what each program does is said in words beside it.

They are: the loader of supervised fine-tuning (train.json, cold_start.json), ms-swift with the release's rewards
(train_r1.jsonl, loaded with Hugging Face datasets), and the evaluator with its judge (bench.json).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import PurePosixPath

import pytest

from data_prep import curate
from data_prep.cold_start import oracle
from data_prep.cold_start.r1_items import parse_item
from data_prep.cold_start.selection import record as cold_start_record
from data_prep.questions.propose import QuestionRules, propose
from data_prep.questions.scenarios import SCENARIOS
from data_prep.store.export import assemble, check_result
from data_prep.store.parts import ClipResult, PartStore
from mllm4d_jax.qa.benchmarks import PARSERS
from mllm4d_jax.qa.records import parse_record, unread_fields
from mllm4d_jax.qa.rewards import parse, score
from tests.data_prep.scenes.random_scenes import random_scene

SCENES = [random_scene(seed) for seed in range(36)]
SCALES = ("metric", "assumed_baseline")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder, question row by id): the files of two thirds of the scenes for training, the others for the bench."""
    folder = tmp_path_factory.mktemp("written")
    rows = {}
    with PartStore(folder / "work", seed=0, config={}) as store:
        for n, scene in enumerate(SCENES):
            object.__setattr__(scene, "scale", SCALES[n % 2])
            asked = tuple(q.record(f"clips/{scene.clip_id}.mp4") for q in propose(scene, QuestionRules(), n))
            result = ClipResult(scene.clip_id, scene.source_id, "train" if n % 3 else "bench", asked)
            check_result(result)
            store.write(result)
            rows |= {row["id"]: row for row in asked}
        assemble(store, [scene.clip_id for scene in SCENES], folder, curate.OUTPUTS)
    return folder, rows


@pytest.fixture(scope="module")
def train(written):
    return json.loads((written[0] / "train.json").read_text())


@pytest.fixture(scope="module")
def r1(written):
    return [json.loads(line) for line in (written[0] / "train_r1.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def bench(written):
    return json.loads((written[0] / "bench.json").read_text())


@pytest.fixture(scope="module")
def cold_start(r1):
    items = [parse_item(record, "record", "none") for record in r1[:80]]
    return [cold_start_record(item, oracle.compose(item, 0, seed=0), item.id) for item in items]


def sft_messages(record):
    """What the fine-tuning loader makes of a record: user and system are who they say, all others are the assistant;
    each <video> of the user takes the next file, and none may be left."""
    files = [record["video"]] if isinstance(record["video"], str) else list(record["video"])
    said = []
    for turn in record["conversations"]:
        role = turn["from"] if turn["from"] in ("user", "system") else "assistant"
        pieces = re.split("(<video>|<image>)", turn["value"]) if role == "user" else [turn["value"]]
        said.append(
            (role, [files.pop(0) if piece == "<video>" else piece.strip() for piece in pieces if piece.strip()])
        )
    assert not files, "a video that no placeholder takes ends the loader"
    return said


def test_sft_from_and_value(train, written):
    assert len(train) > 100
    for record in train:
        (asker, (video, text)), (answerer, (letter,)) = sft_messages(record)
        assert (asker, answerer) == ("user", "assistant")
        row = written[1][record["id"]]
        assert (video, letter) == (record["video"], row["answer"]) and text.startswith(row["question"])


def test_sft_reads_the_reasoning_after_its_system_message(cold_start):
    for record in cold_start:
        (first, _), (second, (video, _)), (third, (reply,)) = sft_messages(record)
        assert (first, second, third) == ("system", "user", "assistant") and video == record["video"]
        assert reply.endswith("</answer>")


def test_sft_video_and_the_fields_that_would_mean_something_else(train, cold_start):
    """Paths are joined to the data folder. "image" would be more files, "num_tokens" a length to pack by, and
    "data_path" is where the loader itself notes the folder."""
    for record in (*train, *cold_start):
        path = PurePosixPath(record["video"])
        assert not path.is_absolute() and ".." not in path.parts
        assert record.keys().isdisjoint({"image", "num_tokens", "data_path"})


def test_r1_messages_and_videos(r1):
    """ms-swift wants a user's turn that is not empty, then the assistant's by turns, and one file for each <video>."""
    for record in r1:
        (turn,) = record["messages"]
        assert turn["role"] == "user" and turn["content"].count("<video>") == len(record["videos"]) == 1
        assert all(isinstance(video, str) for video in record["videos"])


def test_r1_solution_answer(r1, written):
    """The accuracy reward is exact equality of the text in <answer> with the first solution's answer."""
    for record in r1:
        assert record["solution"][0]["answer"] == written[1][record["id"]]["answer"]


def release_centers(completion, kind):
    """The centres that the release finds in a completion: a bracket after "<Kind> Center:" without null in it."""
    found = re.findall(rf"{kind} Center:\s*(\[.*?\])", completion)
    return [json.loads(text) for text in found if "null" not in text.lower()]


@pytest.mark.parametrize(("kind", "field"), [("Camera", "camera_center"), ("Object", "object_center")])
def test_r1_solution_centers(r1, kind, field):
    """Its rewards leave out what is null, then want as many centres, of the same shape, near those of the solution;
    with none in the solution there must be none in the completion. Ours come to the same."""
    some = 0
    for record in r1:
        item = parse_item(record, "record", "none")
        said = release_centers(oracle.compose(item, 0, seed=0), kind)
        truth = [center for center in record["solution"][0].get(field, []) if center is not None]
        assert [len(center) for center in said] == [len(center) for center in truth]
        assert all(math.dist(a, b) < 1e-9 for a, b in zip(said, truth, strict=True))
        some += bool(truth)
    assert some == len(r1) if kind == "Camera" else 0 < some < len(r1)


def test_bench_question_type(bench):
    """The evaluator looks its prompts up by "multiple-choice" (or "open-ended") and stops at any other name."""
    assert len(bench) > 50 and {record["question_type"] for record in bench} == {"multiple-choice"}
    assert {record["category"] for record in bench} == set(SCENARIOS)


def test_bench_question_and_choices(bench, written):
    """The prompt is the question, then a line "A: text" for each choice in the file's order."""
    for record in bench:
        row = written[1][record["id"]]
        assert record["question"] == row["question"] and "Options" not in record["question"]
        assert list(record["choices"]) == list("ABCD"[: len(row["options"])]) and record["choices"] == row["options"]
        assert all(isinstance(text, str) and text for text in record["choices"].values())


def test_bench_answer_is_the_text_of_one_choice(bench, written):
    """The judge is shown the choices with their texts and the "Ground Truth Answer", and says which choice matches."""
    for record in bench:
        letters = [letter for letter, text in record["choices"].items() if text == record["answer"]]
        assert letters == [written[1][record["id"]]["answer"]]


def test_bench_id_video_and_the_field_it_writes(bench):
    """ "id" is printed, "video" opened as it is (relative to where it is started), and "response" is added."""
    assert len({record["id"] for record in bench}) == len(bench)
    assert all(isinstance(record["video"], str) and "response" not in record for record in bench)


def test_our_own_readers_see_the_same_questions(written, train, r1, bench, cold_start):
    rows = written[1]
    for record in bench:
        asked, row = PARSERS["mllm4d"](record, "bench", "k", None), rows[record["id"]]
        assert (asked.question, dict(asked.choices), asked.truth) == (row["question"], row["options"], (row["answer"],))
        assert (asked.category, asked.subtask, asked.split) == (row["question_type"], row["subtask"], "bench")
        assert asked.prompt == row["conversations"][0]["value"]
    for record in r1:
        item, row = parse_item(record, "k", "none"), rows[record["id"]]
        value = row["value"]
        assert item.value == (tuple(value) if isinstance(value, (list, tuple)) else value)
        assert (item.scenario, item.label, item.scale) == (row["question_type"], row["label"], row["scale"])
    for record in (*train, *r1, *bench, *cold_start):
        assert parse_record(record, "k", "/root").messages and not unread_fields(record)


def test_rewards_of_null_centres_are_those_of_none_at_all(r1):
    """Kinds without a centre are empty lists in the file; every completion scores as with null at both states."""
    asked = [record for record in r1 if not record["solution"][0]["object_center"]]
    assert asked
    lines = ("", "- Object Center: null\n", "- Object Center: [1, 2, 3]\n")
    for record in asked[:5]:
        full = record["solution"][0] | {"object_center": [None, None]}
        for objects in ((a, b) for a in lines for b in lines):
            text = "".join(f"- Camera Center: [0, 0, 0]\n{line}" for line in objects)
            text = f"<thinking>{text}</thinking><answer>A</answer>"
            assert parse(text).camera_centers
            for preset in ("paper", "release"):
                assert score(text, record["solution"], preset) == score(text, full, preset)


def test_every_record_says_how_far_its_metres_can_be_trusted(written, train, r1, bench, cold_start):
    scales = {scene.clip_id: scene.scale for scene in SCENES}
    for record in (*train, *r1, *bench, *cold_start):
        assert record["scale"] == scales[record["id"].rpartition(":")[0]]
    manifest = json.loads((written[0] / "manifest.json").read_text())
    for split, records in (("train", train), ("bench", bench)):
        counted = {scale: sum(record["scale"] == scale for record in records) for scale in SCALES}
        assert manifest["scales"][split] == counted and min(counted.values()) > 0


def types(value, path="record"):
    """(path, type) of a JSON value and of all in it, as the columns of a table have them."""
    if isinstance(value, list):
        yield path, "list"
        for item in value:
            yield from types(item, f"{path}[]")
    elif isinstance(value, dict):
        yield path, f"object of {sorted(value)}"
        for name, item in value.items():
            yield from types(item, f"{path}.{name}")
    else:
        yield path, type(value).__name__


@pytest.mark.parametrize("name", ["train", "r1", "bench", "cold_start"])
def test_a_field_has_one_type_in_every_record(name, request):
    found = {}
    for record in request.getfixturevalue(name):
        columns = {
            field: value for field, value in record.items() if field != "choices"
        }  # as many as there are options
        for path, kind in types(columns):
            assert found.setdefault(path, kind) == kind != "NoneType", path
    assert len(found) > 5


@pytest.mark.parametrize("name", ["train.json", "train_r1.jsonl", "bench.json"])
@pytest.mark.parametrize("chunksize", [10 << 20, 40_000])
def test_hugging_face_datasets_load_every_file_as_it_is(written, name, chunksize, tmp_path):
    """Datasets 3.6, 4.8 and 5.2 were tried; with small chunks the types of the first have to fit all others."""
    datasets = pytest.importorskip("datasets")
    file = str(written[0] / name)
    loaded = datasets.load_dataset("json", data_files=file, split="train", cache_dir=tmp_path, chunksize=chunksize)
    text = (written[0] / name).read_text()
    records = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    assert len(loaded) == len(records) > 50
    for got, record in zip(loaded, records, strict=True):
        if "choices" in got:  # a letter that a question does not have is null in the column
            got["choices"] = {letter: option for letter, option in got["choices"].items() if option is not None}
        # 3.6 reads the numbers of a list of records to 15 digits or so
        assert json.loads(json.dumps(got), parse_float=lambda digits: round(float(digits), 9)) == record
