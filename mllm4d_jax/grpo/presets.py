"""What a GRPO objective consists of, and the published ones by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from configs.schema import did_you_mean
from mllm4d_jax.grpo.advantages import SCALES
from mllm4d_jax.grpo.ratios import LEVELS

SURROGATES = ("clip", "cispo")
KL_ESTIMATORS = ("k1", "k2", "k3")
REDUCTIONS = ("sequence_mean", "token_mean", "constant")
OVERLONG = ("keep", "mask", "soft")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """One choice for each piece of the objective. Compiled into the step.

    Attributes:
      scale: divisor of the advantages, one of `advantages.SCALES`; ddof, std_eps: its standard deviation.
      ratio: level of the importance ratio, one of `ratios.LEVELS`.
      surrogate: "clip" (PPO's minimum) or "cispo", see `objective.surrogate`.
      eps_low, eps_high: the ratio is clipped to [1 - eps_low, 1 + eps_high].
      dual_clip: for negative advantages the ratio counts as at most this (> 1 + eps_high); None for no such bound.
      kl: estimator of the divergence from the reference; beta: its weight in the loss, 0 for none.
      reduction: how tokens and completions are averaged, one of REDUCTIONS, see `objective.token_weights`.
      max_completion: length cap in tokens; used by the reduction "constant" and by overlong "soft".
      overlong: completions cut off by the cap are kept, masked out of the loss, or all long ones are punished softly.
      overlong_share: last part of the cap over which the soft punishment grows; overlong_penalty: its greatest value.
      dynamic_sampling: groups of equal rewards are left out of the loss (and their places are to be filled by others).
      gap_bound: mean |learner - sampler| log-prob (nats) from which on the gap is corrected; importance_cap: the
        greatest weight of that correction. See `ratios.correct_for_gap`.
    """

    scale: str = "group"
    ddof: int = 1
    std_eps: float = 1e-4
    ratio: str = "token"
    surrogate: str = "clip"
    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float | None = None
    kl: str = "k3"
    beta: float = 0.0
    reduction: str = "sequence_mean"
    max_completion: int = 4096
    overlong: str = "keep"
    overlong_share: float = 0.2
    overlong_penalty: float = 1.0
    dynamic_sampling: bool = False
    gap_bound: float = 0.01
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        known = dict(
            scale=SCALES, ratio=LEVELS, surrogate=SURROGATES, kl=KL_ESTIMATORS, reduction=REDUCTIONS, overlong=OVERLONG
        )
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"objective {name}={getattr(self, name)!r} is unknown (known: {', '.join(choices)})")
        rules = {
            "0 <= eps_low <= 1": 0 <= self.eps_low <= 1,
            "eps_high >= 0": 0 <= self.eps_high < math.inf,
            "dual_clip > 1 + eps_high": self.dual_clip is None or 1 + self.eps_high < self.dual_clip < math.inf,
            "dual_clip goes with surrogate clip": self.dual_clip is None or self.surrogate == "clip",
            "ddof is 0 or 1": self.ddof in (0, 1),
            "std_eps > 0": 0 < self.std_eps < math.inf,
            "beta >= 0": 0 <= self.beta < math.inf,
            "max_completion >= 1": self.max_completion >= 1,
            "0 < overlong_share <= 1": 0 < self.overlong_share <= 1,
            "overlong_penalty >= 0": 0 <= self.overlong_penalty < math.inf,
            "gap_bound >= 0": self.gap_bound >= 0,
            "importance_cap >= 1": 1 <= self.importance_cap < math.inf,
        }
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError(f"objective needs {'; '.join(broken)}, got {self}")

    @property
    def overlong_cache(self) -> int:
        """Tokens before the cap over which the soft punishment grows."""
        return max(1, round(self.overlong_share * self.max_completion))


# GRPO is arXiv 2402.03300, MLLM-4D arXiv 2603.00515. Where its paper is silent (epsilon, standard deviation, average
# over completions), `paper` follows the trainer that its authors used, which `release` does anyway; they differ in
# beta. DAPO (arXiv 2503.14476): cap 20,480 of which the last 4,096 are punished, here the same share of another cap.
# Dr. GRPO: arXiv 2503.20783. GSPO: arXiv 2507.18071, section 5.1; without KL, as in the authors' runs.
PRESETS: Mapping[str, ObjectiveConfig] = {
    "paper": ObjectiveConfig(beta=0.1),
    "release": ObjectiveConfig(beta=0.001),
    "dapo": ObjectiveConfig(
        std_eps=1e-6, eps_high=0.28, reduction="token_mean", overlong="soft", dynamic_sampling=True
    ),
    "dr_grpo": ObjectiveConfig(scale="none", reduction="constant"),
    "gspo": ObjectiveConfig(std_eps=1e-6, ratio="sequence", eps_low=3e-4, eps_high=4e-4),
}


def resolve_objective(preset: str) -> ObjectiveConfig:
    """Return the objective of a preset. Raises ValueError for an unknown name."""
    if preset not in PRESETS:
        raise ValueError(f"no objective preset {preset!r} (known: {', '.join(PRESETS)}){did_you_mean(preset, PRESETS)}")
    return PRESETS[preset]
