"""The two sides of sft_vs_hf.py: this project's training step, and Transformers with PEFT, on the same weights."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.small_world import ask, write_clip
from configs import common
from mllm4d_jax.data.steps import LoadedBatch
from mllm4d_jax.encode.encoder import Encoder
from mllm4d_jax.qa.records import Record
from mllm4d_jax.run.begin import Begun
from mllm4d_jax.run.build import build, encoder_of, open_records
from mllm4d_jax.run.checkpoint import Checkpoints, Progress
from mllm4d_jax.run.optimizer import init_optimizer
from mllm4d_jax.sft.setup import make_loader
from mllm4d_jax.sft.step import TrainStep
from tools.reference import cases
from tools.reference.tensors import tensors

RATE, SEED = 1e-3, 0


class TimedStep(NamedTuple):
    """One step: seconds to prepare its batch and to run it, processor seconds of the latter, loss, gradient norm."""

    data: float
    step: float
    cpu: float
    loss: float
    norm: float


def write_world(folder: Path, clips: int, per_clip: int) -> Path:
    """Writes clips of STORED size with `per_clip` questions each, and records.json; returns its path."""
    rng = np.random.default_rng(SEED)
    (folder / "videos").mkdir(parents=True)
    records = []
    for n in range(clips):
        name = f"videos/clip_{n:03d}.mp4"
        write_clip(folder / name, n)
        for asked in ask(per_clip, rng):
            turns = [{"from": "human", "value": f"<video>\n{asked.text}"}, {"from": "gpt", "value": asked.letter}]
            records.append({"video": name, "conversations": turns})
    path = folder / "records.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def run_config(
    model: Path, records: Path, *, batch: int, per_video: int, steps: int, frames: int, side: int
) -> ml_collections.ConfigDict:
    """The SFT config both sides follow: fp32, frozen tower, LoRA on q, k, v, o, AdamW at a constant rate."""
    config = common.config("sft")
    config.model.path, config.data.path, config.data.root = str(model), str(records), str(records.parent)
    config.model.dtype, config.model.remat = "float32", "none"
    config.video.num_frames, config.video.min_pixels, config.video.max_pixels = frames, side**2, side**2
    config.data.questions_per_video = per_video
    config.lora.rank, config.lora.alpha = 16, 32.0
    config.optim.lr, config.optim.warmup_ratio, config.optim.schedule = RATE, 0.0, "constant"
    config.train.batch_size, config.train.steps = batch, steps
    return config


class Ours:
    """The loader and the jitted step of a run."""

    def __init__(self, config: ml_collections.ConfigDict, folder: Path) -> None:
        parts = build(config)
        self._frozen, self._mesh, self._optimizer = parts.frozen, parts.mesh, parts.optimizer
        self.adapter = jax.tree.map(np.array, _random_b(parts.trainable))
        self.restart()
        chunk = config.train.loss_chunk
        self._step = TrainStep(parts.graphdef, self._optimizer, self._lora, self._state, parts.mesh, chunk)
        self.encoder = encoder_of(config.model.path, config.video, config.data.max_tokens)
        with Checkpoints(folder / "checkpoints", 1) as checkpoints:
            begun = Begun(folder, checkpoints, open_records(config), {}, Progress(), parts, self.encoder)
        self._loader = make_loader(begun)
        self._batches: list[tuple[LoadedBatch, float]] = []

    def load(self, steps: int) -> list[list[int]]:
        """Prepares the batches of all steps; returns the numbers of their records."""
        for _ in range(steps):
            started = time.perf_counter()
            step = self._loader.next_step()
            loaded = step.finish(self._loader.shape.sizes(step.needed))
            self._batches.append((loaded, time.perf_counter() - started))
        return [[int(key.rpartition("#")[2]) for key in loaded.keys] for loaded, _ in self._batches]

    def restart(self) -> None:
        """Puts adapter and optimiser back to the start; what was compiled stays."""
        self._lora = jax.device_put(self.adapter, NamedSharding(self._mesh, PartitionSpec()))
        self._state = init_optimizer(self._optimizer, self._lora, self._mesh)

    def record(self, i: int) -> Record:
        return self._loader.stream.mixture.sources[0][i]

    def run(self, step: int) -> TimedStep:
        """One step on the batch loaded for it."""
        loaded, data = self._batches[step]
        started, used = time.perf_counter(), time.process_time()
        self._lora, self._state, m = self._step(self._lora, self._state, self._frozen, [loaded.batch], step)
        loss = float(m.loss)
        jax.block_until_ready(self._lora)
        spent = (time.perf_counter() - started, time.process_time() - used)
        return TimedStep(data, *spent, loss, float(m.grad_norm))

    def facts(self) -> str:
        """Sizes of the first batch."""
        loaded = self._batches[0][0]
        rows, length = loaded.batch.inputs.tokens.shape
        padding = 1 - loaded.counts.tokens / loaded.counts.slots
        return f"{rows} rows of {length} tokens, {padding:.0%} of them padding, {loaded.counts.visual} visual"


def _random_b(lora):
    """B is zero at the start of a run, which leaves A without a gradient: random, so that all of it is compared."""
    rng = np.random.default_rng(SEED)

    def fill(path, x):
        return 0.02 * rng.standard_normal(x.shape, np.float32) if path[-1].key == "lora_b" else x

    return jax.tree_util.tree_map_with_path(fill, lora)


class Theirs:
    """Transformers with PEFT: one padded row per question, every question with its own clip."""

    def __init__(self, config: ml_collections.ConfigDict, adapter, encoder: Encoder) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForImageTextToText

        base = AutoModelForImageTextToText.from_pretrained(
            config.model.path, dtype=torch.float32, attn_implementation="sdpa"
        )
        lora, o = config.lora, config.optim
        self._model = get_peft_model(
            base, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=list(lora.targets))
        ).train()
        self._encoder, self._clip = encoder, o.clip_norm
        self._prompts = cases.PromptMaker.from_folder(config.model.path, SEED)
        self.trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self.trained, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay
        )
        self._start = self._adapter(adapter)
        self.restart()

    def _adapter(self, adapter) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Our adapter under their parameters: stacked over layers there, transposed here."""
        start = {}
        leaves = {tuple(k.key for k in path): x for path, x in jax.tree_util.tree_leaves_with_path(adapter)}
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                parts = name.split(".")
                layer, kind = int(parts[parts.index("layers") + 1]), f"lora_{parts[-3][-1].lower()}"
                path = next(p for p in leaves if p[-1] == kind and p[-2] == parts[-4])
                start[parameter] = torch.from_numpy(leaves[path][layer].T.copy())
        return start

    def restart(self) -> None:
        """Puts adapter and optimiser back to the start."""
        with torch.no_grad():
            for parameter, value in self._start.items():
                parameter.copy_(value)
        self._optimizer.state.clear()

    def run(self, records: Sequence[Record]) -> TimedStep:
        """One step on these records, each encoded on its own."""
        started = time.perf_counter()
        rows = [cases.example_row(self._encoder.encode(record)) for record in records]
        batch = tensors(cases.batch(self._prompts, rows, "right"))
        prepared, used = time.perf_counter(), time.process_time()
        self._model.base_model.model.model.rope_deltas = None  # kept from the call before otherwise
        loss = self._model(**batch, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        spent = (time.perf_counter() - prepared, time.process_time() - used)
        return TimedStep(prepared - started, *spent, loss.item(), norm.item())
