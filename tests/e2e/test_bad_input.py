"""Invalid input: every answer is exact, and the server is unharmed afterwards."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import httpx
import pytest

from tests.e2e.bad_input import REFUSED, REQUIRED
from tests.e2e.bad_json import ACCEPTED_JSON, REFUSED_JSON, BadBody, nested
from tests.e2e.error_texts import JSON, MAX_INPUT, MAX_TOTAL, SHAPE, UNTAGGED
from tests.e2e.limits_input import ACCEPTED, STRICT, STRICT_ACCEPTED, STRICT_FLAGS
from tests.e2e.reflection_client import ReflectionClient, details
from tests.e2e.refusal import COMPLETIONS, MESSAGES, RPCS, Row, check, processes, tokens
from tests.e2e.stack import DEADLINE_S, ENDLESS, PROMPT, Stack, running
from tests.e2e.typed_messages import call_to_the_end

POSTS = list(RPCS)
METHODS = {**dict.fromkeys(POSTS, "POST"), "/": "GET,HEAD,POST"}
METHODS |= dict.fromkeys(["/health", "/ping", "/info", "/metrics", "/v1/models"], "GET,HEAD")
METHODS |= dict.fromkeys(["/openapi.json", "/api-doc/openapi.json", "/docs"], "GET,HEAD")
LIMIT = 2_097_152  # bytes of a request body

# The smallest request that each path answers with 200.
_TEXT = {"inputs": "a", "parameters": {"max_new_tokens": 1}}
_CHAT = {"messages": MESSAGES, "max_tokens": 1}
SERVED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(POSTS, _TEXT),
    **{path: _CHAT for path, name in REQUIRED.items() if name == "messages"},
    COMPLETIONS: {"prompt": "a", "max_tokens": 1},
}


@pytest.fixture(autouse=True, scope="module")
def _server_is_unharmed(stack: Stack) -> Iterator[None]:
    """Checks after all tests: the same processes, no leaked blocks, and a request is answered."""
    before = processes(stack)
    expected = stack.generate()
    yield
    assert stack.is_healthy()
    stack.wait_until_idle()
    assert stack.generate() == expected
    assert processes(stack) == before


def send(
    stack: Stack, path: str, body: bytes | str, content_type: str | None = "application/json"
) -> httpx.Response:
    headers = {} if content_type is None else {"content-type": content_type}
    content = body.encode() if isinstance(body, str) else body
    return stack.http.post(path, content=content, headers=headers)


def names(rows: Iterable[Any]) -> list[str]:
    """Test ids for the rows of a table."""
    paths = (row.path if isinstance(row, Row | BadBody) else row[0] for row in rows)
    return [f"{index} {path}" for index, path in enumerate(paths)]


def check_refused_over_grpc(api: ReflectionClient, row: Row) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call_to_the_end(api, row.rpc, row.body)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == row.grpc_error
    assert details(caught.value) == (row.error_type, row.field)


def check_refused_over_rest(stack: Stack, row: Row) -> None:
    reply = stack.http.post(row.path, json=row.body)
    assert reply.text == row.content
    assert reply.status_code == (200 if row.is_event else 422)
    if row.is_event:
        assert reply.headers["content-type"] == "text/event-stream"
    else:
        check(reply, 422, row.rest_error, row.rest_error_type)


def check_accepted(stack: Stack, api: ReflectionClient, path: str, body: dict[str, Any]) -> None:
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert '"error' not in reply.text
    call_to_the_end(api, RPCS[path], body)


def test_every_row_is_different() -> None:
    rows = [*REFUSED, *STRICT]
    assert len({(row.path, json.dumps(row.body, sort_keys=True)) for row in rows}) == len(rows)


def test_rows_use_the_limits_of_the_server(stack: Stack) -> None:
    info = stack.http.get("/info").json()
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (MAX_INPUT, MAX_TOTAL)
    text = tokens(50)
    assert len(stack.http.post("/tokenize", json={"inputs": text}).json()) == 50


@pytest.mark.parametrize("row", REFUSED, ids=names(REFUSED))
def test_refused_over_rest(stack: Stack, row: Row) -> None:
    check_refused_over_rest(stack, row)


@pytest.mark.parametrize("row", REFUSED, ids=names(REFUSED))
def test_refused_over_grpc(direct_api: ReflectionClient, row: Row) -> None:
    check_refused_over_grpc(direct_api, row)


@pytest.mark.parametrize("row", REFUSED_JSON, ids=names(REFUSED_JSON))
def test_body_that_is_no_request_is_refused(stack: Stack, row: BadBody) -> None:
    check(send(stack, row.path, row.data), row.status, row.error, "validation")


@pytest.mark.parametrize(("path", "body"), ACCEPTED_JSON, ids=names(ACCEPTED_JSON))
def test_unusual_body_is_accepted(stack: Stack, path: str, body: str) -> None:
    reply = send(stack, path, body)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("seed", [2**53 + 1, 2**63, 2**64 - 1])
def test_seed_is_exact(stack: Stack, seed: int) -> None:
    parameters = {"seed": seed, "do_sample": True, "max_new_tokens": 1, "details": True}
    body = json.dumps({"inputs": "a", "parameters": parameters})
    assert send(stack, "/generate", body).json()["details"]["seed"] == seed


@pytest.mark.parametrize("number", [2512292042121000001, 2**53 + 1, 2**63 - 1, -(2**63) + 1])
def test_integer_of_a_schema_is_exact(stack: Stack, number: int) -> None:
    grammar = f'{{"type": "json", "value": {{"enum": [{number}]}}}}'
    parameters = f'{{"max_new_tokens": 40, "grammar": {grammar}}}'
    reply = send(stack, "/generate", f'{{"inputs": "a", "parameters": {parameters}}}')
    assert reply.json()["generated_text"] == str(number)


def test_integer_of_a_schema_that_would_be_rounded_is_refused(stack: Stack) -> None:
    grammar = {"type": "json", "value": {"enum": ["a", 2**64]}}
    reply = stack.http.post("/generate", json={"inputs": "a", "parameters": {"grammar": grammar}})
    reason = f"the number {2**64} cannot be enforced exactly, at #/enum/1"
    check(reply, 422, f"Input validation error: grammar is not valid: {reason}", "validation")


@pytest.mark.parametrize(("path", "body"), ACCEPTED, ids=names(ACCEPTED))
def test_last_values_inside_the_limits_are_accepted(
    stack: Stack, direct_api: ReflectionClient, path: str, body: dict[str, Any]
) -> None:
    check_accepted(stack, direct_api, path, body)


class TestStrictServer:
    """Errors that only small limits cause, or that they cause at smaller values."""

    @pytest.fixture(scope="class")
    @classmethod
    def strict(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
        with running(tmp_path_factory.mktemp("strict") / "log", *STRICT_FLAGS) as stack:
            yield stack

    @pytest.mark.parametrize("row", STRICT, ids=names(STRICT))
    def test_refused(self, strict: Stack, row: Row) -> None:
        check_refused_over_rest(strict, row)
        check_refused_over_grpc(ReflectionClient(strict.direct), row)

    @pytest.mark.parametrize(("path", "body"), STRICT_ACCEPTED, ids=names(STRICT_ACCEPTED))
    def test_last_values_inside_the_limits_are_accepted(
        self, strict: Stack, path: str, body: dict[str, Any]
    ) -> None:
        check_accepted(strict, ReflectionClient(strict.direct), path, body)

    def test_null_as_max_new_tokens_means_as_many_as_fit(self, strict: Stack) -> None:
        parameters = {**ENDLESS, "max_new_tokens": None, "details": True}
        body = {"inputs": tokens(8), "parameters": parameters}
        details = strict.http.post("/generate", json=body).json()["details"]
        assert (details["finish_reason"], details["generated_tokens"]) == ("length", 24)

    @pytest.mark.parametrize("path", POSTS)
    def test_body_above_its_limit_is_a_413(self, strict: Stack, path: str) -> None:
        for size, status in [(1000, 422), (1001, 413)]:
            body = json.dumps({"more": "a" * (size - len('{"more": ""}'))})
            assert send(strict, path, body).status_code == status


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", ["{}", '{"unknown": null}', ' { "x" : {"inputs": "a"} } '])
def test_missing_field_is_named(stack: Stack, path: str, body: str) -> None:
    name = REQUIRED.get(path, "inputs")
    check(send(stack, path, body), 422, f"{SHAPE}missing field `{name}`", "validation")


def test_required_fields_that_are_all_null_count_as_missing(stack: Stack) -> None:
    body = {"inputs": None, "messages": None, "prompt": None}
    reply = stack.http.post("/invocations", json=body)
    check(reply, 422, f"{SHAPE}missing field `inputs`", "validation")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("", "Input data was truncated"),
        ("{", "Input data was truncated"),
        ("{'inputs': 'a'}", "object keys must be strings (byte 1)"),
        ('{"x": }', "invalid character (byte 6)"),
        (b"\xff\xfe\x00", "invalid UTF-8 (byte 0)"),
        (b"\x00", "invalid character (byte 0)"),
    ],
)
def test_body_that_is_no_json_is_a_400(
    stack: Stack, path: str, body: bytes | str, error: str
) -> None:
    check(send(stack, path, body), 400, JSON + error, "validation")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    ("body", "given"),
    [("null", "null"), ("[]", "a list"), ('"text"', "a string"), ("1", "an integer")],
)
def test_body_that_is_no_object_is_refused(stack: Stack, path: str, body: str, given: str) -> None:
    error = f"{SHAPE}expected an object, got {given}"
    check(send(stack, path, body), 422, error, "validation")


@pytest.mark.parametrize("path", POSTS)
def test_invalid_utf8_is_refused(stack: Stack, path: str) -> None:
    body = json.dumps(SERVED[path])[:-1].encode()
    error = f"{JSON}invalid UTF-8 (byte {len(body) + 8})"
    check(send(stack, path, body + b', "x": "\xff\xfe"}'), 400, error, "validation")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("kind", ["list", "object"])
def test_nesting_has_a_limit(stack: Stack, path: str, kind: str) -> None:
    start = json.dumps(SERVED[path])[:-1]
    assert send(stack, path, f'{start}, "x": {nested(127, kind)}}}').status_code == 200
    error = f"{JSON}it is nested more than 128 deep"
    for depth in (128, 100_000):
        reply = send(stack, path, f'{start}, "x": {nested(depth, kind)}}}')
        check(reply, 400, error, "validation")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat_tokenize"])
def test_nesting_of_content_has_the_same_limit(stack: Stack, path: str) -> None:
    body = '{"messages": [{"role": "user", "content": %s}]}'
    error = f"{SHAPE}messages[0].content: {UNTAGGED}"
    check(send(stack, path, body % nested(125, "object")), 422, error, "validation")
    error = f"{JSON}it is nested more than 128 deep"
    check(send(stack, path, body % nested(126, "object")), 400, error, "validation")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""],
)
def test_wrong_content_type_is_a_415(stack: Stack, path: str, content_type: str | None) -> None:
    error = "Expected request with `Content-Type: application/json`"
    check(send(stack, path, '{"inputs": "a"}', content_type), 415, error, "validation")


@pytest.mark.parametrize("path", POSTS)
def test_body_above_the_limit_is_a_413(stack: Stack, path: str) -> None:
    error = "Failed to buffer the request body: length limit exceeded"
    body = json.dumps({"inputs": "a" * 3_000_000})
    check(send(stack, path, body), 413, error, "validation")


def test_body_of_exactly_the_limit_is_read(stack: Stack) -> None:
    frame = len('{"inputs": ""}')
    reply = send(stack, "/generate", json.dumps({"inputs": "a" * (LIMIT - frame)}))
    limit = stack.http.get("/info").json()["max_input_tokens"]
    error = (
        f"Input validation error: `inputs` must have less than {limit} tokens. "
        f"Given: {LIMIT - frame} characters"
    )
    check(reply, 422, error, "validation")


@pytest.mark.parametrize(
    ("path", "method"),
    [
        (path, method)
        for path, right in METHODS.items()
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
        if method not in right
    ],
)
def test_wrong_method_is_a_405(stack: Stack, path: str, method: str) -> None:
    reply = stack.http.request(method, path)
    check(reply, 405, "Method Not Allowed", "method_not_allowed")
    assert reply.headers["allow"] == METHODS[path]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/generate/",
        "/GENERATE",
        "/v1",
        "/v1/model/tokenwire",
        "/health/x",
        "/ping/",
        "/docs/",
        "/docs/index.html",
        "/docs/swagger-ui.css/x",
        "/api-doc",
        "/invocations/x",
        "/%47enerate",
        "/tokenwire.v1.TextGenerationService/Generate",
    ],
)
def test_unknown_path_is_a_404(stack: Stack, method: str, path: str) -> None:
    reply = stack.http.request(method, path, json={"inputs": "a"})
    check(reply, 404, "Not Found", "not_found")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '"\\ud800 "', '"\n"', "01", "True"])
def test_broken_value_is_a_400_also_where_it_is_ignored(
    stack: Stack, path: str, value: str
) -> None:
    reply = send(stack, path, f'{json.dumps(SERVED[path])[:-1]}, "x": {value}}}')
    assert (reply.status_code, reply.json()["error_type"]) == (400, "validation")
    assert reply.json()["error"].startswith(JSON)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("more", [" trailing", "{}", ",", "\x00"])
def test_text_after_the_end_is_a_400(stack: Stack, path: str, more: str) -> None:
    body = json.dumps(SERVED[path])
    byte = len(body + more) - len(more.lstrip()) + 1
    error = f"{JSON}trailing characters (byte {byte})"
    check(send(stack, path, body + more), 400, error, "validation")


@pytest.mark.parametrize("path", POSTS)
def test_name_that_comes_twice_is_refused(stack: Stack, path: str) -> None:
    body = json.dumps(SERVED[path])[:-1]
    error = f"{SHAPE}duplicate field `x`"
    check(send(stack, path, f'{body}, "x": 1, "x": 1}}'), 422, error, "validation")


@pytest.mark.parametrize("path", ["/%67enerate", "/x/../generate", "/./generate"])
def test_another_spelling_of_a_path_is_the_path(stack: Stack, path: str) -> None:
    host, port = stack.address.split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.request("POST", path, '{"inputs": 1}', {"content-type": "application/json"})
        reply = connection.getresponse()
        body = json.loads(reply.read())
    assert reply.status == 422
    assert body["error"] == f"{SHAPE}inputs: expected a string, got an integer"


def test_control_characters_are_accepted_as_text(stack: Stack) -> None:
    assert stack.generate("a\x00b\x01\u200b", max_new_tokens=1)["details"]


def test_inputs_above_the_token_limit_are_refused(stack: Stack) -> None:
    text = "one two " * 3000
    num_tokens = len(stack.http.post("/tokenize", json={"inputs": text}).json())
    total = stack.http.get("/info").json()["max_total_tokens"]
    body = {"inputs": text, "parameters": {"max_new_tokens": 10}}
    error = (
        f"Input validation error: `inputs` tokens + `max_new_tokens` must be <= {total}. "
        f"Given: {num_tokens} `inputs` tokens and 10 `max_new_tokens`"
    )
    check(stack.http.post("/generate", json=body), 422, error, "validation")
    body["parameters"] = {"truncate": 5, "max_new_tokens": 1}
    assert stack.http.post("/generate", json=body).status_code == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET\r\n\r\n",
        b"\x00\x01\x02\x03\r\n\r\n",
        b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: -5\r\n\r\n{}",
        b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 200_000 + b"\r\n\r\n",
    ],
    ids=["no path", "binary", "negative length", "huge header"],
)
def test_broken_http_is_a_4xx(stack: Stack, request_bytes: bytes) -> None:
    host, port = stack.address.split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(request_bytes)
        status_line = connection.recv(100)
    assert status_line.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))


def test_unfinished_request_does_not_block_other_requests(stack: Stack) -> None:
    host, port = stack.address.split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b'content-length: 100\r\n\r\n{"inputs"')
        assert stack.generate(PROMPT)["details"]
