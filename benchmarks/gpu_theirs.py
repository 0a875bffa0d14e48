"""The reference's side of gpu.py: Transformers with PEFT, in a process of its own. Rows go to standard output.

Training is what a Trainer does: a padded row per question, each with its own copy of the clip, logits of every
position, gradient checkpointing, autocast, AdamW. Decoding is `generate`, with the adapters as in our sampler.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    os.environ["JAX_PLATFORMS"] = "cpu"  # the device's memory is for torch

import torch

from benchmarks import gpu_work as work
from tools.reference import cases
from tools.reference.tensors import tensors

SIDE = "theirs"


class Reference:
    """A random model on the device, with adapters on q, k, v and o."""

    def __init__(self, folder: Path, scale: work.Scale, device: str) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForImageTextToText

        self._folder, self._scale, self.device = folder, scale, device
        self._dtype = getattr(torch, scale.dtype)
        config = AutoConfig.from_pretrained(folder)
        with torch.device(device):
            base = AutoModelForImageTextToText.from_config(config, dtype=self._dtype, attn_implementation="sdpa")
        base.generation_config.eos_token_id = None  # every completion is as long as the cap
        self._base, targets = base.model, ["q_proj", "k_proj", "v_proj", "o_proj"]
        lora = LoraConfig(r=scale.rank, lora_alpha=2 * scale.rank, lora_dropout=0.0, target_modules=targets)
        self.model = get_peft_model(base, lora)
        self._prompts = cases.PromptMaker.from_folder(folder, 0)

    def feed(self, clips: int, questions: int) -> dict[str, torch.Tensor]:
        """Rows of one question each (0: prompts without one), about as many clips, on the device."""
        rows = [work.make_questions(self._folder, self._scale, clip, questions)[0] for clip in range(clips)]
        arrays = tensors(cases.batch(self._prompts, [cases.example_row(row) for row in rows], "left"))
        if not questions:
            del arrays["labels"]
        return {name: value.to(self.device) for name, value in arrays.items()}

    def precision(self):
        """bfloat16 as trainers run it: PEFT keeps the adapters in float32."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self._dtype == torch.bfloat16)

    def forget(self) -> None:
        """Positions are kept from the call before otherwise."""
        self._base.rope_deltas = None

    def wait(self, _: object = None) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else None


def decode(reference: Reference, scale: work.Scale, prompts: int, branches: int) -> None:
    """Report `generate`: seconds of all tokens less those of the first one."""
    from transformers import GenerationConfig

    feed = reference.feed(prompts, 0)
    reference.model.eval()

    def run(tokens: int) -> None:
        how = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=branches,
            max_new_tokens=tokens,
            use_cache=True,
            pad_token_id=0,
        )
        reference.forget()
        with torch.no_grad(), reference.precision():
            out = reference.model.generate(**feed, generation_config=how)
        if out.shape != (prompts * branches, feed["input_ids"].shape[1] + tokens):
            raise RuntimeError(f"generate gave {tuple(out.shape)} tokens")

    run(2)
    first, whole = (work.seconds_of(lambda n=n: run(n), reference.wait, 1) for n in (1, scale.their_tokens))
    seconds = (whole - first) / (scale.their_tokens - 1)
    work.report(
        f"{prompts}x{branches}",
        SIDE,
        milliseconds_per_step=1e3 * seconds,
        tokens_per_second=prompts * branches / seconds,
        steps=scale.their_tokens - 1,
        prefill_s=first,
        prompt=feed["input_ids"].shape[1],
        peak_gib_so_far=reference.peak_gib(),
    )


def sft(reference: Reference, scale: work.Scale, rows: int) -> None:
    """Report training steps of `rows` questions."""
    model, feed = reference.model, reference.feed(rows, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step() -> torch.Tensor:
        reference.forget()
        with reference.precision():
            loss = model(**feed, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    seconds = work.seconds_of(step, reference.wait, scale.steps)
    work.report(
        f"{rows} rows of a question",
        SIDE,
        seconds=seconds,
        qa_per_second=rows / seconds,
        peak_gib_so_far=reference.peak_gib(),
        loss=step().item(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--candidates", default="1x1,2x12", help="prompts and branches of decoding")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    names = ("torch", "transformers", "peft")
    work.report("versions", SIDE, **{name: importlib.metadata.version(name) for name in names})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise SystemExit("this torch sees no GPU")
    scale = work.scale_of(args.tiny, gpu=device == "cuda")
    with tempfile.TemporaryDirectory() as name:
        started = time.perf_counter()
        work.write_settings(Path(name), scale.size)
        reference = Reference(Path(name), scale, device)
        print(f"model on the device after {time.perf_counter() - started:.0f} s", file=sys.stderr)
        for candidate in args.candidates.split(","):
            prompts, branches = map(int, candidate.split("x"))
            work.guarded(candidate, functools.partial(decode, reference, scale, prompts, branches), SIDE)
        reference.model.train()
        reference.model.enable_input_require_grads()
        reference.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rows = scale.clips
        while rows and not work.guarded(
            f"{rows} rows of a question", functools.partial(sft, reference, scale, rows), SIDE
        ):
            rows //= 2
            if device == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
