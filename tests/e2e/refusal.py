"""A request that is refused, with the exact error, and what all tables of such requests share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

from tests.e2e.error_texts import SHAPE
from tests.e2e.stack import Stack

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

MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@dataclass(frozen=True, slots=True)
class Row:
    """A request that is refused.

    Args:
        path: the REST path it is sent to, which also decides on the RPC.
        body: the JSON body; read as protobuf's JSON form it is the typed message.
        error: the complete error text, as REST has it: over gRPC the shape of a request is
            refused without the words about a body.
        field: the field that `google.rpc.BadRequest` names.
        error_type: `error_type` of the REST reply, and in the metadata of `google.rpc.ErrorInfo`.
        in_band: whether a REST client receives the error as an event of a stream with status 200.
        body_error: the text over REST, if reading the body already fails: with another error than
            over gRPC, because JSON can tell apart what a message cannot, or the other way round.
    """

    path: str
    body: dict[str, Any]
    error: str
    field: str | None
    error_type: str = "validation"
    in_band: bool = False
    body_error: str | None = None

    @property
    def rpc(self) -> str:
        """The RPC that the path is bound to."""
        return RPCS[self.path]

    @property
    def rest_error(self) -> str:
        """The text over REST."""
        return self.body_error or self.error

    @property
    def rest_error_type(self) -> str:
        """`error_type` over REST."""
        return self.error_type if self.body_error is None else "validation"

    @property
    def grpc_error(self) -> str:
        """The text over gRPC."""
        return self.error.removeprefix(SHAPE)

    @property
    def is_event(self) -> bool:
        """Whether REST answers with a stream: never before the body is read."""
        return self.in_band and self.body_error is None

    @property
    def payload(self) -> str:
        """The JSON of the error, byte for byte."""
        body = {"error": self.rest_error, "error_type": self.rest_error_type}
        return json.dumps(body, separators=(",", ":"))

    @property
    def content(self) -> str:
        """The whole body of a REST reply."""
        if not self.is_event:
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


def no_number(path: str, value: Any) -> str | None:
    """REST's error if a value is no number in JSON: a message's JSON form has NaN as a text."""
    return f"{SHAPE}{path}: expected a number, got a string" if isinstance(value, str) else None


def processes(stack: Stack) -> dict[str, int]:
    """The processes that serve requests. Those that try grammars start when they are needed."""
    return {name: stack.child(name).pid for name in ("engine", "service", "envoy")}


def tokens(count: int) -> str:
    """A text of `count` tokens, the beginning-of-text token included: no merge has this byte."""
    return "\x01" * (count - 1)
