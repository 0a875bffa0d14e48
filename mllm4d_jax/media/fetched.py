"""Media files as files of this machine, wherever they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mllm4d_jax.files.cache import ClipCache
from mllm4d_jax.files.remote import TransferError, is_remote
from mllm4d_jax.qa.errors import MediaError, RecordError


@contextlib.contextmanager
def on_disk(path: str, clips: ClipCache, kind: str = "video") -> Iterator[str]:
    """Yield a file itself, or the copy of one in a bucket, which stays there as long as the block runs.

    Errors of the record that the block raises go on to name the file in the bucket.

    Args:
      kind: what messages call it.

    Raises:
      MediaError: reason "missing_file", or "fetch_failed" for one that cannot be read whole.
      RemoteError: the bucket cannot be used; nothing is wrong with the record.
    """
    if not is_remote(path):
        yield path
        return
    with contextlib.ExitStack() as held:
        try:
            here = str(held.enter_context(clips.held(path)))
        except FileNotFoundError:
            raise MediaError(f"{kind} file {path} does not exist", "missing_file") from None
        except TransferError as error:
            raise MediaError(str(error), "fetch_failed") from error
        try:
            yield here
        except RecordError as error:
            raise error.with_names({here: path}) from error.__cause__
