"""The two sides of grpo_vs_hf.py: this project's GRPO step, and Transformers with PEFT, on the same weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import ml_collections
import numpy as np
import torch

from benchmarks.sft_contenders import STORED, Shape, write_model
from configs import common
from configs.published import published_config
from mllm4d_jax.data.samples import draw, make_clip, questions, write_video
from mllm4d_jax.grpo import settings
from mllm4d_jax.grpo.actor import Drawn
from mllm4d_jax.grpo.prompts import Prompt, PromptStep
from mllm4d_jax.grpo.setup import GrpoSetup, set_up
from mllm4d_jax.grpo.task import rows_of
from mllm4d_jax.models.config import ModelConfig
from mllm4d_jax.models.flops import Tuning, real_work, step_flops
from mllm4d_jax.qa.system_prompt import ST_COT
from mllm4d_jax.rows.completion_rows import CompletionRows
from mllm4d_jax.run.checkpoint import Checkpoints
from tools import make_checkpoint
from tools.reference import cases
from tools.reference.tensors import tensors

RATE, SEED = 1e-3, 0
PHASES = ("vision", "prefill", "decode", "score", "reference", "update")
SMALL = "small"  # the size that has no name among the published ones
_BUCKET = 64  # prompts are padded to the next multiple


def noise(completion: str, solution: Any, record: Any) -> float:
    """A number in [0, 1] made from the text: a random model says nothing to reward, and equal rewards teach nothing."""
    return zlib.crc32(completion.encode()) / (2**32 - 1)


class TimedUpdate(NamedTuple):
    """One step: seconds of each of PHASES and of the whole, and processor seconds."""

    phases: dict[str, float]
    whole: float
    cpu: float


class Numbers(NamedTuple):
    """What a side makes of the same completions: log-probs f32[C, T] of policy and reference, loss, gradient norm."""

    policy: np.ndarray
    reference: np.ndarray
    loss: float
    norm: float


def write_world(folder: Path, clips: int) -> Path:
    """Writes clips of STORED size and prompts.jsonl, one question about each; returns its path."""
    rng = np.random.default_rng(SEED)
    (folder / "videos").mkdir(parents=True)
    lines = []
    for n in range(clips):
        clip, name = make_clip(rng), f"videos/clip_{n:03d}.mp4"
        frames = (cv2.resize(f, STORED[::-1], interpolation=cv2.INTER_CUBIC) for f in np.repeat(draw(clip), 3, axis=0))
        write_video(folder / name, np.stack(list(frames)))
        asked = questions(clip, rng)[0]
        turns = [{"role": "user", "content": f"<video>\n{asked.text}"}]
        lines.append(json.dumps({"messages": turns, "videos": [name], "solution": [asked.solution]}) + "\n")
    path = folder / "prompts.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_weights(folder: Path, size: str, shape: Shape, records: Path) -> None:
    """Writes a random model: of this shape for SMALL, else a published one, or `tiny` with the vocabulary of those."""
    if size == SMALL:
        write_model(folder, shape, [records.read_text(encoding="utf-8"), ST_COT])
    else:
        config = make_checkpoint.tiny_config() if size == "tiny" else published_config(size)
        make_checkpoint.write_checkpoint(folder, config, SEED)


def run_config(
    model: Path, records: Path, *, prompts: int, completions: int, tokens: int, frames: int, side: int, dtype: str
) -> ml_collections.ConfigDict:
    """The GRPO config both sides follow: the paper's objective and prompt, frozen tower, LoRA on q, k, v, o."""
    config = common.config("grpo")
    config.model.path, config.model.adapter, config.model.dtype = str(model), "", dtype
    config.model.remat = "none"
    config.data.path, config.data.root = str(records), str(records.parent)
    config.data.prefix_buckets = tuple(range(_BUCKET, config.data.max_tokens + 1, _BUCKET))
    config.video.num_frames, config.video.min_pixels, config.video.max_pixels = frames, side**2, side**2
    config.lora.rank, config.lora.alpha = 16, 32.0
    config.optim.lr, config.optim.warmup_ratio, config.optim.schedule = RATE, 0.0, "constant"
    config.rollout.prompts, config.rollout.completions = prompts, completions
    config.rollout.max_new_tokens, config.rollout.buckets = tokens, (tokens,)
    config.reward.functions = ("paper::1.0", f"{noise.__module__}:{noise.__name__}::1.0")
    config.objective.gap_bound = 10.0  # the comparison learns twice from the same completions, uncorrected
    return config


