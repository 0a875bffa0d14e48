"""GRPO objectives once more, in float64 with loops over completions and tokens, and the batches to compare them on.

Nothing here is shared with the package. A stop-gradient is a second, frozen copy of the log-probs, and gradients are
central differences: there is no derivation that could repeat a mistake.
"""

from __future__ import annotations

import functools
import math

import numpy as np

T, CAP = 8, 8  # tokens of a row, and the length cap of the cases
PLAIN = dict(
    scale="group",
    ddof=1,
    std_eps=1e-4,
    ratio="token",
    surrogate="clip",
    eps_low=0.2,
    eps_high=0.2,
    dual_clip=None,
    kl="k3",
    beta=0.0,
    reduction="sequence_mean",
    overlong="keep",
    dynamic_sampling=False,
)
# The presets by hand, from their papers, not from the package's table.
PRESET_SPECS = {
    "paper": PLAIN | dict(beta=0.1),
    "release": PLAIN | dict(beta=0.001),
    "dapo": PLAIN | dict(std_eps=1e-6, eps_high=0.28, reduction="token_mean", overlong="soft", dynamic_sampling=True),
    "dr_grpo": PLAIN | dict(scale="none", reduction="constant"),
    "gspo": PLAIN | dict(std_eps=1e-6, ratio="sequence", eps_low=3e-4, eps_high=4e-4),
}
# What the presets leave out: fields of ObjectiveConfig, and what the batch brings along.
VARIANTS = {
    "cispo": dict(surrogate="cispo", eps_low=0.1, eps_high=0.3, reduction="token_mean"),
    "cispo_sequence": dict(surrogate="cispo", ratio="sequence", eps_low=3e-4, eps_high=4e-4),
    "dual_clip": dict(dual_clip=1.3),
    "k1": dict(kl="k1", beta=0.3),
    "k2": dict(kl="k2", beta=0.3, ddof=0),
    "batch_std": dict(scale="batch", overlong="mask"),
    "soft": dict(overlong="soft", overlong_penalty=0.5, reduction="constant", beta=0.2),
    "gspo_token": dict(ratio="sequence_token", eps_low=3e-4, eps_high=4e-4, reduction="token_mean"),
    "token_advantages": dict(ratio="sequence_token", eps_low=3e-4, eps_high=4e-4),
    "token_advantages_sequence": dict(ratio="sequence", eps_low=3e-4, eps_high=4e-4),
    "importance": dict(beta=0.1),
    "importance_sequence": dict(ratio="sequence", eps_low=3e-4, eps_high=4e-4),
}
SPECS = PRESET_SPECS | {name: PLAIN | changes for name, changes in VARIANTS.items()}


