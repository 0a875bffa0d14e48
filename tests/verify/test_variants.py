"""`verify` on models far from the committed fixtures, recorded here with transformers (see `variants.py`)."""

from __future__ import annotations

import json
import random
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from mllm4d_jax.encode.grids import position_taps, window_order  # noqa: E402
from mllm4d_jax.encode.positions import mrope_positions  # noqa: E402
from mllm4d_jax.models import rope  # noqa: E402
from mllm4d_jax.models.config import ModelConfig, ModelConfigError  # noqa: E402
from mllm4d_jax.models.hf import load_model, save_model  # noqa: E402
from mllm4d_jax.verify.model import Tolerances  # noqa: E402
from mllm4d_jax.verify.task import Target, verify_target  # noqa: E402
from tests.verify.variants import VARIANTS, Variant  # noqa: E402
from tools import record_reference  # noqa: E402
from tools.reference import cases, tensors  # noqa: E402

CONFIGS = {"qwen3_vl": "Qwen3VLConfig", "qwen3_vl_moe": "Qwen3VLMoeConfig", "qwen2_5_vl": "Qwen2_5_VLConfig"}


def empty_model(variant: Variant):
    """The transformers model of a variant as transformers initialises it."""
    config = getattr(transformers, CONFIGS[variant.model_type])(**variant.config())
    return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def build(variant: Variant, folder, seed: int) -> None:
    """A random model whose every tensor matters, saved by transformers."""
    torch.manual_seed(seed)
    model = empty_model(variant)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                fan_in = p.shape[1:].numel() if p.ndim != 3 else p.shape[-1]
                p.normal_(0, 0.5 if "embed_tokens" in name or "pos_embed" in name else fan_in**-0.5)
            else:
                p.normal_(0, 0.1).add_(0.0 if name.endswith("bias") else 1.0)
    model.to(getattr(torch, variant.dtype)).save_pretrained(folder, max_shard_size=variant.shard)


def release(variant: Variant, saved, folder) -> None:
    """The same model as released: old spelling of config.json, published layout, shards kept."""
    folder.mkdir()
    raw = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(variant.released(raw)))
    files = sorted(saved.glob("model*.safetensors"))
    index = saved / "model.safetensors.index.json"
    weights = json.loads(index.read_text()) if index.is_file() else None
    for file in files:
        stored = load_file(file)
        for name in stored:
            if ".experts." in name and variant.experts == "in_out":
                stored[name] = stored[name].transpose(1, 2).contiguous()
        embedding = next((n for n in stored if n.endswith("embed_tokens.weight")), None)
        if variant.store_head and embedding:
            stored["lm_head.weight"] = stored[embedding].clone()
        save_file(stored, folder / file.name, metadata={"format": "pt"})
    if weights:
        (folder / index.name).write_text(json.dumps(weights))


