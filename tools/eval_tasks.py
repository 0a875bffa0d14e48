"""Writes task files with which lmms-eval and VLMEvalKit score a benchmark as strictly as this project does.

python tools/eval_tasks.py --benchmark=vlm4d --data=QA --videos=VIDEOS --out=DIR

DIR then has `lmms_eval/`, for `python -m lmms_eval --include_path DIR/lmms_eval --tasks NAME`, and `vlmevalkit/`, for
`python DIR/vlmevalkit/run.py --data NAME_32frame` in a checkout of VLMEvalKit. NAME is the benchmark's with `_strict`
behind it. The files hold this project's own rules as text: neither needs this project to be installed.
"""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mllm4d_jax.data.json_index import RecordFileError
from mllm4d_jax.eval.asking import Manner
from mllm4d_jax.eval.questions import BenchmarkError, load_benchmark
from mllm4d_jax.eval.scoring import MACRO
from mllm4d_jax.files.atomic import write_atomic
from mllm4d_jax.files.storage import StorageError, storing
from mllm4d_jax.qa.questions import BenchmarkQuestion

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ("vlm4d", "mllm4d")
_RULES = ("mllm4d_jax/qa/reasoning.py", "mllm4d_jax/qa/answers.py")
_TASKS = "tools/task_files"
_HEAD = "# Written by tools/eval_tasks.py of mllm4d-jax: change it there, and write it anew.\n"
_MAX_NEW_TOKENS = 64  # as of configs/eval.py
_COLUMNS = ("index", "id", "video", "question", "messages", "choices", "truth", "split", "subtask", "macro")


class TaskFileError(ValueError):
    """Task files cannot be made."""


def write_tasks(benchmark: str, data: str, videos: str, out: str | Path) -> str:
    """Write the files for both programs, and return the task's name.

    Args:
      benchmark: one of `BENCHMARKS`; data: its question files; videos: the folder of its videos.

    Raises:
      TaskFileError: a question that neither program can ask; BenchmarkError, RecordFileError: the questions.
      StorageError: the files cannot be written there.
    """
    questions = load_benchmark(benchmark, data, videos)
    parts = [question.id for question in questions if question.span is not None]
    if parts:
        raise TaskFileError(
            f"{len(parts)} questions are about a part of a video, which VLMEvalKit cannot show: " + parts[0]
        )
    if not questions:
        raise TaskFileError(f"{data} holds no questions")
    name, out = f"{benchmark}_strict", Path(out)
    rows = [_row(n, question) for n, question in enumerate(questions)]
    texts = {
        "lmms_eval/utils.py": bundled([*_RULES, f"{_TASKS}/lmms_eval_task.py"]),
        f"lmms_eval/{name}.jsonl": "".join(json.dumps(_doc(row, rows), ensure_ascii=False) + "\n" for row in rows),
        f"lmms_eval/{name}.yaml": _yaml(name, (out / f"lmms_eval/{name}.jsonl").resolve(), _doc(rows[0], rows), rows),
        "vlmevalkit/strict_video_mcq.py": bundled([*_RULES, f"{_TASKS}/vlmevalkit_dataset.py"]),
        "vlmevalkit/run.py": _HEAD + (ROOT / _TASKS / "vlmevalkit_run.py").read_text(encoding="utf-8"),
        f"vlmevalkit/{name}.tsv": _table(rows),
    }
    with storing(out):
        for file, text in texts.items():
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(out / file, text.encode())
    return name


