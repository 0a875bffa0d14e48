"""Several rewards at once, by name and weight: the built-in ones and functions of the user's own.

A spec maps names to weights, as a config has it:

    {"paper": 1.0, "my_rewards:short_thinking": 0.2}
    {"accuracy": 0.7, "format": 0.3}

A name is a preset of `rewards.PRESETS` (its total), one component of the paper's reward (`COMPONENTS`), or the path of
a function, `package.module:function` or `package.module.function`, that is called as
`function(completion: str, solution, record) -> number in [0, 1]`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import numbers
import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mllm4d_jax.files.quoting import cut, shown
from mllm4d_jax.qa.errors import MOST_SAID, did_you_mean
from mllm4d_jax.qa.rewards import COMPONENTS, PRESETS, RewardWeights, score

CustomReward = Callable[[str, Any, Any], float]


class RewardError(ValueError):
    """The rewards are set up wrongly, or a reward function of the user's own misbehaves; never the model's text."""


@dataclass(frozen=True)
class Rewards:
    """Weighted rewards of one completion. Made by `load_rewards`.

    Attributes:
      shares: name -> share in the total; not negative, sum 1.
      builtin: rules of the built-in components; None if no built-in reward is asked for.
      preset: name of the preset whose total is in `shares`, "" if none is.
      functions: path -> function of the user's own.
    """

    shares: Mapping[str, float]
    builtin: RewardWeights | None
    preset: str
    functions: Mapping[str, CustomReward]

    def __call__(self, completion: str, solution: Any, record: Any) -> dict[str, float]:
        """Return every reward by its name, and "total", their weighted mean; all in [0, 1].

        With a built-in reward the result also has all components of `rewards.score`, to be logged.

        Args:
          completion: text of the model, without its end-of-text token.
          solution: `rewards.Solution`, or what a record has under that name. Given to functions as it is.
          record: the record that the prompt came from; only functions see it.

        Raises:
          SolutionError: a built-in reward cannot use the solution.
          RewardError: a function raises, tries to end the program, or returns something other than a number in [0, 1].
        """
        values: dict[str, float] = {}
        if self.builtin is not None:
            values = score(completion, solution, self.builtin)
            if self.preset:
                values[self.preset] = values["total"]
        for path, function in self.functions.items():
            values[path] = _call(path, function, completion, solution, record)
        # Shares sum to 1 only up to rounding.
        values["total"] = min(1.0, math.fsum(share * values[name] for name, share in self.shares.items()))
        return values


def load_rewards(spec: Mapping[str, float]) -> Rewards:
    """Return the rewards that a spec names (see the top of this file), loaded and ready to be called.

    Only the ratios of the weights matter: they are divided by their sum, so that the total stays in [0, 1]. A reward of
    weight 0 is computed and reported, but does not count. One preset at most, and no single components beside it: they
    would be two different things of the same name. Single components follow the rules of the paper's preset.

    Raises:
      RewardError: nothing to reward, a weight that is no number or negative, an unknown name, or a path that leads to
        no function; says which.
    """
    if not spec:
        raise RewardError("no reward is set: name at least one, for example {'paper': 1.0}")
    for name, weight in spec.items():
        number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight >= 0):
            raise RewardError(f"the weight of reward {name!r} must be a number that is not negative, not {weight!r}")
    whole = sum(spec.values())
    if not 0 < whole < math.inf:
        raise RewardError(f"the weights of the rewards must sum to something above 0: {dict(spec)}")
    presets = [name for name in spec if name in PRESETS]
    components = [name for name in spec if name in COMPONENTS]
    if len(presets) > 1 or (presets and components):
        raise RewardError(f"take one preset or single components, not {', '.join(presets + components)} together")
    builtin = PRESETS[presets[0]] if presets else PRESETS["paper"] if components else None
    return Rewards(
        shares={name: weight / whole for name, weight in spec.items()},
        builtin=builtin,
        preset=presets[0] if presets else "",
        functions={name: load_function(name) for name in spec if name not in presets + components},
    )


def load_function(path: str) -> CustomReward:
    """Return the function at `package.module:function` or `package.module.function`.

    Raises:
      RewardError: the path is none, there is no such module or function, importing the module fails or ends the
        program, or the function cannot be called with completion, solution and record.
    """
    module_name, separator, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not separator or not all(part.isidentifier() for part in [*module_name.split("."), name]):
        names = [*PRESETS, *COMPONENTS]
        hint = did_you_mean(path, names) or f"; known: {', '.join(names)}"
        raise RewardError(f"reward {path!r} is neither built in nor a path like package.module:function{hint}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = f"there is no module {error.name!r}; is its folder on the Python path (PYTHONPATH)?"
        if not f"{module_name}.".startswith(f"{error.name}."):
            missing = f"module {module_name!r} needs {error.name!r}, which is missing"
        raise RewardError(f"reward {path!r}: {missing}") from error
    except BaseException as error:
        if _is_interrupt(error):
            raise
        raise RewardError(f"reward {path!r}: importing {module_name!r} raised {_said(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        what = f"which has no such function{did_you_mean(name, vars(module))}"
        if function is not None:
            what = f"where it is of type {type(function).__name__}"
        raise RewardError(f"reward {path!r}: {name!r} is not a function of {module_name}, {what}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C do not say
        return function
    try:
        signature.bind("", None, None)
    except TypeError as error:
        raise RewardError(
            f"reward {path!r} must be callable as function(completion, solution, record), but takes {signature}"
        ) from error
    return function


def _call(path: str, function: CustomReward, completion: str, solution: Any, record: Any) -> float:
    where = f" on record {shown(record['id'])}" if isinstance(record, Mapping) and "id" in record else ""
    try:
        value = function(completion, solution, record)
    except BaseException as error:  # sys.exit among them: it would end the run as if all were well
        if _is_interrupt(error):
            raise
        raise RewardError(f"reward {path!r} raised {_said(error)}{where}") from error
    if not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise RewardError(f"reward {path!r} returned {shown(value)}{where}; it must return a number in [0, 1]")
    return float(value)


def _is_interrupt(error: BaseException) -> bool:
    """Whether the user interrupts the program: raised by the handler of the signal, not by the code it came to."""
    if not isinstance(error, KeyboardInterrupt):
        return False
    handler = signal.getsignal(signal.SIGINT)
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return handler is signal.default_int_handler or getattr(handler, "__code__", None) in codes  # that one has no frame


def _said(error: BaseException) -> str:
    return cut(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, MOST_SAID)
