"""Runs the commands of README.md and docs/, and finds the messages that docs/faq.md quotes in the code.

python tools/check_docs.py [--slow] [--keep=DIR] [FILE.md ...]

A line before each block of commands says what is done with it:

    <!-- check: fast -->                             run always
    <!-- check: slow -->                             run with --slow: minutes, or a fresh environment
    <!-- check: elsewhere, needs a TPU -->           not run, for the reason that follows
    <!-- check: slow + --config.train.steps=2 -->    run with these flags after every `python run.py`

A block without such a line is an error. Commands run in the order of the pages, in a folder that has the repository's
files and small stand-ins for what a user brings: a tiny random model for the published weights, a clip, records of the
sample world for the released files. So a page's command is run as it stands, on other content.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

_BLOCK = re.compile(
    r"(?:^[ ]*<!-- check: (?P<check>.*?) -->\n)?^(?P<indent> *)```bash\n(?P<text>.*?)^(?P=indent)```", re.M | re.S
)
_QUOTE = re.compile(r"^> `(.*)`$", re.M)
_NOT_SHARED = {".git", "runs", "weights", "site", ".venv"}


class DocsError(ValueError):
    """A page that does not hold."""


@dataclasses.dataclass(frozen=True)
class CodeBlock:
    """Commands of a page.

    Attributes:
      page: its file; line: of the first command, from 1.
      check: "fast", "slow" or "elsewhere"; reason: why elsewhere.
      flags: put after every `python run.py`.
      text: the commands.
    """

    page: Path
    line: int
    check: str
    reason: str
    flags: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def script(self) -> str:
        return re.sub(r"(python run\.py(?: .*?)?)( &)?$", rf"\1 {self.flags}\2", self.text, flags=re.M)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slow", action="store_true", help="run the slow blocks too")
    parser.add_argument("--keep", default="", help="run in this new folder and leave it")
    parser.add_argument("pages", nargs="*", help="only these pages")
    args = parser.parse_args(argv)
    pages = [Path(page).resolve() for page in args.pages] or page_files()
    try:
        todo = [block for page in pages for block in blocks(page)]
        missing = absent_messages(ROOT / "docs/faq.md")
    except DocsError as problem:
        print(problem, file=sys.stderr)
        return 1
    for message in missing:
        print(f"docs/faq.md quotes what no code says: {message}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.keep or scratch)
        furnish(folder)
        failed = [block for block in todo if not done(block, folder, args.slow)]
    print(f"{len(todo)} blocks, {len(failed)} failed; {len(missing)} messages not found")
    return 1 if failed or missing else 0


def page_files() -> list[Path]:
    """Return README.md and the pages of docs/ in the order of the navigation."""
    listed = re.findall(r"^\s*- ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    return [ROOT / "README.md", *(ROOT / "docs" / name for name in listed)]


def blocks(page: Path) -> Iterator[CodeBlock]:
    """Read the blocks of commands of a page. Raises DocsError for one that does not say what is to be done with it."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        check, _, flags = (match["check"] or "").partition(" + ")
        kind, _, reason = check.partition(", ")
        if kind not in ("fast", "slow", "elsewhere") or (kind == "elsewhere" and not reason):
            raise DocsError(
                f"{page.relative_to(ROOT)}:{line}: commands need a line <!-- check: fast -->, <!-- check: slow --> or "
                "<!-- check: elsewhere, REASON --> before them"
            )
        commands = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        yield CodeBlock(page, line, kind, reason, flags, commands)


def done(block: CodeBlock, folder: Path, slow: bool) -> bool:
    """Run a block, or say why not; returns whether it went well."""
    if block.check == "elsewhere" or (block.check == "slow" and not slow):
        print(f"not run   {block.place}: {block.reason or 'slow'}", flush=True)
        return True
    start = time.monotonic()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    script = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.script],
        cwd=folder,
        env=os.environ | {"PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    well = script.returncode == 0
    print(f"{'ran' if well else 'FAILED':9} {block.place}: {time.monotonic() - start:.0f} s", flush=True)
    if not well:
        print(block.script + "\n" + script.stdout[-4000:], file=sys.stderr, flush=True)
    return well


def furnish(folder: Path) -> None:
    """Fill a folder with the repository's files and with stand-ins for weights, clips and the released record files."""
    from data_prep.sample import write_sample_world
    from tools import make_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    for entry in sorted(ROOT.iterdir()):
        if entry.name not in _NOT_SHARED:
            (folder / entry.name).symlink_to(entry)
    for name in ("Qwen3-VL-8B-Instruct",):
        make_checkpoint.main(["", "--size=tiny", f"--out={folder / 'weights' / name}"])
    world = folder / "runs" / "stand-in"
    write_sample_world(world)
    shutil.copytree(world / "videos", folder / "videos")
    shutil.copy(next((folder / "videos").glob("*.mp4")), folder / "clip.mp4")
    for source, name in (("records", "MLLM4D-2M"), ("cold_start", "MLLM4D-Cold-Start-Data")):
        (folder / f"{name}.json").write_text(_below_videos((world / f"{source}.json").read_text(encoding="utf-8")))
    prompts = _below_videos((world / "r1.jsonl").read_text(encoding="utf-8"))
    (folder / "MLLM4D-R1-30k.jsonl").write_text(prompts)


def _below_videos(text: str) -> str:
    """Records whose media root is videos/ itself, as the released files' is."""
    return text.replace('"videos/', '"')


def absent_messages(page: Path) -> list[str]:
    """Return the quoted messages of a page that no string of the code holds, piece by piece between the "…"."""
    texts = list(code_strings())
    quoted = _QUOTE.findall(page.read_text(encoding="utf-8"))
    if not quoted:
        raise DocsError(f"{page}: it quotes no message")
    return [message for message in quoted if not any(_holds(text, message) for text in texts)]


def _holds(text: str, message: str) -> bool:
    pieces = [re.escape(piece) for piece in message.split("…")]
    return re.search(".*".join(pieces), text, re.S) is not None


def code_strings() -> Iterator[str]:
    """Yield the strings of the program; what an f-string fills in is "…"."""
    files = [
        ROOT / "run.py",
        *(f for room in ("mllm4d_jax", "data_prep", "configs") for f in (ROOT / room).rglob("*.py")),
    ]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
