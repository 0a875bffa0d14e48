"""Jobs of reinforcement learning that are planned in tests."""

from __future__ import annotations

from configs import common
from mllm4d_jax.plan.job import GrpoJob, Lengths


def job_of(config, **lengths) -> GrpoJob:
    words = [f"{name}={value}" for name, value in lengths.items()]
    return GrpoJob.of(config, Lengths.parse(words, config))


def paper_job(**settings) -> GrpoJob:
    config = common.config("grpo")
    config.model.published = "8b"
    config.update_from_flattened_dict(settings)
    return job_of(config)
