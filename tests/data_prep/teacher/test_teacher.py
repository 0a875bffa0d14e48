"""The teacher's client against a real HTTP server on the loopback interface."""

from __future__ import annotations

import base64
import email.utils
import json
import shutil
import ssl
import subprocess
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import common
from configs.schema import build
from data_prep.sources.frames import encode_jpeg
from data_prep.teacher.client import (
    ChatRequest,
    ReplyError,
    RetryPolicy,
    Teacher,
    open_teacher,
    user_message,
)
from data_prep.teacher.describe import entity_request, parse_entities
from data_prep.teacher.endpoint import Endpoint, TeacherError, check_promised
from data_prep.teacher.json_schema import SchemaError, exact_object, parse_json
from data_prep.teacher.replay import ReplayError, Reply, ReplyCache
from tests.data_prep.teacher.server import OK, completion

SCHEMA = exact_object(n={"type": "integer"})
KEY = "sk-very-secret"
DEFAULT_POLICY = RetryPolicy()


class Waits(list):
    """Stands in for time.sleep: keeps how long it would have been."""

    def __call__(self, seconds):
        self.append(seconds)


def request(**changes):
    return ChatRequest("m", (user_message("How many?"),), SCHEMA, **changes)


def teacher(server, tmp_path, waits=None, retry=DEFAULT_POLICY, **settings):
    endpoint = Endpoint(server.url, KEY, **({"timeout_s": 5.0} | settings))
    return Teacher(endpoint, ReplyCache(tmp_path / "cache"), retry, sleep=Waits() if waits is None else waits)


