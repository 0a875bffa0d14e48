"""The recorder against transformers itself, on tiny random models of every family."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mllm4d_jax.encode.example import Grid  # noqa: E402
from mllm4d_jax.encode.positions import RULES, mrope_positions  # noqa: E402
from mllm4d_jax.encode.tokenizer import build_byte_level_tokenizer  # noqa: E402
from mllm4d_jax.verify.model import Tolerances  # noqa: E402
from mllm4d_jax.verify.task import Target, verify_target  # noqa: E402
from tools import record_reference  # noqa: E402
from tools.reference import cases, tensors  # noqa: E402

FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl")
IDS = {"image_token_id": 103, "video_token_id": 104, "vision_start_token_id": 101, "vision_end_token_id": 102}
TEXT = dict(
    vocab_size=112,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=106,
    eos_token_id=105,
    pad_token_id=106,
    initializer_range=0.2,
)
QWEN3_ROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
VISION = dict(depth=3, hidden_size=24, intermediate_size=40, num_heads=2, patch_size=4, out_hidden_size=32)


def config_of(family: str):
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]}
        vision = VISION | {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        text = TEXT | {"rope_parameters": rope}
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **IDS)
    text = TEXT | {"head_dim": 16, "rope_parameters": QWEN3_ROPE}
    vision = VISION | {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2], "initializer_range": 0.2}
    if family == "qwen3_vl":
        return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **IDS)
    text |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "tie_word_embeddings": False}
    return transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **IDS)


@pytest.fixture(scope="module", params=FAMILIES)
def recorded(request, tmp_path_factory):
    """(model folder, model, prompts, output folder) of a recording of every case."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    transformers.AutoModelForImageTextToText.from_config(config_of(request.param)).save_pretrained(folder / "model")
    args = [f"--model={folder / 'model'}", f"--out={folder / 'out'}", "--cases=text,image,video,batch,multi"]
    assert record_reference.main(["", *args]) == 0
    model = tensors.load(str(folder / "model"))
    return folder / "model", model, cases.PromptMaker.from_folder(folder / "model", 0), folder / "out"


