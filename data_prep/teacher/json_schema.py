"""Strict JSON from a language model: parsed without surprises and held against a small schema.

The schema language is the part of JSON Schema that replies need: type, enum, properties, required,
additionalProperties (false unless said otherwise), items, minItems, maxItems, minLength, maxLength, minimum, maximum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_KEYWORDS = {"type", "enum", "properties", "required", "additionalProperties", "items", "minItems", "maxItems"} | {
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "description",
}


class SchemaError(ValueError):
    """A reply is not JSON or does not fit its schema; the message says where ("$.entities[2].en")."""


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
      SchemaError: not JSON, NaN or infinity, a key twice in one object, nested too deeply, or a number with thousands
        of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except SchemaError:
        raise
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"not JSON: {error}; it begins with {text[:80]!r}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise SchemaError(f"an object has a key twice among {[k for k, _ in pairs][:20]}")
    return value


def _no_constant(name: str) -> None:
    raise SchemaError(f"{name} is not JSON")


def check_schema(value: Any, schema: Mapping[str, Any], where: str = "$") -> None:
    """Checks a parsed JSON value.

    Raises:
      SchemaError: naming the place and what was expected there.
      ValueError: the schema uses a keyword that this checker does not have.
    """
    unknown = set(schema) - _KEYWORDS
    if unknown:
        raise ValueError(f"schema keywords {sorted(unknown)} are not supported")
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if kinds and not any(_is(value, kind) for kind in kinds):
        raise SchemaError(f"{where} must be {' or '.join(kinds)}, not {_short(value)}")
    if "enum" in schema and not any(value == e and type(value) is type(e) for e in schema["enum"]):
        raise SchemaError(f"{where} must be one of {list(schema['enum'])}, not {_short(value)}")
    if isinstance(value, str):
        _check_range(len(value), schema, "minLength", "maxLength", f"the length of {where}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise SchemaError(f"{where} is not a finite number")
        _check_range(value, schema, "minimum", "maximum", where)
    elif isinstance(value, list):
        _check_range(len(value), schema, "minItems", "maxItems", f"the number of entries of {where}")
        for n, entry in enumerate(value):
            check_schema(entry, schema.get("items", {}), f"{where}[{n}]")
    elif isinstance(value, dict):
        _check_object(value, schema, where)


def _check_object(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> None:
    properties = schema.get("properties", {})
    missing = [name for name in schema.get("required", ()) if name not in value]
    extra = [name for name in value if name not in properties]
    if missing:
        raise SchemaError(f"{where} lacks {missing}")
    if "properties" in schema and extra and not schema.get("additionalProperties", False):
        raise SchemaError(f"{where} has unknown keys {extra[:10]}")
    for name, entry in value.items():
        if name in properties:
            check_schema(entry, properties[name], f"{where}.{name}")


def _check_range(number: float, schema: Mapping[str, Any], low: str, high: str, what: str) -> None:
    if number < schema.get(low, -math.inf) or number > schema.get(high, math.inf):
        raise SchemaError(f"{what} is {number}, allowed: {low} {schema.get(low)}, {high} {schema.get(high)}")


def _is(value: Any, kind: str) -> bool:
    if kind not in _TYPES:
        raise ValueError(f"schema type {kind!r} is not supported")
    return isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