class Ours:
    """The actor and the learner of a run."""

    def __init__(self, config: ml_collections.ConfigDict, setup: GrpoSetup) -> None:
        self._config, self._setup = config, setup
        # Without an end token every completion is as long as the cap, on both sides.
        setup.actor.options = dataclasses.replace(setup.actor.options, eos_ids=())
        self.banned_ids = setup.actor.options.banned_ids
        self.decode = setup.begun.encoder.tokenizer.decode
        self._steps = 0

    @property
    def adapter(self) -> Any:
        """Tree of the trained parameters on the host."""
        return jax.tree.map(np.array, self._setup.state.trainable)

    def prompts(self) -> PromptStep:
        """Prompts of the next step."""
        return self._setup.loader.next_step()

    def draw(self, found: PromptStep) -> Drawn:
        """Completions of the prompts by the policy as it is."""
        self._steps += 1
        return self._setup.actor.draw(found, self._setup.sampling_weights(), self._steps, self._steps)

    def reference(self, drawn: Drawn) -> tuple[Any, list[CompletionRows], np.ndarray]:
        """(the batch with the reference's log-probs, its rows, these log-probs)."""
        setup = self._setup
        length, parts = rows_of(self._config, setup.actor.shape, drawn)
        batch = drawn.rollouts.batch(length)
        scored = np.asarray(
            setup.learner.score(setup.reference, setup.begun.parts.frozen, drawn.features, parts, batch)
        )
        return batch._replace(reference_logprobs=scored), parts, scored

    def update(self, drawn: Drawn, batch: Any, parts: list[CompletionRows]) -> tuple[float, float]:
        """One optimiser step: (loss, gradient norm) before it."""
        setup, state = self._setup, self._setup.state
        state.trainable, state.opt_state, update = setup.learner.update(
            state.trainable, state.opt_state, setup.begun.parts.frozen, drawn.features, parts, batch
        )
        jax.block_until_ready(state.trainable)
        return float(update.step.loss), float(update.step.grad_norm)

    def numbers(self, drawn: Drawn) -> Numbers:
        """Log-probs, loss and gradient norm of the policy as it is, which then makes an optimiser step."""
        setup, (batch, parts, reference) = self._setup, self.reference(drawn)
        policy = setup.learner.score(setup.state.trainable, setup.begun.parts.frozen, drawn.features, parts, batch)
        return Numbers(np.asarray(policy), reference, *self.update(drawn, batch, parts))

    def step(self, found: PromptStep) -> TimedUpdate:
        """Draws, scores, updates."""
        started, used = time.perf_counter(), time.process_time()
        drawn = self.draw(found)
        sampled = time.perf_counter()
        batch, parts, _ = self.reference(drawn)
        scored = time.perf_counter()
        self.update(drawn, batch, parts)
        ended = time.perf_counter()
        phases = {name: drawn.rollouts.seconds[name] for name in PHASES[:4]}
        phases |= {"reference": scored - sampled, "update": ended - scored}
        return TimedUpdate(phases, ended - started, time.process_time() - used)

    def facts(self, drawn: Drawn) -> tuple[dict[str, int], float]:
        """(numbers of tokens, FLOPs that the model needs for the update: the pass of the reference not included)."""
        c, (_, parts) = self._config, rows_of(self._config, self._setup.actor.shape, drawn)
        model = ModelConfig.from_dict(json.loads((Path(c.model.path) / "config.json").read_text(encoding="utf-8")))
        tuning = Tuning(rank=c.lora.rank, targets=tuple(c.lora.targets))
        flops = sum(
            step_flops(
                model, real_work(rows.inputs, int((rows.places < rows.loss_index.shape[1]).sum())), tuning
            ).total.model
            for rows in parts
        )
        prompt = int(drawn.batch.lengths.max())
        counts = {
            "prompt": prompt,
            "visual": int((drawn.batch.inputs.vision_index[0] >= 0).sum()),
            "ours": sum(rows.inputs.tokens.size for rows in parts),
            "theirs": len(drawn.rollouts.lengths) * (prompt + drawn.rollouts.tokens.shape[1]),
        }
        return counts, flops


@contextlib.contextmanager
def open_ours(config: ml_collections.ConfigDict, folder: Path) -> Iterator[Ours]:
    """A run at its start, with its workdir in `folder`."""
    settings.check(config)
    with Checkpoints(folder / "checkpoints", config.train.keep_checkpoints) as checkpoints:
        setup = set_up(config, folder, checkpoints)
        with setup.begun.encoder, setup.loader, setup.actor, setup.greedy:
            yield Ours(config, setup)


