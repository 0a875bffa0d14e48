"""A multimodal language model as a teacher: requests in JSON mode, answered from stored replies or by its endpoint."""

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
from pathlib import Path
from typing import Any

import ml_collections

from data_prep.store.parts import StoreError, canonical_json
from data_prep.teacher.endpoint import KEY_VARIABLE, URL_VARIABLE, Endpoint, TeacherError, TransientError
from data_prep.teacher.json_schema import SchemaError, parse_json
from data_prep.teacher.replay import Reply, ReplyCache
from mllm4d_jax.files.quoting import shown

ORACLE, ENDPOINT = "oracle", "endpoint"  # values of the config key teacher.kind


class ReplyError(TeacherError):
    """The model answered, but not with the JSON it was asked for."""


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """How to deal with failures that may pass (`TransientError`) and with replies of the wrong form.

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
        """Return the seconds to wait after failed attempt number `attempt`, counted from 1."""
        factor = random.Random(f"{self.seed}:{key}:{attempt}").uniform(0.5, 1.0)
        return max(retry_after_s, factor * min(self.max_wait_s, self.first_wait_s * 2.0 ** min(attempt - 1, 60)))


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """One question to a model, in JSON mode.

    Attributes:
      model: its name at the endpoint.
      messages: as the API takes them; `user_message` makes one.
      schema: JSON Schema that the reply has to fit.
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
        """Return the body of the HTTP request."""
        seed = {} if self.seed is None else {"seed": self.seed}
        return {
            "model": self.model,
            "messages": list(self.messages),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "response_format": {"type": "json_object"},
        } | seed

    def body(self) -> bytes:
        """Return the payload as canonical JSON. Raises TeacherError for what JSON does not have."""
        try:
            return canonical_json(self.payload())
        except StoreError as error:
            raise TeacherError(f"the request {error}") from error

    @property
    def key(self) -> str:
        """sha256 (hex) of everything that is sent: model, messages with all frames, parameters."""
        return hashlib.sha256(self.body()).hexdigest()


def user_message(text: str, frames: Sequence[bytes] = ()) -> dict[str, Any]:
    """Return a user message: JPEG files in order, then the text. Raises TeacherError for other files."""
    for n, frame in enumerate(frames):
        if not frame.startswith(b"\xff\xd8\xff"):
            raise TeacherError(f"frame {n} is not a JPEG file")
    urls = [f"data:image/jpeg;base64,{base64.b64encode(frame).decode('ascii')}" for frame in frames]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


