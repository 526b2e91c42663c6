"""A request that is refused, with the exact error, and what all tables of such requests share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

RPCS = {
    "/generate": "Generate",
    "/generate_stream": "GenerateStream",
    "/": "CompatGenerate",
    "/invocations": "Invocations",
    "/v1/chat/completions": "Chat",
    "/v1/completions": "Completions",
    "/tokenize": "Tokenize",
    "/chat_tokenize": "ChatTokenize",
}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

# The limits of the bundled model with default settings; a test compares them with /info.
MAX_INPUT, MAX_TOTAL = 2047, 2048

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@dataclass(frozen=True, slots=True)
class Row:
    """A request that is refused.

    Args:
        path: the REST path it is sent to, which also decides on the RPC.
        body: the JSON body; read as protobuf's JSON form it is the typed message.
        error: the complete error text.
        field: the field that `google.rpc.BadRequest` names.
        error_type: `error_type` of the REST reply, and the reason in `google.rpc.ErrorInfo`.
        in_band: whether a REST client receives the error as an event of a stream with status 200.
    """

    path: str
    body: dict[str, Any]
    error: str
    field: str | None
    error_type: str = "validation"
    in_band: bool = False

    @property
    def rpc(self) -> str:
        """The RPC that the path is bound to."""
        return RPCS[self.path]

    @property
    def payload(self) -> str:
        """The JSON of the error, byte for byte."""
        body = {"error": self.error, "error_type": self.error_type}
        return json.dumps(body, separators=(",", ":"))

    @property
    def content(self) -> str:
        """The whole body of a REST reply."""
        if not self.in_band:
            return self.payload
        end = "data: [DONE]\n\n" if "messages" in self.body or "prompt" in self.body else ""
        return f"data: {self.payload}\n\n{end}"


def check(reply: httpx.Response, status: int, error: str, error_type: str) -> None:
    """Checks that a REST reply is this error and has no header of gRPC or Envoy."""
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/json"
    assert reply.json() == {"error": error, "error_type": error_type}
    assert list(reply.json()) == ["error", "error_type"]
    internal = ("grpc-", "x-error", "x-http", "x-envoy")
    assert not [name for name in reply.headers if name.startswith(internal)]


def tokens(count: int) -> str:
    """A text of `count` tokens, the beginning-of-text token included: no merge has this byte."""
    return "\x01" * (count - 1)
