"""JSON objects that others wrote (`config.json` and its like): type and range of every value are checked on reading."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mllm4d_jax.files.quoting import shown
from mllm4d_jax.files.remote import place

_LARGEST = sys.float_info.max


@dataclasses.dataclass(frozen=True)
class JsonObject:
    """Reads the keys of one object, with errors that name the place.

    A key without a value (null) counts as absent, and the first of several names that is there counts. All methods
    raise `problem` for a value of another type or outside its range; without a default also for an absent key.

    Attributes:
      raw: the object.
      where: file, and the path of keys inside it, for messages.
      problem: class of the errors.
    """

    raw: Mapping[str, Any]
    where: str
    problem: type[ValueError]

    @classmethod
    def of(cls, value: Any, where: str, problem: type[ValueError]) -> JsonObject:
        """Take a value that has to be an object."""
        if not isinstance(value, Mapping):
            raise problem(f"{where}: expected a JSON object, got {shown(value)}")
        return cls(value, where, problem)

    def error(self, text: str) -> ValueError:
        return self.problem(f"{self.where}: {text}")

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the value as it is."""
        name = self._name(names)
        if name is not None:
            return self.raw[name]
        if default is None:
            raise self.error(f"key {' / '.join(map(repr, names))} is missing")
        return default

    def integer(self, *names: str, low: int = 0, high: int, default: int | None = None) -> int:
        """Return a whole number from `low` to `high`."""
        return self._checked(names, default, whole(low, high), f"must be an integer from {low} to {high}")

    def number(self, *names: str, low: float, high: float = _LARGEST, default: float | None = None) -> float:
        """Return a number from `low` to `high`; never NaN or infinite."""
        return float(self._checked(names, default, real(low, high), f"must be a number from {low:g} to {high:g}"))

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        return self._checked((name,), default, lambda value: isinstance(value, bool), "must be true or false")

    def choice(self, *names: str, allowed: tuple[str, ...], default: str) -> str:
        """Return one of some texts."""
        name, value = self._name(names) or names[0], self.get(*names, default=default)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(f"{name} = {shown(value)} is not supported (supported: {', '.join(allowed)})")
        return value

    def list_of(
        self, name: str, fits: Callable[[Any], bool], what: str, length: int | None = None, default: Any = None
    ) -> tuple:
        """Return the values of a list, each of which `fits`; `what` says in the plural what they must be."""

        def right(value: Any) -> bool:
            return isinstance(value, (list, tuple)) and length in (None, len(value)) and all(map(fits, value))

        return tuple(self._checked((name,), default, right, f"must be a list of {what}"))

    def object(self, *names: str) -> JsonObject:
        """Return the object under a key; an empty one where there is none."""
        name = self._name(names)
        value = {} if name is None else self.raw[name]
        return self.of(value, f"{self.where}: {name or names[0]}", self.problem)

    def _name(self, names: tuple[str, ...]) -> str | None:
        return next((name for name in names if self.raw.get(name) is not None), None)

    def _checked(self, names: tuple[str, ...], default: Any, fits: Callable[[Any], bool], must: str) -> Any:
        value = self.get(*names, default=default)
        if self._name(names) is not None and not fits(value):
            raise self.error(f"key {self._name(names)!r} {must}, got {shown(value)}")
        return value


def read_object(path: str | Path, problem: type[ValueError]) -> Mapping[str, Any] | None:
    """Read a file that holds one JSON object; None where there is none.

    Raises:
      problem: not such a file: also not UTF-8, a number of thousands of digits, nested too deep.
    """
    path = place(path)
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise problem(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise problem(f"{path} cannot be read: {error.strerror or error}") from error
    return JsonObject.of(value, str(path), problem).raw


def whole(low: int, high: int) -> Callable[[Any], bool]:
    """Return the test for whole numbers from `low` to `high`; true and false are none."""
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def real(low: float, high: float) -> Callable[[Any], bool]:
    """Return the test for finite numbers from `low` to `high`."""

    def fits(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high

    return fits
