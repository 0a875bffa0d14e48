"""Config tables: every default is legal, every config file builds, and a wrong key or value is refused by name."""

from __future__ import annotations

import ast
import importlib

import ml_collections
import pytest

from configs import common, reading, schema
from configs.published import PAPER, SIZES
from configs.schema import ConfigError, Key, Presets, complete
from configs.tables.training import SFT_KEYS

FILES = (
    ("curate", "curate"),
    ("sft", "sft"),
    ("cold_start", "sft"),
    ("infer", "infer"),
    ("verify", "verify"),
    ("grpo", "grpo"),
    ("eval", "eval"),
    ("export", "export"),
    ("report", "report"),
    ("quickstart", "quickstart"),
)  # (file, task)


@pytest.mark.parametrize("task", common.TASKS)
def test_defaults_are_legal_and_documented(task):
    keys = common.task_keys(task)
    assert len({key.name for key in keys}) == len(keys)
    for key in keys:
        assert schema.checked(key, key.default) == key.default
        assert key.help and not key.help.endswith(".")


@pytest.mark.parametrize(("name", "task"), FILES)
def test_every_variant_is_a_full_locked_config(name, task):
    module = importlib.import_module(f"configs.{name}")
    for variant in module.get_config.variants:
        config = module.get_config(variant)
        assert config.is_locked and config.task == task
        again = complete(config, common.task_keys(task))
        assert again.to_dict() == config.to_dict()
    if name == task:
        assert module.get_config().to_dict() == common.config(task).to_dict()


def test_variants_of_fine_tuning_change_what_they_say():
    default, get = schema.flatten(common.config("sft")), importlib.import_module("configs.sft").get_config
    default = dict(default)

    def changes(config):
        return {name: value for name, value in schema.flatten(config) if value != default[name]}

    assert changes(get("qwen3_vl_2b")) == {"model.published": "2b"}
    assert changes(get("qwen3_vl_30b_a3b")) == {"model.published": "30b_a3b", "mesh.fsdp": 8}
    release = {"lora.dropout": 0.05, "video.num_frames": 8, "train.batch_size": 64, "train.steps": 31250}
    assert changes(get("release")) == release
    cold = changes(importlib.import_module("configs.cold_start").get_config())
    assert (cold["prompt.system"], cold["optim.warmup_ratio"], cold["model.adapter"]) == ("st_cot", 0.03, "runs/sft")
    assert (cold["train.batch_size"], cold["train.steps"]) == (32, 219)  # 7,000 records once


def test_the_default_is_the_papers_run():
    config = common.config("sft")
    assert (config.lora.rank, config.lora.alpha, config.train.batch_size, config.train.steps) == (128, 256.0, 8, 30000)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_norm) == (2e-5, 0.0, 1.0)
    assert (config.video.num_frames, config.video.resize_rule) == (32, "per_frame")
    assert (config.video.min_pixels, config.video.max_pixels) == (0, 0)  # the rule's own: 28 x 28 to 224 x 224
    assert config.data.max_tokens == 8192 and config.data.prefix_buckets[-1] == 8192


def test_partial_configs_are_completed_with_the_right_types():
    config = complete({"task": "sft", "optim": {"lr": 1}, "lora": {"targets": ["q_proj"]}}, SFT_KEYS)
    assert type(config.optim.lr) is float and config.lora.targets == ("q_proj",) and config.train.steps == 30000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"lrr": 1.0}}, "unknown key 'optim.lrr' - did you mean 'optim.lr'?"),
        ({"steps": 3}, "unknown key 'steps' - did you mean 'train.steps'?"),
        ({"optm": {"lr": 1.0}}, "unknown key 'optm.lr' - did you mean 'optim.lr'?"),
        ({"video": 3}, "'video' is a group of keys"),
        ({"train": {"steps": "many"}}, "train.steps must be a whole number, not str 'many'"),
        ({"train": {"steps": True}}, "train.steps must be a whole number"),
        ({"train": {"steps": 1.0}}, "train.steps must be a whole number"),
        ({"train": {"resume": 1}}, "train.resume must be true or false"),
        ({"optim": {"lr": float("nan")}}, "optim.lr must be a finite number"),
        ({"train": {"batch_size": 0}}, "train.batch_size must be at least 1"),
        ({"model": {"attention": "splsh"}}, "did you mean 'splash'?"),
        ({"train": {"steps": 10**12}}, "train.steps must be at most 2147483647, not 1e+12"),
        ({"seed": 10**20}, "seed must be at most 2147483647"),
        ({"seed": 10**5000}, "seed must be at most 2147483647, not one of more than 300 digits"),
        ({"optim": {"lr": 10**5000}}, "optim.lr must be a finite number"),
        ({"optim": {"b2": 1.0}}, "optim.b2 must be at most 0.999999"),
        ({"lora": {"rank": 10**8}}, "lora.rank must be at most 16384"),
        ({"video": {"decode_timeout_s": 1e300}}, "video.decode_timeout_s must be at most 1000000000"),
        ({"data": {"prefix_buckets": (512, 10**12)}}, "data.prefix_buckets must be at most"),
        ({"train": {"trace_steps": (-(10**5000), 10**5000)}}, "train.trace_steps must be at most"),
        ({"lora": {"targets": (1,)}}, "lora.targets must be a tuple of str values"),
        ({"train": {"trace_steps": ("a",)}}, "train.trace_steps must be a tuple of int values, not 'a'"),
        ({"train": {"trace_steps": (True,)}}, "train.trace_steps must be a tuple of int values, not True"),
        ({"data": {"mixture": (1,)}}, "data.mixture must be a tuple of str values, not 1"),
        ({"train": {"trainable": ("lora", "")}}, "train.trainable must not hold an empty text"),
    ],
)
def test_a_wrong_key_or_value_is_refused(change, message):
    for config in (change, ml_collections.ConfigDict(change)):
        with pytest.raises(ConfigError) as caught:
            complete(config, SFT_KEYS)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("task", "name", "value", "message"),
    [
        ("infer", "top_p", 0.0, "top_p must be above 0, not 0"),
        ("infer", "top_p", -0.5, "top_p must be above 0, not -0.5"),
        ("infer", "top_p", 1.5, "top_p must be at most 1"),
        ("grpo", "rollout.stop", ("",), "rollout.stop must not hold an empty text"),
        ("grpo", "rollout.stop", (1,), "rollout.stop must be a tuple of str values, not 1"),
        ("eval", "controls", (None,), "controls must be a tuple of str values, not None"),
    ],
)
def test_what_would_fail_once_the_model_is_loaded_is_refused(task, name, value, message):
    """They were found by what uses them, with a traceback."""
    with pytest.raises(ConfigError) as caught:
        common.config(task, {name: value})
    assert str(caught.value).startswith(message)
    assert common.config("infer", {"top_p": 1e-3}).top_p == 1e-3


