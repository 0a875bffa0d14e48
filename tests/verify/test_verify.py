"""The verify task: what it finds, what it prints, and that it can fail."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import common
from mllm4d_jax.models.hf import load_model
from mllm4d_jax.verify import task as verify
from mllm4d_jax.verify.checks import ROUNDINGS, SHIFT, Check, Comparison, chosen_alike
from mllm4d_jax.verify.model import Tolerances, verify_case
from mllm4d_jax.verify.processor import verify_processor
from mllm4d_jax.verify.reference import RecordingError, build_case

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def run(golden, model="", case="", **values) -> int:
    values |= {"golden": str(golden), "model.path": str(model), "case": case}
    return verify.run(common.config("verify", values), "unused")


def test_processor_tables_all_hold_and_every_row_is_compared(capsys):
    assert run(GOLDEN / "processor") == 0
    out = capsys.readouterr().out
    assert "PASSED: all 37 checks" in out and "FAIL" not in out
    counts = {(c.case.split("/")[1], c.group): c.compared for c in verify_processor(GOLDEN / "processor", "p")}
    sampling = json.loads((GOLDEN / "processor" / "frame_sampling.json").read_text())
    sizes = json.loads((GOLDEN / "processor" / "smart_resize.json").read_text())
    for table in ("qwen3_vl", "qwen2_5_vl_hf", "qwen_vl_utils"):
        assert counts["frame_sampling", table] == len(sampling[table])
    for table, rows in sizes.items():
        assert counts["smart_resize", table] == len(rows)
    assert counts["prompts", "templates"] == 14 and counts["prompts", "expanded"] == 18


def test_a_model_folder_reports_every_stage(capsys):
    assert run(GOLDEN / "qwen3_vl", case="image") == 0
    out = capsys.readouterr().out
    for stage in ("positions", "vision blocks", "decoder layers", "logits", "loss", "greedy ids"):
        assert any(stage in line and line.startswith("ok") for line in out.splitlines()), stage


def damaged_model(tmp_path, name: str) -> pathlib.Path:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(GOLDEN / "qwen3_vl" / "config.json", folder)
    values = load_file(GOLDEN / "qwen3_vl" / "model.safetensors")
    values[name] = values[name] + np.float32(0.01)
    save_file(values, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("tensor", "stage"),
    [
        ("model.visual.blocks.1.attn.proj.bias", "vision blocks (img_block_1)"),
        ("model.language_model.layers.2.mlp.down_proj.weight", "decoder layers (layer_2_out)"),
        ("model.language_model.norm.weight", "final norm (final_norm)"),
    ],
)
def test_a_deviation_is_named_where_it_starts(tmp_path, capsys, tensor, stage):
    assert run(GOLDEN / "qwen3_vl", model=damaged_model(tmp_path, tensor), case="image") == 1
    out = capsys.readouterr().out
    assert f"first stage that deviates: qwen3_vl/image: {stage}" in out
    assert "FAILED:" in out


def test_a_root_uses_the_given_model_where_the_configuration_matches(tmp_path):
    model = damaged_model(tmp_path, "model.language_model.norm.weight")
    targets = {t.folder.name: t.model for t in verify.find_targets(str(GOLDEN), str(model))}
    assert targets["qwen3_vl"] == model
    assert targets["qwen2_5_vl"] == GOLDEN / "qwen2_5_vl" and targets["processor"] is None
    assert {t.model for t in verify.find_targets(str(GOLDEN), "")} == {
        None,
        *(GOLDEN / m for m in ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl")),
    }


def test_refusals(tmp_path):
    with pytest.raises(RecordingError, match="is not a folder"):
        run(tmp_path / "nothing")
    with pytest.raises(RecordingError, match="holds no recorded cases"):
        run(tmp_path)
    with pytest.raises(RecordingError, match="no recorded case matches config.case = 'vidoe'"):
        run(GOLDEN / "qwen3_vl", case="vidoe")
    recording = tmp_path / "recording"
    recording.mkdir()
    shutil.copy(GOLDEN / "qwen3_vl" / "text.npz", recording)
    with pytest.raises(RecordingError, match="holds no weights"):
        run(recording)
    (recording / "text.npz").write_bytes(b"not an npz")
    with pytest.raises(RecordingError, match="cannot be read as an npz"):
        run(recording, model=GOLDEN / "qwen3_vl")
    with pytest.raises(RecordingError, match="has the configuration of none of"):
        root = tmp_path / "root"
        shutil.copytree(GOLDEN / "qwen2_5_vl", root / "qwen2_5_vl")
        run(root, model=GOLDEN / "qwen3_vl")


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(key: str):
    """Leaves a key of an npz or of a JSON object out."""

    def change(path: pathlib.Path) -> None:
        if path.suffix == ".npz":
            np.savez(path, **{k: v for k, v in np.load(path).items() if k != key})
        else:
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return change


def single(path: pathlib.Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def holding(text: str):
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("text.npz", cut, "text.npz cannot be read as an npz of plain arrays (BadZipFile"),
        ("text.npz", holding(""), "text.npz cannot be read as an npz of plain arrays (EOFError"),
        ("text.npz", single, "text.npz cannot be read as an npz of plain arrays (ValueError"),
        ("text.npz", without("attention_mask"), "text.npz: attention_mask is missing"),
        ("text.npz", without("input_ids"), "text.npz: input_ids is missing"),
        ("text.npz", lambda path: np.savez(path, input_ids=np.zeros((1, 3)), attention_mask=np.ones((1, 4))), "shape"),
        ("image.npz", without("pixel_values"), "image.npz has grids but no ['pixel_values']"),
        ("batch.npz", without("pixel_values_videos"), "batch.npz has grids but no ['pixel_values_videos']"),
        ("manifest.json", holding('{"rope_ru'), "manifest.json cannot be read as JSON"),
        ("manifest.json", holding("[]"), "manifest.json does not hold an object of JSON, but []"),
        ("manifest.json", holding('{"rope_rule": "of next year"}'), "manifest.json: rope_rule = 'of next year' is"),
        ("grads_batch.json", cut, "grads_batch.json cannot be read as JSON"),
        ("grads_batch.json", without("case"), "grads_batch.json: case is missing"),
        ("grads_batch.json", without("grads"), "grads_batch.json: grads is missing"),
        ("grads_batch.json", holding('{"case": "batch", "loss": 1, "grads": {"a": [1]}}'), "grads two numbers"),
        ("grads_batch.json", holding('{"case": "none", "loss": 1, "grads": {}}'), "none.npz cannot be read as an npz"),
    ],
)
def test_a_damaged_recording_is_named_with_its_key(tmp_path, monkeypatch, name, damage, said):
    monkeypatch.setattr(verify, "load_model", lambda *_, **__: None)  # nothing comes to be compared
    folder = tmp_path / "recorded"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    for file in ("text.npz", name):
        if (GOLDEN / "qwen3_vl" / file).is_file():
            shutil.copy(GOLDEN / "qwen3_vl" / file, folder)
    damage(folder / name)
    with pytest.raises(RecordingError) as caught:
        run(folder, model=GOLDEN / "qwen3_vl", case=name.partition(".")[0] if name != "manifest.json" else "text")
    text = str(caught.value)
    assert said in text and str(folder) in text and ("record it again" in text or "to take them from" in text)


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("frame_sampling.json", cut, "cannot be read as JSON"),
        ("frame_sampling.json", holding('{"qwen3_vl": [{"video_fps": 25, "indices": []}]}'), "total is missing"),
        ("smart_resize.json", holding("[]"), "does not hold an object of JSON, but []"),
        ("smart_resize.json", holding('{"image": [{"h": 3, "w": 3}]}'), "factor is missing"),
        ("prompts.json", cut, "cannot be read as JSON"),
        ("prompts.json", holding("{}"), "conversations is missing"),
        ("mrope_axis.json", holding("{}"), "does not hold a list of JSON"),
        ("vision_index.npz", without("rope_hw_0"), "rope_hw_0 is missing"),
        ("vision_index.npz", cut, "cannot be read as an npz"),
        ("resize_uint8_bicubic.npz", holding(""), "cannot be read as an npz"),
    ],
)
def test_a_damaged_table_is_named_with_its_key(tmp_path, name, damage, said):
    shutil.copy(GOLDEN / "processor" / name, tmp_path)
    damage(tmp_path / name)
    with pytest.raises(RecordingError, match="record it again") as caught:
        list(verify_processor(tmp_path, "p"))
    assert said in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_a_table_with_a_wrong_row_fails(tmp_path):
    table = json.loads((GOLDEN / "processor" / "smart_resize.json").read_text())
    table["video_qwen3_vl"][40]["out"] = [32, 32]
    (tmp_path / "smart_resize.json").write_text(json.dumps(table))
    failed = [c for c in verify_processor(tmp_path, "p") if not c.passed]
    assert [(c.group, c.error) for c in failed] == [("video_qwen3_vl", 1.0)]


def test_a_recording_that_goes_on_elsewhere_than_generate_is_told_to_be_made_again(tmp_path):
    """Earlier recorders decoded by a loop of their own, which counted from the largest position."""
    arrays = dict(np.load(GOLDEN / "qwen2_5_vl" / "video.npz"))
    arrays["second_per_grid_ts"] = np.float32([30.0])
    model = load_model(GOLDEN / "qwen2_5_vl", dtype=jnp.float32, attention="xla")
    positions = build_case("video", arrays, model.config, "hf523").inputs.positions
    assert positions.max() > positions[0, 0, -1]  # the clip outlasts the text
    arrays |= {"position_ids": positions, "gen_position": positions.max() + 1 + np.arange(12)[None]}
    np.savez(tmp_path / "video.npz", **arrays)
    checks = list(verify_case(model, tmp_path / "video.npz", "old", Tolerances(), "hf523"))
    (ids,) = (c for c in checks if c.group == "greedy ids")
    assert not ids.passed and "record it again" in ids.worst


def one(compare, tolerance=1e-4) -> Check:
    comparison = Comparison("case", "group", tolerance)
    compare(comparison)
    return comparison.check()[0]


def test_errors_are_shares_of_their_row_and_of_what_rounding_moves():
    rows = np.array([[1e3, -1e3], [3.0, 4.0], [0.0, 0.0]])
    off = np.array([[0.05, 0.0], [0.0, 1e-3], [0.0, 0.0]])
    check = one(lambda c: c.near("x", rows + off, rows, rows + off))
    np.testing.assert_allclose(check.error, 1e-3 / np.sqrt(12.5), rtol=1e-6)  # f64, root mean square of (3, 4)
    assert not check.passed and check.tolerance == 1e-4
    moved = rows + off + 1.001 * off * SHIFT / ROUNDINGS  # rounding alone may change as much
    check = one(lambda c: c.near("x", rows + off, rows, moved))
    assert check.passed and check.tolerance == pytest.approx(1.001 * check.error)
    assert not one(lambda c: c.near("x", rows + 1.01 * off, rows, moved + 0.01 * off)).passed
    # Rows of zeros: they count for a thousandth of all.
    assert one(lambda c: c.near("x", rows + [[0], [0], [1e-3]], rows, rows)).error == pytest.approx(
        1e-3 / 0.577, rel=0.01
    )


def test_a_model_that_float32_does_not_decide_is_said_to_be_one():
    for moved in (np.ones(4) * 1e9, np.ones(4) * np.nan):
        check = one(lambda c, moved=moved: c.near("x", np.full(4, 1.5), np.ones(4), moved))
        assert not check.passed and ("does not decide" in check.worst) == np.isfinite(moved).all()


def test_choices_differ_only_beyond_rounding():
    scores = np.array([[1.0, 1.1, 3.0], [1.0, 1.1, 3.0]])
    ours, recorded = np.array([[2, 1], [2, 1]]), np.array([[2, 0], [0, 1]])
    allowed = np.array([[0.06], [0.06]])
    assert chosen_alike(ours, recorded, scores, allowed).tolist() == [[2, 0], [2, 1]]
    assert chosen_alike(ours, recorded, scores, None).tolist() == ours.tolist()
    assert chosen_alike(ours, recorded, scores, 0.8 * allowed).tolist() == ours.tolist()


def test_nan_and_other_shapes_never_pass():
    comparison = Comparison("case", "group", 1.0)
    comparison.close("nan", np.array([np.nan]), np.zeros(1))
    assert not comparison.check()[0].passed
    comparison = Comparison("case", "group", 1.0)
    comparison.close("shape", np.zeros((2, 1)), np.zeros(2))
    assert not comparison.check()[0].passed
    assert not Check("c", "g", float("nan"), 1e-3, 1).passed
    assert Check("c", "g", 1e-3, 1e-3, 1).passed
