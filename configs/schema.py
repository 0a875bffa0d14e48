"""What a config key is, how a table of keys becomes a ConfigDict, and how any config is checked against that table."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_collections

TYPE_NAMES = MappingProxyType(
    {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a tuple"}
)


class ConfigError(ValueError):
    """A config that cannot be used: an unknown key, a value of the wrong type, a variant or file that is not there."""


@dataclass(frozen=True)
class Key:
    """One config key: dotted name, default (which also fixes the type), one line of help, and the values allowed.

    `choices` lists the only accepted values; `low` is an inclusive lower bound for numbers.
    """

    name: str
    default: bool | int | float | str | tuple
    help: str
    choices: tuple = ()
    low: float | None = None


def nearest(word: str, known: Iterable[str]) -> str:
    """The member of `known` that `word` was most likely meant to be, or "" when none is similar.

    The last part of a dotted name counts on its own too: `steps` is near `train.steps`.
    """
    known = list(known)
    tail = word.rsplit(".", 1)[-1]
    same_tail = [name for name in known if name.rsplit(".", 1)[-1] == tail]
    for pool in (same_tail, known):
        found = difflib.get_close_matches(word, pool, n=1, cutoff=0.6 if pool is known else 0.0)
        if found:
            return found[0]
    tails = {name.rsplit(".", 1)[-1]: name for name in known}
    found = difflib.get_close_matches(tail, tails, n=1, cutoff=0.6)
    return tails[found[0]] if found else ""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` - did you mean 'x'?`, or "" when nothing known is similar to `word`."""
    close = nearest(word, known)
    return f" - did you mean '{close}'?" if close else ""


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) for every leaf of a nested mapping or ConfigDict, in its own order."""
    for name, value in config.items():
        if isinstance(value, (Mapping, ml_collections.ConfigDict)):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def build(keys: Iterable[Key], values: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
    """A locked ConfigDict holding every key of the table, with `values` (dotted name -> checked value) laid over it."""
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
    """`value` in the key's own type. Raises ConfigError when the type, the range or the choice is wrong."""
    wanted = type(key.default)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if wanted is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not wanted:
        raise ConfigError(f"{key.name} must be {TYPE_NAMES[wanted]}, not {type(value).__name__} {value!r}")
    if wanted is tuple and key.default:
        element = type(key.default[0])
        wrong = [item for item in value if type(item) is not element]
        if wrong:
            raise ConfigError(f"{key.name} must be a tuple of {element.__name__} values, not {wrong[0]!r}")
    if wanted is float and not math.isfinite(value):
        raise ConfigError(f"{key.name} must be a finite number, not {value}")
    if key.choices and value not in key.choices:
        options = ", ".join(repr(choice) for choice in key.choices)
        hint = did_you_mean(value, key.choices) if isinstance(value, str) else ""
        raise ConfigError(f"{key.name} must be one of {options}, not {value!r}{hint}")
    if key.low is not None and value < key.low:
        raise ConfigError(f"{key.name} must be at least {key.low:g}, not {value:g}")
    return value


def complete(config: Mapping[str, Any] | ml_collections.ConfigDict, keys: Iterable[Key]) -> ml_collections.ConfigDict:
    """The full locked config of a task: `config` checked key by key, and keys it leaves out at their defaults.

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


def unknown_key(name: str, known: Iterable[str]) -> str:
    """The message for a key that is not in the table: it names the group's keys, or else the nearest key."""
    known = list(known)
    inside = [key for key in known if key.startswith(f"{name}.")]
    if inside:
        return f"'{name}' is a group of keys, not a value; set one of {', '.join(inside)}"
    return f"unknown key '{name}'{did_you_mean(name, known)}"


def check_variant(variant: str, variants: Mapping[str, str], path: str) -> str:
    """`variant` if `variants` has it. Raises ConfigError naming the nearest one and all there are."""
    if variant in variants:
        return variant
    listed = ", ".join(f"{path}:{name}" if name else path for name in variants)
    close = nearest(variant, [name for name in variants if name])
    hint = f" - did you mean '{path}:{close}'?" if close else ""
    raise ConfigError(f"{path} has no variant '{variant}'{hint} (there are: {listed})")