def record(variant: Variant, saved, out, seed: int) -> None:
    """What `tools/record_reference.py` writes, for the rows of the variant."""
    out.mkdir()
    model, prompts = tensors.load(str(saved)), cases.PromptMaker.from_folder(saved, seed)
    rng = np.random.default_rng(seed)
    rows = [prompts.row(segments, rng) for segments in variant.rows]
    inputs = cases.batch(prompts, rows, "left")
    arrays = tensors.record(model, inputs, tensors.FULL) | tensors.generate(model, inputs, 4)
    np.savez(out / "mixed.npz", **arrays)
    margin = record_reference.summary(arrays, "left")
    assert margin["gen_margin"] > 1e-3 and margin.get("router_min_gap", 1) > 1e-5, "choose another seed"
    if variant.right:
        np.savez(out / "mixed_right.npz", **tensors.record(model, cases.batch(prompts, rows, "right"), tensors.OUTPUTS))
    if variant.grads:
        (out / "grads_mixed.json").write_text(json.dumps(tensors.record_gradients(model, inputs, "mixed")))
    manifest = {"rope_rule": record_reference.position_rule(model, prompts)}
    (out / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, tmp_path):
    variant, seed = VARIANTS[name], zlib.crc32(name.encode())
    saved, released, out = tmp_path / "saved", tmp_path / "released", tmp_path / name
    build(variant, saved, seed)
    release(variant, saved, released)
    record(variant, saved, out, seed)
    assert (len(list(released.glob("model-*.safetensors"))) > 1) == (variant.shard != "1GB")

    with jax.default_matmul_precision("highest"):
        checks = list(verify_target(Target(out, released), Tolerances(), attention="xla", rule="auto"))
    for check in checks:
        print(check.line(90))
    assert not [c.line(60) for c in checks if not c.passed]
    stages = {"positions", "patch embedding", "vision blocks", "vision features", "embeddings", "decoder layers"}
    stages |= {"final norm", "logits", "loss", "greedy ids", "greedy logits"}
    stages |= {"router", "router choice"} if variant.model_type == "qwen3_vl_moe" else set()
    stages |= {"gradients"} if variant.grads else set()
    assert {c.group for c in checks} == stages
    assert {c.case.split("/")[1].split("[")[0] for c in checks} >= {"mixed"} | (
        {"mixed_right"} if variant.right else set()
    )
    assert_same_model(saved, released)


def assert_same_model(a, b) -> None:
    """Both spellings and layouts load as the same numbers."""
    first, second = (load_model(p, dtype=jnp.float32, attention="xla") for p in (a, b))
    flat = [nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (first, second)]
    assert [p for p, _ in flat[0]] == [p for p, _ in flat[1]]
    for (path, x), (_, y) in zip(*flat, strict=True):
        np.testing.assert_array_equal(x.get_value(), y.get_value(), err_msg=str(path))


def test_positions_of_random_rows():
    """Every rule but the released one is transformers' own: hundreds of videos, seconds that end on exact multiples."""
    draw = random.Random(0)
    for name in ("q3-no-taps-merge1-depth1", "q25-all-full-mha-tie-in-text", "q25-window-beyond-grid-tied-bf16"):
        variant, used = VARIANTS[name], 0
        model = empty_model(variant)
        config, m = model.config, variant.vision.get("spatial_merge_size", 2)
        prompts = cases.PromptMaker(
            family=config.model_type,
            ids=tuple(getattr(config, f"{n}_token_id") for n in ("image", "video", "vision_start", "vision_end")),
            merge_size=m,
            patch_width=1,
            plain_ids=np.arange(20, 90),
            pad_id=99,
            tokenizer=None,
            seed=0,
        )
        rule = record_reference.position_rule(model, prompts)
        for seed in range(40):
            segments = []
            for _ in range(draw.randint(1, 4)):
                modality, t = draw.choice((("image", 1), ("video", draw.randint(1, 30))))
                seconds = draw.choice((1 / 3, 0.1, 0.2, 0.7, 1.1, 2 / 3, draw.uniform(0.02, 3)))
                segments.append(cases.Text("a " * draw.randint(1, 5)))
                segments.append(cases.Pixels(modality, t, draw.randint(1, 4), draw.randint(1, 4), seconds))
            row = prompts.row(segments, np.random.default_rng(seed))
            inputs = tensors.tensors(cases.batch(prompts, [row], "left"))
            known = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            theirs, delta = model.model.get_rope_index(**{k: inputs[k] for k in known if k in inputs})
            seconds = [seconds for grid, _, seconds in row.media if grid.modality == "video"]
            ours, ours_delta = mrope_positions(
                row.tokens,
                [grid for grid, _, _ in row.media],
                image_token_id=config.image_token_id,
                video_token_id=config.video_token_id,
                merge_size=m,
                family=prompts.family,
                second_per_grid=seconds if prompts.family == "qwen2_5_vl" else (),
                tokens_per_second=getattr(config.vision_config, "tokens_per_second", 0),
                rule=rule,
            )
            np.testing.assert_array_equal(ours, theirs[:, 0].numpy())
            assert int(ours.max()) + 1 - len(row.tokens) == int(delta)
            assert ours_delta == ours[:, -1].max() + 1 - len(row.tokens)
            used += len(seconds)
        assert used > 30


