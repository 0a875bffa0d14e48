"""One HTTP POST with hard limits on time and size; standard library only."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import http.client
import math
import socket
import ssl
import threading
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

_CHUNK = 65536


class TransportError(ValueError):
    """No reply came: no connection, time is up, or the body is cut off. Worth another attempt."""


class RefusedReplyError(ValueError):
    """The body is longer than allowed, or the server's certificate is not trusted. Another attempt changes nothing."""


class HttpReply(NamedTuple):
    """status; body; retry_after_s, the pause the server asks for, 0 if it names none."""

    status: int
    body: bytes
    retry_after_s: float


def post_json(url: str, body: bytes, headers: Mapping[str, str], timeout_s: float, max_bytes: int) -> HttpReply:
    """Posts a JSON body and reads the whole reply.

    Args:
      timeout_s: for everything together, so that a server that sends a byte now and then does not hold a thread.
      max_bytes: of the reply's body; nothing beyond it is read.

    Raises:
      TransportError, RefusedReplyError: see there. Any HTTP status is a reply, not an error.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout_s)
    expired, opened = threading.Event(), []

    def expire() -> None:
        expired.set()
        # A blocked read returns when its socket is shut down; closing it would not wake it.
        for sock in opened:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        connection.connect()
        opened.append(connection.sock)  # the connection forgets it when the server announces that it will close
        sent = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        connection.request("POST", parts.path or "/", body, sent | dict(headers))
        response = connection.getresponse()
        data = _read_body(response, max_bytes)
        if expired.is_set():
            raise TimeoutError
        return HttpReply(response.status, data, _retry_after(response.getheader("Retry-After")))
    except (OSError, http.client.HTTPException, TransportError) as error:
        if expired.is_set() or isinstance(error, TimeoutError):
            raise TransportError(f"no complete reply within {timeout_s:g} s") from error
        if isinstance(error, ssl.SSLCertVerificationError):
            raise RefusedReplyError(f"the server's certificate is not trusted: {error.verify_message}") from error
        raise TransportError(f"no usable reply ({type(error).__name__}: {error})") from error
    finally:
        timer.cancel()
        connection.close()


def _read_body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    length = response.getheader("Content-Length")
    promised = int(length) if length is not None and length.isascii() and length.isdigit() else None
    if promised is not None and promised > max_bytes:
        raise RefusedReplyError(f"the body has {promised} bytes, more than the limit of {max_bytes}")
    chunks, size = [], 0
    while chunk := response.read(_CHUNK):
        size += len(chunk)
        if size > max_bytes:
            raise RefusedReplyError(f"the body has more bytes than the limit of {max_bytes}")
        chunks.append(chunk)
    if promised is not None and size < promised:
        raise TransportError(f"the body was cut off after {size} of {promised} bytes")
    return b"".join(chunks)


def _retry_after(value: str | None) -> float:
    """Seconds from a Retry-After header: a number of seconds or a date (RFC 9110, section 10.2.3)."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
