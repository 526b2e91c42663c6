"""What callers send by mistake or on purpose: exact answers, and a server that is well after it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.stack import DEADLINE_S, PROMPT, Stack

POSTS = [
    "/generate",
    "/generate_stream",
    "/",
    "/tokenize",
    "/v1/chat/completions",
    "/v1/completions",
]
REQUIRED = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}
METHODS = {**dict.fromkeys(POSTS, "POST"), "/": "GET,POST"}
METHODS |= dict.fromkeys(["/health", "/info", "/metrics"], "GET")
MESSAGES = [{"role": "user", "content": "hi"}]
SHAPE = "Failed to deserialize the JSON body into the target type: "
LIMIT = 2_097_152


@pytest.fixture(autouse=True, scope="module")
def _well_afterwards(stack: Stack) -> Iterator[None]:
    """After all of it the processes are the same, nothing is leaked, and requests work."""
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


def check(reply: httpx.Response, status: int, error: str, error_type: str) -> None:
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {"error": error, "error_type": error_type}
    assert list(reply.json()) == ["error", "error_type"]
    internal = ("grpc-", "x-error", "x-http", "x-envoy")
    assert not [name for name in reply.headers if name.startswith(internal)]


def check_shape(reply: httpx.Response, start: str) -> None:
    """An error of the JSON parser: what comes behind the field's name is Envoy's to word."""
    assert reply.status_code == 422
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert body["error_type"] == "validation"
    assert body["error"].startswith(SHAPE + start)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", ["{}", "", '{"inputs": null, "messages": null, "prompt": null}'])
def test_missing_field(stack: Stack, path: str, body: str) -> None:
    name = REQUIRED.get(path, "inputs")
    check(send(stack, path, body), 422, f"{SHAPE}missing field `{name}`", "validation")


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "body",
    ["not json", "{", '{"inputs": }', "null", "[]", '"text"', "1", b"\xff\xfe\x00", b"\x00"],
    ids=repr,
)
def test_not_json(stack: Stack, path: str, body: bytes | str) -> None:
    check_shape(send(stack, path, body), "")


@pytest.mark.parametrize("path", POSTS)
def test_invalid_utf8(stack: Stack, path: str) -> None:
    name = REQUIRED.get(path, "inputs").encode()
    check_shape(send(stack, path, b'{"' + name + b'": "\xff\xfe"}'), "")


@pytest.mark.parametrize("path", POSTS)
def test_deep_nesting(stack: Stack, path: str) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    check_shape(send(stack, path, f'{{"inputs": "a", "unknown": {deep}}}'), "")


def test_deep_message_content(stack: Stack) -> None:
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
def test_wrong_content_type(stack: Stack, path: str, content_type: str | None) -> None:
    error = "Expected request with `Content-Type: application/json`"
    check(send(stack, path, '{"inputs": "a"}', content_type), 415, error, "validation")


@pytest.mark.parametrize("path", POSTS)
def test_body_above_the_limit(stack: Stack, path: str) -> None:
    error = "Failed to buffer the request body: length limit exceeded"
    body = json.dumps({"inputs": "a" * 3_000_000})
    check(send(stack, path, body), 413, error, "validation")


def test_body_of_the_limit_is_read(stack: Stack) -> None:
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
def test_wrong_method(stack: Stack, path: str, method: str) -> None:
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
        "/v1/models",
        "/health/x",
        "/%67enerate",
        "/tokenwire.v1.TextGenerationService/Generate",
    ],
)
def test_unknown_path(stack: Stack, method: str, path: str) -> None:
    reply = stack.http.request(method, path, json={"inputs": "a"})
    check(reply, 404, "Not Found", "not_found")


INVALID: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ({"temperature": -1}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"frequency_penalty": -2.1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -3}, "`top_k` must be strictly positive"),
    ({"stop": ["x"] * 100}, "`stop` supports up to 4 stop sequences. Given: 100"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than {max_input}. Given: 0"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2, "top_k": 5, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"watermark": True}, "`watermark` is not supported"),
    # The first rule that is broken counts, in TGI's order.
    (
        {"top_k": 0, "temperature": 0.0, "max_new_tokens": 0},
        "`temperature` must be strictly positive",
    ),
]


@pytest.mark.parametrize(("parameters", "error"), INVALID)
@pytest.mark.parametrize("path", ["/generate", "/"])
def test_parameter_out_of_bounds(
    stack: Stack, path: str, parameters: dict[str, Any], error: str
) -> None:
    reply = stack.http.post(path, json={"inputs": "a", "parameters": parameters})
    limit = stack.http.get("/info").json()["max_input_tokens"]
    text = "Input validation error: " + error.replace("{max_input}", str(limit))
    check(reply, 422, text, "validation")


WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"inputs": 1}, "inputs: "),
    ({"inputs": ["a"]}, ""),
    ({"inputs": "a", "parameters": "x"}, "parameters: "),
    ({"inputs": "a", "parameters": []}, ""),
    ({"inputs": "a", "parameters": {"max_new_tokens": -1}}, "parameters.max_new_tokens: "),
    ({"inputs": "a", "parameters": {"max_new_tokens": 1.5}}, "parameters.max_new_tokens: "),
    ({"inputs": "a", "parameters": {"max_new_tokens": "many"}}, "parameters.max_new_tokens: "),
    ({"inputs": "a", "parameters": {"max_new_tokens": 2**32}}, "parameters.max_new_tokens: "),
    ({"inputs": "a", "parameters": {"max_new_tokens": 10**30}}, "parameters.max_new_tokens: "),
    ({"inputs": "a", "parameters": {"seed": -1}}, "parameters.seed: "),
    ({"inputs": "a", "parameters": {"seed": 2**64}}, "parameters.seed: "),
    ({"inputs": "a", "parameters": {"temperature": "hot"}}, "parameters.temperature: "),
    ({"inputs": "a", "parameters": {"temperature": 1e39}}, "parameters.temperature: "),
    ({"inputs": "a", "parameters": {"top_k": "x"}}, "parameters.top_k: "),
    ({"inputs": "a", "parameters": {"details": 1}}, "parameters.details: "),
    ({"inputs": "a", "parameters": {"stop": [1]}}, "parameters.stop[0]: "),
    ({"inputs": "a", "parameters": {"grammar": {"type": "xml"}}}, "parameters.grammar.type: "),
]


@pytest.mark.parametrize(("body", "start"), WRONG_TYPES)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_wrong_type(stack: Stack, path: str, body: dict[str, Any], start: str) -> None:
    check_shape(stack.http.post(path, json=body), start)


@pytest.mark.parametrize(
    "body",
    [
        '{"inputs": "a", "parameters": {"temperature": NaN}}',
        '{"inputs": "a", "parameters": {"temperature": 1e999}}',
        '{"inputs": "a", "parameters": {"max_new_tokens": 1}} trailing',
        '{"inputs": "\\ud800"}',
    ],
)
def test_broken_json_value(stack: Stack, body: str) -> None:
    check_shape(send(stack, "/generate", body), "")


def test_empty_inputs(stack: Stack) -> None:
    reply = stack.http.post("/generate", json={"inputs": ""})
    check(reply, 422, "Input validation error: `inputs` cannot be empty", "validation")


def test_control_characters_are_text(stack: Stack) -> None:
    assert stack.generate("a\x00b\x01\u200b", max_new_tokens=1)["details"]


def test_inputs_above_the_limit(stack: Stack) -> None:
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


BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, f"{SHAPE}missing field `messages`", "validation"),
    ({"messages": [{}]}, f"{SHAPE}missing field `messages[0].role`", "validation"),
    (
        {"messages": [*MESSAGES, {"role": "user"}]},
        f"{SHAPE}missing field `messages[1].content`",
        "validation",
    ),
    (
        {"messages": [{"role": "user", "content": 5}]},
        f"{SHAPE}messages[0].content: data did not match any variant of untagged enum "
        "MessageContent",
        "validation",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "Input validation error: the model takes text only; `image_url` is not supported",
        "validation",
    ),
    (
        {"messages": MESSAGES, "n": 2},
        "Input validation error: `n` must be 1. Given: 2",
        "validation",
    ),
    (
        {"messages": MESSAGES, "temperature": -1},
        "Input validation error: `temperature` must be strictly positive",
        "validation",
    ),
    (
        {"messages": MESSAGES, "presence_penalty": -3},
        "Input validation error: `repetition_penalty` must be strictly positive",
        "validation",
    ),
    (
        {"messages": MESSAGES, "logprobs": True, "top_logprobs": 9},
        "Input validation error: `top_n_tokens` must be >= 0 and <= 5. Given: 9",
        "validation",
    ),
    (
        {"messages": MESSAGES, "max_tokens": 0},
        "Input validation error: `max_new_tokens` must be strictly positive",
        "validation",
    ),
]


@pytest.mark.parametrize(("body", "error", "error_type"), BAD_CHATS)
def test_bad_chat(stack: Stack, body: dict[str, Any], error: str, error_type: str) -> None:
    check(stack.http.post("/v1/chat/completions", json=body), 422, error, error_type)


def test_role_that_the_template_refuses(stack: Stack) -> None:
    body = {"messages": [{"role": "weird", "content": "x"}]}
    reply = stack.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 422
    assert reply.json()["error_type"] == "template_error"
    assert reply.json()["error"].startswith("Template error: ")


BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": []}, f"{SHAPE}missing field `prompt`", "validation"),
    ({"prompt": ""}, "Input validation error: `inputs` cannot be empty", "validation"),
    ({"prompt": ["a", ""]}, "Input validation error: `inputs` cannot be empty", "validation"),
    (
        {"prompt": ["a"] * 5},
        "Number of prompts exceeds the maximum allowed batch size of 4",
        "batch size exceeded",
    ),
    (
        {"prompt": "a", "suffix": ""},
        "Suffix is not supported and can be achieved by preprocessing the prompt.",
        "suffix not supported",
    ),
    (
        {"prompt": "a", "max_tokens": 0},
        "Input validation error: `max_new_tokens` must be strictly positive",
        "validation",
    ),
]


@pytest.mark.parametrize(("body", "error", "error_type"), BAD_COMPLETIONS)
def test_bad_completion(stack: Stack, body: dict[str, Any], error: str, error_type: str) -> None:
    check(stack.http.post("/v1/completions", json=body), 422, error, error_type)


@pytest.mark.parametrize("prompt", [1, [1, 2], [[1]], {"a": 1}], ids=str)
def test_prompt_of_the_wrong_type(stack: Stack, prompt: Any) -> None:
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


def test_caller_that_says_nothing_does_not_matter(stack: Stack) -> None:
    host, port = stack.address.split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        head = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b'content-length: 100\r\n\r\n{"inputs"')
        assert stack.generate(PROMPT)["details"]
