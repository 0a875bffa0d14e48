"""Paths in a bucket, `gs://BUCKET/...`: the one place that says what a path is, how it is opened and what went wrong.

`place` gives a path with the methods of `pathlib` for both kinds; what reads or writes much has functions here. The
driver is gcsfs, for etils' paths as well, whether or not tensorflow is installed. All requests are repeated, with
growing pauses, where that can help.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mllm4d_jax.files.traffic import counting

SCHEME = "gs://"
_BUCKETS = re.compile(r"(gs|gcs|s3|az|abfs|hf)://")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_CONNECT_S, _READ_S = 20.0, 60.0  # until a server answers, and between two pieces of an answer
_LARGE = 32 << 20  # bytes of an object that is fetched in several parts at a time
_TRIES = 5  # of a transfer that came to an end with other bytes than were asked for
_ACCESS = "give this account the roles roles/storage.objectUser and roles/storage.legacyBucketReader on the bucket"
_LOG_IN = "log in with `gcloud auth application-default login`, or give the machine a service account"
T = TypeVar("T")


class RemoteError(ValueError):
    """A bucket cannot be used: no driver, no rights, not there, or not to be reached. Nothing is wrong with a file."""


class TransferError(ValueError):
    """One object cannot be read whole, though its bucket can."""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is no path of this machine's file system, by how it begins."""
    return bool(_URL.match(os.fspath(path)))


def buckets_in(value: object) -> list[str]:
    """Return the paths in buckets among what a key of a config says: a path, or parts with "::" between them."""
    texts = value if isinstance(value, tuple | list) else (value,)
    parts = [part for text in texts if isinstance(text, str) for part in text.split("::")]
    return [part for part in parts if _BUCKETS.match(part)]


def place(path: str | os.PathLike) -> Path:
    """Return a path with the methods of `pathlib.Path`: of this machine, or of a bucket (`etils.epath`).

    Raises:
      RemoteError: it is of a kind that is not supported, or the driver is not installed.
    """
    if not is_remote(path):
        return Path(path)
    _filesystem(path)
    from etils import epath

    return epath.Path(os.fspath(path))


def is_file(path: str | os.PathLike) -> bool:
    """Whether a path names a file; False for a name that no file can have. Raises RemoteError."""
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        return bool(info(path))
    except FileNotFoundError:
        return False


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a path names a folder, or a bucket has objects below it. Raises as `place`."""
    return place(path).is_dir() if is_remote(path) else os.path.isdir(path)


def absolute(path: str | os.PathLike) -> str:
    """Return a path that does not depend on the folder in which a program was started."""
    return os.fspath(path) if is_remote(path) else os.path.abspath(path)


def join(root: str | os.PathLike, name: str) -> str:
    """Return the path of a file below a remote folder."""
    return f"{os.fspath(root).rstrip('/')}/{name}"


def require(path: str) -> None:
    """Ask the bucket of a path for one name below it.

    Raises:
      RemoteError: the bucket is not there, may not be read or cannot be reached.
    """
    fs = _filesystem(path)
    bucket, _, name = path.removeprefix(SCHEME).partition("/")
    try:
        fs.call("GET", "b/{}/o", bucket, prefix=name, maxResults=1)
    except FileNotFoundError:
        raise RemoteError(
            f"{path}: there is no bucket {SCHEME}{bucket}: correct the name, or make the bucket"
        ) from None
    except Exception as problem:
        raise _named(problem, path) from problem


def info(path: str | os.PathLike) -> dict[str, Any]:
    """Return what a bucket says of an object: "size", "generation", "crc32c" (base64).

    Raises:
      FileNotFoundError; RemoteError.
    """
    object_ = _object(path)
    return _asked(path, lambda fs, _: fs.call("GET", "b/{}/o/{}", *object_, json_out=True))


def size(path: str | os.PathLike) -> int:
    """Return the bytes of a file anywhere. Raises FileNotFoundError, OSError, RemoteError."""
    return int(info(path)["size"]) if is_remote(path) else os.stat(path).st_size


def found(path: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Return name below a folder -> `info` of every file there, at any depth, by one listing. Raises RemoteError."""
    root = os.fspath(path).removeprefix(SCHEME).rstrip("/") + "/"
    listed = _asked(path, lambda fs, name: fs.find(name, detail=True))
    below = {name.removeprefix(root): about for name, about in listed.items() if name.startswith(root)}
    return {name: about for name, about in below.items() if _names_file(name)}


