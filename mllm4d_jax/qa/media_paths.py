"""Where the media files of records are, and how a part of a video is called.

Records come from elsewhere: no path may leave the folder that the records' media are in.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mllm4d_jax.files.quoting import cut, shown
from mllm4d_jax.files.remote import is_remote, join
from mllm4d_jax.qa.errors import MediaError

# First and last second of a part of a video, from the start of its presentation; None = where the video itself ends.
Span = tuple[float | None, float | None]
_SECONDS = r"(-?\d+(?:\.\d+)?(?:e[+-]\d+)?)?"
_FRAGMENT = re.compile(f"#t={_SECONDS},{_SECONDS}$")


def resolve_media(root: str | Path, relative: str) -> str:
    """Return the absolute path of a record's media file; whether it exists is not looked at.

    Records come from elsewhere, so a path may not leave its root: no absolute path, no `..` that climbs out, no
    symbolic link that points out (the root itself may be a link). In a snapshot of a Hugging Face cache all files are
    links to the `blobs` of the same repository, and these are followed.

    Raises:
      MediaError: reason "path_outside_root", or "bad_path" for an empty path or one with a NUL character.
    """
    if not isinstance(relative, str) or not relative.strip() or "\0" in relative:
        raise MediaError(f"media path {shown(relative)} is not a usable path", "bad_path")
    if is_remote(root):
        return _in_bucket(os.fspath(root), relative)
    base = Path(root).resolve()
    try:
        relative.encode("utf-8")  # half a surrogate pair can stand for a byte in a file's name, but in no message
        full = (base / relative).resolve()
    except (OSError, RuntimeError, UnicodeError) as error:  # a link that loops, half a surrogate pair
        raise MediaError(f"media path {shown(relative)} cannot be resolved ({error})", "bad_path") from error
    named = Path(os.path.normpath(base / relative))
    if Path(relative).is_absolute() or not named.is_relative_to(base) or full == base:
        raise MediaError(
            f"media path {shown(relative)} leaves the media root {base}: paths must be relative to it and stay inside",
            "path_outside_root",
        )
    blobs = _blobs_beside(base)
    if not full.is_relative_to(base) and not (blobs and full.is_relative_to(blobs)):
        raise MediaError(
            f"media path {shown(relative)} leads through a link to {cut(str(full), 400)}, outside the media root "
            f"{base}: copy the file there, or name a root above both",
            "path_outside_root",
        )
    return str(full)


def _in_bucket(root: str, relative: str) -> str:
    """Return `resolve_media` for a root in a bucket, where names have no links."""
    try:
        relative.encode("utf-8")
    except UnicodeError as error:
        raise MediaError(f"media path {shown(relative)} cannot be resolved ({error})", "bad_path") from error
    named = posixpath.normpath(relative)
    if named.startswith("/") or named in (".", "..") or named.startswith("../"):
        raise MediaError(
            f"media path {shown(relative)} leaves the media root {root}: paths must be relative to it and stay inside",
            "path_outside_root",
        )
    return join(root, named)


def _blobs_beside(root: Path) -> Path | None:
    """Return the folder that holds what the links below `root` lead to, if it is a snapshot of a Hugging Face cache or
    in one: CACHE/datasets--OWNER--NAME/snapshots/REVISION/..."""
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and re.fullmatch(r"(?:models|datasets|spaces)--.+", repository.name):
            return (repository / "blobs").resolve()
    return None


def named_part(path: str, span: Span | None) -> str:
    """Return how a part of a video is called in logs: the path, and a media fragment in seconds ("a.mp4#t=2.0,5.0")."""
    return path if span is None else f"{path}#t={','.join('' if end is None else repr(end) for end in span)}"


def part_named(name: str) -> tuple[str, Span | None]:
    """Return the path and the part of the video that `named_part` called `name`."""
    found = _FRAGMENT.search(name)
    if not found:
        return name, None
    start, end = (float(number) if number else None for number in found.groups())
    return name[: found.start()], (start, end)