def test_a_tuple_that_is_empty_by_default_says_what_it_holds():
    with pytest.raises(ValueError, match="a.b: a tuple that is empty by default needs the type of its elements"):
        Key("a.b", (), "x")


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        complete({"sed": 1, "train": {"steps": 0}}, SFT_KEYS)
    assert "'seed'" in str(caught.value) and "train.steps" in str(caught.value)


def test_unknown_task_and_variant_name_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'verify'"):
        common.task_keys("verfy")
    with pytest.raises(ConfigError, match="did you mean 'configs/sft.py:tiny'"):
        importlib.import_module("configs.sft").get_config("tinny")


def test_nearest_prefers_the_same_last_name_and_gives_up_when_nothing_is_near():
    known = ("train.steps", "train.log_every", "optim.lr")
    assert schema.nearest("optim.steps", known) == "train.steps"
    assert schema.nearest("log_evry", known) == "train.log_every"
    assert schema.nearest("zzz", known) == ""


def test_build_locks():
    config = schema.build((Key("a.b", 1, "x"),))
    with pytest.raises((AttributeError, KeyError)):
        config.a.c = 2


def test_presets_are_checked_and_leave_the_table_as_it_is():
    keys = (Key("a.b", 1, "x", low=0), Key("c", "", "x"))
    presets = Presets("f.py", keys, {"one": ("x", {"a.b": 3}), "two": ("x", {"a.d": 3}), "three": ("x", {"a.b": -1})})
    assert presets().to_dict() == {"a": {"b": 3}, "c": ""} and presets().is_locked
    for variant, message in (("two", "unknown key 'a.d'"), ("three", "at least 0"), ("", "f.py has no variant ''")):
        with pytest.raises(ConfigError, match=message):
            presets(variant)


@pytest.mark.parametrize("task", common.TASKS)
def test_every_key_has_one_meaning_on_resume(task):
    assert not [key.name for key in common.task_keys(task) if key.free and key.content]


def test_what_is_fixed_is_what_no_flag_frees():
    keys = (Key("a.b", 1, "x"), Key("a.c", 1, "x", free=True), Key("d", "", "x", content=True))
    config = schema.build(keys, {"a.b": 2, "a.c": 3, "d": "folder"})
    assert schema.fixed(config, keys) == {"a": {"b": 2}}


def key_lists(text: str, known: frozenset[str]) -> list[int]:
    """Lines of tuples, lists and sets with two or more literals that are dotted names of config keys."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Tuple, ast.List, ast.Set))
        and sum(isinstance(one, ast.Constant) and one.value in known for one in node.elts) >= 2
    ]


def test_only_the_tables_list_keys():
    known = frozenset(key.name for task in common.TASKS.values() for key in task.keys if "." in key.name)
    assert key_lists('FREE = frozenset({"train.log_every", *OTHERS, "mesh.data"})', known) == [1]
    assert not key_lists('config["train.log_every"], ("train.log_every", "mesh.date")', known)
    texts = {p: p.read_text() for room in ("mllm4d_jax", "data_prep") for p in (reading.ROOT / room).rglob("*.py")}
    assert len(texts) > 100, "the walk must see the project"
    assert not [f"{path}:{line}" for path, text in texts.items() for line in key_lists(text, known)]


def test_published_sizes_are_the_choices():
    (key,) = [key for key in SFT_KEYS if key.name == "model.published"]
    assert key.choices == ("", *SIZES) and PAPER in SIZES and "235b_a22b" in SIZES
    assert len({size.repository for size in SIZES.values()}) == len(SIZES)
    assert all(size.repository.startswith("Qwen/Qwen") for size in SIZES.values())
