"""Client for a multimodal language model behind an OpenAI-compatible `/chat/completions` endpoint.

Where it is and how to get in come from the environment: `MLLM4D_TEACHER_URL` (what stands before `/chat/completions`,
usually ending in `/v1`) and `MLLM4D_TEACHER_KEY` (sent as a bearer token; none is sent if unset). The key appears in no
message, file or cache entry. Redirects and proxies are not followed.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self
from urllib.parse import urlsplit

from data_prep.store.parts import StoreError, canonical_json
from data_prep.teacher.http_post import HttpReply, RefusedReplyError, TransportError, post_json
from data_prep.teacher.json_schema import SchemaError, check_schema, parse_json
from data_prep.teacher.replay import Reply, ReplyCache

URL_VARIABLE = "MLLM4D_TEACHER_URL"
KEY_VARIABLE = "MLLM4D_TEACHER_KEY"
_TRANSIENT = {408, 425, 429}  # and all of 5xx


class TeacherError(ValueError):
    """The endpoint or its settings are wrong, it gave up, or a reply is missing offline."""


class ReplyError(TeacherError):
    """The model answered, but not with the JSON it was asked for."""


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
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise TeacherError(f"the teacher's address must look like https://host/v1 ({URL_VARIABLE})")
        if parts.username is not None or parts.password is not None:
            raise TeacherError(f"the teacher's address holds a user or password: use {KEY_VARIABLE}")
        if not self.key.isascii() or not self.key.isprintable():
            raise TeacherError(f"{KEY_VARIABLE} holds a character that no key has, perhaps a line break")
        positive = (self.timeout_s, self.max_reply_bytes, self.max_concurrent, self.requests_per_minute or 1)
        if min(positive) <= 0:
            raise TeacherError("time limit, size limit, request rate and concurrency must be positive")

    @classmethod
    def from_environment(cls, **settings: Any) -> Self:
        """Address and key from the environment, the rest from `settings`. Raises TeacherError without an address."""
        url = os.environ.get(URL_VARIABLE, "").strip()
        if not url:
            raise TeacherError(
                f"{URL_VARIABLE} is not set: give the address of an OpenAI-compatible server, for example "
                f"http://localhost:8000/v1, and its key in {KEY_VARIABLE}; or replay stored replies offline"
            )
        return cls(url, os.environ.get(KEY_VARIABLE, "").strip(), **settings)


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """How to deal with failures that may pass: 408, 425, 429, 5xx, timeouts, lost connections, truncated bodies.

    Attributes:
      attempts: HTTP attempts per request in all.
      first_wait_s: before the second attempt; doubles with each further one, up to `max_wait_s`, times a random factor
        in [0.5, 1]. `Retry-After` of the server is a lower bound.
      max_wait_s: a server that asks for a longer pause than ten times this is given up on.
      replies: how often a model may be asked that answers with something else than the JSON wanted.
      seed: of the random factors, which also depend on request and attempt.
    """

    attempts: int = 6
    first_wait_s: float = 1.0
    max_wait_s: float = 60.0
    replies: int = 2
    seed: int = 0

    def wait_s(self, key: str, attempt: int, retry_after_s: float = 0.0) -> float:
        """Seconds to wait after failed attempt number `attempt`, counted from 1."""
        factor = random.Random(f"{self.seed}:{key}:{attempt}").uniform(0.5, 1.0)
        return max(retry_after_s, factor * min(self.max_wait_s, self.first_wait_s * 2.0 ** min(attempt - 1, 60)))


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """One question to a model, in JSON mode.

    Attributes:
      model: its name at the endpoint.
      messages: as the API takes them; `user_message` makes one.
      schema: what the reply has to fit (`data_prep.teacher.json_schema`).
      temperature, max_tokens: sampling.
      seed: sent along; another seed is another request, which is how several replies to one question are had.
    """

    model: str
    messages: tuple[Mapping[str, Any], ...]
    schema: Mapping[str, Any]
    temperature: float = 0.0
    max_tokens: int = 2048
    seed: int | None = None

    def payload(self) -> dict[str, Any]:
        """The body of the HTTP request."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return {
            "model": self.model,
            "messages": list(self.messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "response_format": {"type": "json_object"},
        } | seed

    def body(self) -> bytes:
        """The payload as canonical JSON. Raises TeacherError for what JSON does not have."""
        try:
            return canonical_json(self.payload())
        except StoreError as error:
            raise TeacherError(f"the request {error}") from error

    @property
    def key(self) -> str:
        """sha256 (hex) of everything that is sent: model, messages with all frames, parameters."""
        return hashlib.sha256(self.body()).hexdigest()


def user_message(text: str, frames: Sequence[bytes] = ()) -> dict[str, Any]:
    """A user message: JPEG files in order, then the text."""
    for n, frame in enumerate(frames):
        if not frame.startswith(b"\xff\xd8\xff"):
            raise TeacherError(f"frame {n} is not a JPEG file")
    urls = [f"data:image/jpeg;base64,{base64.b64encode(frame).decode('ascii')}" for frame in frames]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