def test_asks_once_then_replays_also_offline(serve, tmp_path):
    server = serve(OK)
    frame = encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    asked = ChatRequest("m", (user_message("How many?", [frame]),), SCHEMA, temperature=0.5, max_tokens=9, seed=3)
    online = teacher(server, tmp_path)
    assert online.ask(asked) == {"n": 7} and online.ask(asked) == {"n": 7}
    assert len(server.seen) == 1
    _, path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["response_format"] == {"type": "json_object"} and body["seed"] == 3 and body["max_tokens"] == 9
    image = body["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(image.removeprefix("data:image/jpeg;base64,")) == frame
    offline = Teacher(None, ReplyCache(tmp_path / "cache"))
    assert offline.ask(asked) == {"n": 7}
    for path in (tmp_path / "cache").rglob("*.*"):
        assert KEY.encode() not in path.read_bytes() and not path.name.endswith(".partial")


@pytest.mark.parametrize(
    "changes", [{"model": "m2"}, {"temperature": 0.1}, {"max_tokens": 5}, {"seed": 1}, {"messages": ()}]
)
def test_the_key_covers_everything_that_is_sent(changes):
    import dataclasses

    assert dataclasses.replace(request(), **changes).key != request().key
    assert dataclasses.replace(request(), schema={}).key == request().key


def test_offline_names_what_is_missing(tmp_path):
    offline = Teacher(None, ReplyCache(tmp_path))
    with pytest.raises(TeacherError, match=f"offline, and there is no stored reply to request {request().key[:16]}"):
        offline.ask(request())
    ReplyCache(tmp_path).put(request().key, Reply("m", '{"n": "seven"}'))
    with pytest.raises(TeacherError, match=r"does not fit \(\$\.n: 'seven' is not of type 'integer'"):
        offline.ask(request())


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_statuses_that_may_pass_are_tried_again(serve, tmp_path, status):
    waits, server = Waits(), serve(("status", status, {}, "busy"), ("status", status, {}, "busy"), OK)
    policy = RetryPolicy(seed=4)
    assert teacher(server, tmp_path, waits, policy).ask(request()) == {"n": 7}
    assert len(server.seen) == 3
    assert waits == [policy.wait_s(request().key, 1), policy.wait_s(request().key, 2)]
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_honoured(serve, tmp_path, date):
    value = email.utils.formatdate(time.time() + 8, usegmt=True) if date else "7"
    waits, server = Waits(), serve(("status", 429, {"Retry-After": value}, ""), OK)
    assert teacher(server, tmp_path, waits).ask(request()) == {"n": 7}
    assert 6 <= waits[0] <= 8
    assert max(waits) <= 8


def test_retry_after_holds_back_other_requests_too(serve, tmp_path):
    server = serve(("status", 429, {"Retry-After": "0.4"}, ""), OK)
    client = teacher(server, tmp_path, time.sleep, RetryPolicy(first_wait_s=0.01), max_concurrent=1)
    assert client.ask_many([request(seed=n) for n in range(3)]) == [{"n": 7}] * 3
    assert server.seen[1][0] - server.seen[0][0] >= 0.39


def test_a_server_that_asks_for_hours_is_given_up_on(serve, tmp_path):
    server = serve(("status", 429, {"Retry-After": "86400"}, "quota"))
    with pytest.raises(TeacherError, match="asks to wait 86400 s.*quota"):
        teacher(server, tmp_path).ask(request())
    assert len(server.seen) == 1


@pytest.mark.parametrize("value", ["1e400", "9" * 5000, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_pause_without_end_is_not_waited_for(serve, tmp_path, value):
    server = serve(("status", 503, {"Retry-After": value}, "busy"))
    with pytest.raises(TeacherError, match="asks to wait (inf|[0-9]{9,}) s.*busy"):
        teacher(server, tmp_path).ask(request())
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "value", ["-5", "nan", "soon", "", "Mon, 01 Jan 99999 00:00:00 GMT", "01 Jan 2026 00:00 +9" + 99 * "9"]
)
def test_a_pause_that_is_none_is_as_if_not_asked_for(serve, tmp_path, value):
    waits, server = Waits(), serve(("status", 503, {"Retry-After": value}, ""), OK)
    assert teacher(server, tmp_path, waits).ask(request()) == {"n": 7} and max(waits) <= 1


def test_a_length_of_thousands_of_digits_is_refused(serve, tmp_path):
    server = serve(("promised", 200, {"Content-Length": "9" * 5000}, ""))
    with pytest.raises(TeacherError, match="more than the limit|no reply in 1 attempts"):
        teacher(server, tmp_path, retry=RetryPolicy(attempts=1)).ask(request())
    with pytest.raises(TeacherError, match="more than the limit of 10"):
        check_promised("9" * 5000, 10)
    for fine in ("10", "", "x", "-9"):
        check_promised(fine, 10)


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 413, 422])
def test_other_statuses_are_not_tried_again(serve, tmp_path, status):
    server = serve(("status", status, {"Location": "/elsewhere"}, "no such thing"))
    with pytest.raises(TeacherError, match=f"HTTP status {status}: 'no such thing'") as error:
        teacher(server, tmp_path).ask(request())
    assert len(server.seen) == 1 and KEY not in str(error.value)


@pytest.mark.parametrize("kind", ["truncated", "hang_up", "not_json", "html"])
def test_damaged_replies_are_tried_again(serve, tmp_path, kind):
    step = {"not_json": ("status", 200, {}, OK[3][:-9]), "html": ("status", 200, {}, "<html>")}
    server = serve(step.get(kind, (kind, 200, {}, OK[3])), OK)
    assert teacher(server, tmp_path).ask(request()) == {"n": 7}
    assert len(server.seen) == 2


@pytest.mark.parametrize("kind", ["silent", "drip", "drip_head"])
def test_slow_replies_time_out_and_are_tried_again(serve, tmp_path, kind):
    server = serve((kind, 200, {}, OK[3]), OK)
    start = time.monotonic()
    assert teacher(server, tmp_path, timeout_s=0.4).ask(request()) == {"n": 7}
    assert len(server.seen) == 2 and 0.35 < time.monotonic() - start < 3


