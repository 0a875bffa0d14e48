"""The infer task on a real file in every step, with a tiny random checkpoint."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from configs import common
from mllm4d_jax.eval import infer
from mllm4d_jax.run.tiny import write_tiny_model


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


def test_image_and_system_prompt_from_a_file(model, tmp_path, capfd):
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8))
    run(model, image=str(image))
    plain = capfd.readouterr().err
    prompt = tmp_path / "system.txt"
    prompt.write_text("You are terse.\n")
    run(model, image=str(image), system_file=str(prompt))
    with_system = capfd.readouterr().err
    assert prompt_tokens(with_system) > prompt_tokens(plain)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(model="", clip="x.mp4"), "model.path = '' is not a model folder"),
        (dict(question="  ", clip="x.mp4"), "config.question is empty"),
        (dict(), "nothing to look at"),
        (dict(clip="missing.mp4"), "missing.mp4"),
        (dict(clip="x.mp4", system_file="missing.txt"), "missing.txt cannot be read"),
    ],
)
def test_refusals_say_what_to_do(model, values, message):
    with pytest.raises(ValueError, match=message):
        run(**{"model": model, **values})
