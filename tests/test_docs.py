"""README.md and the pages of docs/: commands are accepted by the program they start, what they name exists, messages
that they quote are the code's. `tools/check_docs.py` runs the commands as well.
"""

from __future__ import annotations

import ast
import re
import shlex

import pytest

import run
from configs import common, reading
from configs.reading import ROOT
from configs.tables.shared import VIDEO_KEYS
from mllm4d_jax.grpo import settings
from mllm4d_jax.parallel.topology import PLANNED
from mllm4d_jax.plan.job import Lengths
from mllm4d_jax.plan.task import MEMORY
from mllm4d_jax.run import preflight
from tools import check_docs, make_checkpoint, record_reference

PAGES = check_docs.page_files()
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
BLOCKS = [block for page in PAGES for block in check_docs.blocks(page)]
COMMANDS = [part.strip() for block in BLOCKS for line in block.text.splitlines() for part in line.split("&&")]
RUNS = sorted({c for c in COMMANDS if c.startswith("python run.py")})


def test_there_are_commands():
    assert len(RUNS) >= 12 and {"pytest -n 2", "pip install -r requirements.txt"} <= set(COMMANDS)


@pytest.mark.parametrize("command", RUNS)
def test_run_commands_are_accepted(command, capsys):
    assert run.main([*shlex.split(command)[1:], "--help"]) == 0
    assert "error" not in capsys.readouterr().err


def test_flags_of_the_check_are_accepted_too(capsys):
    for block in BLOCKS:
        for line in block.script.splitlines():
            if block.flags and line.startswith("python run.py"):
                assert run.main([*shlex.split(line)[1:], "--help"]) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page):
    text = TEXTS[page]
    named = set(re.findall(r"(?<![\w/])(?:configs|tools|tests|benchmarks|data_prep|mllm4d_jax)/[\w/]+\.\w+", text))
    named |= set(re.findall(r"requirements[\w-]*\.txt", text))
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_of_pages_outside_the_site_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))
    assert len(links) >= 2
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


def test_pages_that_are_made_of_another_file_link_to_it_for_readers_of_the_repository():
    made = {page: re.findall(r'^--8<-- "(.+)"', text, re.M) for page, text in TEXTS.items()}
    assert sum(map(len, made.values())) == 2
    for page, names in made.items():
        linked = [(page.parent / link).resolve() for link in re.findall(r'href="([^"]+)"', TEXTS[page])]
        assert [ROOT / name for name in names] == linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_keys_of_flags_exist(page):
    known = {key.name for task in common.TASKS.values() for key in task.keys}
    assert set(re.findall(r"--config\.([a-z][\w.]*)=", TEXTS[page])) <= known


def test_every_key_of_frames_is_described():
    text = "\n".join(TEXTS.values())
    assert not [key.name for key in VIDEO_KEYS if f"`{key.name}`" not in text]


@pytest.mark.parametrize("where", ["help", "page"])
def test_all_that_plan_takes_is_said(where):
    text = TEXTS[ROOT / "docs/train/plans.md"] if where == "page" else reading.overview()
    lengths = {f"{name}=" for task in ("sft", "grpo") for name in Lengths.names(task)}
    said = {*PLANNED, MEMORY, "v5e:4x4+", "h100:8", *lengths}
    assert len(said) >= 13 and not [word for word in said if word not in text]


def test_lengths_of_plans_without_a_word_are_those_of_the_page():
    rows = re.findall(r"^\| `(\w+)=` \|.*\| (\d+) \|$", TEXTS[ROOT / "docs/train/plans.md"], re.M)
    assert {name: int(tokens) for name, tokens in rows} == vars(Lengths())


