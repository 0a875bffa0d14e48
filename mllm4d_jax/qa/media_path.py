"""Media paths of records: always inside the folder they are relative to."""

from __future__ import annotations

from pathlib import Path

from mllm4d_jax.qa.errors import MediaError


def resolve_media(root: str | Path, relative: str) -> str:
    """Return the absolute path of a record's media file; whether it exists is not looked at.

    Records come from elsewhere, so a path may not leave its root: no absolute path, no `..` that climbs out, no
    symbolic link that points out (the root itself may be a link).

    Raises:
      MediaError: reason "path_outside_root", or "bad_path" for an empty path or one with a NUL character.
    """
    if not isinstance(relative, str) or not relative.strip() or "\0" in relative:
        raise MediaError(f"media path {relative!r} is not a usable path", "bad_path")
    base = Path(root).resolve()
    try:
        full = (base / relative).resolve()
    except (OSError, RuntimeError) as error:  # a link that loops
        raise MediaError(f"media path {relative!r} cannot be resolved ({error})", "bad_path") from error
    if Path(relative).is_absolute() or not full.is_relative_to(base) or full == base:
        raise MediaError(
            f"media path {relative!r} leaves the media root {base}: paths must be relative to it and stay inside",
            "path_outside_root",
        )
    return str(full)