@pytest.mark.parametrize("merge", [1, 2, 3, 4])
def test_index_arrays_of_random_grids(merge):
    helpers = pytest.importorskip("transformers.vision_utils")
    draw = random.Random(merge)
    for _ in range(60):
        h, w = draw.randint(1, 14), draw.randint(1, 14)
        grid, side = torch.tensor([[1, h * merge, w * merge]]), draw.randint(1, 50)
        index, weight = position_taps(h * merge, w * merge, merge, side)
        table = np.random.default_rng(side).normal(size=side**2)
        theirs = helpers.get_vision_interpolation_indices_and_weights(
            grid, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=merge
        )
        want = (table[theirs[0].numpy()] * theirs[1].numpy()).sum(-1)
        np.testing.assert_allclose((table[index] * weight).sum(-1), want, atol=2e-5)
        window = draw.randint(1, 9)
        order, _ = helpers.get_vision_window_index(
            grid, spatial_merge_size=merge, window_size=window * merge * 4 + draw.randint(0, 3), patch_size=4
        )
        np.testing.assert_array_equal(window_order(h * merge, w * merge, merge, window), order.numpy())


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"attention_factor": 1.7},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"mscale": 0.7},
        {"beta_fast": 8, "beta_slow": 2},
        {"truncate": False},
        {"factor": 0.5},
        {"original_max_position_embeddings": 4096, "rope_theta": 150.0},
        {"original_max_position_embeddings": None},
    ],
)
def test_yarn_frequencies(model_type, extra):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 300, **extra}
    variant = Variant(model_type, rope={k: v for k, v in scaling.items() if v is not None})
    if model_type == "qwen2_5_vl":
        variant = Variant(model_type, text={"hidden_size": 64}, rope=variant.rope | {"mrope_section": [4, 2, 2]})
    theirs = empty_model(variant).model.language_model.rotary_emb
    config = ModelConfig.from_dict(variant.config() | {"model_type": model_type})
    inv_freq, scale = rope.inverse_frequencies(config.text.rope, config.text.head_dim)
    np.testing.assert_allclose(inv_freq, theirs.inv_freq.numpy(), rtol=1e-6)
    assert scale == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize(
    "said",
    [
        {"rope_theta": 7.0, "rope_scaling": {"rope_theta": 9.0}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 9.0}},
        {"rope_theta": 7.0, "rope_scaling": {}},
        {"rope_scaling": {"rope_theta": 7.0}, "rope_parameters": {"rope_theta": 9.0}},
        {"rope_scaling": None, "rope_parameters": {"rope_theta": 9.0}},
    ],
)
def test_what_is_said_twice_is_read_as_transformers_does(model_type, said):
    raw = Variant(model_type).config()
    del raw["text_config"]["rope_parameters"]
    common = {"rope_type": "default", "mrope_section": Variant(model_type).config()["text_config"]["rope_parameters"]}
    common["mrope_section"] = common["mrope_section"]["mrope_section"]
    raw["text_config"] |= {k: v | common if isinstance(v, dict) else v for k, v in said.items()}
    ours = ModelConfig.from_dict(raw | {"model_type": model_type}).text.rope
    theirs = getattr(transformers, CONFIGS[model_type])(**json.loads(json.dumps(raw))).text_config.rope_parameters
    assert ours.theta == theirs["rope_theta"]
    assert list(ours.sections) == theirs["mrope_section"]


