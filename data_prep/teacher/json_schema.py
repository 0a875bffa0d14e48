"""Strict JSON from a language model: parsed without surprises and held against a JSON Schema."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from mllm4d_jax.files.quoting import cut, shown

_LONGEST_MESSAGE = 200  # characters; the library quotes the whole value in its messages


class SchemaError(ValueError):
    """A reply is not JSON or does not fit its schema; the message says where ("$.entities[2].en")."""


def exact_object(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of an object with exactly these keys."""
    return {"type": "object", "required": list(properties), "properties": properties, "additionalProperties": False}


def text_schema(longest: int, shortest: int = 1) -> dict[str, Any]:
    """Return the schema of a text of `shortest` to `longest` characters."""
    return {"type": "string", "minLength": shortest, "maxLength": longest}


def parse_json(text: str, schema: Mapping[str, Any] | None = None) -> Any:
    """Return the value of a JSON text.

    Args:
      schema: what the value must fit, in JSON Schema 2020-12; None for anything.

    Raises:
      SchemaError: not JSON, NaN or infinity, a key twice in one object, nested too deeply, a number with thousands of
        digits, or not of the schema.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        misfit = None if schema is None else best_match(Draft202012Validator(schema).iter_errors(value))
    except SchemaError:
        raise
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"not JSON: {error}; it begins with {text[:80]!r}") from error
    if misfit is not None:
        said = misfit.message
        if len(said) > _LONGEST_MESSAGE:
            said = f"{said[:80]}... does not have {misfit.validator} {misfit.validator_value!r}"
        raise SchemaError(f"{cut(misfit.json_path, _LONGEST_MESSAGE)}: {cut(said, 2 * _LONGEST_MESSAGE)}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise SchemaError(f"an object has a key twice among {shown([k for k, _ in pairs])}")
    return value


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise SchemaError(f"{cut(number, 40)} is not JSON: numbers must be finite")
    return value
