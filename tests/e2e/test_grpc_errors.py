"""Errors over gRPC: status, text and details, and the same text over REST."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from tests.e2e.reflection_client import ReflectionClient, assert_same_text, details, retry_seconds
from tests.e2e.stack import DEADLINE_S, PROMPT, SERVICE, Stack
from tests.e2e.typed_messages import failure, rest_events

INVALID = grpc.StatusCode.INVALID_ARGUMENT
MESSAGES = [{"role": "user", "content": PROMPT}]

# (method, request, REST path, reason, field); the HTTP status is 422.
SAME_ERRORS: list[tuple[str, dict[str, Any], str, str, str | None]] = [
    ("Generate", {}, "/generate", "validation", "inputs"),
    ("Generate", {"inputs": ""}, "/generate", "validation", "inputs"),
    (
        "Generate",
        {"inputs": "a", "parameters": {"temperature": 0.0}},
        "/generate",
        "validation",
        "parameters.temperature",
    ),
    (
        "Generate",
        {"inputs": "a", "parameters": {"max_new_tokens": 100_000}},
        "/generate",
        "validation",
        "parameters.max_new_tokens",
    ),
    (
        "Generate",
        {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True, "seed": 1}},
        "/generate",
        "validation",
        "parameters.seed",
    ),
    (
        "Generate",
        {"inputs": "a", "parameters": {"stop": ["x"] * 100}},
        "/generate",
        "validation",
        "parameters.stop",
    ),
    ("Generate", {"inputs": "word " * 100_000}, "/generate", "validation", "inputs"),
    ("GenerateStream", {}, "/generate_stream", "validation", "inputs"),
    (
        "CompatGenerate",
        {"inputs": "a", "parameters": {"top_k": 0}},
        "/",
        "validation",
        "parameters.top_k",
    ),
    ("Tokenize", {}, "/tokenize", "validation", "inputs"),
    ("Chat", {}, "/v1/chat/completions", "validation", "messages"),
    (
        "Chat",
        {"messages": [{"content": "x"}]},
        "/v1/chat/completions",
        "validation",
        "messages[0].role",
    ),
    (
        "Chat",
        {"messages": [{"role": "user", "content": 5}]},
        "/v1/chat/completions",
        "validation",
        "messages[0].content",
    ),
    ("Chat", {"messages": MESSAGES, "n": 17}, "/v1/chat/completions", "validation", "n"),
    (
        "Chat",
        {"messages": [{"role": "weird", "content": "x"}]},
        "/v1/chat/completions",
        "template_error",
        None,
    ),
    ("Completions", {}, "/v1/completions", "validation", "prompt"),
    (
        "Completions",
        {"prompt": ["a"], "suffix": ""},
        "/v1/completions",
        "suffix not supported",
        "suffix",
    ),
    ("Completions", {"prompt": ["a"] * 5}, "/v1/completions", "batch size exceeded", "prompt"),
]


@pytest.mark.parametrize(("method", "fields", "path", "reason", "field"), SAME_ERRORS)
def test_errors_are_the_same_over_both_transports(
    stack: Stack,
    api: ReflectionClient,
    method: str,
    fields: dict[str, Any],
    path: str,
    reason: str,
    field: str | None,
) -> None:
    error = failure(api, method, fields)
    assert error.code() is INVALID
    assert details(error) == (reason, field)
    assert retry_seconds(error) is None
    reply = stack.http.post(path, json=fields)
    assert reply.status_code == 422
    assert reply.json()["error_type"] == reason
    assert_same_text(error, reply.json()["error"])


@pytest.mark.parametrize(
    ("method", "fields", "path"),
    [
        (
            "GenerateStream",
            {"inputs": "a", "parameters": {"decoder_input_details": True}},
            "/generate_stream",
        ),
        ("Chat", {"messages": MESSAGES, "stream": True, "max_tokens": 0}, "/v1/chat/completions"),
        ("Completions", {"prompt": ["a", ""], "stream": True}, "/v1/completions"),
    ],
)
def test_error_in_a_stream_is_a_status_for_grpc_and_an_event_for_rest(
    stack: Stack, api: ReflectionClient, method: str, fields: dict[str, Any], path: str
) -> None:
    error = failure(api, method, fields)
    assert error.code() is INVALID
    assert details(error)[0] == "validation"
    expected = {"error": error.details(), "error_type": "validation"}
    assert expected in rest_events(stack, path, fields)


def test_broken_bytes_are_an_invalid_argument(api: ReflectionClient) -> None:
    call = api.channel.unary_unary(f"/{SERVICE}/Generate")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff\xff", timeout=DEADLINE_S)
    assert caught.value.code() is INVALID
    assert details(caught.value)[0] == "validation"


def test_text_that_is_not_utf8_is_an_invalid_argument(api: ReflectionClient) -> None:
    call = api.channel.unary_unary(f"/{SERVICE}/Tokenize")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\x0a\x02\xff\xfe", timeout=DEADLINE_S)
    assert caught.value.code() is INVALID


@pytest.mark.parametrize("path", [f"/{SERVICE}/Nothing", "/other.Service/Method"])
def test_unknown_method_is_unimplemented(api: ReflectionClient, path: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        api.channel.unary_unary(path)(b"", timeout=DEADLINE_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_message_above_the_limit_is_resource_exhausted(api: ReflectionClient) -> None:
    error = failure(api, "Tokenize", {"inputs": "a" * 5_000_000})
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