class _Pace:
    """Evenly spaced starts over all threads, and a pause for all of them when the server asks for one."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._next, self._lock = clock(), threading.Lock()

    def take(self) -> None:
        """Waits for the next free start and takes it."""
        with self._lock:
            start = max(self._clock(), self._next)
            self._next = start + self._gap
        wait = start - self._clock()
        if wait > 0:
            self._sleep(wait)

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


class Teacher:
    """Answers `ChatRequest`s from the cache or the endpoint. Threads may share it."""

    def __init__(
        self,
        endpoint: Endpoint | None,
        cache: ReplyCache,
        retry: RetryPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`endpoint` None means offline: stored replies only. `clock` and `sleep` are for tests."""
        self.endpoint, self.cache, self.retry = endpoint, cache, retry or RetryPolicy()
        self._sleep = sleep
        self._pace = _Pace(endpoint.requests_per_minute if endpoint else None, clock, sleep)
        self._slots = threading.BoundedSemaphore(endpoint.max_concurrent if endpoint else 1)

    def ask(self, request: ChatRequest) -> Any:
        """The reply as a JSON value that fits the request's schema.

        A stored reply that no longer fits (the schema has changed) counts as missing.

        Raises:
          ReplyError: the model does not reply with JSON of that form.
          TeacherError: anything else that kept a reply from coming; offline, that there is none.
          ReplayError: a damaged cache entry.
        """
        key = request.key
        stored = self.cache.get(key)
        problem = "there is no stored reply"
        if stored is not None:
            try:
                return _checked(stored.content, request.schema)
            except SchemaError as error:
                problem = f"the stored reply does not fit ({error})"
        if self.endpoint is None:
            raise TeacherError(
                f"offline, and {problem} to request {key[:16]}... to {request.model} in {self.cache.folder}: "
                f"ask it online once (set {URL_VARIABLE}), or replay with the prompts, frames and parameters it was "
                "recorded with"
            )
        failure: Exception | None = None
        for _ in range(max(1, self.retry.replies)):
            reply = self._fetch(request, key)
            try:
                value = _checked(reply.content, request.schema)
            except SchemaError as error:
                failure = error
                continue
            self.cache.put(key, reply)
            return value
        raise ReplyError(
            f"{request.model} did not reply in the form asked for ({self.retry.replies} tries): {failure}"
        ) from failure

    def ask_many(self, requests: Sequence[ChatRequest]) -> list[Any | TeacherError]:
        """Replies in the order of the requests; a request that failed gives its error. Equal requests are sent once."""
        distinct = {request.key: request for request in requests}
        with ThreadPoolExecutor(self.endpoint.max_concurrent if self.endpoint else 1) as pool:
            answers = dict(zip(distinct, pool.map(self._answer_or_error, distinct.values()), strict=True))
        return [answers[request.key] for request in requests]

    def _answer_or_error(self, request: ChatRequest) -> Any | TeacherError:
        try:
            return self.ask(request)
        except TeacherError as error:
            return error

    def _fetch(self, request: ChatRequest, key: str) -> Reply:
        """One reply from the endpoint, through as many attempts as the policy allows."""
        body, attempts = request.body(), max(1, self.retry.attempts)
        for attempt in range(1, attempts + 1):
            retry_after_s = 0.0
            try:
                response = self._post(body)
                if response.status == 200:
                    return _read_completion(response.body, request)
                retry_after_s = response.retry_after_s
                problem = _refusal(response)
            except TransportError as error:
                problem = str(error)
            except RefusedReplyError as error:
                raise TeacherError(f"the teacher's reply is not usable: {error}") from error
            if retry_after_s > 10 * self.retry.max_wait_s:
                raise TeacherError(f"the teacher asks to wait {retry_after_s:.0f} s: {problem}; run again later")
            if attempt < attempts:
                wait = self.retry.wait_s(key, attempt, retry_after_s)
                if retry_after_s:
                    self._pace.pause(retry_after_s)
                self._sleep(wait)
        raise TeacherError(f"the teacher gave no reply in {attempts} attempts; the last one: {problem}")

    def _post(self, body: bytes) -> HttpReply:
        endpoint = self.endpoint
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        with self._slots:
            self._pace.take()
            url = f"{endpoint.url.rstrip('/')}/chat/completions"
            return post_json(url, body, headers, endpoint.timeout_s, endpoint.max_reply_bytes)


def _refusal(response: HttpReply) -> str:
    """What a status other than 200 says. Raises TeacherError if trying again is of no use."""
    text = response.body[:300].decode("utf-8", "replace")
    problem = f"HTTP status {response.status}: {text!r}"
    if response.status in _TRANSIENT or response.status >= 500:
        return problem
    hint = {401: f"check {KEY_VARIABLE}", 403: f"check {KEY_VARIABLE}", 404: f"check {URL_VARIABLE} and the model name"}
    raise TeacherError(f"the teacher refuses the request ({hint.get(response.status, 'not retried')}); {problem}")


def _read_completion(body: bytes, request: ChatRequest) -> Reply:
    """The model's message in a 200 body.

    Raises:
      TransportError: the body is no JSON; a proxy or a crashed server cut it, so it is worth another attempt.
      ReplyError: the reply is cut at `max_tokens` or withheld.
      TeacherError: the server speaks another protocol.
    """
    try:
        value = parse_json(body.decode("utf-8"))
    except (SchemaError, UnicodeDecodeError) as error:
        raise TransportError(f"the body of a 200 reply is damaged: {error}") from error
    try:
        choice = value["choices"][0]
        content, finish, usage = choice["message"]["content"], choice.get("finish_reason"), value.get("usage") or {}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise TeacherError(f"the reply has no choices[0].message.content: is {URL_VARIABLE} right?") from error
    if finish == "length":
        raise ReplyError(f"the reply was cut at max_tokens = {request.max_tokens}: allow more")
    if not isinstance(content, str) or finish not in (None, "stop"):
        raise ReplyError(f"{request.model} withheld its reply (finish_reason {finish!r})")
    return Reply(request.model, content, usage if isinstance(usage, dict) else {})


def _checked(content: str, schema: Mapping[str, Any]) -> Any:
    value = parse_json(content)
    check_schema(value, schema)
    return value
