"""Requests of very many parts are refused by their number, and disturb nobody meanwhile."""

from __future__ import annotations

import json
import threading
from typing import Any

import grpc
import pytest

from tests.e2e.reflection_client import ReflectionClient, details
from tests.e2e.stack import DEADLINE_S, PROMPT, Stack

TURN = {"role": "user", "content": "a"}
CHAT = "/v1/chat/completions"


def chat(**changes: Any) -> dict[str, Any]:
    return {"messages": [TURN], "max_tokens": 1, **changes}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {}}}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }


KEYS = {f"k{index}": index for index in range(40_000)}
PARTS = [{"type": "text", "text": "a"}]

# (path, RPC, body, field over REST, a part of the text)
TOO_MANY = [
    (CHAT, "Chat", chat(messages=[TURN] * 4097), "messages", "up to 4096 messages. Given: 4097"),
    ("/chat_tokenize", "ChatTokenize", chat(messages=[TURN] * 4097), "messages", "Given: 4097"),
    (
        CHAT,
        "Chat",
        chat(messages=[TURN, {"role": "user", "content": PARTS * 1025}]),
        "messages[1].content",
        "up to 1024 parts. Given: 1025",
    ),
    (
        CHAT,
        "Chat",
        chat(tools=[tool(f"f{index}") for index in range(1025)]),
        "tools",
        "up to 1024 tools. Given: 1025",
    ),
    (
        "/generate",
        "Generate",
        {"inputs": "a", "parameters": {"stop": ["x" * 1025]}},
        "parameters.stop",
        "at most 1024 bytes. Given: 1025",
    ),
    (CHAT, "Chat", chat(stop=["é" * 513]), "stop", "at most 1024 bytes. Given: 1026"),
    (
        "/tokenize",
        "Tokenize",
        {"inputs": "a" * (1024 * 1024 + 1)},
        "inputs",
        "at most 1048576 bytes to be tokenised. Given: 1048577",
    ),
]
# Of these gRPC callers send more than four times as many fields.
TOO_MANY_VALUES = [
    (CHAT, "Chat", chat(messages=[TURN, call(KEYS)]), "messages"),
    (CHAT, "Chat", chat(tools=[tool("f", {"properties": KEYS})]), "tools"),
    (CHAT, "Chat", chat(tool_choice=KEYS), "tool_choice"),
    (
        "/generate",
        "Generate",
        {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": {"enum": [*KEYS]}}}},
        "parameters",
    ),
]
FACES = pytest.mark.parametrize("face", ["direct", "envoy"])


def refused_over_grpc(
    stack: Stack, face: str, rpc: str, body: dict[str, Any]
) -> tuple[str | None, str]:
    api = ReflectionClient(stack.direct if face == "direct" else stack.through_envoy)
    with pytest.raises(grpc.RpcError) as failed:
        result = api.call(rpc, body)
        list(result)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return details(failed.value)[1], failed.value.details()


@pytest.mark.parametrize(("path", "rpc", "body", "field", "text"), TOO_MANY)
def test_what_is_one_too_many_is_refused_on_both_faces(
    stack: Stack, path: str, rpc: str, body: dict[str, Any], field: str, text: str
) -> None:
    reply = stack.http.post(path, json=body)
    assert (reply.status_code, reply.json()["error_type"]) == (422, "validation")
    assert text in reply.json()["error"]
    for face in ("direct", "envoy"):
        at, said = refused_over_grpc(stack, face, rpc, body)
        assert at == field
        assert text in said


@pytest.mark.parametrize(("path", "rpc", "body", "field"), TOO_MANY_VALUES)
def test_too_many_values_are_refused_with_the_field_that_has_most(
    stack: Stack, path: str, rpc: str, body: dict[str, Any], field: str
) -> None:
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 422
    assert "the body must have at most 32768 JSON values. Given: " in reply.json()["error"]
    assert f"most of them in `{field}`" in reply.json()["error"]
    at, said = refused_over_grpc(stack, "direct", rpc, body)
    assert at is not None
    assert at.partition(".")[0] == field  # of a grammar its bytes are counted, too
    assert "at most" in said


def test_the_last_that_is_allowed_is_accepted(stack: Stack) -> None:
    # The conversation is too long for the model, but not for being read.
    reply = stack.http.post(CHAT, json=chat(messages=[TURN] * 4096))
    assert reply.status_code == 422
    assert "tokens" in reply.json()["error"]
    whole = stack.http.post("/chat_tokenize", json=chat(messages=[TURN] * 4096))
    assert whole.status_code == 200
    assert len(whole.json()["tokenize_response"]) > 4096
    texts = chat(messages=[{"role": "user", "content": PARTS * 300}])
    assert stack.http.post(CHAT, json=texts).status_code == 200
    stop = {"inputs": PROMPT, "parameters": {"max_new_tokens": 1, "stop": ["x" * 1024]}}
    assert stack.http.post("/generate", json=stop).status_code == 200
    text = ("words " * 200_000)[: 1024 * 1024]  # a single word takes many times as long
    assert stack.http.post("/tokenize", json={"inputs": text}).status_code == 200


def test_info_over_grpc_says_the_limits(stack: Stack) -> None:
    info = ReflectionClient(stack.direct).call("Info")
    assert (info.max_messages, info.max_message_parts, info.max_tools) == (4096, 1024, 1024)
    assert (info.max_stop_sequence_bytes, info.max_tokenize_bytes) == (1024, 1024 * 1024)
    assert info.max_request_values == 32_768


@pytest.mark.parametrize(
    "text",
    [
        "a\u0301" * 20_000 + "\u0301" * 40_000,
        "x" * 200_000,
    ],
    ids=["combining accents", "one word"],
)
def test_others_are_served_while_odd_long_texts_are_tokenised(stack: Stack, text: str) -> None:
    """Six at a time, for two processes: a request that comes later is answered before they are."""
    statuses: list[int] = []

    def attack() -> None:
        body = json.dumps({"inputs": text}).encode()
        headers = {"content-type": "application/json"}
        reply = stack.http.post("/tokenize", content=body, headers=headers, timeout=DEADLINE_S)
        statuses.append(reply.status_code)

    threads = [threading.Thread(target=attack) for _ in range(6)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert stack.http.get("/health").status_code == 200
        assert stack.generate(max_new_tokens=1)["details"]["generated_tokens"] == 1
    assert set(statuses) <= {200, 422, 429}
    assert len(statuses) == 6
