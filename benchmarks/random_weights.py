"""Random weights of a model, made on its devices: nothing is read, and nothing passes through the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

STD = 0.02


def random_arrays(shapes: Any, seed: int = 0) -> Any:
    """Make arrays of a tree of shapes in one program.

    Args:
      shapes: tree of `jax.ShapeDtypeStruct`s of floating point, with shardings or without, such as those of an abstract
        `run.build.Parts`; the last name of a path says what an array is.
      seed: another one gives other values.

    Returns:
      The same tree: 1 for scales of norms, 0 for biases, else normal with standard deviation 0.02.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)

    def make() -> list[jax.Array]:
        made = []
        for number, (path, leaf) in enumerate(leaves):
            name = getattr(path[-1], "key", "") if path else ""
            if name in ("scale", "bias"):
                made.append(jnp.full(leaf.shape, name == "scale", leaf.dtype))
            else:
                key = jax.random.fold_in(jax.random.key(seed), number)
                made.append((STD * jax.random.normal(key, leaf.shape, jnp.float32)).astype(leaf.dtype))
        return made

    places = [leaf.sharding for _, leaf in leaves]
    return jax.tree.unflatten(structure, jax.jit(make, out_shardings=places)())
