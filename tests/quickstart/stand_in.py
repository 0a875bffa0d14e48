"""Stands in for run.py in tests of the quickstart: leaves what each task leaves, in no time, and can go wrong."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import sys
import time

EXAMINATIONS = 8


def main(flags: list[str]) -> int:
    """Do a stage. STAND_IN says for some, as `STAGE=WHAT,...`, to fail, to end early, or to wait: for a signal, or for
    all other examinations to begin. `*` stands for all examinations that are not named."""
    given = dict(flag.lstrip("-").split("=", 1) for flag in flags)
    folder = pathlib.Path(given["workdir"])
    asked = dict(one.split("=") for one in os.environ.get("STAND_IN", "").split(",") if one)
    what = asked.get(folder.name, asked.get("*", "") if folder.name.startswith("eval_") else "")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "started.txt").open("a") as file:
        file.write(f"{folder.name}\n")
    if what == "fail":
        print("error: no such luck")
        return 1
    if what == "leave":
        return 0
    if what == "meet":
        (folder / "here").touch()
        while len(list(folder.parent.glob("eval_*/here"))) < EXAMINATIONS:
            time.sleep(0.01)
    if what in ("wait", "hang"):
        wait(folder, what == "hang")
        return 0
    name = given["config"].partition("/")[2].partition(".py")[0]
    if name == "curate":
        (folder / "train.json").write_text(given["config"])
        (folder / "manifest.json").write_text(json.dumps({"files": {"train.json": {}}}))
        (folder / "clips").mkdir(exist_ok=True)
        (folder / "bench.json").write_text("[{}]")
    elif name == "export":
        output = pathlib.Path(given["config.output"])
        output.mkdir()
        for file in ("config.json", "model.safetensors"):
            (output / file).write_text("{}")
    elif name == "eval":
        (folder / "predictions.jsonl").write_text("{}\n")
        (folder / "results.json").write_text("{}")
    else:
        (folder / "metrics.jsonl").write_text('{"step": 1, "step_s": 2.0}\n')
        checkpoint = folder / "checkpoints" / given.get("config.train.steps", "2")
        checkpoint.mkdir(parents=True)
        (checkpoint / "digests.json").write_text(f"{time.time()}")
    return 0


def wait(folder: pathlib.Path, on: bool) -> None:
    """Wait until interrupted, and say that it was; then go `on` waiting."""
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(True))
    (folder / "waiting").touch()
    while not asked:
        time.sleep(0.01)
    (folder / "interrupted").touch()
    while on:
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
