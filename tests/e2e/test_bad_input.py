"""Invalid input: every answer is exact, and the server is unharmed afterwards."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
import httpx
import pytest

from tests.e2e.bad_input import REFUSED, REQUIRED
from tests.e2e.bad_json import REFUSED_JSON
from tests.e2e.error_texts import SHAPE
from tests.e2e.limits_input import ACCEPTED, STRICT, STRICT_ACCEPTED, STRICT_FLAGS
from tests.e2e.reflection_client import ReflectionClient, details
from tests.e2e.refusal import MAX_INPUT, MAX_TOTAL, RPCS, Row, check, tokens
from tests.e2e.stack import DEADLINE_S, PROMPT, Stack, running
from tests.e2e.typed_messages import call_to_the_end

POSTS = list(RPCS)
METHODS = {**dict.fromkeys(POSTS, "POST"), "/": "GET,POST"}
METHODS |= dict.fromkeys(["/health", "/ping", "/info", "/metrics", "/v1/models"], "GET")
METHODS |= dict.fromkeys(["/openapi.json", "/api-doc/openapi.json", "/docs"], "GET")
LIMIT = 2_097_152  # bytes of a request body


@pytest.fixture(autouse=True, scope="module")
def _server_is_unharmed(stack: Stack) -> Iterator[None]:
    """Checks after all tests: the same processes, no leaked blocks, and a request is answered."""
    before = sorted(child.pid for child in stack.children())
    expected = stack.generate()
    yield
    assert stack.is_healthy()
    stack.wait_until_idle()
    assert stack.generate() == expected
    assert sorted(child.pid for child in stack.children()) == before


def send(
    stack: Stack, path: str, body: bytes | str, content_type: str | None = "application/json"
) -> httpx.Response:
    headers = {} if content_type is None else {"content-type": content_type}
    content = body.encode() if isinstance(body, str) else body
    return stack.http.post(path, content=content, headers=headers)


def check_shape(reply: httpx.Response, start: str) -> None:
    """Checks an error of Envoy's JSON parser up to `start`; the rest is in Envoy's words."""
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert body["error_type"] == "validation"
    assert body["error"].startswith(SHAPE + start)


def names(rows: Iterable[Any]) -> list[str]:
    """Test ids for the rows of a table."""
    paths = (row.path if isinstance(row, Row) else row[0] for row in rows)
    return [f"{index} {path}" for index, path in enumerate(paths)]


def check_refused_over_grpc(api: ReflectionClient, row: Row) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call_to_the_end(api, row.rpc, row.body)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == row.error
    assert details(caught.value) == (row.error_type, row.field)


def check_refused_over_rest(stack: Stack, row: Row) -> None:
    reply = stack.http.post(row.path, json=row.body)
    assert reply.text == row.content
    assert reply.status_code == (200 if row.in_band else 422)
    if row.in_band:
        assert reply.headers["content-type"] == "text/event-stream"
    else:
        check(reply, 422, row.error, row.error_type)


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


@pytest.mark.parametrize(("path", "body", "error"), REFUSED_JSON, ids=names(REFUSED_JSON))
def test_refused_by_the_json_parser(stack: Stack, path: str, body: str, error: str) -> None:
    check(send(stack, path, body), 422, SHAPE + error, "validation")


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

    @pytest.mark.parametrize("path", POSTS)
    def test_body_above_its_limit_is_a_413(self, strict: Stack, path: str) -> None:
        for size, status in [(1000, 422), (1001, 413)]:
            body = json.dumps({"more": "a" * (size - len('{"more": ""}'))})
            assert send(strict, path, body).status_code == status


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", ["", '{"inputs": null, "messages": null, "prompt": null}'])
def test_missing_field_is_named(stack: Stack, path: str, body: str) -> None:
    name = REQUIRED.get(path, "inputs")
    check(send(stack, path, body), 422, f"{SHAPE}missing field `{name}`", "validation")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    ["not json", "{", '{"inputs": }', "null", "[]", '"text"', "1", b"\xff\xfe\x00", b"\x00"],
    ids=repr,
)
def test_body_that_is_not_a_json_object_is_refused(
    stack: Stack, path: str, body: bytes | str
) -> None:
    check_shape(send(stack, path, body), "")


@pytest.mark.parametrize("path", POSTS)
def test_invalid_utf8_is_refused(stack: Stack, path: str) -> None:
    name = REQUIRED.get(path, "inputs").encode()
    check_shape(send(stack, path, b'{"' + name + b'": "\xff\xfe"}'), "")


@pytest.mark.parametrize("path", POSTS)
def test_deep_nesting_is_refused(stack: Stack, path: str) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    check_shape(send(stack, path, f'{{"inputs": "a", "unknown": {deep}}}'), "")


def test_deep_message_content_is_refused(stack: Stack) -> None:
    content: Any = "x"
    for _ in range(200):
        content = {"a": content}
    body = {"messages": [{"role": "user", "content": content}]}
    check_shape(send(stack, "/v1/chat/completions", json.dumps(body)), "")


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
        "/v1/models/tokenwire",
        "/health/x",
        "/ping/",
        "/docs/",
        "/docs/index.html",
        "/docs/swagger-ui.css/x",
        "/api-doc",
        "/invocations/x",
        "/%67enerate",
        "/tokenwire.v1.TextGenerationService/Generate",
    ],
)
def test_unknown_path_is_a_404(stack: Stack, method: str, path: str) -> None:
    reply = stack.http.request(method, path, json={"inputs": "a"})
    check(reply, 404, "Not Found", "not_found")


@pytest.mark.parametrize(
    "body",
    [
        '{"inputs": "a", "parameters": {"temperature": NaN}}',
        '{"inputs": "a", "parameters": {"temperature": 1e999}}',
        '{"inputs": "a", "parameters": {"max_new_tokens": 1}} trailing',
        '{"inputs": "\\ud800"}',
    ],
)
def test_broken_json_value_is_refused(stack: Stack, body: str) -> None:
    check_shape(send(stack, "/generate", body), "")


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


@pytest.mark.parametrize("prompt", [1, [1, 2], [[1]], {"a": 1}], ids=str)
def test_prompt_of_the_wrong_type_is_refused(stack: Stack, prompt: Any) -> None:
    check_shape(stack.http.post("/v1/completions", json={"prompt": prompt}), "")


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
