"""The OpenAPI document against the running server: every schema and every status."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.contract import (
    DOCUMENT,
    DONE,
    SSE,
    Checker,
    documented_statuses,
    events,
    meant_path,
    operations,
    response_schemas,
)
from tests.e2e.exchanges import EXCHANGES, GENERATIONS, Exchange
from tests.e2e.long_winded import LONG, long_winded
from tests.e2e.stack import PROMPT, Stack, running, wait_until

HEALTH_PATHS = ["/", "/health", "/ping"]
BODIES = [path for method, path, _ in operations() if method == "POST"]
READABLE = [path for path in BODIES if not path.endswith("_lora_adapter")]  # by everybody

PROVOKED_HERE = {
    *((method, meant_path(path, None), 200) for method, path, _ in EXCHANGES.values()),
    ("GET", "/v1/models/{id}", 404),
    *(("POST", path, status) for path in GENERATIONS for status in (422, 424, 429)),
    *(("POST", path, status) for path in BODIES for status in (413, 415)),
    *(("POST", path, 400) for path in READABLE),
    *(("POST", path, 422) for path in ("/tokenize", "/chat_tokenize")),
    *(("GET", path, 503) for path in HEALTH_PATHS),
}
# tests/e2e/test_adapters.py, and test_loading_adapters.py, whose server has keys.
PROVOKED_WITH_ADAPTERS = {
    *(("POST", path, 404) for path in (*GENERATIONS, "/chat_tokenize")),
    *(("POST", "/v1/load_lora_adapter", status) for status in (200, 400, 401, 403, 404, 422, 503)),
    *(
        ("POST", "/v1/unload_lora_adapter", status)
        for status in (200, 400, 401, 403, 404, 422, 503)
    ),
}
# A stream of the engine client that ends without its last message, which no real engine causes:
# see tests/service/api/test_documented_statuses.py.
PROVOKED_OVER_A_FAKE_ENGINE = {
    ("POST", path, 500) for path in GENERATIONS if path != "/invocations"
}
# "No tokenizer found": the server does not start without a tokenizer.
CANNOT_OCCUR = {("POST", "/tokenize", 404)}


def ask(stack: Stack, exchange: Exchange) -> httpx.Response:
    """Sends a request."""
    method, path, body = exchange
    return stack.http.request(method, path, json=body)


def checked_path(exchange: Exchange) -> str:
    """The path whose schemas the reply must fit."""
    _, path, body = exchange
    return meant_path(path, body)


def failure(reply: httpx.Response) -> tuple[int, dict[str, Any]]:
    """The status and the error of a reply; a stream has the error in its only event."""
    if reply.headers["content-type"] == SSE:
        payloads = [item for item in events(reply) if item != DONE]
        (event,) = (json.loads(item) for item in payloads)
        return reply.status_code, event
    return reply.status_code, reply.json()


@pytest.fixture(scope="module")
def replies(stack: Stack) -> dict[str, httpx.Response]:
    """What the server answers to each exchange."""
    return {name: ask(stack, exchange) for name, exchange in EXCHANGES.items()}


def check_exchange(checker: Checker, name: str, reply: httpx.Response) -> None:
    """Checks a reply of `EXCHANGES` against its schema."""
    assert reply.status_code == 200, reply.text
    exchange = EXCHANGES[name]
    checker.check(exchange[0], checked_path(exchange), reply)


@pytest.mark.parametrize("name", EXCHANGES)
def test_reply_fits_its_schema(replies: dict[str, httpx.Response], name: str) -> None:
    check_exchange(Checker(), name, replies[name])


def test_every_schema_of_a_reply_is_exercised(
    replies: dict[str, httpx.Response], stack: Stack
) -> None:
    checker = Checker()
    for name, reply in replies.items():
        check_exchange(checker, name, reply)
    checker.check("POST", "/generate", stack.http.post("/generate", json={}))
    for name in ("chat, call", "chat stream, call"):
        method, path, body = EXCHANGES[name]
        headers = {"x-tool-call-format": "openai"}
        checker.check(method, path, stack.http.request(method, path, json=body, headers=headers))
    assert response_schemas() - checker.exercised == set()


def test_served_document_is_the_one_that_replies_are_checked_with(
    replies: dict[str, httpx.Response],
) -> None:
    # tests/service/api/test_docs.py checks that it contains the contract.
    assert replies["openapi"].json() == DOCUMENT


def test_every_documented_status_is_provoked() -> None:
    provoked = PROVOKED_HERE | PROVOKED_WITH_ADAPTERS | PROVOKED_OVER_A_FAKE_ENGINE
    assert documented_statuses() - provoked == CANNOT_OCCUR


def check_failure(
    reply: httpx.Response, path: str, status: int, error_type: str, *, in_stream: bool = True
) -> None:
    """Checks a failure; one `in_stream` of `/generate_stream` has status 200."""
    Checker().check("POST", meant_path(path, {}), reply)
    got, body = failure(reply)
    assert got == (200 if path == "/generate_stream" and in_stream else status)
    assert body["error_type"] == error_type


@pytest.mark.parametrize("path", GENERATIONS)
def test_refused_generation_is_a_422(stack: Stack, path: str) -> None:
    body, _ = GENERATIONS[path]
    check_failure(stack.http.post(path, json=body), path, 422, "validation")


@pytest.mark.parametrize("path", GENERATIONS)
def test_failed_generation_is_a_424(stack: Stack, path: str) -> None:
    _, body = GENERATIONS[path]
    check_failure(stack.http.post(path, json=body), path, 424, "generation")


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/v1/completions", "/invocations"])
def test_generation_that_fails_in_a_stream_is_an_event(stack: Stack, path: str) -> None:
    _, body = GENERATIONS[path]
    reply = stack.http.post(path, json={**body, "stream": True})
    check_failure(reply, path, 200, "generation")


@pytest.mark.parametrize(
    ("paths", "content", "kind", "status"),
    [
        (READABLE, b'{"inputs"', "application/json", 400),
        (BODIES, b" " * 2_097_153, "application/json", 413),
        (BODIES, b"{}", "text/plain", 415),
    ],
    ids=["no JSON", "too large", "another type"],
)
def test_body_that_cannot_be_read_is_refused(
    stack: Stack, paths: list[str], content: bytes, kind: str, status: int
) -> None:
    for path in paths:
        reply = stack.http.post(path, content=content, headers={"content-type": kind})
        check_failure(reply, path, status, "validation", in_stream=False)


@pytest.mark.parametrize("body", [{}, {"inputs": 1}])
def test_text_that_is_not_given_is_a_422(stack: Stack, body: dict[str, Any]) -> None:
    check_failure(stack.http.post("/tokenize", json=body), "/tokenize", 422, "validation")


def test_unknown_model_is_a_404(stack: Stack) -> None:
    reply = stack.http.get("/v1/models/org/other")
    Checker().check("GET", "/v1/models/{id}", reply)
    assert failure(reply)[0] == 404


def test_conversation_that_cannot_be_tokenised_is_a_422(stack: Stack) -> None:
    body = {"messages": [{"role": "nobody", "content": "x"}]}
    reply = stack.http.post("/chat_tokenize", json=body)
    check_failure(reply, "/chat_tokenize", 422, "template_error")


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server that takes one request at a time."""
    directory = tmp_path_factory.mktemp("contract")
    flags = ("--max-concurrent-requests=1", *long_winded(directory / "model"))
    with running(directory / "log", *flags) as stack:
        yield stack


@pytest.fixture
def small(small_server: Stack) -> Stack:
    """The same, healthy and idle."""
    wait_until(small_server.is_healthy, "a healthy server")
    small_server.wait_until_idle()
    return small_server


def test_generation_on_a_full_server_is_a_429(small: Stack) -> None:
    body = {"inputs": PROMPT, "parameters": LONG}
    with small.http.stream("POST", "/generate_stream", json=body) as reply:
        lines = reply.iter_lines()  # held, since dropping it would close the connection
        assert next(lines).startswith("data: ")
        refused = {path: small.http.post(path, json=GENERATIONS[path][1]) for path in GENERATIONS}
    for path, answer in refused.items():
        check_failure(answer, path, 429, "overloaded")
        assert (answer.headers.get("retry-after") is None) == (path == "/generate_stream")


def test_health_without_an_engine_is_a_503(small: Stack) -> None:
    with small.without_engine():
        replies = {path: small.http.get(path) for path in HEALTH_PATHS}
    for path, reply in replies.items():
        Checker().check("GET", path, reply)
        expected = {"error": "unhealthy", "error_type": "healthcheck"}
        assert (reply.status_code, reply.json()) == (503, expected)