def test_gives_up_after_all_attempts_and_says_why(serve, tmp_path):
    server = serve(("status", 503, {}, "overloaded"))
    with pytest.raises(TeacherError, match="no reply in 3 attempts; the last one: HTTP status 503: 'overloaded'"):
        teacher(server, tmp_path, retry=RetryPolicy(attempts=3)).ask(request())
    assert len(server.seen) == 3
    server.close()
    with pytest.raises(TeacherError, match="ConnectError"):
        teacher(server, tmp_path, retry=RetryPolicy(attempts=2)).ask(request())


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl to make a certificate")
def test_a_certificate_that_nobody_trusts_is_not_tried_again(serve, tmp_path):
    made = "req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=127.0.0.1 -keyout key.pem -out cert.pem".split()
    subprocess.run(["openssl", *made], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server, waits = serve(OK), Waits()
    server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
    server.url = server.url.replace("http:", "https:")
    with pytest.raises(TeacherError, match="certificate is not trusted: self.signed"):
        teacher(server, tmp_path, waits).ask(request())
    assert server.seen == [] and waits == []


@pytest.mark.parametrize("step", [("endless", 200, {}, ""), ("status", 200, {}, "x" * 5000)])
def test_huge_bodies_are_refused_without_reading_them(serve, tmp_path, step):
    server = serve(step)
    with pytest.raises(TeacherError, match="more .*than the limit of 4096"):
        teacher(server, tmp_path, max_reply_bytes=4096).ask(request())
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("seven", "not JSON"),
        ('```json\n{"n": 7}\n```', "not JSON"),
        ('{"n": 7.5}', r"\$\.n: 7\.5 is not of type 'integer'"),
        ('{"n": true}', r"\$\.n: True is not of type 'integer'"),
        ('{"n": 7, "m": 1}', r"\$: Additional properties .*'m'"),
        ('{"n": 7, "n": 8}', "a key twice"),
        ('{"n": NaN}', "NaN is not JSON"),
        ('{"n": 1e999}', "1e999 is not JSON"),
        ("{}", r"\$: 'n' is a required property"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_wrong_content_is_asked_for_again_and_never_stored(serve, tmp_path, content, says):
    wrong = ("status", 200, {}, completion(content))
    assert teacher(serve(wrong, OK), tmp_path / "a").ask(request()) == {"n": 7}
    client = teacher(serve(wrong), tmp_path / "b")
    with pytest.raises(ReplyError, match=says):
        client.ask(request())
    assert list((tmp_path / "b").rglob("*.json")) == []


def test_cut_withheld_and_foreign_replies(serve, tmp_path):
    for text, says in (
        (completion('{"n', "length"), "cut at max_tokens = 2048"),
        (completion("", "content_filter"), "withheld"),
        (completion(None), "withheld"),
        ('{"error": "x"}', r"no choices\[0\]"),
        ("[]", r"no choices\[0\]"),
    ):
        server = serve(("status", 200, {}, text))
        with pytest.raises(TeacherError, match=says):
            teacher(server, tmp_path).ask(request())
        assert len(server.seen) == 1


def test_rate_and_concurrency_are_bounded(serve, tmp_path):
    server = serve(("held", 200, {}, OK[3]))
    client = teacher(server, tmp_path, time.sleep, requests_per_minute=1200, max_concurrent=2)
    asked = [request(seed=n % 8) for n in range(16)]
    assert client.ask_many(asked) == [{"n": 7}] * 16
    starts = np.sort([seen[0] for seen in server.seen])
    assert len(starts) == 8 and server.most_in_flight == 2
    assert starts[-1] - starts[0] >= 0.9 * 7 * 0.05


def test_ask_many_keeps_the_order_and_the_errors(serve, tmp_path):
    server = serve(("status", 400, {}, "bad"), OK)
    replies = teacher(server, tmp_path, max_concurrent=1).ask_many([request(seed=1), request(seed=2)])
    assert isinstance(replies[0], TeacherError) and replies[1] == {"n": 7}


def test_the_back_off_is_deterministic_and_bounded():
    policy = RetryPolicy(first_wait_s=1, max_wait_s=8, seed=1)
    waits = [policy.wait_s("k", n) for n in range(1, 100)]
    assert waits == [policy.wait_s("k", n) for n in range(1, 100)]
    assert waits[:3] != [RetryPolicy(max_wait_s=8, seed=2).wait_s("k", n) for n in range(1, 4)]
    assert all(min(8, 2 ** (n - 1)) / 2 <= w <= min(8, 2 ** (n - 1)) for n, w in enumerate(waits, 1))
    assert policy.wait_s("k", 1, 30.0) == 30.0


def test_settings_come_from_the_environment_and_are_checked(monkeypatch, tmp_path):
    monkeypatch.delenv("MLLM4D_TEACHER_URL", raising=False)
    group = build(common.CURATE_KEYS, {"teacher.kind": "endpoint", "teacher.model": "m"}).teacher
    with pytest.raises(TeacherError, match="MLLM4D_TEACHER_URL is not set"):
        open_teacher(group, tmp_path)
    monkeypatch.setenv("MLLM4D_TEACHER_URL", "https://host/v1")
    monkeypatch.setenv("MLLM4D_TEACHER_KEY", KEY)
    endpoint = open_teacher(group, tmp_path).endpoint
    assert endpoint == Endpoint("https://host/v1", KEY, max_concurrent=group.concurrency)
    assert KEY not in repr(endpoint)
    for url in (
        "ftp://host/v1",
        "host/v1",
        f"https://me:{KEY}@host/v1",
        "https://host/v1?key=1",
        "",
        "https://host:99999999/v1",
        "https://[::1/v1",
        "https://ho\x00st/v1",
    ):
        with pytest.raises(TeacherError) as error:
            Endpoint(url)
        assert KEY not in str(error.value)
    with pytest.raises(TeacherError) as error:
        Endpoint("https://host/v1", f"{KEY}\n")
    assert KEY not in str(error.value)
    with pytest.raises(TeacherError, match="positive"):
        Endpoint("https://host/v1", max_concurrent=0)


def test_damaged_stored_replies_are_named(tmp_path):
    cache, key = ReplyCache(tmp_path), request().key
    cache.put(key, Reply("m", '{"n": 1}'))
    path = next(tmp_path.rglob("*.json"))
    whole = path.read_bytes()
    for damaged in (b"", whole[:-5], b"[]", b"null", whole.replace(key.encode(), b"0" * 64), b'{"format": 9}'):
        path.write_bytes(damaged)
        with pytest.raises(ReplayError, match="delete it|this release reads"):
            cache.get(key)
    with pytest.raises(ReplayError, match="not a request key"):
        cache.get("../../etc/passwd")


def test_entities_are_asked_for_and_tidied(serve, tmp_path):
    content = {"entities": [{"en": " the  red car ", "cat": "Vehicle"}, {"en": "The red car", "cat": "x"}]}
    server = serve(("status", 200, {}, completion(json.dumps(content))))
    frames = [encode_jpeg(np.full((4, 4, 3), n, np.uint8)) for n in range(3)]
    asked = entity_request("m", frames)
    assert parse_entities(teacher(server, tmp_path).ask(asked)) == [{"en": "the red car", "cat": "vehicle"}]
    parts = server.seen[0][3]["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url"] * 3 + ["text"]
    assert "These are 3 frames" in parts[-1]["text"] and '{"entities": [{"en": ' in parts[-1]["text"]
    with pytest.raises(TeacherError, match="frame 1 is not a JPEG"):
        entity_request("m", [frames[0], b"GIF89a"])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"entities": [{"en": "a", "cat": ""}]}, r"\$\.entities\[0\]\.cat: '' should be non-empty"),
        ({"entities": [{"en": "a", "cat": "b" * 51}]}, r"\$\.entities\[0\]\.cat: 'b+' is too long"),
        ({"entities": [{"en": "a" * 9999, "cat": "b"}]}, r"\$\.entities\[0\]\.en: 'a{79}\.\.\. .* maxLength 100"),
        ({"entities": [{"en": "a"}]}, r"\$\.entities\[0\]: 'cat' is a required property"),
        ({"entities": "a"}, r"\$\.entities: 'a' is not of type 'array'"),
        ({"entities": [{"en": "a", "cat": "b"}] * 21}, r"\$\.entities: .* maxItems 20"),
    ],
)
def test_the_entity_schema_is_strict(value, says):
    with pytest.raises(SchemaError, match=says) as error:
        parse_json(json.dumps(value), entity_request("m", []).schema)
    assert len(str(error.value)) < 250


@settings(max_examples=150, deadline=None)
@given(st.text() | st.recursive(st.none() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_any_text_parses_or_gives_a_schema_error(text):
    try:
        value = parse_json(text, {"type": "array", "items": {"type": "string"}})
    except SchemaError:
        return
    assert isinstance(value, list) and all(isinstance(entry, str) for entry in value)
