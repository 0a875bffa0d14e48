"""Nobody has to listen to a run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TALKS = """
import os, sys
import run
def main(argv):
    for n in range(20000):
        print("line", n)
    sys.stdout.flush()
    print("seen to the end", file=sys.stderr, flush=True)
    os.write(3, b"done")
    return 0
run.main = main
sys.exit(run.run_program(sys.argv))
"""


def talk(tmp_path, redirection):
    """Run the program in a shell: its exit code, what it said on standard error, and whether it came to its end."""
    command = (
        f'( "{sys.executable}" -c "$TALKS" 3>{tmp_path}/done {redirection} ; echo $? > {tmp_path}/code ) | head -1'
    )
    env = {"TALKS": TALKS, "PATH": "/usr/bin:/bin"}
    found = subprocess.run(["sh", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    return int((tmp_path / "code").read_text()), found.stderr, (tmp_path / "done").read_text() == "done", found.stdout


@pytest.mark.parametrize("redirection", ["", "2>&1", ">&-", ">&- 2>&- <&-"])
def test_a_reader_that_goes_away_ends_nothing(tmp_path, redirection):
    """`| head` used to end a training with exit code 1 and no word."""
    code, said, done, read = talk(tmp_path, redirection)
    assert (code, done) == (0, True) and "Traceback" not in said
    if redirection == "":
        assert "standard output is lost (Broken pipe): going on without it" in said and "seen to the end" in said
    assert read == ("" if "-" in redirection else "line 0\n")


def test_output_on_a_full_disk_is_missed_in_the_end(tmp_path):
    code, said, done, _ = talk(tmp_path, ">/dev/full")
    assert (code, done) == (1, True) and "Traceback" not in said
    assert said.count("No space left on device") == 2 and "error: standard output: No space left" in said


def test_numbers_of_closed_outputs_are_not_given_to_files(tmp_path):
    """What a library prints would be written into them."""
    code = "import run, os, sys; run.guard_console(); print(os.open(os.devnull, 0), file=open(sys.argv[1], 'w'))"
    command = f'exec "{sys.executable}" -c "{code}" {tmp_path}/number >&- 2>&- <&-'
    subprocess.run(["sh", "-c", command], cwd=ROOT, timeout=60, check=True)
    assert int((tmp_path / "number").read_text()) > 2
