"""Programs of which the fastest form that fits the devices is run: what `model.remat=auto` comes to.

A form keeps certain activations of the forward pass. What a compiled program wants is known before it runs, and so is
what the devices have left; so a form is compiled, looked at, and dropped for the next one where it does not fit. The
first one fits in most runs, and nothing is compiled in vain then.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mllm4d_jax.models.layers import REMAT
from mllm4d_jax.parallel import multihost
from mllm4d_jax.parallel.place import memory_stats
from mllm4d_jax.run.log import say

AUTO = "auto"
SHARE = 0.95  # of what the runtime can give out; gaps between arrays are no room for a program's one large block
_MIB = 1 << 20

Room = Callable[[], int | None]


def remat_forms(asked: str, platform: str) -> tuple[str, ...]:
    """Return the policies that `model.remat` lets a step have, fastest first.

    A CPU has no memory of its own to fit: everything is kept there. "none" is not tried on an accelerator, where it
    saves little time and fits next to nothing.
    """
    if asked != AUTO:
        return (asked,)
    return REMAT[:1] if platform == "cpu" else REMAT[1:]


def remat_of(asked: str, mesh: Mesh) -> str:
    """Return the policy of a model before its step chooses: the one that keeps least of those it can have."""
    return remat_forms(asked, mesh.devices.flat[0].platform)[-1]


def free_bytes() -> int | None:
    """Return the bytes that a program can still have on the fullest device of all processes; None if they do not say.

    Every process of a run has to call this at the same point.
    """
    stats = [memory_stats(device) for device in jax.local_devices()]
    if not all("bytes_limit" in s for s in stats):
        return None
    free = min(SHARE * s["bytes_limit"] - s["bytes_in_use"] for s in stats)
    return int(multihost.gather([max(0, int(free)) // _MIB]).min()) * _MIB


def out_of_memory(problem: BaseException) -> bool:
    """Whether an error says that devices have too little memory, be it the compiler's or that of a program."""
    said = ("RESOURCE_EXHAUSTED", "Ran out of memory in memory space")
    return isinstance(problem, jax.errors.JaxRuntimeError) and any(words in str(problem) for words in said)


def wanted_bytes(message: str) -> int:
    """Return the bytes that such an error names: those of the program, or of the array that found no room; 0 for none.

    The compiler for TPUs says "Used 24.50G of 15.75G hbm", its runtime "Attempting to reserve 5.43G at ...", that of
    GPUs "Out of memory while trying to allocate 58.12GiB" or "... 1234567 bytes".
    """
    found = re.search(r"(?:Used|allocate|reserve|request for) ([\d.]+) ?([KMGT])?i?(?:B|b|\b)", message)
    return int(float(found[1]) * 2 ** (10 * (" KMGT".index(found[2] or " ")))) if found else 0


@dataclasses.dataclass(frozen=True)
class Choice:
    """A form of a program for arguments of one shape.

    Attributes:
      name: of the form; run: runs it.
      wanted: bytes that it takes besides its arguments, room: those that are left; 0 where nothing was compared.
    """

    name: str
    run: Callable
    wanted: float = 0
    room: float = 0

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.wanted <= self.room


class Fitted:
    """A function in several forms; for each shape of its arguments the first one that fits is compiled and run.

    Attributes:
      dropped: forms that were compiled in vain, besides the one for each shape.
    """

    def __init__(self, make: Callable[[str], Callable], forms: Sequence[str], room: Room = free_bytes) -> None:
        """
        Args:
          make: gives the jitted function of a form.
          forms: their names, fastest first. A single one is run as it is.
          room: bytes that are left, None if not known; then the last form is run.
        """
        self._forms, self._room, self.dropped = {name: make(name) for name in forms}, room, 0
        self._choices: dict[Any, Choice] = {}

    def __call__(self, *args: Any) -> Any:
        return self.choose(*args).run(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """The first form for shapes that are placed."""
        return next(iter(self._forms.values())).lower(*args)

    def choose(self, *args: Any) -> Choice:
        """Return the form for such arguments; the last one, which may not fit, where no other does."""
        if len(self._forms) == 1:
            ((name, form),) = self._forms.items()
            return Choice(name, form)
        leaves, structure = jax.tree.flatten(args)
        key = structure, tuple((np.shape(x), x.dtype) for x in leaves)
        if key not in self._choices:
            self._choices[key] = self._choose(args)
        return self._choices[key]

    def _choose(self, args: tuple) -> Choice:
        room = self._room()
        names = tuple(self._forms) if room is not None else tuple(self._forms)[-1:]
        for name in names:
            try:
                program = self._forms[name].lower(*args).compile()
            except jax.errors.JaxRuntimeError as problem:  # TPUs: the compiler itself says that it does not fit
                if not out_of_memory(problem):
                    raise
                choice = Choice(name, self._forms[name], wanted=float("inf"), room=room or 0)
            else:
                choice = Choice(name, program) if room is None else Choice(name, program, extra_bytes(program), room)
            if choice.fits:
                break
            self.dropped += name != names[-1]
        if choice.fits:
            limit = "" if room is None else f": {choice.wanted / 2**30:.1f} of {room / 2**30:.1f} GiB that are left"
            say(f"model.remat=auto takes '{choice.name}'{limit}")
        return choice


def extra_bytes(program: jax.stages.Compiled) -> int:
    """Return the bytes that a program takes on a device besides its arguments."""
    m = program.memory_analysis()
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.temp_size_in_bytes + results + m.generated_code_size_in_bytes