def bundled(files: Sequence[str]) -> str:
    """Return the text of one module that holds several of this project's, which then import nothing of each other.

    Raises:
      TaskFileError: two of them define the same name.
    """
    imports, bodies, owner = set(), [], {}
    for file in files:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        tree, gone = ast.parse("\n".join(lines)), set()
        for node in tree.body:
            dropped = isinstance(node, ast.Import | ast.ImportFrom) or node is tree.body[0]  # the module's docstring
            gone.update(range(node.lineno, node.end_lineno + 1) if dropped else ())
            if isinstance(node, ast.Import | ast.ImportFrom) and not _is_ours(node):
                imports.add(ast.unparse(node))
            for name in _defined(node):
                if owner.setdefault(name, file) != file:
                    raise TaskFileError(f"{file} and {owner[name]} both define {name}")
        body = "\n".join(line for n, line in enumerate(lines, 1) if n not in gone)
        bodies.append(f"# From {file}.\n\n{body.strip()}\n")
    imports.discard("from __future__ import annotations")  # data classes need it gone where a loader runs the text
    docstring = ast.get_docstring(ast.parse((ROOT / files[-1]).read_text(encoding="utf-8")))
    head = f'{_HEAD}"""{docstring}"""\n\n' + "\n".join(sorted(imports))
    return "\n\n\n".join([head, *bodies])


def _is_ours(node: ast.Import | ast.ImportFrom) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mllm4d_jax")


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _row(n: int, question: BenchmarkQuestion) -> dict[str, Any]:
    """A question as plain values; what is no text or number is JSON."""
    asked, video = Manner("direct", None, blind=False).record(question), ""
    messages = []
    for message in asked.messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        video = next((part["path"] for part in parts if part["type"] == "video"), video)
        shown = [{name: part[name] for name in ("type", "text") if name in part} for part in parts]
        messages.append({"role": message["role"], "content": shown})
    values = {"messages": messages, "choices": dict(question.choices), "truth": list(question.truth)}
    return {
        "index": n,
        "id": question.id,
        "video": video,
        "question": question.question,
        **{name: json.dumps(value, ensure_ascii=False) for name, value in values.items()},
        "split": question.split,
        "subtask": question.subtask or "",
        "macro": int(question.benchmark in MACRO),
    }


def _doc(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row for lmms-eval, with the metrics that it counts for."""
    metrics = ["accuracy", "unparsed"]
    metrics += [f"accuracy_{row['split']}"] if len({other["split"] for other in rows}) > 1 else []
    metrics += ["mean_over_subtasks"] if row["macro"] else []
    return {**row, "truth": json.loads(row["truth"]), "metrics": metrics}


def _yaml(name: str, docs: Path, first: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The task; JSON is YAML, but for the functions that are named."""
    metrics = dict.fromkeys(metric for row in rows for metric in _doc(row, rows)["metrics"])
    listed = [
        f"  - metric: {metric}\n"
        f"    aggregation: {'!function utils.mean_over_subtasks' if metric == 'mean_over_subtasks' else 'mean'}\n"
        f"    higher_is_better: {'false' if metric == 'unparsed' else 'true'}\n"
        for metric in metrics
    ]
    functions = ("doc_to_visual", "doc_to_text", "doc_to_messages", "process_results")
    return (
        f"{_HEAD}task: {name}\ndataset_path: json\n"
        f"dataset_kwargs: {json.dumps({'data_files': {'test': str(docs)}})}\n"
        "test_split: test\noutput_type: generate_until\n"
        + "".join(f"{function}: !function utils.{function}\n" for function in functions)
        + f"doc_to_target: truth\ngeneration_kwargs: {json.dumps(_GENERATION)}\nmetric_list:\n"
        + "".join(listed)
        + "metadata:\n  version: 1\n"
    )


_GENERATION = {"max_new_tokens": _MAX_NEW_TOKENS, "temperature": 0, "do_sample": False}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files that the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    parser.add_argument("--data", required=True, help="file with the questions, or a folder of such files")
    parser.add_argument("--videos", required=True, help="folder of the videos")
    parser.add_argument("--out", required=True, help="folder to write")
    flags = parser.parse_args(argv)
    try:
        name = write_tasks(flags.benchmark, flags.data, flags.videos, flags.out)
    except (TaskFileError, BenchmarkError, RecordFileError, StorageError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    print(f"{flags.out}/lmms_eval and {flags.out}/vlmevalkit: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
