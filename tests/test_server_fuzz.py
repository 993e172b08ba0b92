"""What a server makes of what nobody should send: a client's error each time, nothing left behind, and it goes on.

Schemathesis draws requests from the server's own OpenAPI schema; each is sent as it is, and every field of it in
otherwise valid requests, so that not only the first fault is met.
"""

import gc
import http.client
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx
import pytest

from mlx_fastvlm import load
from mlx_fastvlm.server.limits import Limits
from tests.live_server import example, openai_or_skip, serving, user, wait_until

openai_or_skip()

from mlx_fastvlm.server import connection  # noqa: E402
from mlx_fastvlm.server.job import Job  # noqa: E402
from mlx_fastvlm.server.messages import MessagesRequest  # noqa: E402
from mlx_fastvlm.server.schema import ChatRequest  # noqa: E402

CHAT, MESSAGES = "/v1/chat/completions", "/v1/messages"
VALID = {"model": "demo", "messages": [user("Hello", example("word.png"))], "max_tokens": 1}
VALID_FOR = {CHAT: VALID, MESSAGES: {**VALID, "messages": [{"role": "user", "content": "Hello"}]}}
FORMS = {CHAT: ChatRequest, MESSAGES: MessagesRequest}
DRAWN = {"negative": 45, "positive": 6}  # requests drawn for each route


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def live(demo):
    with serving(*demo, limits=Limits(max_tokens=4, max_seconds=30)) as server:
        yield server