def arrays(recorded, name):
    with np.load(recorded[3] / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def test_files_and_manifest(recorded):
    folder, model, _, out = recorded
    names = {f"{case}.npz" for case in cases.CASES} | {"config.json", "grads_batch.json", "manifest.json"}
    assert {path.name for path in out.iterdir()} == names  # and no weights
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["model"] == str(folder) and manifest["transformers"] == transformers.__version__
    assert manifest["params"] == sum(p.numel() for p in model.parameters())
    assert set(manifest["cases"]) == set(cases.CASES) and set(manifest["sha256"]) == names - {"manifest.json"}
    assert manifest["rope_rule"] in RULES
    assert ("router_min_gap" in manifest["cases"]["text"]) == (model.config.model_type == "qwen3_vl_moe")


def expected_keys(model, name: str) -> set[str]:
    qwen3, moe = model.config.model_type != "qwen2_5_vl", model.config.model_type == "qwen3_vl_moe"
    layers, blocks, taps = range(TEXT["num_hidden_layers"]), range(VISION["depth"]), range(2 if qwen3 else 0)
    keys = {"input_ids", "attention_mask", "mm_token_type_ids", "labels", "position_ids", "rope_deltas"}
    keys |= {"final_norm", "logits", "loss"}
    prefixes = {"text": (), "image": ("img",), "video": ("vid",)}.get(name, ("img", "vid"))
    for prefix in prefixes:
        keys |= {"image_grid_thw", "pixel_values"} if prefix == "img" else {"video_grid_thw", "pixel_values_videos"}
        keys |= {"second_per_grid_ts"} if prefix == "vid" and not qwen3 else set()
        keys |= {f"{prefix}_merged", *(f"{prefix}_deepstack_{j}" for j in taps)}
        if name in ("image", "video"):
            keys |= {f"{prefix}_{part}" for part in ("patch_embed", "rope_cos", "rope_sin", "block_in")}
            keys |= {f"{prefix}_block_{i}" for i in blocks}
    if name != "multi":
        keys |= {"gen_ids", "gen_logits", "gen_position", "inputs_embeds", "text_cos", "text_sin"}
        keys |= {f"layer_{i}_out" for i in layers} | {f"layer_{j}_out_ds" for j in taps if prefixes}
        keys |= {f"router_{i}_{part}" for i in layers if moe for part in ("logits", "weights", "index")}
    return keys


@pytest.mark.parametrize("name", cases.CASES)
def test_keys_shapes_and_dtypes(recorded, name):
    got, model = arrays(recorded, name), recorded[1]
    assert set(got) == expected_keys(model, name)
    rows, length = got["input_ids"].shape
    assert got["position_ids"].shape == (3, rows, length) and got["rope_deltas"].shape == (rows, 1)
    assert got["logits"].shape == (rows, length, TEXT["vocab_size"]) and got["loss"].shape == ()
    assert {value.dtype for value in got.values()} == {np.dtype(np.int32), np.dtype(np.float32)}
    assert all(np.isfinite(value).all() for value in got.values())
    for image, token, prefix in (("image", 103, "img"), ("video", 104, "vid")):
        if f"{image}_grid_thw" in got:
            patches = got[f"{image}_grid_thw"].prod(-1).sum()
            assert (got["input_ids"] == token).sum() * 4 == patches
            assert got[f"{prefix}_merged"].shape == (patches // 4, TEXT["hidden_size"])


@pytest.mark.parametrize("name", ["text", "image", "video", "batch"])
def test_tensors_fit_together(recorded, name):
    """Every kept tensor is where its name says: checked against a plain call and against its neighbours."""
    _, model, prompts, _ = recorded
    got = arrays(recorded, name)
    side, rows = cases.make_case(prompts, name)
    inputs = cases.batch(prompts, rows, side)
    model.model.rope_deltas = None
    with torch.no_grad():
        plain = model(**tensors.tensors(inputs))
        weight = model.lm_head.weight.numpy()
    np.testing.assert_allclose(got["logits"], plain.logits.numpy(), atol=1e-5)
    np.testing.assert_allclose(got["loss"], plain.loss.numpy(), atol=1e-5)
    np.testing.assert_allclose(got["final_norm"] @ weight.T, got["logits"], atol=1e-4)
    words = (got["mm_token_type_ids"] == 0) & (got["attention_mask"] == 1)
    table = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(got["inputs_embeds"][words], table[got["input_ids"][words]])
    for prefix, kind in (("img", 1), ("vid", 2)):
        places = got["mm_token_type_ids"] == kind
        if not places.any():
            continue
        np.testing.assert_array_equal(got["inputs_embeds"][places], got[f"{prefix}_merged"])
        for j in range(2):
            if f"{prefix}_deepstack_{j}" in got:
                step = got[f"layer_{j}_out_ds"] - got[f"layer_{j}_out"]
                np.testing.assert_allclose(step[places], got[f"{prefix}_deepstack_{j}"], atol=1e-4)
                assert np.abs(step[places]).max() > 1e-3 and not step[got["mm_token_type_ids"] == 0].any()


def test_vision_tensors(recorded):
    _, model, _, _ = recorded
    got, tower = arrays(recorded, "video"), model.model.visual
    weight = tower.patch_embed.proj.weight.detach().numpy().reshape(VISION["hidden_size"], -1)
    bias = getattr(tower.patch_embed.proj, "bias", None)
    expected = got["pixel_values_videos"] @ weight.T + (0 if bias is None else bias.detach().numpy())
    np.testing.assert_allclose(got["vid_patch_embed"], expected, atol=1e-4)
    np.testing.assert_allclose(got["vid_rope_cos"] ** 2 + got["vid_rope_sin"] ** 2, 1, atol=1e-5)
    if model.config.model_type == "qwen2_5_vl":  # no position table; the windows only reorder groups of four
        assert not np.array_equal(got["vid_block_in"], got["vid_patch_embed"])
        np.testing.assert_array_equal(np.sort(got["vid_block_in"], 0), np.sort(got["vid_patch_embed"], 0))


def test_positions_follow_the_rule_of_the_manifest(recorded):
    _, model, prompts, out = recorded
    rule = json.loads((out / "manifest.json").read_text())["rope_rule"]
    _, (row,) = cases.make_case(prompts, "video")
    ours, delta = mrope_positions(
        row.tokens,
        [grid for grid, _, _ in row.media],
        image_token_id=103,
        video_token_id=104,
        merge_size=2,
        family=prompts.family,
        second_per_grid=[seconds for _, _, seconds in row.media],
        tokens_per_second=getattr(model.config.vision_config, "tokens_per_second", 0),
        rule=rule,
    )
    got = arrays(recorded, "video")
    np.testing.assert_array_equal(got["position_ids"][:, 0], ours)
    assert got["rope_deltas"].item() == ours.max() + 1 - len(row.tokens)
    np.testing.assert_array_equal(got["gen_position"][0], len(row.tokens) + delta + np.arange(tensors.STEPS))
    # The clip outlasts the text, so that it shows after which token `generate` goes on.
    assert (got["rope_deltas"].item() > delta) == (rule != "release")


def test_our_decoding_goes_on_as_generate_does(recorded):
    folder, _, _, out = recorded
    target = Target(out, folder)
    with jax.default_matmul_precision("highest"):
        checks = list(verify_target(target, Tolerances(), attention="xla", rule="auto", only="video"))
    assert {c.group for c in checks} >= {"greedy ids", "greedy logits"}
    assert not [c.line(60) for c in checks if not c.passed]


@pytest.mark.parametrize("name", ["text", "video", "batch"])
def test_greedy_steps_are_those_of_generate(recorded, name):
    _, model, prompts, _ = recorded
    got = arrays(recorded, name)
    side, rows = cases.make_case(prompts, name)
    feed = tensors.tensors({k: v for k, v in cases.batch(prompts, rows, side).items() if k != "labels"})
    model.model.rope_deltas = None
    saved, model.generation_config = model.generation_config, transformers.GenerationConfig(pad_token_id=106)
    try:
        out = model.generate(
            **feed, max_new_tokens=tensors.STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    finally:
        model.generation_config = saved
    np.testing.assert_array_equal(out.sequences[:, -tensors.STEPS :].numpy(), got["gen_ids"])
    np.testing.assert_allclose(torch.stack(out.logits, 1).numpy(), got["gen_logits"], atol=1e-4)
    assert out.sequences.shape[1] == feed["input_ids"].shape[1] + got["gen_position"].shape[1]
    np.testing.assert_array_equal(got["gen_logits"].argmax(-1), got["gen_ids"])


def test_gradients(recorded):
    folder, model, prompts, out = recorded
    got = json.loads((out / "grads_batch.json").read_text())
    side, rows = cases.make_case(prompts, "batch")
    model.zero_grad()
    model.model.rope_deltas = None
    model(**tensors.tensors(cases.batch(prompts, rows, side))).loss.backward()
    assert got["columns"] == list(tensors.COLUMNS) and got["case"] == "batch"
    assert len(got["grads"]) + len(got["no_grad"]) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        published, _ = tensors.published_name(name, model.config.model_type)
        grad = parameter.grad.numpy().astype(np.float64)
        if "mlp.experts." in name:  # transformers 5 holds [expert, out, in]; published files [expert, in, out]
            grad = np.ascontiguousarray(grad.swapaxes(1, 2))
        projection = sum(np.cos(0.1 * i) * value for i, value in enumerate(grad.ravel()))
        np.testing.assert_allclose(
            got["grads"][published], [np.sqrt((grad**2).sum()), projection], rtol=1e-4, atol=1e-6
        )
    assert ("aux_loss" in got) == (model.config.model_type == "qwen3_vl_moe")
    model.zero_grad()


def test_gradient_names_are_published_names(recorded):
    safetensors = pytest.importorskip("safetensors")
    folder, _, _, out = recorded
    got = json.loads((out / "grads_batch.json").read_text())
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        assert set(got["grads"]) | set(got["no_grad"]) == set(file.keys())


def theirs(rule):
    def positions(input_ids, **kwargs):
        grid = Grid("video", *kwargs["video_grid_thw"][0].tolist())
        seconds = kwargs["second_per_grid_ts"].tolist()
        shared = dict(image_token_id=103, video_token_id=104, merge_size=2, family="qwen2_5_vl", tokens_per_second=2)
        found, _ = mrope_positions(input_ids[0].numpy(), [grid], second_per_grid=seconds, rule=rule, **shared)
        return torch.from_numpy(found)[:, None], None

    return positions


def test_every_position_rule_is_recognised(recorded, monkeypatch):
    _, model, prompts, _ = recorded
    if prompts.family == "qwen3_vl":
        assert record_reference.position_rule(model, prompts) == "release"
        return
    for rule in RULES:
        monkeypatch.setattr(model.model, "get_rope_index", theirs(rule))
        assert record_reference.position_rule(model, prompts) == rule
    monkeypatch.setattr(model.model, "get_rope_index", lambda ids, **_: (torch.zeros(3, 1, ids.shape[1]), None))
    with pytest.raises(ValueError, match="none of the rules"):
        record_reference.position_rule(model, prompts)


def test_recording_twice_gives_the_same(recorded, tmp_path):
    folder, _, _, out = recorded
    args = [f"--model={folder}", f"--out={tmp_path}", "--cases=image"]
    assert record_reference.main(["", *args, "--grads=off"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"image.npz", "config.json", "manifest.json"}
    with np.load(tmp_path / "image.npz") as again, np.load(out / "image.npz") as first:
        assert all(np.array_equal(again[key], first[key]) for key in first.files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--cases=text,viedo", "unknown case 'viedo'"),
        ("--out={model}", "is not empty"),
        ("--video=no.mp4", "there is no file 'no.mp4'"),
        ("--image={model}/config.json", "needs a tokenizer.json"),
        ("--model={model}/x", "there is no config.json"),
    ],
)
def test_wrong_arguments(recorded, tmp_path, capsys, change, message):
    args = [f"--model={recorded[0]}", f"--out={tmp_path}", change.format(model=recorded[0])]
    with pytest.raises(SystemExit) as stop:
        record_reference.main(["", *args])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_clip_and_a_picture_of_the_user(tmp_path):
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 48))
    for i in range(6):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    cv2.imwrite(str(tmp_path / "picture.png"), np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3))
    folder, out = tmp_path / "model", tmp_path / "out"
    tokenizer = build_byte_level_tokenizer(["What happens here?"], 300)
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>"}
    names["vision_end"] = "<|vision_end|>"
    config = config_of("qwen3_vl")
    config.text_config.vocab_size = 320
    for name, content in names.items():
        setattr(config, f"{name}_token_id", tokenizer.token_to_id(content))
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    media = [f"--video={tmp_path / 'clip.mp4'}", f"--image={tmp_path / 'picture.png'}", "--cases=video,image"]
    assert record_reference.main(["", f"--model={folder}", f"--out={out}", *media, "--num_frames=4"]) == 0
    with np.load(out / "video.npz") as video, np.load(out / "image.npz") as image:
        assert video["video_grid_thw"].tolist() == [[2, 12, 16]] and image["image_grid_thw"].tolist() == [[1, 12, 16]]
        ids = video["input_ids"][0]
        assert "What happens here?" in tokenizer.decode(ids) and " seconds>" in tokenizer.decode(ids)
        np.testing.assert_array_equal(video["labels"][0][-3:], ids[-3:])  # the end of the assistant's turn
        assert np.ptp(video["pixel_values_videos"]) > 1 and np.ptp(image["pixel_values"]) > 1


def test_another_family_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit):
        record_reference.main(["", f"--model={tmp_path}", f"--out={tmp_path / 'out'}"])
    assert "model_type 'llama'" in capsys.readouterr().err
