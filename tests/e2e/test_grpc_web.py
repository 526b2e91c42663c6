"""gRPC-Web through Envoy, binary and as base64 text."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from google.protobuf.message import Message

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import ENDLESS, PROMPT, SERVICE, Stack


def settled(api: ReflectionClient, method: str, fields: dict[str, Any]) -> list[bytes]:
    """The messages of a reply once the prompt's blocks are cached, as the reply tells."""
    for _ in range(2):
        reply = api.call(method, fields)
        messages = [reply] if isinstance(reply, Message) else list(reply)
    return [message.SerializeToString() for message in messages]


@pytest.mark.parametrize("text", [False, True], ids=["binary", "text"])
def test_unary_reply_is_the_message_of_native_grpc(
    stack: Stack, direct_api: ReflectionClient, text: bool
) -> None:
    fields = {"inputs": PROMPT, "parameters": {"max_new_tokens": 3}, "request_id": "same"}
    expected = settled(direct_api, "Generate", fields)
    payload = direct_api.request("Generate", fields).SerializeToString()
    frame = struct.pack(">BI", 0, len(payload)) + payload
    content_type = "application/grpc-web-text+proto" if text else "application/grpc-web+proto"
    reply = stack.http.post(
        f"/{SERVICE}/Generate",
        content=base64.b64encode(frame) if text else frame,
        headers={"content-type": content_type, "accept": content_type, "x-grpc-web": "1"},
    )
    assert reply.status_code == 200
    assert reply.headers["content-type"] == content_type
    data = _decode(reply.content) if text else reply.content
    (kind, message), (last_kind, trailers) = _frames(data)
    assert (kind, last_kind) == (0, 0x80)
    assert b"grpc-status:0" in trailers.replace(b" ", b"")
    assert [message] == expected


def test_stream_is_the_messages_of_native_grpc(stack: Stack, direct_api: ReflectionClient) -> None:
    parameters = {**ENDLESS, "max_new_tokens": 3}
    fields = {"inputs": PROMPT, "parameters": parameters, "request_id": "same"}
    expected = settled(direct_api, "GenerateStream", fields)
    payload = direct_api.request("GenerateStream", fields).SerializeToString()
    reply = stack.http.post(
        f"/{SERVICE}/GenerateStream",
        content=struct.pack(">BI", 0, len(payload)) + payload,
        headers={"content-type": "application/grpc-web+proto", "x-grpc-web": "1"},
    )
    *messages, (last_kind, trailers) = _frames(reply.content)
    assert last_kind == 0x80
    assert b"grpc-status:0" in trailers.replace(b" ", b"")
    assert messages == [(0, message) for message in expected]


def test_error_has_its_grpc_status(stack: Stack) -> None:
    reply = stack.http.post(
        f"/{SERVICE}/Generate",
        content=struct.pack(">BI", 0, 0),
        headers={"content-type": "application/grpc-web+proto", "x-grpc-web": "1"},
    )
    assert reply.status_code == 200
    status = reply.headers.get("grpc-status")
    if status is None:
        (_, trailers) = _frames(reply.content)[-1]
        assert b"grpc-status:3" in trailers.replace(b" ", b"")
    else:
        assert status == "3"


def _decode(data: bytes) -> bytes:
    """Decodes base64 of several parts, each encoded by itself with its own padding."""
    parts = data.replace(b"=", b"= ").replace(b"= =", b"==").split()
    return b"".join(base64.b64decode(part) for part in parts)


def _frames(data: bytes) -> list[tuple[int, bytes]]:
    """Splits a gRPC-Web body into (flags, payload)."""
    frames = []
    while data:
        kind, size = struct.unpack(">BI", data[:5])
        frames.append((kind, data[5 : 5 + size]))
        data = data[5 + size :]
    return frames
