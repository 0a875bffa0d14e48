"""What is said of files that another version of this project has written."""

from __future__ import annotations

from mllm4d_jax import __version__
from mllm4d_jax.files.quoting import plain

PROGRAM = f"mllm4d-jax {__version__}"


def of_another(what: object, version: object) -> str:
    """Return a line that says which version wrote something, '' if it was this one.

    Args:
      what: the file or folder.
      version: as it says itself; None or '' where it says none, as before 0.1.0.
    """
    if version == __version__:
        return ""
    return f"{what} was written by mllm4d-jax {plain(version) if version else 'before 0.1.0'}; this is {__version__}"