def read_range(path: str | os.PathLike, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of an object.

    Raises:
      FileNotFoundError; TransferError: other bytes came, again and again; RemoteError.
    """
    if stop <= start:
        return b""

    def read(fs: Any, name: str) -> bytes:
        return fs.cat_file(name, start=start, end=stop)

    return _until(lambda: _asked(path, read), lambda data: len(data) == stop - start, path)


def fetch(path: str | os.PathLike, target: Path) -> None:
    """Copy an object to a file of this machine, and compare its size and checksum with what the bucket says.

    Raises:
      FileNotFoundError; TransferError: other bytes came, again and again; RemoteError.
    """
    about = info(path)

    def same(_: object) -> bool:
        return target.stat().st_size == int(about["size"]) and about.get("crc32c") in (None, crc32c(target))

    lanes = {} if int(about["size"]) > _LARGE else {"concurrency": 1}  # one request for a small one
    _until(lambda: _asked(path, lambda fs, name: fs.get_file(name, os.fspath(target), **lanes)), same, path)


def bring(path: str | os.PathLike, target: Path) -> None:
    """Copy a file from anywhere to this machine. Raises as `fetch`, and OSError."""
    if is_remote(path):
        fetch(path, target)
    else:
        shutil.copyfile(path, target)


def upload(path: str | os.PathLike, data: bytes | Path) -> None:
    """Write an object, whole: readers see the old one or the new one. Raises RemoteError."""
    if isinstance(data, bytes):
        _asked(path, lambda fs, name: fs.pipe_file(name, data))
    else:
        _asked(path, lambda fs, name: fs.put_file(os.fspath(data), name))


def write_if(path: str | os.PathLike, data: bytes, generation: str) -> str | None:
    """Write a small object if it still is of a generation ("0": if it is not there), as one action of the bucket.

    Returns:
      its new generation; None if it was another one, and nothing was written.

    Raises:
      RemoteError.
    """
    bucket, name = _object(path)
    mark = "mllm4d-part"
    described = f'--{mark}\r\nContent-Type: application/json\r\n\r\n{{"name": {_quoted(name)}}}\r\n'
    body = f"{described}--{mark}\r\nContent-Type: application/json\r\n\r\n".encode() + data + f"\r\n--{mark}--".encode()

    def write(fs: Any, _: str) -> str | None:
        try:
            made = fs.call(
                "POST",
                f"{fs._location}/upload/storage/v1/b/{{}}/o",
                bucket,
                headers={"Content-Type": f"multipart/related; boundary={mark}"},
                uploadType="multipart",
                ifGenerationMatch=generation,
                data=body,
                json_out=True,
            )
        except FileExistsError:  # how gcsfs says 412, precondition failed
            return None
        return str(made["generation"])

    return _asked(path, write)


def remove(path: str | os.PathLike, generation: str | None = None) -> None:
    """Delete an object, if it is there, and, where a generation is given, still is of that one. Raises RemoteError."""
    only = {} if generation is None else {"ifGenerationMatch": generation}
    try:
        object_ = _object(path)
        _asked(path, lambda fs, _: fs.call("DELETE", "b/{}/o/{}", *object_, **only))
    except (FileNotFoundError, FileExistsError):  # gone; or, as gcsfs says 412, another one by now
        pass


def remove_folder(path: str | os.PathLike) -> None:
    """Delete a folder with all that is in it, if it is there."""
    if is_remote(path):
        place(path).rmtree(missing_ok=True)
    elif os.path.isdir(path):
        shutil.rmtree(path)


def trouble(problem: BaseException | None) -> str | None:
    """Return what an error of the driver says of a bucket, and what to do; None for an error of another kind."""
    while problem is not None:
        text, code = str(problem), str(getattr(problem, "code", ""))
        home = type(problem).__module__.partition(".")[0]
        if home in ("gcsfs", "aiohttp", "requests", "google", "fsspec") or text.startswith("Forbidden: "):
            if text.startswith("Forbidden: "):
                return _answer("403")
            if type(problem).__module__.startswith("google.auth"):
                return _answer("401")
            if code.isdecimal():
                return _answer(code)
            return f"the storage cannot be reached ({type(problem).__name__}): look at the network"
        number = re.search(r"http_response_code='(\d+)'", text)  # how TensorStore says it
        if number:
            return _answer(number[1])
        problem = problem.__cause__
    return None


def _answer(code: str) -> str:
    """Return what a status of HTTP means here, and what to do."""
    if code == "403":
        return f"permission denied (403): {_ACCESS}"
    if code == "401":
        return f"no credentials are accepted (401): {_LOG_IN}"
    return f"the storage answers {code}, also when asked again: try later"


def _names_file(name: str) -> bool:
    """Whether an object of that name, below a folder or a bucket, is a file.

    Consoles and mounted buckets mark a folder by an empty object with its name and a "/", which is none.
    """
    return bool(name) and not name.endswith("/")


def _object(path: str | os.PathLike) -> tuple[str, str]:
    """Return (bucket, name of the object) of a file. Raises FileNotFoundError for what can be no file; RemoteError."""
    _filesystem(path)
    bucket, _, name = os.fspath(path).removeprefix(SCHEME).partition("/")
    if not _names_file(name):
        raise FileNotFoundError(f"{os.fspath(path)} names a bucket or a folder in one, and no file")
    return bucket, name


def _asked(path: str | os.PathLike, call: Callable[[Any, str], T]) -> T:
    """Return what a call of the driver gives, given the driver and the name that it knows the path by."""
    fs = _filesystem(path)
    try:
        return call(fs, os.fspath(path).removeprefix(SCHEME))
    except FileNotFoundError:
        raise
    except Exception as problem:
        raise _named(problem, path) from problem


def _named(problem: Exception, path: str | os.PathLike) -> Exception:
    said = trouble(problem)
    return problem if said is None else RemoteError(f"{os.fspath(path)}: {said}")


def _until(call: Callable[[], T], good: Callable[[T], bool], path: str | os.PathLike) -> T:
    for pause in _pauses():
        result = call()
        if good(result):
            return result
        time.sleep(pause)
    raise TransferError(f"{os.fspath(path)}: what was read is not what the bucket says it holds, {_TRIES} times")


def _pauses() -> Iterator[float]:
    return (0.1 * 2**n for n in range(_TRIES))


def crc32c(file: Path) -> str:
    """Return the checksum that the service gives for every object, in its form. Raises RemoteError without a driver."""
    _driver()
    import base64

    import google_crc32c

    sum_ = google_crc32c.Checksum()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            sum_.update(block)
    return base64.b64encode(sum_.digest()).decode()


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)


def _filesystem(path: str | os.PathLike) -> Any:
    found = _URL.match(os.fspath(path))
    if found is None or found[0] != SCHEME:
        raise RemoteError(f"{os.fspath(path)}: only {SCHEME}BUCKET/... and local paths are supported")
    return _driver()


@functools.cache
def _driver() -> Any:
    """Return the driver; etils' and Orbax's paths use one with the same settings from then on.

    What a folder holds is always asked anew: other processes write there, too. An emulator that gcsfs is sent to by
    STORAGE_EMULATOR_HOST is TensorStore's as well.
    """
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    try:
        import aiohttp
        import fsspec
        import gcsfs.core
        import google_crc32c  # noqa: F401
    except ImportError as problem:
        raise RemoteError(
            f"paths that begin with {SCHEME} need a driver ({problem.name} is not installed): "
            "pip install -r requirements-cloud.txt"
        ) from problem
    limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)
    # Not its experimental class, which asks for the kind of the bucket at each call.
    fsspec.register_implementation("gcs", gcsfs.core.GCSFileSystem, clobber=True)
    more = {"trace_configs": [counting()]}
    fsspec.config.conf["gcs"] = {"use_listings_cache": False, "requests_timeout": limits, "session_kwargs": more}
    _keep_from_tensorflow()
    return fsspec.filesystem("gcs")


def _keep_from_tensorflow() -> None:
    """Have etils' paths take this driver also where tensorflow is installed, whose own knows none of these settings.

    Raises:
      RemoteError: the environment tells them otherwise.
    """
    os.environ.setdefault("EPATH_USE_TF", "false")  # processes that are started from here have it, too
    from etils.epath import gpath

    asked = getattr(gpath, "_is_tf_installed", None)  # its answer is kept from the first path of any kind on
    if asked is not None:
        asked.cache_clear()
        if asked():
            raise RemoteError(
                f"EPATH_USE_TF = {os.environ['EPATH_USE_TF']!r} has paths in buckets go through tensorflow, without "
                "limits of time and repetitions: set EPATH_USE_TF=false, or unset it"
            )
