"""Weights laid out for sampling on another mesh than the learner's.

Learning may split every weight over all devices (fsdp) and gather a layer at a time; sampling would gather the whole
model for each token. The same devices are then seen as a second mesh, of data and tensor alone: the base weights are
placed on it once, besides the learner's copy, and what is trained is copied there before each step's completions.

In a run of several processes each samples on its own part of that mesh, where all weights are: no process waits for
another to end its completions, and none has to know of another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from mllm4d_jax.models.attention import choose_backend
from mllm4d_jax.models.split import merge_model, split_model
from mllm4d_jax.parallel.mesh import make_mesh
from mllm4d_jax.parallel.place import own_copies, placed
from mllm4d_jax.parallel.rules import parameter_sharding


def sampling_mesh(mesh: Mesh, tensor: int) -> Mesh:
    """The devices of a mesh as one of data and tensor; `mesh` itself for tensor = 0.

    Raises:
      MeshError: the devices cannot be divided.
    """
    return make_mesh({"data": -1, "tensor": tensor}, list(mesh.devices.flat)) if tensor else mesh


class SamplingWeights:
    """What the sampler is given.

    Attributes:
      graphdef: structure of the model on the sampling mesh.
      mesh: that mesh, or this process's part of it.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        trainable: Any,
        frozen: Any,
        mesh: Mesh,
        *,
        learner_mesh: Mesh,
        patterns: Sequence[str],
        attention: str,
        own: Mesh,
    ) -> None:
        """
        Args:
          graphdef, trainable, frozen: from `models.split.split_model`, on the learner's mesh; arrays, or shapes with
            shardings, whose copies are shapes, too.
          mesh: to sample on; the learner's for no second copy.
          patterns: what is trained, as given to `split_model`.
          attention: backend by its configured name; chosen anew for the mesh.
          own: this process's part of `mesh`, see `own_part`.
        """
        self.graphdef, self.mesh, self._frozen, self._places = graphdef, own, frozen, None
        self._apart = own is not mesh
        if own is learner_mesh:
            return
        model = merge_model(graphdef, trainable, frozen)
        config = model.config
        backend = choose_backend(attention, model.dtype, own, config.largest_head, config.grouped_widths)
        model.mesh, model.backend = own, backend
        self.graphdef = split_model(model, patterns)[0]
        if mesh is not learner_mesh:
            self._places = _places(model, patterns, mesh)
            self._frozen = _copied(frozen, self._places[1])
        if self._apart:
            self._frozen = own_copies(self._frozen, own)

    def of(self, trainable: Any) -> tuple[Any, Any]:
        """Return the trees for `Sampler.generate` with the given trained weights; all processes call it."""
        if self._places is not None:
            trainable = _copied(trainable, self._places[0])
        return own_copies(trainable, self.mesh) if self._apart else trainable, self._frozen


def _copied(tree: Any, places: Any) -> Any:
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):
        return jax.tree.map(placed, tree, places)
    return jax.device_put(tree, places)


def _places(model: nnx.Module, patterns: Sequence[str], mesh: Mesh) -> tuple[Any, Any]:
    """Shardings of the trained and the frozen tree."""

    def place(variable: nnx.Variable) -> nnx.Variable:
        value = variable.get_value()
        axes = variable.get_metadata().get("logical_axes") or (None,) * value.ndim
        return variable.replace(placed(value, parameter_sharding(axes, value.shape, mesh)))

    graphdef, state = nnx.split(model)
    shapes = nnx.merge(graphdef, jax.tree.map(place, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))
    _, trainable, frozen = split_model(shapes, patterns)
    return jax.tree.map(lambda x: x.sharding, (trainable, frozen))
