"""One of two processes with two devices each: rows and weights go where they belong. Run with its number and a port."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mllm4d_jax.parallel import multihost
from mllm4d_jax.parallel.mesh import AXES, own_part
from mllm4d_jax.parallel.place import everywhere, join_rows, own_copies, place_rows, put
from mllm4d_jax.rows.completion_rows import CompletionRows


def rows_of(host: int) -> CompletionRows:
    """Two rows whose numbers say whose they are; only the fields that differ in form matter."""
    numbers = np.arange(2, dtype=np.int32) + 10 * host
    return CompletionRows((), None, numbers[:, None], numbers[:, None], numbers, numbers[:, None, None])


def main(host: int, port: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, host)
    # On a TPU, the devices of a process need not be neighbours on the mesh.
    crossed = np.array(jax.devices())[[0, 3, 1, 2]]
    for devices, tensor in ((crossed, 1), (np.array(jax.devices()), 2)):
        mesh = Mesh(devices.reshape(-1, 1, tensor), AXES)
        own = own_part(mesh)
        assert {d.process_index for d in own.devices.flat} == {host} and own.devices.shape == (2 // tensor, 1, tensor)
        rows = place_rows(rows_of(host), mesh)
        twice = jax.jit(lambda x: 2 * x)(rows.completions)
        mine = np.concatenate([s.data for s in sorted(twice.addressable_shards, key=lambda s: s.index[0].start or 0)])
        assert sorted(set(mine.ravel().tolist())) == [20 * host, 20 * host + 2], mine

        # What each process has on its own devices lies beside the rows that it has given.
        features = jnp.asarray(rows_of(host).loss_target * 1.5)
        joined = join_rows(features, mesh)
        apart = jax.jit(lambda a, b: jnp.max(jnp.abs(a - 1.5 * b)))(joined, rows.loss_target)
        assert joined.shape == (4,) and float(apart) == 0

        whole = np.arange(8, dtype=np.float32).reshape(2, 4)
        split = put(whole, NamedSharding(mesh, PartitionSpec(None, "tensor")))
        alone = own_copies({"kernel": split}, own)["kernel"]
        assert alone.is_fully_addressable and np.array_equal(alone, whole)
        assert alone.addressable_shards[0].data.shape == (2, 4 // tensor)
        assert np.array_equal(jax.jit(lambda x: x @ x.T)(alone), whole @ whole.T)
        assert np.array_equal(everywhere(whole, mesh).addressable_data(0), whole)
    assert multihost.gather_bytes(b"ab" * host + b"c") == [b"c", b"abc"]
    try:
        multihost.together(lambda: 1 / host)
    except ZeroDivisionError:
        assert host == 0
    except multihost.OtherProcessError as error:
        assert host == 1 and "process 0 of 2 cannot go on" in str(error)
    assert multihost.together(lambda: host) == host
    print("as it should be", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
