"""The README's commands: every one of them is accepted by the program it starts, and every path it names exists."""

from __future__ import annotations

import re
import shlex

import pytest

import run
from configs import reading

README = (reading.ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [part.strip() for block in BLOCKS for line in block.splitlines() for part in line.split("&&")]
RUNS = [command for command in COMMANDS if command.startswith("python run.py")]


def test_there_are_commands():
    assert len(RUNS) >= 4 and {"pytest -n 2", "pip install -r requirements.txt"} <= set(COMMANDS)


@pytest.mark.parametrize("command", RUNS)
def test_run_commands_are_accepted(command, capsys):
    assert run.main([*shlex.split(command)[1:], "--help"]) == 0
    assert "error" not in capsys.readouterr().err


def test_files_it_names_exist():
    named = set(
        re.findall(
            r"(?:configs|tools|tests)/\w+\.py|requirements[\w-]*\.txt|(?:benchmarks/)?[A-Z]+\.md|LICENSE", README
        )
    )
    assert len(named) > 8
    assert not [name for name in named if not (reading.ROOT / name).is_file()]


def test_its_config_example_works(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_run.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    assert run.main(["run.py", "--config=my_run.py", "--help"]) == 0
    assert "train.steps = 2000" in capsys.readouterr().out


def test_its_options_of_the_recorder_exist(capsys):
    from tools import make_checkpoint, record_reference

    for module in (record_reference, make_checkpoint):
        name = f"tools/{module.__name__.rpartition('.')[2]}.py"
        with pytest.raises(SystemExit):
            module.main(["", "--help"])
        known = capsys.readouterr().out
        used = [option for command in COMMANDS if name in command for option in re.findall(r"--\w+", command)]
        assert used and all(option in known for option in used)
