"""The learner against the plain model: same loss and gradient however rows, parts and devices are chosen."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mllm4d_jax.grpo.batch import denominators
from mllm4d_jax.grpo.learner import Learner
from mllm4d_jax.grpo.objective import objective, prepare
from mllm4d_jax.grpo.presets import ObjectiveConfig
from mllm4d_jax.models.qwen_vl import vision_geometry
from mllm4d_jax.models.split import merge_model
from mllm4d_jax.rows.batch import collate
from mllm4d_jax.run.optimizer import init_optimizer
from tests.grpo import learner_cases as cases


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compiling costs more than running here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


GRPO = ObjectiveConfig(beta=0.1, gap_bound=1e9, max_completion=6)
CORRECTED = ObjectiveConfig(beta=0.1, gap_bound=0.0, importance_cap=3.0, max_completion=6)
BRANCHES, LONGEST = 4, 6


def one_step(name="qwen3_vl", config=GRPO, *, per_row=BRANCHES, micro=1, count=2, iterations=1, rewards=None, **mesh):
    """(gradient, Update) of one step, the gradient read off plain gradient descent at rate 1."""
    _, graphdef, trainable, frozen, devices = cases.parts(name, **mesh)
    optimizer = optax.sgd(1.0)
    state = init_optimizer(optimizer, trainable, devices)
    how = dict(temperature=0.8, banned_ids=cases.BANNED, mesh=devices, chunk=16)
    learner = Learner(graphdef, optimizer, trainable, state, config, **how)
    _, batch = cases.prompts(name, count)
    rollouts = cases.completions(count, BRANCHES, LONGEST)
    if rewards is not None:
        rollouts = rollouts._replace(rewards=rewards)
    reference = cases.noisy(trainable, 2) if config.beta else None
    before = jax.tree.map(np.asarray, trainable)
    with jax.default_matmul_precision("highest"):
        features = learner.encode(trainable, frozen, batch.inputs.vision, count)
        parts = cases.laid_out(batch, rollouts, count, per_row, micro)
        copied = jax.tree.map(lambda x: x.copy(), trainable)
        after, _, update = learner.update(
            copied, state, frozen, features, parts, rollouts, reference=reference, iterations=iterations
        )
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, after), update


@functools.lru_cache
def plain(name, config, count=2):
    """Loss and gradient from one ordinary row per completion, prompt and media repeated."""
    model_config, graphdef, trainable, frozen, _ = cases.parts(name)
    examples, _ = cases.prompts(name, count)
    rollouts = cases.completions(count, BRANCHES, LONGEST)
    rows, places = [], []
    for i, (tokens, mask) in enumerate(zip(rollouts.tokens, rollouts.mask, strict=True)):
        prompt, n = examples[i // BRANCHES], int(mask.sum())
        text = np.concatenate([prompt.tokens, tokens[:n]])
        after = len(prompt.tokens) + prompt.rope_delta + np.arange(n)
        positions = np.concatenate([prompt.positions, np.broadcast_to(after, (3, n))], 1).astype(np.int32)
        rows.append(dataclasses.replace(prompt, tokens=text, positions=positions))
        places.append(len(prompt.tokens) - 1 + np.arange(LONGEST))
    visual = (model_config.image_token_id, model_config.video_token_id)
    inputs = collate(rows, vision_geometry(model_config), visual_token_ids=visual)
    places = np.minimum(np.array(places), inputs.tokens.shape[1] - 1)

    def logprobs(tree):
        model = merge_model(graphdef, tree, frozen)
        hidden = jnp.take_along_axis(model(jax.tree.map(jnp.asarray, inputs)), jnp.asarray(places)[..., None], 1)
        logits = model.logits(hidden).at[..., jnp.array(cases.BANNED)].set(-jnp.inf) / 0.8
        return jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(rollouts.tokens)[..., None], 2)[..., 0]

    with jax.default_matmul_precision("highest"):
        batch = jax.tree.map(jnp.asarray, rollouts)
        reference = jax.jit(logprobs)(cases.noisy(trainable, 2))
        batch, _ = prepare(batch._replace(reference_logprobs=reference), config)
        if not config.gap_bound:  # the correction, written out
            mine = jax.jit(logprobs)(trainable)
            weights = jnp.minimum(jnp.exp(mine - batch.old_logprobs), config.importance_cap)
            batch = batch._replace(old_logprobs=mine, importance=jnp.where(batch.mask > 0, weights, 1.0))
        totals = denominators(batch.mask)
        found = jax.jit(jax.value_and_grad(lambda tree: objective(logprobs(tree), batch, totals, config)[0]))(trainable)
    return jax.tree.map(np.asarray, found)


def assert_same(found, expected, tolerance):
    (grads, update), (loss, wanted) = found, expected
    assert abs(float(update.step.loss) - float(loss)) < tolerance * max(1, abs(float(loss)))
    for mine, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert np.abs(mine - other).max() < tolerance * max(1e-3, np.abs(other).max())
        assert np.abs(other).max() > 1e-6  # every adapter is part of it


@pytest.mark.parametrize("config", [GRPO, CORRECTED], ids=["grpo", "corrected"])
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_shared_prompts_give_the_loss_and_gradient_of_repeated_ones(name, config):
    assert_same(one_step(name, config), plain(name, config), 2e-5)


@pytest.mark.parametrize(("per_row", "micro"), [(4, 2), (1, 4)])
@pytest.mark.parametrize("config", [GRPO, CORRECTED], ids=["grpo", "corrected"])
def test_rows_and_parts_do_not_matter(per_row, micro, config):
    grads, update = one_step(config=config)
    assert_same(one_step(config=config, per_row=per_row, micro=micro), (update.step.loss, grads), 2e-5)


def test_metrics_of_parts_are_those_of_the_whole():
    _, whole = one_step()
    _, parts = one_step(micro=2)
    assert set(whole.metrics) == set(parts.metrics) >= {"reward", "ratio", "kl", "entropy", "gap", "dead_groups"}
    for name, mean in whole.metrics.items():
        np.testing.assert_allclose(float(mean.value), float(parts.metrics[name].value), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(float(whole.gap_max), float(parts.gap_max), rtol=1e-5)
    np.testing.assert_allclose(whole.advantages, parts.advantages)


def test_the_gap_is_measured_where_there_is_something_to_learn():
    """Completions that do not count are no part of it, in one part or several."""
    config = dataclasses.replace(GRPO, overlong="mask")
    gaps = [float(one_step(config=config, micro=micro)[1].metrics["gap"].value) for micro in (1, 2)]
    np.testing.assert_allclose(gaps[0], gaps[1], rtol=1e-5)
    assert abs(gaps[0] - float(one_step()[1].metrics["gap"].value)) > 1e-4  # those left out would move it


@pytest.mark.parametrize(
    "mesh",
    [
        dict(data=2, fsdp=2, tensor=2),
        pytest.param(dict(data=8), marks=pytest.mark.slow),
        pytest.param(dict(data=4, tensor=2), marks=pytest.mark.slow),
        pytest.param(dict(fsdp=8), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_meshes_agree_with_one_device(mesh):
    grads, update = one_step(count=8)
    assert_same(one_step(count=8, devices=8, **mesh), (update.step.loss, grads), 3e-5)  # sums in another order


def test_a_second_iteration_sees_a_policy_that_moved():
    _, first = one_step(config=ObjectiveConfig(max_completion=6, gap_bound=0.0))
    _, second = one_step(config=ObjectiveConfig(max_completion=6, gap_bound=0.0), iterations=2)
    assert abs(float(first.metrics["ratio"].value) - 1) < 1e-6
    assert abs(float(second.metrics["ratio"].value) - 1) > 1e-4


def test_equal_rewards_move_nothing():
    """Nor does the momentum of earlier steps; with a KL term there is something to learn all the same."""
    equal = np.full(2 * BRANCHES, 0.7, np.float32)
    for beta, moves in ((0.0, False), (0.1, True)):
        config = ObjectiveConfig(beta=beta, max_completion=6)
        learner, trainable, state, frozen, reference = cases.learner("qwen3_vl", config)
        _, batch = cases.prompts("qwen3_vl")
        rollouts = cases.completions(2, BRANCHES, LONGEST)
        features = learner.encode(trainable, frozen, batch.inputs.vision, 2)
        parts = cases.laid_out(batch, rollouts, 2, BRANCHES)
        kept = reference if beta else None
        trainable, state, first = learner.update(trainable, state, frozen, features, parts, rollouts, reference=kept)
        before = jax.tree.map(np.asarray, trainable)
        rollouts = rollouts._replace(rewards=equal)
        after, _, update = learner.update(trainable, state, frozen, features, parts, rollouts, reference=kept)
        changed = any((a != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
        assert changed == moves and bool(update.step.finite) and float(first.step.grad_norm) > 0
        assert float(update.metrics["dead_groups"].value) == 1.0


def test_a_prompt_of_text_alone():
    """No prompt has media: nothing is encoded."""
    _, graphdef, trainable, frozen, mesh = cases.parts("qwen3_vl")
    learner, trainable, state, frozen, _ = cases.learner("qwen3_vl", ObjectiveConfig(max_completion=6))
    _, batch = cases.prompts("qwen3_vl", text_only=True)
    rollouts = cases.completions(2, BRANCHES, LONGEST)
    assert learner.encode(trainable, frozen, batch.inputs.vision, 2) is None
    parts = cases.laid_out(batch, rollouts, 2, BRANCHES)
    _, _, update = learner.update(trainable, state, frozen, None, parts, rollouts)
    assert np.isfinite(float(update.step.loss)) and float(update.step.grad_norm) > 0


def test_sharing_the_prompt_saves_the_work_that_it_should(capsys):
    """FLOPs of the compiled gradient, G completions of C tokens on a prompt of P: (P + G C) / (G (P + C)) of them.

    The attention and the head do not follow this rule; for these sizes they change little.
    """
    p, c, g = 256, 64, 12
    _, graphdef, trainable, frozen, mesh = cases.parts("qwen3_vl")
    config = cases.parts("qwen3_vl")[0]
    learner = cases.learner("qwen3_vl", ObjectiveConfig(max_completion=c))[0]
    example = cases.prompt(config, "p", np.random.default_rng(0), grid=None, words=p - 3)
    sizes = cases.needed_prompt_sizes([example])
    batch = cases.collate_prompts([example], sizes, vision_geometry(config), (config.video_token_id,))
    rollouts = cases.completions(1, g, c)._replace(mask=np.ones((g, c), np.float32))
    rollouts, _ = prepare(jax.tree.map(jnp.asarray, rollouts), learner.objective)
    flops = []
    for per_row in (g, 1):
        rows = cases.laid_out(batch, jax.tree.map(np.asarray, rollouts), 1, per_row)[0]
        grads = jax.tree.map(jnp.zeros_like, trainable)
        lowered = learner._add.lower(grads, trainable, frozen, None, rows, rollouts, denominators(rollouts.mask))
        flops.append(lowered.compile().cost_analysis()["flops"])
    measured, expected = flops[0] / flops[1], (p + g * c) / (g * (p + c))
    with capsys.disabled():
        print(f"\nshared prompt: {measured:.3f} of the FLOPs of repeated ones, by token counts {expected:.3f}")
    assert abs(measured / expected - 1) < 0.15
