"""The OpenAPI document against the running server: every schema, every status, exact error bytes.

`UPDATE_GOLDEN=1 pytest tests/e2e/test_contract.py` rewrites `golden/*.txt`, whole replies that do
not depend on the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.contract import (
    DOCUMENT,
    DONE,
    JSON,
    SSE,
    Checker,
    documented_statuses,
    events,
    meant_path,
    response_schemas,
)
from tests.e2e.stack import ENDLESS, PROMPT, Stack, running, wait_until
from tests.e2e.tools import TOOLS, WEATHER_QUESTION
from tests.golden import check_golden, check_no_others

GOLDEN = Path(__file__).with_name("golden")
Exchange = tuple[str, str, dict[str, Any] | None]

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": 4,
    "seed": 1,
}
COMPLETION: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0.0}
LOGPROBS: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
CALL: dict[str, Any] = {
    "messages": [{"role": "user", "content": WEATHER_QUESTION}],
    "tools": TOOLS,
    "tool_choice": "required",
    "max_tokens": 100,
    "temperature": 0.0,
}
FORMAT: dict[str, Any] = {"response_format": {"type": "json_object"}}
GRAMMAR: dict[str, Any] = {"grammar": {"type": "regex", "value": "[a-c]{3}"}}
EVERYTHING: dict[str, Any] = {
    "details": True,
    "decoder_input_details": True,
    "top_n_tokens": 2,
    "seed": 2**64 - 1,
    "do_sample": True,
}


def generate(**parameters: Any) -> dict[str, Any]:
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, **parameters}}


# Requests that are answered with 200; between them they draw every kind of reply.
EXCHANGES: dict[str, Exchange] = {
    "root": ("GET", "/", None),
    "health": ("GET", "/health", None),
    "ping": ("GET", "/ping", None),
    "info": ("GET", "/info", None),
    "metrics": ("GET", "/metrics", None),
    "models": ("GET", "/v1/models", None),
    "openapi": ("GET", "/openapi.json", None),
    "tokenize": ("POST", "/tokenize", {"inputs": "¿Qué? 🙂"}),
    "chat tokenize": ("POST", "/chat_tokenize", CHAT),
    "generate": ("POST", "/generate", generate()),
    "generate, details": ("POST", "/generate", generate(details=True)),
    "generate, everything": ("POST", "/generate", generate(**EVERYTHING)),
    "generate, best of": (
        "POST",
        "/generate",
        generate(best_of=2, do_sample=True, details=True, top_n_tokens=1),
    ),
    "generate, improbable tokens": (
        "POST",
        "/generate",
        generate(top_k=1, top_n_tokens=5, details=True),
    ),
    "generate, grammar": (
        "POST",
        "/generate",
        generate(details=True, top_n_tokens=2, best_of=2, do_sample=True, **GRAMMAR),
    ),
    "stream": ("POST", "/generate_stream", generate()),
    "stream, details": (
        "POST",
        "/generate_stream",
        generate(details=True, top_n_tokens=2, do_sample=True, seed=0),
    ),
    "stream, grammar": ("POST", "/generate_stream", generate(details=True, **GRAMMAR)),
    "compat": ("POST", "/", generate(details=True)),
    "compat stream": ("POST", "/", {**generate(details=True), "stream": True}),
    "chat": ("POST", "/v1/chat/completions", CHAT),
    "chat, logprobs": ("POST", "/v1/chat/completions", {**CHAT, **LOGPROBS}),
    "chat, improbable": ("POST", "/v1/chat/completions", {**CHAT, **LOGPROBS, "top_p": 0.01}),
    "chat stream": ("POST", "/v1/chat/completions", {**CHAT, "stream": True}),
    "chat stream, logprobs": ("POST", "/v1/chat/completions", {**CHAT, **LOGPROBS, **USAGE}),
    "chat, format": ("POST", "/v1/chat/completions", {**CHAT, **FORMAT}),
    "chat, call": ("POST", "/v1/chat/completions", CALL),
    "chat, call, logprobs": ("POST", "/v1/chat/completions", {**CALL, **LOGPROBS}),
    "chat stream, call": ("POST", "/v1/chat/completions", {**CALL, "stream": True}),
    "chat stream, call, logprobs": ("POST", "/v1/chat/completions", {**CALL, **LOGPROBS, **USAGE}),
    "chat stream, unfinished call": (
        "POST",
        "/v1/chat/completions",
        {**CALL, "stream": True, "max_tokens": 12},
    ),
    "completion": ("POST", "/v1/completions", COMPLETION),
    "completions": ("POST", "/v1/completions", {**COMPLETION, "prompt": [PROMPT, "One"]}),
    "completion stream": ("POST", "/v1/completions", {**COMPLETION, "stream": True}),
    "completions stream": (
        "POST",
        "/v1/completions",
        {**COMPLETION, "prompt": ["a", "b"], **USAGE},
    ),
    "invocation": ("POST", "/invocations", generate(details=True)),
    "invocation stream": ("POST", "/invocations", {**generate(), "stream": True}),
    "chat invocation": ("POST", "/invocations", CHAT),
    "chat invocation stream": ("POST", "/invocations", {**CHAT, **USAGE}),
    "call invocation": ("POST", "/invocations", CALL),
    "call invocation stream": ("POST", "/invocations", {**CALL, "stream": True}),
    "completion invocation": ("POST", "/invocations", COMPLETION),
    "completion invocation stream": ("POST", "/invocations", {**COMPLETION, "stream": True}),
}

# The smallest float32: logits become infinite and, at the softmax, no numbers.
HOPELESS = 1e-45
GENERATE_422 = generate(top_p=1.0)
GENERATE_424 = generate(temperature=HOPELESS)
GENERATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # path: a request that is refused, one that fails
    "/generate": (GENERATE_422, GENERATE_424),
    "/generate_stream": (GENERATE_422, GENERATE_424),
    "/": (GENERATE_422, GENERATE_424),
    "/v1/chat/completions": ({**CHAT, "top_p": 1.0}, {**CHAT, "temperature": HOPELESS}),
    "/v1/completions": ({**COMPLETION, "top_p": 1.0}, {**COMPLETION, "temperature": HOPELESS}),
    "/invocations": (GENERATE_422, GENERATE_424),
}
HEALTH_PATHS = ["/", "/health", "/ping"]

PROVOKED_HERE = {
    *((method, path, 200) for method, path, _ in EXCHANGES.values()),
    *(("POST", path, status) for path in GENERATIONS for status in (422, 424, 429)),
    ("POST", "/chat_tokenize", 422),
    *(("GET", path, 503) for path in HEALTH_PATHS),
}
# An engine's client that ends a stream without its last message: no engine can make it. See
# tests/service/api/test_documented_statuses.py.
PROVOKED_OVER_A_FAKE_ENGINE = {
    ("POST", path, 500) for path in GENERATIONS if path != "/invocations"
}
# "No tokenizer found": the server does not start without one.
CANNOT_OCCUR = {("POST", "/tokenize", 404)}


def ask(stack: Stack, exchange: Exchange) -> httpx.Response:
    method, path, body = exchange
    return stack.http.request(method, path, json=body)


def checked_path(exchange: Exchange) -> str:
    _, path, body = exchange
    return meant_path(path, body)


def failure(reply: httpx.Response) -> tuple[int, dict[str, Any]]:
    """The status and the error that a caller hears; a stream tells it in a single event."""
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
    assert reply.status_code == 200, reply.text
    exchange = EXCHANGES[name]
    checker.check(exchange[0], checked_path(exchange), reply)


@pytest.mark.parametrize("name", EXCHANGES)
def test_reply_fits_its_schema(replies: dict[str, httpx.Response], name: str) -> None:
    check_exchange(Checker(), name, replies[name])


def test_every_schema_of_a_reply_was_met(replies: dict[str, httpx.Response], stack: Stack) -> None:
    checker = Checker()
    for name, reply in replies.items():
        check_exchange(checker, name, reply)
    checker.check("POST", "/generate", stack.http.post("/generate", json={}))
    assert response_schemas() - checker.exercised == set()


def test_served_document_is_the_one_that_judges(replies: dict[str, httpx.Response]) -> None:
    assert (
        replies["openapi"].json() == DOCUMENT
    )  # tests/service/api/test_docs.py: it has the contract


def test_every_documented_status_is_provoked() -> None:
    provoked = PROVOKED_HERE | PROVOKED_OVER_A_FAKE_ENGINE
    assert documented_statuses() - provoked == CANNOT_OCCUR


def made_up(kind: str, *bodies: Any, status: int = 200) -> httpx.Response:
    """A reply that no server sent."""
    texts = [body if isinstance(body, str) else json.dumps(body) for body in bodies]
    text = "".join(f"data: {item}\n\n" for item in texts) if kind == SSE else texts[0]
    return httpx.Response(status, headers={"content-type": kind}, text=text)


TOKEN = {"id": 1, "text": "a", "logprob": -0.5, "special": False}
EVENT = {"index": 1, "token": TOKEN, "generated_text": None, "details": None}
USAGE_CHUNK = {
    "object": "chat.completion.chunk",
    "id": "",
    "created": 1,
    "model": "m",
    "system_fingerprint": "f",
    "choices": [],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def test_checker_takes_what_is_right() -> None:
    checker = Checker()
    checker.check("POST", "/generate_stream", made_up(SSE, EVENT))
    checker.check("POST", "/v1/chat/completions", made_up(SSE, USAGE_CHUNK, DONE))
    assert checker.exercised == {
        "StreamResponse",
        "Token",
        "ChatCompletionChunk",
        "Usage",
    }


@pytest.mark.parametrize(
    ("path", "reply"),
    [
        ("/generate", made_up(JSON, {"error": "x"}, status=422)),
        ("/generate", made_up("text/plain", "x", status=422)),
        ("/generate", made_up(JSON, {})),
        ("/generate", made_up(JSON, {"generated_text": "x", "unknown": 1})),
        ("/generate", made_up(JSON, [{"generated_text": "x"}])),
        ("/", made_up(JSON, {"generated_text": "x"})),
        ("/", made_up(JSON, [])),
        ("/generate_stream", made_up(SSE)),
        ("/generate_stream", made_up(SSE, EVENT, DONE)),
        ("/generate_stream", made_up(SSE, {**EVENT, "index": 1.0})),
        ("/generate_stream", made_up(SSE, {**EVENT, "index": -1})),
        ("/generate_stream", made_up(SSE, {**EVENT, "top_tokens": None})),
        ("/generate_stream", made_up(SSE, {"index": 1, "token": TOKEN})),
        ("/generate_stream", made_up(SSE, {**EVENT, "token": {**TOKEN, "id": 2**32}})),
        ("/generate_stream", made_up(SSE, {**EVENT, "token": {**TOKEN, "logprob": -0.1 / 3}})),
        ("/generate_stream", made_up(SSE, {**EVENT, "details": {"finish_reason": "stop"}})),
        ("/v1/chat/completions", made_up(SSE, USAGE_CHUNK)),
        ("/v1/chat/completions", made_up(SSE, {**USAGE_CHUNK, "object": "text_completion"}, DONE)),
        ("/v1/chat/completions", made_up(SSE, {**USAGE_CHUNK, "usage": None}, DONE)),
        ("/v1/chat/completions", made_up(JSON, USAGE_CHUNK)),
        ("/tokenize", made_up(JSON, [{"id": "1", "text": "a", "start": 0, "stop": 1}])),
    ],
)
def test_checker_refuses_what_is_wrong(path: str, reply: httpx.Response) -> None:
    with pytest.raises(AssertionError):
        Checker().check("POST", path, reply)


def check_failure(reply: httpx.Response, path: str, status: int, error_type: str) -> None:
    Checker().check("POST", meant_path(path, {}), reply)
    got, body = failure(reply)
    assert got == (200 if path == "/generate_stream" else status)
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


def test_conversation_that_cannot_be_tokenised_is_a_422(stack: Stack) -> None:
    body = {"messages": [{"role": "nobody", "content": "x"}]}
    reply = stack.http.post("/chat_tokenize", json=body)
    check_failure(reply, "/chat_tokenize", 422, "template_error")


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    log_path = tmp_path_factory.mktemp("contract") / "log"
    with running(log_path, "--max-concurrent-requests=1") as stack:
        yield stack


@pytest.fixture
def small(small_server: Stack) -> Stack:
    """A server that takes one request at a time, healthy and idle."""
    wait_until(small_server.is_healthy, "a healthy server")
    small_server.wait_until_idle()
    return small_server


def test_generation_on_a_full_server_is_a_429(small: Stack) -> None:
    body = {"inputs": PROMPT, "parameters": ENDLESS}
    with small.http.stream("POST", "/generate_stream", json=body) as reply:
        lines = reply.iter_lines()  # held, since dropping it would close the connection
        assert next(lines).startswith("data: ")
        refused = {path: small.http.post(path, json=GENERATIONS[path][1]) for path in GENERATIONS}
    for path, answer in refused.items():
        check_failure(answer, path, 429, "overloaded")
        assert (answer.headers.get("retry-after") is None) == (path == "/generate_stream")


def test_health_without_an_engine_is_a_503(small: Stack) -> None:
    small.child("engine").kill()
    wait_until(lambda: not small.is_healthy(), "an unhealthy server")
    for path in HEALTH_PATHS:
        reply = small.http.get(path)
        Checker().check("GET", path, reply)
        expected = {"error": "unhealthy", "error_type": "healthcheck"}
        assert (reply.status_code, reply.json()) == (503, expected)


RAW: dict[str, tuple[str, str, dict[str, str], bytes]] = {
    # name: method, path, headers, body
    "unknown_path": ("GET", "/nope", {}, b""),
    "wrong_method": ("PUT", "/generate", {}, b""),
    "wrong_content_type": ("POST", "/generate", {"content-type": "text/plain"}, b"{}"),
    "missing_field": ("POST", "/generate", {}, b"{}"),
    "not_json": ("POST", "/generate", {}, b'{"inputs": }'),
    "wrong_type": ("POST", "/generate", {}, b'{"inputs": "a", "parameters": {"seed": -1}}'),
    "invalid": ("POST", "/generate", {}, json.dumps(GENERATE_422).encode()),
    "failed": ("POST", "/generate", {}, json.dumps(GENERATE_424).encode()),
    "suffix": ("POST", "/v1/completions", {}, b'{"prompt": "a", "suffix": "b"}'),
    "batch_size": ("POST", "/v1/completions", {}, b'{"prompt": ["a", "a", "a", "a", "a"]}'),
    "too_large": ("POST", "/generate", {}, b'"' + b"a" * 2_097_152 + b'"'),
    "stream_invalid": ("POST", "/generate_stream", {}, json.dumps(GENERATE_422).encode()),
    "stream_failed": ("POST", "/generate_stream", {}, json.dumps(GENERATE_424).encode()),
    "chat_stream_invalid": (
        "POST",
        "/v1/chat/completions",
        {},
        json.dumps({**CHAT, "stream": True, "top_p": 1.0}).encode(),
    ),
    "completion_stream_invalid": (
        "POST",
        "/v1/completions",
        {},
        json.dumps({**COMPLETION, "stream": True, "top_p": 1.0}).encode(),
    ),
    "health": ("GET", "/health", {}, b""),
    "preflight": (
        "OPTIONS",
        "/generate",
        {"origin": "https://example.org", "access-control-request-method": "POST"},
        b"",
    ),
}
# The time, the machine, the chat template, and whether Envoy had read the body when it refused it.
VARYING = {"date", "x-compute-type", "x-compute-characters", "connection"}


def whole(reply: httpx.Response) -> bytes:
    """Status, headers in alphabetical order, and body."""
    headers = sorted((name, value) for name, value in reply.headers.items() if name not in VARYING)
    head = [f"{reply.status_code}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\n".join(head).encode() + reply.content


@pytest.mark.parametrize("name", RAW)
def test_reply_that_no_model_decides_is_golden(stack: Stack, name: str) -> None:
    method, path, headers, content = RAW[name]
    headers = {"content-type": "application/json", **headers} if content else headers
    reply = stack.http.request(method, path, headers=headers, content=content)
    check_golden(GOLDEN / f"{name}.txt", whole(reply))


def test_every_golden_reply_has_its_case() -> None:
    check_no_others(GOLDEN, (f"{name}.txt" for name in RAW))
