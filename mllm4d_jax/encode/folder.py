"""The JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllm4d_jax.qa.errors import ProcessorError


def read_json(path: Path) -> dict[str, Any] | None:
    """Read one JSON object; None when there is no such file.

    Raises:
      ProcessorError: not JSON, or not an object.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ProcessorError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ProcessorError(f"{path}: expected a JSON object")
    return value
