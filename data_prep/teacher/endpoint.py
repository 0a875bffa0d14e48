"""One request to an OpenAI-compatible `/chat/completions` endpoint, with hard limits on time and size.

Where it is and how to get in come from the environment: `MLLM4D_TEACHER_URL` (what stands before `/chat/completions`,
usually ending in `/v1`) and `MLLM4D_TEACHER_KEY` (sent as a bearer token; none is sent if unset). The key appears in no
message, file or cache entry. Redirects and proxies are not followed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import email.utils
import functools
import math
import ssl
from urllib.parse import urlsplit

import httpx

URL_VARIABLE = "MLLM4D_TEACHER_URL"
KEY_VARIABLE = "MLLM4D_TEACHER_KEY"
_MOST_DIGITS = 18  # of a Content-Length that is looked at; Python reads no number of thousands of them
_TRANSIENT = {408, 425, 429}  # and all of 5xx
_HINTS = {401: f"check {KEY_VARIABLE}", 403: f"check {KEY_VARIABLE}", 404: f"check {URL_VARIABLE} and the model name"}


class TeacherError(ValueError):
    """The endpoint or its settings are wrong, it gave up, or a reply is missing offline."""


class TransientError(ValueError):
    """A failure that may pass: 408, 425, 429, 5xx, no connection, time is up, a body that is cut off.

    Attributes:
      retry_after_s: the pause the server asks for, 0 if it names none.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where to send requests, and how fast.

    Attributes:
      url: what stands before `/chat/completions`.
      key: bearer token, '' for none; left out of `repr`.
      timeout_s: limit on one attempt, from connecting to the last byte.
      max_reply_bytes: longer bodies are refused.
      requests_per_minute: attempts started per minute over all threads, evenly spaced; None for no limit.
      max_concurrent: attempts in flight at once.
    """

    url: str
    key: str = dataclasses.field(default="", repr=False)
    timeout_s: float = 120.0
    max_reply_bytes: int = 2**22
    requests_per_minute: float | None = None
    max_concurrent: int = 4

    def __post_init__(self) -> None:
        """Raises TeacherError for settings that cannot work."""
        try:
            parts, _ = urlsplit(self.url), httpx.URL(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except (ValueError, httpx.InvalidURL):  # a port beyond 65535, half a bracket, a control character
            usable = False
        if not usable or parts.query or parts.fragment:
            raise TeacherError(f"the teacher's address must look like https://host/v1 ({URL_VARIABLE})")
        if parts.username is not None or parts.password is not None:
            raise TeacherError(f"the teacher's address holds a user or password: use {KEY_VARIABLE}")
        if not self.key.isascii() or not self.key.isprintable():
            raise TeacherError(f"{KEY_VARIABLE} holds a character that no key has, perhaps a line break")
        positive = (self.timeout_s, self.max_reply_bytes, self.max_concurrent, self.requests_per_minute or 1)
        if min(positive) <= 0:
            raise TeacherError("time limit, size limit, request rate and concurrency must be positive")

    def post(self, body: bytes) -> bytes:
        """Post a JSON body once and return the body of the reply.

        Raises:
          TransientError: another attempt may do better.
          TeacherError: none will: the endpoint refuses, sends too much, or has a certificate that is not trusted.
        """
        try:
            response, data = asyncio.run(self._exchange(body))
        except TimeoutError as error:
            raise TransientError(f"no complete reply within {self.timeout_s:g} s") from error
        except httpx.TransportError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
                cause = cause.__cause__ or cause.__context__
            if cause is not None:
                raise TeacherError(f"the server's certificate is not trusted: {cause.verify_message}") from error
            raise TransientError(f"no usable reply ({type(error).__name__}: {error})") from error
        status = response.status_code
        if status == 200:
            return bytes(data)
        problem = f"HTTP status {status}: {data[:300].decode('utf-8', 'replace')!r}"
        if status in _TRANSIENT or status >= 500:
            raise TransientError(problem, _retry_after(response.headers.get("Retry-After")))
        raise TeacherError(f"the teacher refuses the request ({_HINTS.get(status, 'not retried')}); {problem}")

    async def _exchange(self, body: bytes) -> tuple[httpx.Response, bytearray]:
        """Return (response, its body). The time limit is on everything together, so that a server that sends a byte now
        and then does not hold a thread; nothing beyond the size limit is read."""
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url, limit = f"{self.url.rstrip('/')}/chat/completions", self.max_reply_bytes
        client = httpx.AsyncClient(timeout=None, trust_env=False, verify=_trusted())  # its timeouts bound one read each
        async with (
            asyncio.timeout(self.timeout_s),
            client,
            client.stream("POST", url, content=body, headers=headers) as response,
        ):
            check_promised(response.headers.get("Content-Length", ""), limit)
            data = bytearray()
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > limit:
                    raise TeacherError(f"the teacher's reply has more bytes than the limit of {limit}")
            return response, data


def check_promised(length: str, limit: int) -> None:
    """Raise TeacherError for a Content-Length of more than `limit` bytes; what is no number says nothing."""
    if length.isdecimal() and (len(length) > _MOST_DIGITS or int(length) > limit):
        raise TeacherError(f"the teacher's reply has {length:.40} bytes, more than the limit of {limit}")


@functools.cache
def _trusted() -> ssl.SSLContext:
    """Return a context with the certificates that this machine trusts; making one takes a tenth of a second."""
    return ssl.create_default_context()


def _retry_after(value: str | None) -> float:
    """Return the seconds of a Retry-After header: a number of seconds or a date (RFC 9110, section 10.2.3).

    A number beyond the range of floats is infinity; what is in the past or neither asks for no pause.
    """
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return 0.0
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    return 0.0 if math.isnan(seconds) else max(0.0, seconds)