def test_each_kind_of_bad_input_names_tests_that_show_it():
    rows = [line for line in TEXTS[ROOT / "docs/data/bad_input.md"].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 50
    for row in rows:
        files = re.findall(r"`([\w/]+\.py)`", row.split("|")[-2])
        assert files and all(name.startswith("tests/") and (ROOT / name).is_file() for name in files), row


def test_every_page_is_in_the_navigation():
    assert set(PAGES) == {ROOT / "README.md", *(ROOT / "docs").rglob("*.md")}


def test_readme_stays_short():
    assert len(TEXTS[ROOT / "README.md"].splitlines()) < 150


def test_the_config_example_works(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", TEXTS[ROOT / "docs/first_steps.md"], re.M | re.S)
    (tmp_path / "my_run.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    assert run.main(["run.py", "--config=my_run.py", "--help"]) == 0
    assert "train.steps = 2000" in capsys.readouterr().out


def test_the_reward_example_works(tmp_path, monkeypatch):
    page = TEXTS[ROOT / "docs/train/grpo.md"]
    (example,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    (flag,) = re.findall(r'`--(config\.reward\.functions="[^`]+")`', page)
    (tmp_path / "my_rewards.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    config = common.config("grpo", {"reward.functions": ast.literal_eval(flag.split("=")[1].strip('"'))})
    rewards, solution = settings.rewards_of(config), {"answer": "A"}
    short = rewards("<thinking>left</thinking><answer>A</answer>", solution, {})
    assert short["my_rewards:brief"] == 1 and short["total"] == pytest.approx(0.8 * short["paper"] + 0.2)
    assert rewards("word " * 400, solution, {})["my_rewards:brief"] == 0.5


def test_the_pixels_of_the_papers_reinforcement_can_be_set():
    (row,) = [line for line in TEXTS[ROOT / "docs/deviations.md"].splitlines() if "602,112" in line]
    (flags,) = re.findall(r"`(--config[^`]+)`", row)
    asked, rest = run.split_flags(["run.py", "--config=configs/grpo.py", *shlex.split(flags)])
    loaded = reading.load_config(asked.config)
    config = run.override(loaded.config, loaded.keys, rest)
    assert config.video.max_pixels == 602112
    visual = config.video.num_frames // 2 * (config.video.max_pixels // 32**2)
    assert f"{visual:,}" in row and common.config("grpo").data.max_tokens < visual < config.data.max_tokens
    longest = config.data.max_tokens
    assert not list(preflight.bucket_problems("data.prefix_buckets", config.data.prefix_buckets, "", longest))


@pytest.mark.parametrize("module", [record_reference, make_checkpoint], ids=lambda module: module.__name__)
def test_options_of_tools_exist(module, capsys):
    with pytest.raises(SystemExit):
        module.main(["", "--help"])
    known = capsys.readouterr().out
    name = f"tools/{module.__name__.rpartition('.')[2]}.py"
    used = [option for command in COMMANDS if name in command for option in re.findall(r"--\w+", command)]
    assert used and all(option in known for option in used)


def test_messages_that_the_faq_quotes_are_in_the_code(tmp_path):
    assert check_docs.absent_messages(ROOT / "docs/faq.md") == []
    page = tmp_path / "faq.md"
    page.write_text("> `another run is writing to …: …. Wait for it, end it, or use another planet`\n")
    assert len(check_docs.absent_messages(page)) == 1


@pytest.mark.parametrize("marker", ["", "<!-- check: sometimes -->\n", "<!-- check: elsewhere -->\n"])
def test_a_block_says_what_is_done_with_it(marker, tmp_path, monkeypatch):
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{marker}```bash\ntrue\n```\n")
    with pytest.raises(check_docs.DocsError, match=r"page\.md:\d+: commands need"):
        list(check_docs.blocks(page))


def test_blocks_run_in_the_folder_and_failures_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check_docs, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- check: fast -->\n```bash\ntrue && echo here > made.txt\n```\n"
        "1. in a list\n\n   <!-- check: fast -->\n   ```bash\n   cat made.txt\n   false\n   true\n   ```\n"
        "<!-- check: slow -->\n```bash\nfalse\n```\n"
    )
    first, second, third = check_docs.blocks(page)
    assert [check_docs.done(block, tmp_path, slow=False) for block in (first, second, third)] == [True, False, True]
    captured = capsys.readouterr()
    assert "FAILED    page.md:9" in captured.out and "not run   page.md:15: slow" in captured.out
    assert "here" in captured.err
    assert not check_docs.done(third, tmp_path, slow=True)


def test_flags_of_a_block_stand_behind_each_command_and_before_what_sends_it_to_the_background():
    text = "export A=1\nA=1 python run.py --config=a.py &\npython run.py --config=b.py\npython run.py\nwait\n"
    block = check_docs.CodeBlock(ROOT / "README.md", 1, "slow", "", "--config.x=2", text)
    assert block.script.splitlines() == [
        "export A=1",
        "A=1 python run.py --config=a.py --config.x=2 &",
        "python run.py --config=b.py --config.x=2",
        "python run.py --config.x=2",
        "wait",
    ]
