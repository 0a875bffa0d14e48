"""The config group `teacher` -> a client."""

from __future__ import annotations

from pathlib import Path

import ml_collections

from data_prep.teacher.client import Endpoint, Teacher, TeacherError
from data_prep.teacher.replay import ReplyCache

ORACLE, ENDPOINT, REPLAY = "oracle", "endpoint", "replay"


def open_teacher(settings: ml_collections.ConfigDict, folder: Path) -> Teacher:
    """The model behind the configured endpoint, or its stored replies.

    Args:
      settings: kind, model, cache, concurrency, requests_per_minute.
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
    endpoint = None
    if settings.kind == ENDPOINT:
        rate = settings.requests_per_minute or None
        endpoint = Endpoint.from_environment(max_concurrent=settings.concurrency, requests_per_minute=rate)
    return Teacher(endpoint, ReplyCache(settings.cache or folder / "replies"))
