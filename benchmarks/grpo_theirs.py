"""Their side of grpo_vs_hf.py: Transformers with PEFT, on the same weights and completions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence

import ml_collections
import numpy as np
import torch

from benchmarks.grpo_work import PHASES, SEED, Numbers, Sample, TimedUpdate
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.grpo import settings
from mllm4d_jax.grpo.prompts import Prompt
from mllm4d_jax.qa.records import as_prompt
from mllm4d_jax.run.build import open_records
from tools.reference import cases
from tools.reference.tensors import tensors


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

    def __init__(self, config: ml_collections.ConfigDict, encoder: Encoder, device: str, at_once: int) -> None:
        """
        Args:
          encoder: of the records.
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
        self._prompts = cases.PromptMaker.from_folder(config.model.path, SEED)
        self._encoder, self._records = encoder, open_records(config).sources[0]
        size = base.config.text_config.vocab_size
        self._banned = torch.zeros(size, dtype=torch.bool, device=device)
        self._banned[list(settings.sampling_of(config, encoder.tokenizer, size).banned_ids)] = True
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

    def load(self, adapter: Mapping[str, np.ndarray]) -> None:
        """Takes over our adapter: stacked over layers there, transposed here."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                if parameter.requires_grad:
                    parts = name.split(".")
                    stacked = adapter[f"{parts[-4]}/{parts[-3].lower()}"]
                    parameter.copy_(torch.from_numpy(stacked[int(parts[parts.index("layers") + 1])].T.copy()))

    def prompts(self, keys: Sequence[str]) -> tuple[Prompt, ...]:
        """The prompts of these records, encoded anew."""
        records = (as_prompt(self._records[int(key.rpartition("#")[2])]) for key in keys)
        return tuple(Prompt(0, self._encoder.encode(record, add_generation_prompt=True), record) for record in records)

    def feed(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """The prompts as the model takes them, padded on the left, each with its own clip."""
        rows = [cases.example_row(prompt.example) for prompt in prompts]
        arrays = tensors(cases.batch(self._prompts, rows, "left"))
        return {name: value.to(self._device) for name, value in arrays.items() if name != "labels"}

    def step(self, keys: Sequence[str]) -> TimedUpdate:
        """Draws, scores, updates for the prompts of these records, which are ready before the clock starts."""
        prompts = self.prompts(keys)
        feed = self.feed(prompts)
        c, started, used = self._config.rollout, time.perf_counter(), time.process_time()
        self._clock = Clock(self._wait)
        tokens = self._generate(feed, c.completions, c.max_new_tokens)
        self._clock.enter("score")
        rewards = []
        for i, row in enumerate(tokens.tolist()):
            prompt = prompts[i // c.completions]
            rewards.append(
                self._rewards(self._encoder.tokenizer.decode(row), prompt.record.solution, prompt.described())["total"]
            )
        self._clock.enter("reference")
        reference = self._reference(feed, tokens)
        self._clock.enter("update")
        self._gradient(feed, tokens, self._advantages(rewards), reference)
        torch.nn.utils.clip_grad_norm_(self._trained, self._config.optim.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._clock.enter("update")
        return TimedUpdate(self._clock.seconds, time.perf_counter() - started, time.process_time() - used)

    def numbers(self, sample: Sample) -> Numbers:
        """Log-probs, loss and gradient norm for completions of ours; no optimiser step."""
        tokens, old = (torch.from_numpy(x).to(self._device) for x in (sample.tokens.astype(np.int64), sample.logprobs))
        feed = self.feed(self.prompts(sample.keys))
        reference = self._reference(feed, tokens)
        policy, loss = self._gradient(feed, tokens, self._advantages(sample.rewards.tolist()), reference, old)
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
