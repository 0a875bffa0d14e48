"""Which form of prompts a folder asks for, and the Thinking form against renderings of the published template.

`thinking_prompts.json` was rendered by transformers 5.24 from the published Qwen3-VL Thinking template; `templates/`
holds templates of our own that write what the published ones do.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mllm4d_jax.encode.chat import render_chat, rendered_text
from mllm4d_jax.encode.chat_template import ChatForm, chat_form
from mllm4d_jax.encode.processor_config import ProcessorConfig
from mllm4d_jax.qa.errors import ProcessorError, RecordError
from mllm4d_jax.qa.records import Record
from tests.conftest import IDS
from tests.encode.decoding import in_process

HERE = Path(__file__).parent
CASES = json.loads((HERE / "thinking_prompts.json").read_text(encoding="utf-8"))
TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in (HERE / "templates").iterdir()}
THINKING, INSTRUCT = ChatForm(thinking=True), ChatForm()
HELPFUL = ChatForm("You are a helpful assistant.")
FORMS = {"thinking": THINKING, "instruct": INSTRUCT, "qwen2_5": HELPFUL}
ROLE, TURN = "'<|im_start|>' + m['role'] + '\\n' + ", "m['content'] + '<|im_end|>' + '\\n'"
CHATML = f"{{% for m in messages %}}{{{{ {ROLE}{TURN} }}}}{{% endfor %}}"
OPENING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
# As LLaMA-Factory writes them: the answer is opened right after each question, the default system prompt is set.
SET_SYSTEM = (
    "{% set system = 'Be brief.' %}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% endif %}{{ '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|im_start|>user\\n' + m['content'] + '<|im_end|>\\n<|im_start|>assistant\\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"
)


def form_of(template: str, folder: Path) -> ChatForm:
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return chat_form(folder, "qwen3_vl")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_thinking_prompts(case):
    flags = {"add_generation_prompt": case["add_generation_prompt"]}
    assert rendered_text(render_chat(case["messages"], "qwen3_vl", form=THINKING, **flags)) == case["text"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_our_templates_write_what_the_published_ones_do(name, golden):
    """What the tests below recognise are templates that do render these forms, by transformers' own rules."""
    pytest.importorskip("jinja2")
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    recorded = golden("prompts.json")["conversations"]
    key = {"thinking": "text", "instruct": "qwen3_vl", "qwen2_5": "qwen2_5_vl"}[name]
    for case in CASES if name == "thinking" else [c for c in recorded if not c["add_vision_id"]]:
        flags = {"add_generation_prompt": case["add_generation_prompt"]}
        (text,), _ = render([case["messages"]], chat_template=TEMPLATES[name], **flags)
        assert text == case[key]


@pytest.mark.parametrize(
    "template, form",
    [
        *((TEMPLATES[name], form) for name, form in FORMS.items()),
        (TEMPLATES["thinking"].replace("\n", "\r\n"), THINKING),
        (re.sub(r"\n +", "\n", TEMPLATES["thinking"]), THINKING),
        (re.sub(r"\n *(?={[%{])", "", TEMPLATES["instruct"]), INSTRUCT),
        ("{# It's ours -#}\n" + TEMPLATES["thinking"] + "{# the end #}\n", THINKING),
        (TEMPLATES["instruct"].replace("'<|im_end|>\\n'", '"<|im_end|>" ~ "\\n"'), INSTRUCT),
        (TEMPLATES["thinking"].replace("{%- if tools %}", "{%- if tools is not none and tools %}"), THINKING),
        (CHATML + OPENING, INSTRUCT),
        (CHATML + OPENING.replace("assistant\\n", "assistant\\n<think>\\n"), THINKING),
        ("{{ bos_token }}" + CHATML + OPENING, INSTRUCT),
        (SET_SYSTEM, ChatForm("Be brief.")),
    ],
)
def test_templates_of_a_known_form(tmp_path, template, form):
    assert form_of(template, tmp_path) == form


THOUGHT = "{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"


@pytest.mark.parametrize(
    "template, named",
    [
        ("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", r"\[INST\] {content} \[/INST\]"),
        (CHATML.replace("'<|im_end|>' + '\\n'", "'<|im_end|>'") + OPENING, "{content}<|im_end|>'"),
        (CHATML.replace("im_start", "start") + OPENING, "<|start|>"),
        (CHATML.replace("m['role']", "'human'") + OPENING, "human"),
        (CHATML + OPENING.replace("\\n'", "\\nAnswer: '"), "Answer: "),
        (CHATML + OPENING.replace("{% endif %}", THOUGHT + "{% endif %}"), "<think>"),
        (CHATML + OPENING.replace("assistant\\n", "model\\n"), "model"),
        (CHATML, "does not end a prompt with"),
        (CHATML.replace("m['content'] +", "m['content'] | trim +") + OPENING, "| trim"),
        (CHATML.replace("m['content'] +", "m['content'].upper() +") + OPENING, "upper"),
        (CHATML.replace("m['content'] +", "m['content'].split('\\n')[0] +") + OPENING, "split"),
        (CHATML.replace("m['content'] +", "(m['content'] + ' /think') +") + OPENING, "/think"),
        ("{% set sep = '###' %}" + CHATML + OPENING, "'###'"),
        ("{% include 'other.jinja' %}" + CHATML + OPENING, "include"),
        (CHATML + OPENING + "{{ 'unfinished", "unfinished"),
        (TEMPLATES["thinking"].replace("assistant\\n<think>\\n'", "assistant\\n'"), "that its prompts do not open"),
        (TEMPLATES["instruct"].replace("<|image_pad|><|vision_end|>", "<|image_pad|><|vision_end|> and"), "and"),
        (TEMPLATES["instruct"].replace("add_vision_id", "true"), "Picture "),
        (TEMPLATES["qwen2_5"].replace("{{ message['role'] }}", "{{ message['role'] }} "), "{role} "),
        ("It is empty.", "outside of turns"),
    ],
)
def test_templates_of_another_form(tmp_path, template, named):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **IDS, "vision_config": {}}))
    message = f"chat_template.jinja: .*neither .*{named.replace('|', '[|]')}.*model.chat_template=instruct, or thinking"
    with pytest.raises(ProcessorError, match=message):
        form_of(template, tmp_path)
    with pytest.raises(ProcessorError, match="neither"):
        ProcessorConfig.from_folder(tmp_path)
    for choice, form in (("thinking", THINKING), ("instruct", INSTRUCT)):
        assert ProcessorConfig.from_folder(tmp_path, choice).chat == form