class Clock:
    """Seconds by phase. The tower interrupts the phase in which it is called."""

    def __init__(self, wait: Callable[[], None]) -> None:
        self.seconds, self._wait, self._phase = dict.fromkeys(PHASES, 0.0), wait, PHASES[0]
        self._last = time.perf_counter()

    def enter(self, phase: str) -> str:
        """Ends the phase that runs; returns its name."""
        self._wait()
        now, before = time.perf_counter(), self._phase
        self.seconds[before] += now - self._last
        self._last, self._phase = now, phase
        return before


class Theirs:
    """Transformers with PEFT: `generate` with several sequences per prompt, then rows of whole sequences."""

    def __init__(self, config: ml_collections.ConfigDict, ours: Ours, device: str, at_once: int) -> None:
        """
        Args:
          device: of torch.
          at_once: sequences of a forward pass; gradients of several passes add up.
        """
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForImageTextToText

        o, lora, dtype = config.optim, config.lora, getattr(torch, config.model.dtype)
        base = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=dtype, attn_implementation="sdpa")
        base.generation_config.eos_token_id = None
        base = base.to(device)
        self._base = base.model
        adapter = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=list(lora.targets))
        self._model = get_peft_model(base, adapter).eval()
        self._device, self._dtype, self._at_once, self._config = device, dtype, at_once, config
        self._objective, self._rewards = settings.objective_of(config), settings.rewards_of(config)
        self._prompts = cases.Prompts.from_folder(config.model.path, SEED)
        self._decode = ours.decode
        self._banned = torch.zeros(base.config.text_config.vocab_size, dtype=torch.bool, device=device)
        self._banned[list(ours.banned_ids)] = True
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay
        )
        self._wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self._clock = Clock(self._wait)
        interrupted: list[str] = []

        def resume(*_) -> None:  # what a hook returns would take the place of the output
            self._clock.enter(interrupted.pop())

        self._base.visual.register_forward_pre_hook(lambda *_: interrupted.append(self._clock.enter("vision")))
        self._base.visual.register_forward_hook(resume)

    def load(self, adapter: Any) -> None:
        """Takes over our adapter: stacked over layers there, transposed here."""
        leaves = {tuple(k.key for k in path)[-2:]: x for path, x in jax.tree_util.tree_leaves_with_path(adapter)}
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                if parameter.requires_grad:
                    parts = name.split(".")
                    stacked = leaves[parts[-4], parts[-3].lower()]
                    parameter.copy_(torch.from_numpy(stacked[int(parts[parts.index("layers") + 1])].T.copy()))

    def feed(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """The prompts as the model takes them, padded on the left, each with its own clip."""
        rows = [cases.example_row(prompt.example) for prompt in prompts]
        arrays = tensors(cases.batch(self._prompts, rows, "left"))
        return {name: value.to(self._device) for name, value in arrays.items() if name != "labels"}

    def step(self, prompts: Sequence[Prompt], feed: dict[str, torch.Tensor]) -> TimedUpdate:
        """Draws, scores, updates; `feed` is ready before the clock starts."""
        c, started, used = self._config.rollout, time.perf_counter(), time.process_time()
        self._clock = Clock(self._wait)
        tokens = self._generate(feed, c.completions, c.max_new_tokens)
        self._clock.enter("score")
        rewards = []
        for i, row in enumerate(tokens.tolist()):
            prompt = prompts[i // c.completions]
            rewards.append(self._rewards(self._decode(row), prompt.record.solution, prompt.described())["total"])
        self._clock.enter("reference")
        reference = self._reference(feed, tokens)
        self._clock.enter("update")
        self._gradient(feed, tokens, self._advantages(rewards), reference)
        torch.nn.utils.clip_grad_norm_(self._trained, self._config.optim.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._clock.enter("update")
        return TimedUpdate(self._clock.seconds, time.perf_counter() - started, time.process_time() - used)

    def numbers(self, drawn: Drawn) -> Numbers:
        """Log-probs, loss and gradient norm for completions of ours; no optimiser step."""
        r = drawn.rollouts
        tokens, old = (torch.from_numpy(x).to(self._device) for x in (r.tokens.astype(np.int64), r.logprobs))
        feed = self.feed(drawn.prompts)
        reference = self._reference(feed, tokens)
        policy, loss = self._gradient(feed, tokens, self._advantages(r.totals.tolist()), reference, old)
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self._config.optim.clip_norm)
        self._optimizer.zero_grad(set_to_none=True)
        return Numbers(policy.cpu().numpy(), reference.cpu().numpy(), loss, norm.item())

    def _precision(self) -> contextlib.AbstractContextManager:
        """bfloat16 as trainers run it: PEFT keeps the adapters in float32, autocast multiplies in bfloat16."""
        return torch.autocast(self._device, torch.bfloat16, enabled=self._dtype == torch.bfloat16)

    def _generate(self, feed: dict[str, torch.Tensor], branches: int, length: int) -> torch.Tensor:
        """i64[C, T] new tokens, from the policy's own distribution over what may be drawn."""
        from transformers import GenerationConfig

        def allowed(_, scores: torch.Tensor) -> torch.Tensor:
            return scores.masked_fill(self._banned, -torch.inf)

        def first(ids: torch.Tensor, _, **__) -> torch.Tensor:
            if ids.shape[1] == feed["input_ids"].shape[1] + 1:
                self._clock.enter("decode")
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        how = GenerationConfig(
            do_sample=True,
            temperature=self._config.rollout.temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=branches,
            max_new_tokens=length,
            use_cache=True,
            pad_token_id=self._prompts.pad_id,
        )
        self._base.rope_deltas = None  # kept from the call before otherwise
        self._clock.enter("prefill")
        with torch.no_grad(), self._precision():
            ids = self._model.generate(
                **feed, generation_config=how, logits_processor=[allowed], stopping_criteria=[first]
            )
        new = ids[:, feed["input_ids"].shape[1] :]
        if new.shape != (len(feed["input_ids"]) * branches, length):
            raise RuntimeError(f"generate gave {tuple(new.shape)} tokens, where the cap is {length}")
        return new

    def _advantages(self, rewards: Sequence[float]) -> torch.Tensor:
        """f32[C], of each reward within its group."""
        groups = torch.tensor(rewards, device=self._device).reshape(-1, self._config.rollout.completions)
        centred = groups - groups.mean(1, keepdim=True)
        return (centred / (groups.std(1, keepdim=True) + self._objective.std_eps)).reshape(-1)

    def _parts(self, count: int) -> list[range]:
        return [range(at, min(at + self._at_once, count)) for at in range(0, count, self._at_once)]

    def _reference(self, feed: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """f32[C, T] with the adapter switched off: at the start it changes nothing, so this is the starting policy."""
        with torch.no_grad(), self._model.disable_adapter():
            return torch.cat([self._logprobs(feed, tokens, part) for part in self._parts(len(tokens))])

    def _gradient(
        self,
        feed: dict[str, torch.Tensor],
        tokens: torch.Tensor,
        advantages: torch.Tensor,
        reference: torch.Tensor,
        old: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, float]:
        """(log-probs f32[C, T], loss), gradients added up; `old` None for the policy's own log-probs."""
        o, found, total = self._objective, [], 0.0
        for part in self._parts(len(tokens)):
            own = self._logprobs(feed, tokens, part)
            before = own.detach() if old is None else old[part.start : part.stop]
            ratio, pull = torch.exp(own - before), advantages[part.start : part.stop, None]
            kept = torch.minimum(ratio * pull, ratio.clamp(1 - o.eps_low, 1 + o.eps_high) * pull)
            apart = reference[part.start : part.stop] - own
            loss = (o.beta * (torch.expm1(apart) - apart) - kept).mean(1).sum() / len(tokens)
            loss.backward()
            found.append(own.detach())
            total += loss.item()
        return torch.cat(found), total

    def _logprobs(self, feed: dict[str, torch.Tensor], tokens: torch.Tensor, part: range) -> torch.Tensor:
        """f32[n, T] of some of the sequences, in one pass over prompt, clip and completion of each."""
        owners = [i * len(feed["input_ids"]) // len(tokens) for i in part]
        new = tokens[part.start : part.stop]
        rows = {
            "input_ids": torch.cat([feed["input_ids"][owners], new], 1),
            "attention_mask": torch.cat([feed["attention_mask"][owners], torch.ones_like(new)], 1),
            "mm_token_type_ids": torch.cat([feed["mm_token_type_ids"][owners], torch.zeros_like(new)], 1),
        }
        grids = feed["video_grid_thw"]  # one video per prompt
        clips = feed["pixel_values_videos"].split(grids.prod(1).tolist())
        rows |= {"video_grid_thw": grids[owners], "pixel_values_videos": torch.cat([clips[i] for i in owners])}
        self._base.rope_deltas = None
        with self._precision():
            logits = self._model(**rows, use_cache=False, logits_to_keep=new.shape[1] + 1).logits[:, :-1]
        logits = logits.float().masked_fill(self._banned, -torch.inf) / self._config.rollout.temperature
        return logits.gather(-1, new[..., None])[..., 0] - logits.logsumexp(-1)