def drawn_requests(live) -> list[tuple[str, object]]:
    """Bodies for a path, the same ones each time."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{live.url.removesuffix('/v1')}/openapi.json")
    return [
        (path, case.body)
        for path in FORMS
        for mode, count in DRAWN.items()
        for case in drawn(schema[path]["POST"].as_strategy(generation_mode=schemathesis.GenerationMode(mode)), count)
    ]


def drawn(strategy, count: int) -> list:
    """What a strategy of Hypothesis gives, the same each time."""
    hypothesis = pytest.importorskip("hypothesis")
    found = []

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(strategy)
    def draw(value):
        found.append(value)

    draw()
    return found


def one_by_one(body: object) -> list[tuple[str, object]]:
    """Each field of a drawn body in valid ones, where it means something; their answers are whole or streamed."""
    fields = body.items() if isinstance(body, dict) else ()
    whole = [
        (path, {**VALID_FOR[path], name: value})
        for path, form in FORMS.items()
        for name, value in fields
        if name in form.model_fields and value is not None
    ]
    return [*whole, *((path, {"stream": True, **each}) for path, each in whole)]


def left_behind(live) -> dict[str, float]:
    """What a request takes and must give back."""
    gc.collect()
    figures = live.figures()
    kept = figures["kept_image_bytes"] + figures["kept_prefix_bytes"]
    return {
        "running": figures["requests_running"],
        "waiting": figures["requests_waiting"],
        "jobs": sum(isinstance(each, Job) for each in gc.get_objects()),
        "threads": threading.active_count(),
        "array MiB": (figures["memory_bytes"] - kept) // 2**20,
        "open files": len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0,
    }


def post(client: httpx.Client, path: str, body: object) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body, default=repr).encode("ascii")
    return client.post(path, content=content, headers={"Content-Type": "application/json"})


@pytest.mark.filterwarnings("ignore:This model was trained")
def test_a_thousand_drawn_requests_are_no_fault_of_the_servers_and_leave_nothing(live):
    bodies = drawn_requests(live)
    requests = [*bodies, *(request for _, body in bodies for request in one_by_one(body))]
    with live.http() as client, ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda request: post(client, *request), requests[::25]))  # threads and buffers that stay
    before = left_behind(live)
    with live.http() as client, ThreadPoolExecutor(2) as pool:
        responses = list(pool.map(lambda request: post(client, *request), requests))
    for (path, body), response in zip(requests, responses, strict=True):
        assert response.status_code in (200, 400, 404), (path, body, response.text)
    statuses = Counter(response.status_code for response in responses)
    assert statuses[400] + statuses[404] >= 1000 and statuses[200] > 20, statuses
    after = left_behind(live)
    assert (after["running"], after["waiting"], after["jobs"]) == (0, 0, 0)
    assert after["threads"] <= before["threads"] + 4  # of pools that fill up
    assert after["open files"] <= before["open files"] + 4
    assert after["array MiB"] <= before["array MiB"] + 2
    assert live.ask("Hello", max_tokens=2).usage.completion_tokens <= 2
    errors = {name for name in live.figures() if name.startswith("http_errors_total")}
    assert not any('status="5' in name for name in errors), errors


def test_drawn_names_of_models_and_files_find_nothing(live):
    strategies = pytest.importorskip("hypothesis").strategies
    with live.http() as client:
        for name in drawn(strategies.text(min_size=1, max_size=50), 100):
            for place in ("/v1/models/", "/page/"):
                assert client.get(place + quote(name, safe="")).status_code in (200, 404, 307), (place, name)


JSON = "application/json"


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b'{"model": "demo", "max_tokens": 1' + b"0" * 5000 + b"}", JSON),
        (b'{"model": "demo", "max_tokens": 1e400}', JSON),
        (b'{"model": "demo", "max_tokens": NaN, "temperature": Infinity}', JSON),
        (b'{"model": "demo", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", JSON),
        (b'{"model":' * 20_000 + b"1" + b"}" * 20_000, JSON),
        (b'{"model": "\\ud800", "messages": [{"role": "user", "content": "\\udfff"}]}', JSON),
        (b'{"model": "demo", "messages": [{"role": "user", "content": "\xff\xfe"}]}', JSON),
        ("{}".encode("utf-16"), JSON),
        (b'{"model": "demo", "messages": [{"role": "user", "cont', JSON),
        (b'{"model": "demo", "model": null}', JSON),
        (b"model=demo&messages=x", "application/x-www-form-urlencoded"),
        (
            b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ndemo\r\n--x--',
            "multipart/form-data; boundary=x",
        ),
        (json.dumps(VALID).encode(), "text/plain"),
        (json.dumps(VALID).encode(), ""),
        (b"", JSON),
    ],
    ids=lambda value: f"{value[:30]!r}" if isinstance(value, bytes) else value or "no type",
)
def test_a_malformed_body_is_the_clients_error(live, path, content, kind):
    response = live.http().post(path, content=content, headers={"Content-Type": kind})
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["message"]
    assert live.http().get("/health").status_code == 200


@pytest.mark.parametrize("surrogate", ["\ud800", "\udc80", "a\udfffb"])
def test_half_a_character_in_the_words_is_the_clients_error(live, surrogate):
    for field in ("messages", "stop", "user", "response_format"):
        fields = {
            "messages": [{"role": "user", "content": surrogate}],
            "stop": [surrogate],
            "user": surrogate,
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"const": surrogate}}},
        }
        with live.http() as client:
            response = post(client, CHAT, {**VALID, field: fields[field]})
        assert response.status_code in (200, 400), (field, response.text)


def raw(live, *pieces: bytes, pause: float = 0) -> bytes:
    """What comes back for bytes on a connection: the beginning, or nothing if it is closed."""
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        return connection.recv(65536)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no host
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        HEAD + b"Content-Length: -1\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"X: " + b"a" * 66_000,
    ],
    ids=lambda value: repr(value[-40:]),
)
def test_what_is_no_http_is_turned_away(live, request_bytes):
    reply = raw(live, request_bytes)
    assert reply.split()[1] in (b"400", b"401", b"403", b"404", b"431"), reply
    assert live.http().get("/health").status_code == 200


def test_a_client_that_hangs_up_in_the_middle_of_a_body_leaves_nothing(live):
    before = left_behind(live)
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            connection.sendall(HEAD + b'Content-Length: 1000\r\n\r\n{"model": "demo",')
    wait_until(lambda: left_behind(live)["open files"] <= before["open files"] + 2, "connections stay open")
    assert live.http().get("/health").status_code == 200


def test_a_body_that_trickles_in_is_given_up(demo):
    with serving(*demo, limits=Limits(max_seconds=0.5)) as live:
        start = time.monotonic()
        reply = raw(live, HEAD + b"Content-Length: 1000\r\n\r\n{", b" ")
        assert reply.split()[1] == b"408"
        assert time.monotonic() - start < 5


def test_headers_that_trickle_in_and_connections_that_say_nothing_are_given_up(live, monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.4)
    for pieces in ([b""], [HEAD, b"X-A: 1\r\n", b"X-B: 2\r\n"]):
        start = time.monotonic()
        assert raw(live, *pieces, pause=0.1) == b""
        assert time.monotonic() - start < 5
    # A second request on the same connection has as little time; an answer may take longer than headers.
    client = http.client.HTTPConnection("127.0.0.1", live.port, timeout=10)
    client.request("GET", "/health")
    assert client.getresponse().read()
    client.sock.sendall(b"GET /hea")
    assert client.sock.recv(100) == b""


def test_an_answer_may_take_longer_than_headers(demo, monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.01)
    with serving(*demo) as live:
        assert live.ask("Describe this image.", example("word.png")).choices[0].message.content


def test_many_open_connections_do_not_keep_others_out(live):
    idle = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(300)]
    try:
        assert live.ask("Hello", max_tokens=2).usage.completion_tokens <= 2
        for each in idle:
            each.sendall(HEAD)  # and no more
        assert live.ask("Hello", max_tokens=2).usage.completion_tokens <= 2
    finally:
        for each in idle:
            each.close()


def test_more_open_requests_than_there_is_room_for_are_told_to_come_back(demo):
    limits = Limits(max_batch=1, max_queue=1)
    with serving(*demo, limits=limits) as live:
        started = [socket.create_connection(("127.0.0.1", live.port)) for _ in range(limits.max_open_requests)]
        try:
            for each in started:
                each.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")

            def is_full() -> bool:
                return live.http().get("/v1/models").status_code == 503

            wait_until(is_full, "there is still room")
            refused = live.http().get("/v1/models")
            assert refused.json()["error"]["code"] == "overloaded" and refused.headers["Retry-After"]
            assert live.http().get("/health").status_code == 200
        finally:
            for each in started:
                each.close()
        wait_until(lambda: live.http().get("/v1/models").status_code == 200, "there is no room again")
