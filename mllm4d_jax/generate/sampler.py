"""Sampling G completions of each of B prompts: prefill once, then jitted chunks of decode steps with early exit.

The G completions of a row answer one prompt, or (shared-prefix rows) a question each about what the row begins with.

The model is the learner's own (no second implementation), and log-probs come from the functions that the learner uses
(`policy.py`). Between chunks the host reads the new tokens, ends completions and has others begin in their places
(`stream.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.generate import programs
from mllm4d_jax.generate.completions import Completions, Detokenize, Sampled
from mllm4d_jax.generate.decoding import PromptCache
from mllm4d_jax.generate.inputs import Prompts
from mllm4d_jax.generate.joined import choose_form
from mllm4d_jax.generate.policy import SamplingOptions
from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.generate.stream import CompletionStream, Limits
from mllm4d_jax.models.vision import VisionFeatures
from mllm4d_jax.parallel.place import place_rows
from mllm4d_jax.parallel.products import compiler_options
from mllm4d_jax.parallel.rules import batch_shards, replicated
from mllm4d_jax.rows.batch import ModelInputs


class Sampler:
    """Generates for any number of batches; keeps the compiled programs.

    Attributes:
      compiles: programs compiled so far (prefill, packing and decode chunks), counted when traced.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        mesh: Mesh | None = None,
        *,
        chunk: int = 32,
        ladder: Ladder | None = None,
        form: str | None = None,
    ) -> None:
        """
        Args:
          graphdef: structure of the model, from `nnx.split`.
          mesh: the mesh that the model was made for, None for one device.
          chunk: decode steps between two looks of the host.
          ladder: sizes of the device's arrays; None for powers of two that fit the mesh.
          form: of decoding, of `joined.FORMS`; None for what is best on the devices.

        Raises:
          ValueError: a mesh that splits weights over `fsdp`: every decode step would gather all of them.
        """
        if mesh is not None and mesh.shape.get("fsdp", 1) > 1:
            raise ValueError(
                f"sampling on a mesh with fsdp = {mesh.shape['fsdp']} gathers all weights for every token: "
                "place the model on a mesh of data and tensor"
            )
        if chunk < 1:
            raise ValueError(f"a chunk needs at least one step, got {chunk}")
        self.mesh, self.chunk, self.compiles = mesh, chunk, 0
        self.ladder = ladder or Ladder(shards=1 if mesh is None else batch_shards(mesh))
        self._form = form

        def of_model(program, *static: str, donated: tuple = ()):
            return self._compiled(functools.partial(program, graphdef), static, donated)

        def of_caches(program, *static: str, donated: tuple = ()):
            return self._compiled(functools.partial(program, mesh), static, donated)

        self.begin = of_model(programs.prefix)
        self.start = of_model(programs.start, "branches", "options", "apart")
        self.encode = of_model(programs.encode)
        self.layers = of_model(programs.layers, "kernels")
        self.empty = of_model(programs.empty, "shape", "prompt", "apart")
        self.decode = of_model(programs.decode_chunk, "options", "chunk", donated=("own",))
        self.insert = of_caches(programs.insert, donated=("cache", "own"))
        self.take_prompts, self.take_branches = of_caches(programs.take_prompts), of_caches(programs.take_branches)
        self.grow_prompts = of_caches(programs.grow_prompts, "prompt")
        self.grow_branches = of_caches(programs.grow_branches, "width", "slots")

    def _compiled(self, function, static: tuple = (), donated: tuple = ()):
        def counted(*args, **kwargs):
            self.compiles += 1  # runs when traced, not when executed
            return function(*args, **kwargs)

        options = compiler_options(self.mesh)
        return jax.jit(counted, static_argnames=static, donate_argnames=donated, compiler_options=options)

    def form(self, weights: tuple) -> str:
        """Form of decoding with these weights (arrays, or shapes that are placed), of `joined.FORMS`."""
        return choose_form(self.mesh, weights) if self._form is None else self._form

    def lower(self, program: str, *args: Any, **named: Any) -> jax.stages.Lowered:
        """A program of `programs.py`, "decode_chunk" as "decode", for placed shapes."""
        return getattr(self, program).lower(*args, **named)

    def prefix(self, weights: tuple, inputs: ModelInputs) -> PromptCache:
        """Runs the common beginning of prompts that are not all known yet, for any number of calls of `generate`.

        Args:
          weights: as in `stream`.
          inputs: plain rows, one for each row of these calls.
        """
        return self.begin(weights, place_rows(inputs, self.mesh))

    def stream(
        self,
        weights: tuple,
        prompts: Iterable[Prompts],
        *,
        options: SamplingOptions,
        seed: int = 0,
        limits: Limits,
        detokenize: Detokenize | None = None,
    ) -> CompletionStream:
        """Completions of one prompt after the other, as they end; where they end others begin.

        Args:
          weights: the trees that `models.split.merge_model` takes.
          prompts: at most as many together as there are devices that rows are split over (`ladder.shards`). They are
            asked for when there is room for them; all are plain rows, or all are shared-prefix rows.
          seed: in [0, 2^32); another one gives other completions.
          limits: how many prompts and branches are on the devices at a time.
          detokenize: needed for `options.stop`.
        """
        return CompletionStream(self, weights, prompts, options, np.uint32(seed), limits, detokenize)

    def generate(
        self,
        weights: tuple,
        inputs: ModelInputs,
        *,
        prompt_ids: Sequence[int] | Sequence[Sequence[int]],
        branches: int,
        max_new_tokens: int | np.ndarray,
        options: SamplingOptions,
        seed: int = 0,
        features: VisionFeatures | None = None,
        prefix: PromptCache | None = None,
        detokenize: Detokenize | None = None,
        limits: Limits | None = None,
    ) -> Sampled:
        """Draws the completions. Each depends on (seed, prompt id, branch number), its prompt and the weights alone.

        Args:
          inputs, prompt_ids, branches, max_new_tokens, features, prefix: see `inputs.Prompts`, which refuses some.
          limits: None for all at a time.
          weights, options, seed, detokenize: see `stream`.
        """
        prompts = Prompts.checked(inputs, prompt_ids, branches, max_new_tokens, features, prefix)
        if inputs.layout is None and inputs.vision is not None and features is None and len(prompts) > 1:
            # Each prompt's prefill is a program of its own, that all frames are for: they are encoded before.
            features = self.encode(weights, place_rows(inputs.vision, self.mesh))
            prompts = Prompts(inputs._replace(vision=None), prompts.call, features)
        stream = self.stream(
            weights,
            prompts.divided(self.ladder.shards),
            options=options,
            seed=seed,
            limits=limits or Limits(len(prompts)),
            detokenize=detokenize,
        )
        found = dict(stream)
        joined = Completions.join([found[n] for n in range(len(prompts))], options.pad_id)
        return Sampled(**vars(joined), statistics=stream.statistics)

    def everywhere(self, tree: Any) -> Any:
        """Host numbers on all devices."""
        return tree if self.mesh is None else jax.device_put(tree, replicated(self.mesh))
