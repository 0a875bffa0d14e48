"""What is planned of a run apart from the devices, and what no config says: how long the records' texts are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

import ml_collections

from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.grpo.settings import completions_per_row, layout_problems, objective_of
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.rows.rows import RowSizes
from mllm4d_jax.rows.shape import RowShape
from mllm4d_jax.run.build import loader_options, model_sizes, processor_of, row_shape

# Qwen3-VL writes a time before each temporal patch and markers around it: "<12.5 seconds>" is 7 tokens.
TIME_TOKENS = 9
LONGEST = 1.5  # the longest completion of a step is taken to have that many times the tokens of the mean one


class PlanError(ValueError):
    """A plan that cannot be made; the message says what to change."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long texts are taken to be, in tokens.

    Attributes:
      branch: of a question with its answer; answer: of them supervised; system: before the video (fine-tuning).
      text: of a prompt besides its clip: system text, question, options (reinforcement learning).
      completion: of an average completion; five short steps of reasoning with two blocks of centres have about 512.
    """

    branch: int = 96
    answer: int = 24
    system: int = 32
    text: int = 384
    completion: int = 512

    @classmethod
    def parse(cls, words: Sequence[str], config: ml_collections.ConfigDict) -> Self:
        """Return the lengths that words such as "branch=120" set; a mean completion is never longer than the longest.

        Raises:
          PlanError: another name than those of the config's task, no whole number, or lengths that do not go together.
        """
        known, chosen = cls.names(config.task), {}
        for word in words:
            name, _, value = word.partition("=")
            if name not in known or not value.isdecimal() or not int(value):
                raise PlanError(f"--plan: '{word}' is not one of {', '.join(f'{n}=TOKENS' for n in known)}")
            chosen[name] = int(value)
        lengths = cls(**chosen)
        if lengths.answer > lengths.branch:
            raise PlanError(f"--plan: branches of {lengths.branch} tokens cannot hold answers of {lengths.answer}")
        if config.task == "sft":
            return lengths
        cap = config.rollout.max_new_tokens
        if chosen.get("completion", 0) > cap:
            raise PlanError(f"--plan: completion={chosen['completion']} is above rollout.max_new_tokens = {cap}")
        return dataclasses.replace(lengths, completion=min(lengths.completion, cap))

    @staticmethod
    def names(task: str) -> tuple[str, ...]:
        """Return the lengths that matter to a task."""
        return ("answer", "branch", "system") if task == "sft" else ("completion", "text")


@dataclasses.dataclass(frozen=True)
class PlanJob:
    """A run of fine-tuning to plan."""

    config: ml_collections.ConfigDict  # of the run
    model: ModelConfig  # sizes of the model
    shape: RowShape  # of the run's rows
    lengths: Lengths  # what the sizes suppose
    sizes: RowSizes  # what full rows are padded to; for reinforcement learning what prompts are padded to

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, lengths: Lengths) -> Self:
        """Return the job of a config; of the model folder, weights and tokenizer are not needed.

        Raises:
          BuildError, ModelConfigError, ProcessorError: no model is named, or its config.json cannot be used.
          LoaderError: a batch that cannot be divided.
          PlanError: clips without a limit.
        """
        model = model_sizes(config)
        shape = row_shape(config, processor_of(config), model)
        if not shape.clip_frames:
            raise PlanError("video.num_frames = 0 lets clips be of any length: a plan needs the number of their frames")
        # A clip that data.max_tokens does not let through is never seen, however many pixels the resize rule allows.
        extra = TIME_TOKENS if model.family == "qwen3_vl" else 0
        most = max(1, config.data.max_tokens // shape.clip_frames - extra)
        merged = min(shape.frame_patches // shape.merge_area, most)
        text = lengths.system if config.task == "sft" else lengths.text
        prefix = min(shape.clip_frames * (merged + extra) + text, config.data.max_tokens)
        branch = (lengths.branch, lengths.answer) if config.task == "sft" else (1, 1)
        return cls(config, model, shape, lengths, shape.largest(prefix, *branch, merged * shape.merge_area))

    @property
    def item(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def rows(self) -> int:
        """Rows of a micro-batch over all devices."""
        return loader_options(self.config).local(1)[1]

    def with_settings(self, settings: Mapping[str, int]) -> Self:
        """Return the job with other values of dotted keys that change none of its sizes."""
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            config.update_from_flattened_dict(dict(settings))
        return dataclasses.replace(self, config=config)


@dataclasses.dataclass(frozen=True)
class GrpoJob(PlanJob):
    """A run of reinforcement learning to plan.

    Attributes:
      hosts: that draw completions of their own prompts, each on its own devices.
    """

    hosts: int = 1

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, lengths: Lengths) -> Self:
        """Return the job of a config, see `PlanJob.of`; PlanError also for settings that work on no devices."""
        problems = list(layout_problems(config))
        try:
            objective_of(config)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise PlanError("\n".join(problems))
        return super().of(config, lengths)

    @property
    def rollout(self) -> ml_collections.ConfigDict:
        """Of the config."""
        return self.config.rollout

    @property
    def rows(self) -> int:
        """The learner's rows of a micro-batch over all devices."""
        return (
            self.rollout.prompts
            * (self.rollout.completions // completions_per_row(self.config))
            // self.config.train.accumulation
        )

    @property
    def reference(self) -> bool:
        """Whether there is a second policy, which the trained one is kept near to."""
        return objective_of(self.config).beta > 0

    @property
    def at_once(self) -> int:
        """Prompts in the samplers of all hosts at a time."""
        asked = min(self.rollout.prompts_at_once or self.rollout.prompts, self.rollout.prompts)
        return -(-asked // self.hosts) * self.hosts

    @property
    def width(self) -> int:
        """Completions of a prompt in the sampler at a time."""
        return min(self.rollout.completions_at_once or self.rollout.completions, self.rollout.completions)

    def sampled(self, data: int) -> int:
        """Return the rows of the samplers' arrays, filled up: `data` is how many parts all hosts split them into."""
        return -(-self.at_once // data) * data

    def longest(self, mean: int) -> int:
        """Return the tokens of the longest completion of a step, for completions of `mean` tokens."""
        return min(round(LONGEST * mean), self.rollout.max_new_tokens)

    def row_sizes(self, mean: int) -> RowSizes:
        """Return the sizes of a learner's row for completions of `mean` tokens; its features are computed before."""
        per_row, longest = completions_per_row(self.config), self.longest(mean)
        sizes = self.shape.completion_sizes(longest, min(per_row * longest, self.rollout.completions * mean))
        return RowSizes(self.sizes.prefix, per_row, sizes[0], 0, 0, sizes[1], packed=False)

    def cache_bytes(self, rows: int, slots: int, branches: int = 1) -> int:
        """Return the bytes of the keys and values of all layers, of `rows` prompts with `branches` of `slots` each."""
        t = self.model.text
        return 2 * t.num_layers * rows * branches * t.num_kv_heads * slots * t.head_dim * self.item

    def rungs(self, ladder: Ladder, longest: int) -> list[tuple[int, int]]:
        """Return (positions of a branch's cache, decode steps with such a cache) until the longest completion ends.

        The first token comes from the prefill and the last one is never fed back: `longest - 1` steps in all.
        """
        chunk, most, found = self.rollout.chunk, max(self.rollout.max_new_tokens - 1, 1), {}
        for step in range(1, longest, chunk):
            slots = ladder.slots(min(step + chunk - 1, most), most)
            found[slots] = found.get(slots, 0) + min(chunk, longest - step)
        return list(found.items())

    def decode_rungs(self, ladder: Ladder, mean: int) -> list[tuple[int, int]]:
        """Return as `rungs` the decode steps for a step's prompts, with completions of `mean` tokens.

        The last completions of a prompt have the longest among them, those before make room as they end. Prompts that
        wait find caches as long as they will be.
        """
        longest = self.longest(mean)
        rungs, waves = self.rungs(ladder, longest), -(-self.rollout.completions // self.width)
        each = (waves - 1) * mean + longest - 1
        further = -(-self.rollout.prompts // self.at_once) * each - (longest - 1)
        return [*rungs[:-1], *((slots, steps + further) for slots, steps in rungs[-1:])]