def test_the_choice_keeps_the_familys_system_prompt(tmp_path):
    assert chat_form(tmp_path, "qwen2_5_vl") == HELPFUL  # without a template, too
    assert chat_form(tmp_path, "qwen2_5_vl", "thinking") == ChatForm(HELPFUL.default_system, thinking=True)
    with pytest.raises(ProcessorError, match="unknown chat template 'think'"):
        chat_form(tmp_path, "qwen3_vl", "think")


def test_which_file_counts(tmp_path):
    """In transformers' order for processors; what a tokenizer has only where the processor has none."""
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATES["thinking"]}]
    assert chat_form(tmp_path, "qwen3_vl") == INSTRUCT
    for name, content, form in (
        ("tokenizer_config.json", {"chat_template": named}, THINKING),
        ("chat_template.jinja", TEMPLATES["instruct"], INSTRUCT),
        ("chat_template.json", {"chat_template": TEMPLATES["thinking"]}, THINKING),
        ("processor_config.json", {"image_processor": {}}, THINKING),
        ("processor_config.json", {"chat_template": {"default": TEMPLATES["qwen2_5"]}}, HELPFUL),
    ):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert chat_form(tmp_path, "qwen3_vl") == form
    for name, content in (
        ("processor_config.json", b'{"chat_template": 3}'),
        ("processor_config.json", b"{"),
        ("chat_template.json", b"[]"),
        ("chat_template.jinja", b"\xff\xfe"),
    ):
        for file in ("processor_config.json", "chat_template.json", "chat_template.jinja"):
            (tmp_path / file).unlink(missing_ok=True)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ProcessorError, match=name):
            chat_form(tmp_path, "qwen3_vl")


@pytest.mark.parametrize(
    "answer",
    [
        "Well: <think>a</think>B",
        "<think>a</think>B<think>c</think>D",
        "<think>a<think>b</think>C",
        "<think>never closed",
        "a</think>b</think>c",
    ],
)
def test_thoughts_that_the_template_would_cut(answer):
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": answer}]
    with pytest.raises(RecordError, match="message 1 holds <think>") as caught:
        render_chat(messages, "qwen3_vl", form=THINKING)
    assert caught.value.reason == "bad_thought"
    assert answer in rendered_text(render_chat(messages, "qwen3_vl"))  # Instruct: text like any other


def test_a_thinking_folder_end_to_end(tokenizer, tmp_path):
    """Prompt and target of a folder whose template opens the thought: supervised is what comes after that."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", **IDS, "vision_config": {}}))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["thinking"], encoding="utf-8")
    encoder = in_process(ProcessorConfig.from_folder(tmp_path), tokenizer)
    question = {"role": "user", "content": "Which?"}
    prompt = encoder.encode(Record("a", (question,)), add_generation_prompt=True)
    assert prompt.text.endswith("<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert not prompt.supervised.any()
    target = "Left.\n</think>\n\nB<|im_end|>\n"
    answer = {"role": "assistant", "content": "<think>\nLeft.\n</think>\n\nB"}
    example = encoder.encode(Record("a", (question, answer)))
    assert example.text == prompt.text + target
    assert example.tokens.tolist()[: len(prompt.tokens)] == prompt.tokens.tolist()
    assert tokenizer.decode(example.tokens[example.supervised]) == target
    assert 151667 in prompt.tokens and 151668 in example.tokens  # the tokens <think> and </think>


def test_an_answer_that_is_not_learned_from_is_none_with_a_thought_either():
    answer = {"role": "assistant", "content": "<think>a</think>B", "loss": False}
    pieces = render_chat([{"role": "user", "content": "Which?"}, answer], "qwen3_vl", form=THINKING)
    assert not any(piece.supervised for piece in pieces)


def test_without_a_thought_the_end_of_an_empty_one_is_learned(tokenizer, qwen3):
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "B"}]
    ids, supervised = tokenizer.encode_pieces(render_chat(messages, "qwen3_vl", form=THINKING))
    assert tokenizer.decode(ids).endswith("assistant\n<think>\n\n</think>\n\nB<|im_end|>\n")
    assert tokenizer.decode(ids[supervised]).lstrip("\n") == "</think>\n\nB<|im_end|>\n"
