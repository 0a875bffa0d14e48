"""What a config key is, how a table of keys becomes a ConfigDict, and how any config is checked against that table."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_collections

TYPE_NAMES = MappingProxyType(
    {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}
)


MAX_WHOLE = 2**31 - 1  # counters and seeds of the devices are 32 bits wide
MAX_NUMBER = 1e9  # as seconds 31 years, which every timer takes
_PRINTABLE = 10**300  # a larger whole number is no float


class ConfigError(ValueError):
    """A config that cannot be used: an unknown key, a value of the wrong type, a variant or file that is not there."""


@dataclass(frozen=True)
class Key:
    """One config key. Unless a flag below says otherwise, a run that goes on in its workdir must keep the value.

    Attributes:
      name: dotted.
      default: of the type that every value has to have.
      help: one line.
      choices: the only values allowed; () = any.
      low, high: inclusive bounds of a number, or of each in a tuple; without a `high`, whole numbers end at `MAX_WHOLE`
        and others at `MAX_NUMBER`.
      free: the value may change when a run goes on: it says where, how fast or how much of the work is done, or what
        is made of the results afterwards, but not what a result is.
      content: the value names files (or a checkpoint). It may change as well, but what is in the files may not: the
        task keeps a digest of them in place of the value.
      bucket: the value, or a part of it, may be a path in a bucket (gs://BUCKET/...).
      element: type of each value in a tuple; None for that of the values in the default, where there are some.
      above: exclusive lower bound, in place of `low`.
      adapter: part of what the numbers of an adapter mean; a run that starts from an adapter needs the same value.
    """

    name: str
    default: bool | int | float | str | tuple
    help: str
    choices: tuple = ()
    low: float | None = None
    high: float | None = None
    free: bool = False
    content: bool = False
    adapter: bool = False
    bucket: bool = False
    element: type | None = None
    above: float | None = None

    def __post_init__(self) -> None:
        if self.default == () and self.element is None:
            raise ValueError(f"{self.name}: a tuple that is empty by default needs the type of its elements")


@dataclass(frozen=True)
class Presets:
    """The `get_config` of a config file: called with the name of a variant, it returns that variant's config.

    Attributes:
      path: of the file, for messages.
      keys: the table of its task.
      variants: name -> (one line of help, {dotted key: value}); a call without a name takes the first.
    """

    path: str
    keys: tuple[Key, ...]
    variants: Mapping[str, tuple[str, Mapping[str, Any]]]

    def __call__(self, variant: str | None = None) -> ml_collections.ConfigDict:
        """Raises ConfigError naming the nearest variant and all there are, or the keys and values that are wrong."""
        name = next(iter(self.variants)) if variant is None else variant
        if name not in self.variants:
            listed = ", ".join(self.spell(known) for known in self.variants)
            close = nearest(name, [known for known in self.variants if known])
            hint = f" - did you mean '{self.spell(close)}'?" if close else ""
            raise ConfigError(f"{self.path} has no variant '{name}'{hint} (there are: {listed})")
        return complete(self.variants[name][1], self.keys)

    def spell(self, variant: str) -> str:
        """Return what follows `--config=` for a variant."""
        return f"{self.path}:{variant}" if variant else self.path


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the member of `known` that `word` was most likely meant to be, or "" when none is similar.

    The last part of a dotted name counts on its own too: `steps` is near `train.steps`.
    """
    tails, tail = {}, word.rpartition(".")[2]
    for name in known:
        tails.setdefault(name.rpartition(".")[2], []).append(name)
    every = [name for names in tails.values() for name in names]
    close = (
        difflib.get_close_matches(word, tails.get(tail, ()), n=1, cutoff=0.0)
        or difflib.get_close_matches(word, every, n=1)
        or [tails[name][-1] for name in difflib.get_close_matches(tail, tails, n=1)]
    )
    return close[0] if close else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` - did you mean 'x'?`, or "" when nothing known is similar to `word`."""
    close = nearest(word, known)
    return f" - did you mean '{close}'?" if close else ""


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for every leaf of a nested mapping or ConfigDict, in its own order."""
    for name, value in config.items():
        if isinstance(value, (Mapping, ml_collections.ConfigDict)):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def build(keys: Iterable[Key], values: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
    """Return a locked ConfigDict with every key of the table, `values` (dotted name -> checked value) laid over it."""
    values = values or {}
    config = ml_collections.ConfigDict()
    for key in keys:
        group = config
        *parents, leaf = key.name.split(".")
        for parent in parents:
            if parent not in group:
                group[parent] = ml_collections.ConfigDict()
            group = group[parent]
        group[leaf] = values.get(key.name, key.default)
    config.lock()
    return config


def checked(key: Key, value: Any) -> Any:
    """Return `value` in the key's own type. Raises ConfigError when the type, the range or the choice is wrong."""
    wanted = type(key.default)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= _PRINTABLE else math.inf
    if wanted is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not wanted:
        raise ConfigError(f"{key.name} must be {TYPE_NAMES[wanted]}, not {type(value).__name__} {reprlib.repr(value)}")
    if wanted is tuple:
        element = key.element or type(key.default[0])
        wrong = [item for item in value if type(item) is not element]
        if wrong:
            raise ConfigError(f"{key.name} must be a tuple of {element.__name__} values, not {reprlib.repr(wrong[0])}")
        if "" in value:
            raise ConfigError(f"{key.name} must not hold an empty text")
    if key.choices and value not in key.choices:
        options = ", ".join(repr(choice) for choice in key.choices)
        hint = did_you_mean(value, key.choices) if isinstance(value, str) else ""
        raise ConfigError(f"{key.name} must be one of {options}, not {value!r}{hint}")
    for number in value if wanted is tuple else (value,):
        _check_range(key, number)
    return value


def _check_range(key: Key, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if value != value or value in (math.inf, -math.inf):
        raise ConfigError(f"{key.name} must be a finite number, not {value}")
    high = (MAX_WHOLE if isinstance(value, int) else MAX_NUMBER) if key.high is None else key.high
    told = f"{value:.10g}" if abs(value) <= _PRINTABLE else "one of more than 300 digits"
    if key.above is not None and value <= key.above:
        raise ConfigError(f"{key.name} must be above {key.above:g}, not {told}")
    if key.low is not None and value < key.low:
        raise ConfigError(f"{key.name} must be at least {key.low:g}, not {told}")
    if value > high:
        raise ConfigError(f"{key.name} must be at most {high:.10g}, not {told}")


def complete(config: Mapping[str, Any] | ml_collections.ConfigDict, keys: Iterable[Key]) -> ml_collections.ConfigDict:
    """Return the full locked config of a task: `config` checked key by key, keys that it leaves out at their defaults.

    Raises ConfigError with every unknown key and every unusable value, one line each.
    """
    table = {key.name: key for key in keys}
    values, problems = {}, []
    for name, value in flatten(config):
        try:
            if name not in table:
                raise ConfigError(unknown_key(name, table))
            values[name] = checked(table[name], value)
        except ConfigError as problem:
            problems.append(str(problem))
    if problems:
        raise ConfigError("\n".join(problems))
    return build(table.values(), values)


def fixed(config: ml_collections.ConfigDict, keys: Iterable[Key]) -> dict[str, Any]:
    """Return the part of a config, nested, that has to stay as it is when a run goes on (see `Key`)."""
    return build((key for key in keys if not (key.free or key.content)), dict(flatten(config))).to_dict()


def unknown_key(name: str, known: Iterable[str]) -> str:
    """Return the message for a key that is not in the table: it names the group's keys, or else the nearest key."""
    known = list(known)
    inside = [key for key in known if key.startswith(f"{name}.")]
    if inside:
        return f"'{name}' is a group of keys, not a value; set one of {', '.join(inside)}"
    return f"unknown key '{name}'{did_you_mean(name, known)}"