class _Pace:
    """Evenly spaced starts over all threads, and a pause for all of them when the server asks for one."""

    def __init__(self, per_minute: float | None, sleep: Callable[[float], None]) -> None:
        self._gap, self._sleep = 60.0 / per_minute if per_minute else 0.0, sleep
        self._next, self._lock = time.monotonic(), threading.Lock()

    def take(self) -> None:
        """Wait for the next free start and take it."""
        with self._lock:
            start = max(time.monotonic(), self._next)
            self._next = start + self._gap
        wait = start - time.monotonic()
        if wait > 0:
            self._sleep(wait)

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class Teacher:
    """Answers `ChatRequest`s from the cache or the endpoint. Threads may share it."""

    def __init__(
        self,
        endpoint: Endpoint | None,
        cache: ReplyCache,
        retry: RetryPolicy = RetryPolicy(),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`endpoint` None means offline: stored replies only. `sleep` is for tests."""
        self.endpoint, self.cache, self.retry, self._sleep = endpoint, cache, retry, sleep
        self._pace = _Pace(endpoint.requests_per_minute if endpoint else None, sleep)
        self._slots = threading.BoundedSemaphore(endpoint.max_concurrent if endpoint else 1)

    def ask(self, request: ChatRequest) -> Any:
        """Return the reply as a JSON value that fits the request's schema.

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
                return parse_json(stored.content, request.schema)
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
                value = parse_json(reply.content, request.schema)
            except SchemaError as error:
                failure = error
                continue
            self.cache.put(key, reply)
            return value
        raise ReplyError(
            f"{request.model} did not reply in the form asked for ({self.retry.replies} tries): {failure}"
        ) from failure

    def ask_many(self, requests: Sequence[ChatRequest]) -> list[Any | TeacherError]:
        """Return replies in the order of the requests; one that failed gives its error. Equal ones are sent once."""

        def answer(request: ChatRequest) -> Any | TeacherError:
            try:
                return self.ask(request)
            except TeacherError as error:
                return error

        distinct = {request.key: request for request in requests}
        with ThreadPoolExecutor(self.endpoint.max_concurrent if self.endpoint else 1) as pool:
            answers = dict(zip(distinct, pool.map(answer, distinct.values()), strict=True))
        return [answers[request.key] for request in requests]

    def _fetch(self, request: ChatRequest, key: str) -> Reply:
        """Return a reply of the endpoint, through as many attempts as the policy allows."""
        body, attempts = request.body(), max(1, self.retry.attempts)
        for attempt in range(1, attempts + 1):
            try:
                with self._slots:
                    self._pace.take()
                    data = self.endpoint.post(body)
                return _read_completion(data, request)
            except TransientError as error:
                problem = error
            pause = problem.retry_after_s
            if pause > 10 * self.retry.max_wait_s:
                raise TeacherError(f"the teacher asks to wait {pause:.0f} s: {problem}; run again later") from problem
            if attempt < attempts:
                if pause:
                    self._pace.pause(pause)
                self._sleep(self.retry.wait_s(key, attempt, pause))
        raise TeacherError(f"the teacher gave no reply in {attempts} attempts; the last one: {problem}") from problem


def open_teacher(settings: ml_collections.ConfigDict, folder: Path) -> Teacher:
    """Return the model behind the configured endpoint, or its stored replies.

    Args:
      settings: the config group `teacher`: kind, model, cache, concurrency, requests_per_minute.
      folder: the workdir; holds the replies unless `cache` names another place.

    Raises:
      TeacherError: no model's name, an endpoint without an address, or the oracle, which is no model.
    """
    if settings.kind == ORACLE:
        raise TeacherError(
            "teacher.kind = 'oracle' cannot look at videos: use 'endpoint', or 'replay' for stored replies"
        )
    if not settings.model:
        raise TeacherError(f"teacher.model is empty: teacher '{settings.kind}' needs the model's name at the endpoint")
    url, key = (os.environ.get(name, "").strip() for name in (URL_VARIABLE, KEY_VARIABLE))
    endpoint = None
    if settings.kind == ENDPOINT:
        if not url:
            raise TeacherError(
                f"{URL_VARIABLE} is not set: give the address of an OpenAI-compatible server, for example "
                f"http://localhost:8000/v1, and its key in {KEY_VARIABLE}; or replay stored replies offline"
            )
        rate = settings.requests_per_minute or None
        endpoint = Endpoint(url, key, requests_per_minute=rate, max_concurrent=settings.concurrency)
    return Teacher(endpoint, ReplyCache(settings.cache or folder / "replies"))


def _read_completion(body: bytes, request: ChatRequest) -> Reply:
    """Return the model's message in a 200 body.

    Raises:
      TransientError: the body is no JSON; a proxy or a crashed server cut it, so it is worth another attempt.
      ReplyError: the reply is cut at `max_tokens` or withheld.
      TeacherError: the server speaks another protocol.
    """
    try:
        value = parse_json(body.decode("utf-8"))
    except (SchemaError, UnicodeDecodeError) as error:
        raise TransientError(f"the body of a 200 reply is damaged: {error}") from error
    try:
        choice = value["choices"][0]
        content, finish, usage = choice["message"]["content"], choice.get("finish_reason"), value.get("usage") or {}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise TeacherError(f"the reply has no choices[0].message.content: is {URL_VARIABLE} right?") from error
    if finish == "length":
        raise ReplyError(f"the reply was cut at max_tokens = {request.max_tokens}: allow more")
    if not isinstance(content, str) or finish not in (None, "stop"):
        raise ReplyError(f"{request.model} withheld its reply (finish_reason {shown(finish)})")
    return Reply(request.model, content, usage if isinstance(usage, dict) else {})
