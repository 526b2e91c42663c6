"""Grammars that requests carry, and what is checked of constrained texts and of refusals."""

from __future__ import annotations

import json
from typing import Any

import grpc
import jsonschema
import pytest

from tests.e2e.reflection_client import ReflectionClient, assert_same_text, details
from tests.e2e.stack import PROMPT, Stack

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "animal": {"enum": ["cat", "crow", "cow"]},
        "is_loud": {"type": "boolean"},
        "number_of_legs": {"type": "integer", "minimum": 2, "maximum": 4},
    },
    "required": ["animal", "is_loud", "number_of_legs"],
    "additionalProperties": False,
}
# As text: the objects of protobuf have no order, and a constrained text follows the order of its
# schema.
BY_SCHEMA = {"type": "json", "value": json.dumps(SCHEMA)}
DATE = {"type": "regex", "value": "[0-9]{4}-[01][0-9]-[0-3][0-9]"}
UNENFORCEABLE = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
RANDOM = {"do_sample": True, "temperature": 1e6}  # any allowed token, whatever the model has learnt
MESSAGES = [{"role": "user", "content": PROMPT}]
CHAT: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 60, "temperature": 0.0}


def generate(stack: Stack, grammar: dict[str, Any], **parameters: Any) -> dict[str, Any]:
    """POST /generate with a grammar; 60 tokens unless told otherwise."""
    return stack.generate(grammar=grammar, **{"max_new_tokens": 60, **parameters})


def check(text: str, schema: dict[str, Any] = SCHEMA) -> None:
    """Checks that a text is JSON that fits a schema."""
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))


def ids(tokens: list[dict[str, Any]]) -> list[int]:
    """The ids of tokens."""
    return [token["id"] for token in tokens]


def check_refused(
    stack: Stack, api: ReflectionClient, path: str, method: str, body: dict[str, Any], said: str
) -> str:
    """Checks a refusal: a 422 over REST and INVALID_ARGUMENT over gRPC, with the same text.

    Args:
        stack: the server.
        api: its gRPC API.
        path: the REST path.
        method: the RPC.
        body: the request.
        said: a part of the error text.

    Returns:
        The field that the refusal names over gRPC.
    """
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 422, reply.text
    error = reply.json()
    assert error["error_type"] == "validation"
    assert said in error["error"]
    with pytest.raises(grpc.RpcError) as failed:
        result = api.call(method, body)
        if method == "Chat":
            list(result)
    assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert_same_text(failed.value, error["error"])
    reason, field = details(failed.value)
    assert reason == "validation"
    assert field is not None
    return field
