"""The infer task on a real file in every step, with a tiny random checkpoint."""

from __future__ import annotations

import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from configs import common
from mllm4d_jax.eval import infer
from mllm4d_jax.files.storage import StorageError
from mllm4d_jax.run.tiny import write_tiny_model
from tests.report.reading import assert_nothing_external, read


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(folder, ["What moves? The camera moves to the left."])
    return folder


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10.0, (96, 64))
    noise = np.random.default_rng(0).integers(0, 255, (64, 160, 3), np.uint8)
    for i in range(12):
        writer.write(np.ascontiguousarray(noise[:, 4 * i : 4 * i + 96]))
    writer.release()
    return path


def run(model, **values) -> int:
    given = {"model.path": str(model), "question": "What moves?", "model.dtype": "float32", "max_new_tokens": 20}
    return infer.run(common.config("infer", given | values), "unused")


def test_answers_a_video(model, video, capfd):
    assert run(model, clip=str(video)) == 0
    first = capfd.readouterr()
    assert "patch grids video 6x4x6" in first.err and "36 visual" in first.err
    assert "tokens/s" in first.err and "generated 20 (stopped at max_new_tokens = 20)" in first.err
    run(model, clip=str(video))
    assert capfd.readouterr().out == first.out  # greedy is deterministic


def test_sampling_follows_the_seed(model, video, capfd):
    outputs = []
    for seed in (1, 1, 2):
        run(model, clip=str(video), temperature=1.0, seed=seed)
        outputs.append(capfd.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_a_thinking_model_goes_on_with_an_opened_thought(model, video, capfd, tmp_path):
    run(model, clip=str(video))
    plain = capfd.readouterr()
    folder = tmp_path / "thinking"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    template = Path(__file__).parents[1] / "encode/templates/thinking.jinja"
    (folder / "chat_template.jinja").write_text(template.read_text())
    run(folder, clip=str(video))
    found = capfd.readouterr()
    assert found.out.startswith("<think>\n") and not plain.out.startswith("<think>")
    assert prompt_tokens(found.err) == prompt_tokens(plain.err) + 2
    run(model, clip=str(video), **{"model.chat_template": "thinking"})
    assert capfd.readouterr().out == found.out
    run(folder, clip=str(video), **{"model.chat_template": "instruct"})
    assert capfd.readouterr().out == plain.out


def prompt_tokens(text):
    return int(text.split("prompt tokens ")[1].split()[0])


def test_an_image_with_a_system_prompt_from_a_file(model, tmp_path, capfd):
    image, prompt = tmp_path / "image.png", tmp_path / "system.txt"
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8))
    run(model, image=str(image))
    plain = capfd.readouterr().err
    prompt.write_text("You are terse.\n")
    run(model, image=str(image), **{"prompt.mode": "file", "prompt.file": str(prompt)})
    with_system = capfd.readouterr().err
    assert prompt_tokens(with_system) > prompt_tokens(plain)


def typed(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"".join(line + b"\n" for line in lines))))


def test_questions_of_a_file_and_of_a_pipe_are_answered_alike_and_shown(model, video, tmp_path, capfd, monkeypatch):
    asked, page = ["What moves?", "Does the camera move? | yes | no"], tmp_path / "pages/page.html"
    (tmp_path / "q.txt").write_text("\n\n".join(asked))
    assert run(model, clip=str(video), question="", questions=str(tmp_path / "q.txt"), page=str(page)) == 0
    found = capfd.readouterr().out
    assert found.startswith("> What moves?\n") and "\n\n> Does the camera move?\n" in found
    html = page.read_text()
    root = read(html)
    assert_nothing_external(html)
    assert [e.text for e in root.all("article")[1].all("li")][:2] == ["A. yes", "B. no"]
    assert [e.text for e in root.all("div", "film")[0].all("figcaption")] == [f"{n / 10:.2f} s" for n in range(12)]
    # The pipe has a line between them that is no question, and ends in one that is no text.
    typed(monkeypatch, b"", asked[0].encode(), b"Which? | one", asked[1].encode(), b"\xff?")
    assert run(model, clip=str(video), question="") == 1
    again = capfd.readouterr()
    assert again.out == found
    assert "error: line 3: it has the options ['one']" in again.err and "error: line 5: the question holds" in again.err


def test_a_record_is_shown_beside_its_truth(model, video, tmp_path, capfd):
    solution = {"answer": "B", "camera_center": [[0, 0, 0], [1, 0, 2]], "object_center": [None, None]}
    text = "<video>Which way?\nA. left\nB. right"
    row = {"messages": [{"role": "user", "content": text}], "videos": ["clip.mp4"], "solution": solution}
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    page, record = tmp_path / "page.html", {"record": f"{tmp_path}/r.jsonl:0", "data.root": str(video.parent)}
    assert run(model, question="", page=str(page), **record, **{"prompt.mode": "st_cot"}) == 0
    card = read(page.read_text()).all("article")[0]
    assert [e.text for e in card.all("li", "good")] == ["B. right ✓"]
    assert "there is no <thinking> block" in card.text and "it ends at max_new_tokens = 20" in card.text
    assert [e.text for e in card.all("figcaption")] == ["Centres from above", "Centres from the side"]
    with pytest.raises(ValueError, match=r"config.record has a clip of its own"):
        run(model, clip=str(video), **record)


@pytest.mark.parametrize("place", ["file/page.html", "folder", "/proc/page.html"])
def test_a_page_that_cannot_be_written_is_said_before_anything_is_done(video, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=str(tmp_path / place)):
        run("no model", clip=str(video), page=str(tmp_path / place))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(model="", clip="x.mp4"), "model.path = '' is not a model folder"),
        (dict(question="  ", clip="x.mp4"), "config.question is empty"),
        (dict(), "nothing to look at"),
        (dict(clip="missing.mp4"), "missing.mp4"),
        (dict(clip="x.mp4", **{"prompt.mode": "file", "prompt.file": "missing.txt"}), "missing.txt cannot be read"),
        (dict(clip="x.mp4", **{"prompt.file": "x.txt"}), "mode 'file' and a file go together"),
        (dict(clip="x.mp4", question=""), "there is no question"),
        (dict(clip="x.mp4", question="Which? | one"), "config.question: it has the options"),
        (dict(record="none.json:0"), "none.json:0: no such file of records"),
    ],
)
def test_refusals_say_what_to_do(model, values, message):
    with pytest.raises(ValueError, match=message):
        run(**{"model": model, **values})