def make_fields(case: str, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Fields of a RolloutBatch and the trained policy's log-probs f32[16, T].

    Four groups with scattered rows and ids; one has rewards equal but for 5e-7, one completion is empty, one has a
    gap, one row only fills the batch. What does not count is NaN wherever a float can be.
    """
    rng = np.random.default_rng([seed, len(case)])
    groups = rng.permutation([7] * 4 + [2] * 4 + [11] * 4 + [0] * 3 + [-1]).astype(np.int32)
    b = len(groups)
    lengths = rng.integers(1, T + 1, b)
    rewards = rng.uniform(0, 1, b).astype(np.float32)
    dead = np.flatnonzero(groups == 2)
    rewards[dead] = 0.3
    rewards[dead[1]] += 5e-7
    lengths[np.flatnonzero(groups == 7)[2]] = 0
    lengths[np.flatnonzero(groups == 11)[:2]] = T, T - 1
    lengths[groups < 0] = 0
    mask = (np.arange(T) < lengths[:, None]).astype(np.float32)
    mask[np.flatnonzero(groups == 11)[0], 2] = 0
    old = -rng.uniform(0.1, 4, (b, T))
    # Of the size of the bounds of the case: some ratios stay inside, some do not.
    spread = 2e-3 if "sequence" in SPECS[case]["ratio"] else 0.3
    fields = {
        "tokens": rng.integers(0, 99, (b, T)).astype(np.int32),
        "mask": mask,
        "groups": groups,
        "old_logprobs": old.astype(np.float32),
        "rewards": rewards,
        "truncated": lengths == T,
        "reference_logprobs": (old + 0.4 * rng.normal(size=(b, T))).astype(np.float32),
    }
    if case.startswith("importance"):
        fields["importance"] = rng.uniform(0.2, 2, (b, T)).astype(np.float32)
    logprobs = (old + spread * rng.normal(size=(b, T))).astype(np.float32)
    for x in (logprobs, *(fields[k] for k in ("old_logprobs", "reference_logprobs", "importance") if k in fields)):
        x[mask == 0] = np.nan
    return fields, logprobs


def token_advantages(case: str) -> np.ndarray | None:
    """f32[16, T] for the cases that do not derive them from the rewards."""
    if not case.startswith("token_advantages"):
        return None
    return np.random.default_rng(5).normal(size=(16, T)).astype(np.float32)


def reference_advantages(rewards, groups, spec) -> np.ndarray:
    """f64[B]."""
    out = np.zeros(len(rewards))
    everything = [float(r) for r, g in zip(rewards, groups, strict=True) if g >= 0]
    for group in set(groups.tolist()) - {-1}:
        rows = [i for i in range(len(groups)) if groups[i] == group]
        own = [float(rewards[i]) for i in rows]
        if max(own) - min(own) <= 1e-6:
            continue
        mean = sum(own) / len(own)
        population = {"group": own, "batch": everything, "none": None}[spec["scale"]]
        divisor = 1.0
        if population is not None:
            center = sum(population) / len(population)
            squares = sum((r - center) ** 2 for r in population)
            divisor = math.sqrt(squares / (len(population) - spec["ddof"])) + spec["std_eps"]
        for i in rows:
            out[i] = (float(rewards[i]) - mean) / divisor
    return out


def reference_prepared(fields, spec) -> tuple[np.ndarray, np.ndarray]:
    """(advantages f64[B], counts bool[B, T]) after overlong rules and dynamic sampling."""
    counts = fields["mask"] > 0
    groups, scored = fields["groups"], fields["rewards"].astype(np.float64)
    shaped = scored.copy()
    if spec["overlong"] == "soft":
        cache = round(0.2 * CAP)
        for i, row in enumerate(counts):
            beyond = int(row.sum()) - (CAP - cache)
            shaped[i] -= spec.get("overlong_penalty", 1.0) * min(max(beyond / cache, 0), 1)
    advantages = reference_advantages(shaped, groups, spec)
    counts = counts.copy()
    for i in range(len(groups)):
        own = [scored[j] for j in range(len(groups)) if groups[j] == groups[i]]
        if spec["overlong"] == "mask" and fields["truncated"][i]:
            counts[i] = False
        if spec["dynamic_sampling"] and max(own) - min(own) <= 1e-6:
            counts[i] = False
    return advantages, counts


def token_term(r, a, logp, spec) -> float:
    """Surrogate to be minimised; `r` is the pair (differentiable, frozen)."""
    live, frozen = r
    low, high = 1 - spec["eps_low"], 1 + spec["eps_high"]
    if spec["surrogate"] == "cispo":
        return -min(max(frozen, low), high) * a * logp
    gain = min(live * a, min(max(live, low), high) * a)
    if spec["dual_clip"] is not None and a < 0:
        gain = max(gain, spec["dual_clip"] * a)
    return -gain


def kl_term(logp, ref, spec) -> float:
    d = ref - logp
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}[spec["kl"]]


def reference_loss(logprobs, frozen, fields, advantages, counts, spec) -> float:
    """The whole step's loss; `frozen` stands where the gradient is stopped."""
    n_rows, n_tokens = sum(bool(row.any()) for row in counts), int(counts.sum())
    total = 0.0
    for b in range(len(counts)):
        inside = np.flatnonzero(counts[b])
        if len(inside) == 0:
            continue
        old = fields["old_logprobs"][b].astype(np.float64)
        s = math.exp(sum(logprobs[b, t] - old[t] for t in inside) / len(inside))
        s_frozen = math.exp(sum(frozen[b, t] - old[t] for t in inside) / len(inside))
        for t in inside:
            pair = {
                "token": (math.exp(logprobs[b, t] - old[t]), math.exp(frozen[b, t] - old[t])),
                "sequence": (s, s_frozen),
                "sequence_token": (s_frozen * math.exp(logprobs[b, t] - frozen[b, t]), s_frozen),
            }[spec["ratio"]]
            a = advantages[b] if advantages.ndim == 1 else advantages[b, t]
            term = token_term(pair, float(a), logprobs[b, t], spec)
            term *= float(fields["importance"][b, t]) if "importance" in fields else 1.0
            if spec["beta"] > 0:
                term += spec["beta"] * kl_term(logprobs[b, t], float(fields["reference_logprobs"][b, t]), spec)
            divisor = {
                "sequence_mean": n_rows * len(inside),
                "token_mean": n_tokens,
                "constant": n_rows * CAP,
            }[spec["reduction"]]
            total += term / divisor
    return total


@functools.cache
def reference(case: str, seed: int = 0) -> tuple[float, np.ndarray]:
    """(loss, gradient f64[16, T] in the log-probs) of a case."""
    fields, logprobs = make_fields(case, seed)
    spec = SPECS[case]
    advantages, counts = reference_prepared(fields, spec)
    given = token_advantages(case)
    advantages = advantages if given is None else given.astype(np.float64)
    frozen = np.where(counts, logprobs, 0).astype(np.float64)
    value = functools.partial(
        reference_loss, frozen=frozen, fields=fields, advantages=advantages, counts=counts, spec=spec
    )
    gradient, h = np.zeros(frozen.shape), 1e-6
    for b, t in np.argwhere(counts):
        sides = []
        for step in (h, -h):
            moved = frozen.copy()
            moved[b, t] += step
            sides.append(value(moved))
        gradient[b, t] = (sides[0] - sides[1]) / (2 * h)
    return value(frozen), gradient
