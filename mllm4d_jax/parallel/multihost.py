"""What the processes of a run must do together. With one process every function here returns at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def is_primary() -> bool:
    """Whether this process is the one that writes logs, config and reports."""
    return jax.process_index() == 0


def gather(numbers: Sequence[int]) -> np.ndarray:
    """The same count of whole numbers from every process: i32[processes, numbers], equal on all of them.

    Every process has to call this at the same point of the run. It waits for the device work sent before it.

    Raises:
      OverflowError: a number does not fit 32 bits.
    """
    if any(not -(2**31) <= n < 2**31 for n in numbers):
        raise OverflowError(f"{list(numbers)} do not fit 32 bits")
    row = np.asarray(numbers, np.int32)
    if jax.process_count() == 1:
        return row[None]
    return np.asarray(multihost_utils.process_allgather(row)).reshape(jax.process_count(), len(row))


def primary_first(work: Callable[[], T]) -> T:
    """Runs `work` on the first process and then on all others, so that these find its files complete.

    Raises what `work` raises; when it raises on the first process the others still try for themselves.
    """
    if jax.process_count() == 1:
        return work()
    name = f"primary first: {work.__qualname__}"
    if not is_primary():
        multihost_utils.sync_global_devices(name)
        return work()
    try:
        return work()
    finally:
        multihost_utils.sync_global_devices(name)


class FirstProcessError(ValueError):
    """The first process of the run cannot go on."""


def primary_only(work: Callable[[], T]) -> T | None:
    """Runs `work` on the first process alone; the others wait for it, and get None.

    Raises what `work` raises; on the others, FirstProcessError then.
    """
    problem, result = None, None
    if is_primary():
        try:
            result = work()
        except Exception as error:  # the others must hear of it before it is raised
            problem = error
    if gather([problem is not None])[0, 0]:
        raise problem or FirstProcessError("the first process of this run cannot go on; its own output says why")
    return result


class OtherProcessError(ValueError):
    """Another process of the run cannot go on."""


def together(work: Callable[[], T]) -> T:
    """Runs `work`, which concerns this process alone, on every process; where it fails on one, none goes on.

    Raises what `work` raises; on the others, OtherProcessError then.
    """
    if jax.process_count() == 1:
        return work()
    problem, result = None, None
    try:
        result = work()
    except Exception as error:  # the others must hear of it before it is raised
        problem = error
    refuse(gather([problem is not None])[:, 0], problem)
    return result


def refuse(failed: np.ndarray, problem: Exception | None) -> None:
    """Raises if a process has failed: its own problem on that one, OtherProcessError on the others.

    Args:
      failed: bool or i32[processes].
    """
    if np.any(failed):
        which = ", ".join(map(str, np.flatnonzero(failed)))
        raise problem or OtherProcessError(
            f"process {which} of {len(failed)} cannot go on; its own output says why. The same command goes on from "
            "the newest checkpoint"
        )


def gather_bytes(data: bytes) -> list[bytes]:
    """The bytes of every process, in the order of the processes, equal on all of them. Called as `gather`."""
    if jax.process_count() == 1:
        return [data]
    sizes = gather([len(data)])[:, 0]
    padded = np.frombuffer(data.ljust(int(sizes.max()), b"\0"), np.uint8)
    found = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes() for row, size in zip(found, sizes.tolist(), strict=True)]


def share(total: int) -> int:
    """This process's part of a count that belongs to the whole run; the parts add up to it."""
    hosts, host = jax.process_count(), jax.process_index()
    return total // hosts + (host < total % hosts)
