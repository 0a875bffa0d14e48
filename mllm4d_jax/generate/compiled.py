"""The sampler's programs, compiled as they are needed for a model, its mesh and its settings."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.generate import programs
from mllm4d_jax.generate.joined import choose_form
from mllm4d_jax.generate.slots import Ladder
from mllm4d_jax.parallel.products import compiler_options
from mllm4d_jax.parallel.rules import batch_shards, replicated


class CompiledPrograms:
    """Keeps the programs for any number of batches; `programs.py` says what each does.

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

    def everywhere(self, tree: Any) -> Any:
        """Host numbers on all devices."""
        return tree if self.mesh is None else jax.device_put(tree, replicated(self.mesh))
