"""Which files of a folder are its weights, and what damaged or hostile ones do."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.hf import CheckpointError, TensorFiles, load_model, save_model
from tests.models.folders import GOLDEN, INDEX, NORM, SHARDS, copied, fill_norm, norm_of, refusal, sharded, whole


def test_a_single_file_goes_before_an_index_and_its_shards(tmp_path):
    folder = sharded(tmp_path / "model", fill_norm(2.0))
    assert norm_of(folder) == 2.0
    shutil.copy(copied(tmp_path / "new", change=fill_norm(3.0)) / "model.safetensors", folder)
    assert norm_of(folder) == 3.0
    for shard in SHARDS:
        (folder / shard).unlink()
    assert norm_of(folder) == 3.0
    (folder / INDEX).write_text("not even JSON")
    assert norm_of(folder) == 3.0


def test_transformers_takes_the_same_files(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = sharded(tmp_path / "model", fill_norm(2.0))
    shutil.copy(copied(tmp_path / "new", change=fill_norm(3.0)) / "model.safetensors", folder)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder).model.language_model.norm.weight
    assert float(theirs.detach()[0]) == norm_of(folder) == 3.0


def test_shards_that_no_index_names_are_left_alone(tmp_path):
    folder = sharded(tmp_path / "model", fill_norm(2.0))
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"of an older save")
    assert norm_of(folder) == 2.0
    (folder / SHARDS[1]).unlink()
    assert f"{SHARDS[1]} is missing" in refusal(folder)
    (folder / SHARDS[1]).mkdir()
    assert f"{SHARDS[1]} is missing" in refusal(folder)


@pytest.mark.parametrize(
    "there, advice",
    [
        (SHARDS, "it has shards .*model-00002-of-00002.safetensors.* the index: download that as well"),
        (["adapter_model.safetensors"], "it has an adapter: name it by --config.model.adapter"),
        (["pytorch_model.bin"], "pickles, which can run code .* save_pretrained"),
        ([], "download the model's weights into it"),
    ],
)
def test_a_folder_without_weights_says_what_to_do(tmp_path, there, advice):
    folder = copied(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    for name in there:
        (folder / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"holds neither model.safetensors nor {INDEX}: .*{advice}"):
        load_model(folder)


def test_the_cache_of_the_hub_is_links_to_blobs(tmp_path):
    real = sharded(tmp_path / "real", fill_norm(2.0))
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(real.iterdir())):
        shutil.copy(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    assert norm_of(snapshot) == 2.0


def test_saving_leaves_nothing_that_would_be_loaded_instead_and_nothing_else_out(tmp_path):
    folder = sharded(tmp_path / "model", fill_norm(2.0))
    (folder / "model_ema.safetensors").write_bytes(b"mine")
    model = load_model(GOLDEN / "qwen3_vl")
    save_model(model, folder)
    assert sorted(p.name for p in folder.glob("*.safetensors*")) == ["model.safetensors", "model_ema.safetensors"]
    save_model(model, folder, max_shard_bytes=300_000)
    assert not (folder / "model.safetensors").exists() and norm_of(folder) == norm_of(GOLDEN / "qwen3_vl")


@pytest.mark.parametrize(
    "content, said",
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "weight_map['a'] = '../x.safetensors'"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "weight_map['a'] = '/etc/x.safetensors'"),
        ({"weight_map": {"a": "..\\x.safetensors"}}, "weight_map['a']"),
        ({"weight_map": {"a": "c:x.safetensors"}}, "weight_map['a']"),
        ({"weight_map": {"a": ".."}}, "weight_map['a'] = '..'"),
        ({"weight_map": {"a": ""}}, "weight_map['a'] = ''"),
        ({"weight_map": {"a": "config.json"}}, "weight_map['a'] = 'config.json'"),
        ({"weight_map": {"a": 1}}, "weight_map['a'] = 1"),
        ({"weight_map": {"a": None}}, "weight_map['a'] = None"),
        ({"weight_map": {"a": ["x.safetensors"]}}, "weight_map['a'] = ['x.safetensors']"),
        ({"weight_map": {"a": {"b": {}}}}, "weight_map['a'] = {'b': {}}"),
        ({"weight_map": {"a": "x\0.safetensors"}}, "weight_map['a']"),
        ({"weight_map": {"a": "\ud800.safetensors"}}, "weight_map['a'] = '\\ud800.safetensors'"),
        ({"weight_map": {"\ud800": "x.safetensors"}}, "x.safetensors is missing"),
        ({"weight_map": {"a": f"{'x' * 5000}.safetensors"}}, "xxx... is missing"),
        ({"weight_map": {"a\x1b[31m": 3}}, "weight_map['a\\x1b[31m'] = 3"),
        ({"weight_map": {}}, "no object 'weight_map'"),
        ({"weight_map": [["a", "x.safetensors"]]}, "no object 'weight_map'"),
        ({"weight_map": "x.safetensors"}, "no object 'weight_map'"),
        ({}, "no object 'weight_map'"),
        ([], "no object 'weight_map'"),
        (None, "no object 'weight_map'"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the key 'a' is there twice"),
        (b'{"weight_map": {"a": 1}, "weight_map": {"a": 1}}', "the key 'weight_map' is there twice"),
        (b"", "is not a safetensors index"),
        (b"\xff\xfe\xfd", "is not a safetensors index"),
        (b"[" * 100_000, "is not a safetensors index"),
        (b'{"weight_map": {"a": ' + b"1" * 5000 + b"}}", "is not a safetensors index"),
        (b" " * ((1 << 26) + 1), "more than 64 MiB"),
    ],
)
def test_an_index_that_cannot_be_true(tmp_path, content, said):
    folder = sharded(tmp_path / "model")
    (folder / INDEX).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    text = refusal(folder)
    assert said in text and (INDEX in text or "is missing" in text)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        whole({"a": ENTRY}, b"\0" * 8, length=1 << 63),
        whole({"a": ENTRY}, b"\0" * 8, length=(1 << 64) - 1),
        whole({"a": ENTRY}, b"\0" * 8, length=10_000),
        whole({"a": ENTRY}, b"\0" * 7),
        whole({"a": ENTRY}, b"\0" * 9),
        whole({"a": ENTRY, "b": ENTRY}, b"\0" * 8),
        whole({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, b"\0" * 12),
        whole({"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, b"\0" * 20),
        whole({"a": ENTRY | {"data_offsets": [8, 0]}}, b"\0" * 8),
        whole({"a": ENTRY | {"shape": [1 << 62, 1 << 62]}}, b"\0" * 8),
        whole({"a": ENTRY | {"shape": [-2]}}, b"\0" * 8),
        whole({"a": ENTRY | {"shape": [2.0]}}, b"\0" * 8),
        whole({"a": ENTRY | {"dtype": "Q9"}}, b"\0" * 8),
        whole({"a": 3}, b""),
        whole([], b""),
        whole(b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"\0" * 8),
        whole(b"[" * 100_000, b""),
    ],
)
def test_a_header_that_cannot_be_true(tmp_path, content):
    folder = copied(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors is damaged or cut short" in refusal(folder)


def test_names_out_of_a_header_are_printed_safely(tmp_path):
    folder = copied(tmp_path / "model", change=lambda v: v.update({"x\n\x1b[31m" + "y" * 5000: v[NORM]}))
    assert "1 unexpected: 'x\\n\\x1b[31myyy" in refusal(folder)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path):
    folder = sharded(tmp_path / "model")
    (folder / SHARDS[0]).unlink()
    os.mkfifo(folder / SHARDS[0])
    assert f"{SHARDS[0]} is missing" in refusal(folder)


def mutations(data: bytes, count: int, seed: int):
    """Copies of some bytes, each with a few bytes changed, cut out, put in, repeated, or cut off."""
    rng = random.Random(seed)
    tokens = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"-1", b"1e999", b"NaN", b"\\ud800", b"\\u0000", b"\0"]
    tokens += [b"../", b"\xff", b"99999999999999999999", b"true", b'"a":1,']
    for _ in range(count):
        out = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at, length = rng.randrange(len(out) + 1), rng.randint(1, 12)
            kind = rng.randrange(5)
            if kind == 0 and at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del out[at : at + length]
            elif kind == 2:
                out[at:at] = rng.choice(tokens)
            elif kind == 3:
                out[at : at + length] = rng.choice(tokens)
            else:
                out[at:at] = out[at : at + 8 * length]
        yield bytes(out[: rng.randrange(len(out))] if rng.random() < 0.05 and out else out)


def small(folder: pathlib.Path) -> tuple[pathlib.Path, ModelConfig]:
    """A folder with three tensors in two shards: files of some hundred bytes."""
    folder.mkdir()
    shutil.copy(GOLDEN / "qwen3_vl" / "config.json", folder)
    a, b, c = "lm_head.weight", "model.visual.pos_embed.weight", NORM
    save_file({a: np.ones((2, 3), np.float32), b: np.ones(5, np.float16)}, folder / SHARDS[0])
    save_file({c: np.ones(4, np.float32)}, folder / SHARDS[1])
    where = {a: SHARDS[0], b: SHARDS[0], c: SHARDS[1]}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 50}, "weight_map": where}, indent=1))
    return folder, ModelConfig.from_folder(folder)


@pytest.mark.parametrize("name", [INDEX, SHARDS[0]])
def test_changed_bytes_are_an_error_of_the_project_or_no_matter(tmp_path, name):
    folder, config = small(tmp_path / "model")
    file = folder / name
    refused = 0
    for data in mutations(file.read_bytes(), 400, seed=7):
        file.write_bytes(data)
        try:
            files = TensorFiles.scan(folder, config)
        except CheckpointError as error:
            text = str(error)
            assert text.isprintable() and text.encode() and str(folder) in text and len(text) < 5000
            refused += 1
        else:
            for tensor in files.location:
                if files.dtypes[tensor] in ("F32", "F16"):
                    assert files.read(tensor).shape == files.shapes[tensor]
    assert refused > 200
