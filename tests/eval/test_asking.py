"""How questions are asked: their conversations, and who asks which."""

from __future__ import annotations

import pytest

from configs import common
from mllm4d_jax.eval import evaluate
from mllm4d_jax.eval.asking import ItemSource, Manner, share_of_host
from mllm4d_jax.eval.evaluate import EvaluationError
from mllm4d_jax.eval.questions import load_benchmark
from mllm4d_jax.qa.options import INSTRUCTION
from mllm4d_jax.qa.system_prompt import ST_COT
from tests.eval.question_fixtures import item, write_rows


def test_manners(tmp_path):
    asked = item(media="/v/a.mp4")
    composed = "Where does it go?\nOptions:\nA. left\nB. right\nC. up\nD. down"

    def turns(config, one=asked):
        made = evaluate.manner_of(common.config("eval", config)).record(one)
        return [(m["role"], m["content"]) for m in made.messages]

    video = {"type": "video", "path": "/v/a.mp4"}
    direct = {"type": "text", "text": f"{composed}\n{INSTRUCTION}"}
    assert turns({}) == [("user", [video, direct])]
    assert turns({"control": "blind"}) == [("user", [direct])]
    (who, system), (_, parts) = turns({"prompt.mode": "st_cot"}, item(media="/v/a.mp4", system="Be brief."))
    assert (who, system, parts[1]["text"]) == ("system", ST_COT, composed)
    assert turns({}, item(media="/v/a.mp4", system="Be brief.", prompt="As it was: <video>."))[0] == (
        "system",
        "Be brief.",
    )
    file = tmp_path / "system.txt"
    file.write_text("Think first.\n")
    assert turns({"prompt.mode": "file", "prompt.file": str(file)})[0] == ("system", "Think first.")
    for wrong in ({"prompt.mode": "file"}, {"prompt.file": str(file)}):
        with pytest.raises(EvaluationError, match="mode 'file' and a file go together"):
            turns(wrong)


def test_parts_of_a_video_are_clips_of_their_own(tmp_path):
    plain = {"messages": [{"role": "user", "content": "<video>?\nA. x\nB. y"}], "videos": ["a.mp4"], "answer": "A"}
    parts = [{"video_end": 2}, {}, {"video_start": 1}, {"video_end": 2.0}]
    rows = [plain | part | {"id": str(n)} for n, part in enumerate(parts)]
    (tmp_path / "a.mp4").touch()
    items = load_benchmark("jsonl", write_rows(tmp_path, rows), str(tmp_path))
    source = ItemSource(items, Manner("direct", None, blind=False))
    assert source.clips.tolist() == [0, 1, 2, 0]
    spans = [source[n].messages[-1]["content"][0].get("span") for n in range(4)]
    assert spans == [(None, 2.0), None, (1.0, None), (None, 2.0)]
    assert share_of_host(items, (), 0, 1) == [(0, 3), (1,), (2,)]


def test_hosts_share_videos_whatever_is_done():
    items = [item(f"q{i}", video=f"{i % 5}.mp4") for i in range(13)]
    shares = [share_of_host(items, (), host, 3) for host in range(3)]
    assert shares[0] == [(0, 5, 10), (3, 8)] and sorted(i for s in shares for v in s for i in v) == list(range(13))
    assert share_of_host(items, {"q5", "q3", "q8"}, 0, 3) == [(0, 10)]