@pytest.mark.parametrize("model_type", CONFIGS)
def test_heads_tied_stored_and_different(model_type, tmp_path):
    """transformers unties a stored head that differs; a tied one stays one parameter, whatever is stored."""
    variant = Variant(model_type, top={"tie_word_embeddings": True}, store_head=True)
    build(variant, tmp_path / "saved", 0)
    release(variant, tmp_path / "saved", tmp_path / "released")
    assert load_model(tmp_path / "released", dtype=jnp.float32).lm_head is None
    file = tmp_path / "released" / "model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"][3, 5] += 1
    save_file(stored, file, metadata={"format": "pt"})
    model = load_model(tmp_path / "released", dtype=jnp.float32)
    theirs = tensors.load(str(tmp_path / "released")).lm_head.weight.detach().numpy()
    np.testing.assert_array_equal(model.head_kernel().T, theirs)
    np.testing.assert_array_equal(theirs, stored["lm_head.weight"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_transformers_reads_back_the_head_of_a_saved_model(model_type, tied, tmp_path):
    """Also when the config the model came from did not say whether it is tied."""
    variant = Variant(model_type, top={"tie_word_embeddings": tied}, tie_in="nowhere")
    build(variant, tmp_path / "saved", 0)
    release(variant, tmp_path / "saved", tmp_path / "released")
    model = load_model(tmp_path / "released", dtype=jnp.float32)
    assert (model.lm_head is None) == tied
    save_model(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is tied
    theirs = tensors.load(str(tmp_path / "again"))
    np.testing.assert_array_equal(model.head_kernel().T, theirs.lm_head.weight.detach().numpy())
    assert (theirs.lm_head.weight is theirs.get_input_embeddings().weight) == tied


def test_older_nested_qwen2_5_files_are_tied_by_their_text_config(tmp_path):
    variant = Variant("qwen2_5_vl", top={"tie_word_embeddings": True}, tie_in="text", nested=True)
    build(variant, tmp_path / "saved", 0)
    release(variant, tmp_path / "saved", tmp_path / "released")
    path = tmp_path / "released" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    assert load_model(tmp_path / "released", dtype=jnp.float32).lm_head is None
    theirs = tensors.load(str(tmp_path / "released"))
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (Variant("qwen3_vl", rope={"partial_rotary_factor": 0.5}), "partial_rotary_factor other than 1"),
        (Variant("qwen3_vl", text={"partial_rotary_factor": 0.5}), "partial_rotary_factor other than 1"),
        (Variant("qwen3_vl", rope={"rope_type": "yarn"}), "'yarn' needs the key 'factor'"),
        (Variant("qwen3_vl", rope={"mrope_interleaved": False}), "mrope_interleaved = False is not supported"),
        (Variant("qwen3_vl", rope={"mrope_section": [24, 20, 20]}), "summing to head_dim/2 = 8"),
        (Variant("qwen2_5_vl", rope={"rope_type": "dynamic"}), "'dynamic' is not supported"),
        (Variant("qwen3_vl", vision={"rope_theta": 100.0}), "vision rope_theta of 100.0 is not supported"),
        (Variant("qwen3_vl", vision={"deepstack_visual_indexes": [1, 1]}), "distinct block indices"),
        (Variant("qwen3_vl", vision={"hidden_size": 20}), "head width 20/2 must be a multiple of 4"),
        (Variant("qwen3_vl", vision={"patch_size": [4, 4]}), "'patch_size' must be an integer"),
        (Variant("qwen3_vl", text={"rms_norm_eps": None}), "'rms_norm_eps' is missing"),
        (Variant("qwen3_vl_moe", text={"decoder_sparse_step": 0}), "decoder_sparse_step must be at least 1"),
        (Variant("qwen2_5_vl", vision={"window_size": 7}), "window_size 7 is smaller than one merged token"),
        (Variant("qwen2_5_vl", text={"head_dim": 16}), "4 heads of 16 do not make up hidden_size 32"),
        (Variant("qwen2_5_vl", vision={"tokens_per_second": None}), "'tokens_per_second' is missing"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused(variant, message):
    with pytest.raises(ModelConfigError, match=message):
        ModelConfig.from_dict(variant.config() | {"model_type": variant.model_type})
