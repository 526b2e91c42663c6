"""Typed messages next to the JSON that REST has for the same answer."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pytest

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import Stack

FINISH_REASONS = {
    "FINISH_REASON_LENGTH": "length",
    "FINISH_REASON_EOS_TOKEN": "eos_token",
    "FINISH_REASON_STOP_SEQUENCE": "stop_sequence",
}


def float32(value: float | None) -> float | None:
    """The float32 that a typed message holds, from the shortest decimal of it that JSON has."""
    return None if value is None else float(np.float32(value))


def token(message: Any) -> dict[str, Any]:
    """A typed Token as the JSON object of REST."""
    logprob = message.logprob if message.HasField("logprob") else None
    return {
        "id": message.id,
        "text": message.text,
        "logprob": logprob,
        "special": message.special,
    }


def prefill_token(message: Any) -> dict[str, Any]:
    """A typed PrefillToken as the JSON object of REST."""
    logprob = message.logprob if message.HasField("logprob") else None
    return {"id": message.id, "text": message.text, "logprob": logprob}


def rounded(tokens: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON tokens, their log-probabilities rounded to float32."""
    return [{**item, "logprob": float32(item["logprob"])} for item in tokens]


def finish_reason(message: Any) -> str:
    """The finish reason of a typed message, as JSON spells it."""
    field = message.DESCRIPTOR.fields_by_name["finish_reason"]
    return FINISH_REASONS[field.enum_type.values_by_number[message.finish_reason].name]


def seed(message: Any) -> int | None:
    """The seed of a typed message; None where it is absent."""
    return message.seed if message.HasField("seed") else None


def check_details(message: Any, body: dict[str, Any]) -> None:
    """Checks that a typed Details equals its JSON form."""
    assert finish_reason(message) == body["finish_reason"]
    assert message.generated_tokens == body["generated_tokens"]
    assert seed(message) == body["seed"]
    assert [token(item) for item in message.tokens] == rounded(body["tokens"])
    assert [prefill_token(item) for item in message.prefill] == rounded(body["prefill"])
    tops = [[token(item) for item in step.tokens] for step in message.top_tokens]
    assert tops == [rounded(step) for step in body.get("top_tokens", [])]


def rest(stack: Stack, path: str, body: dict[str, Any]) -> Any:
    """The JSON that REST answers with status 200."""
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def rest_events(stack: Stack, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The JSON of all events of a REST stream, without the final `[DONE]`."""
    reply = stack.http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    payloads = [event.removeprefix("data: ") for event in reply.text.strip().split("\n\n")]
    return [json.loads(item) for item in payloads if item != "[DONE]"]


def failure(api: ReflectionClient, method: str, fields: dict[str, Any], **options: Any) -> Any:
    """The error that a failing call raises, unary or streaming."""
    with pytest.raises(grpc.RpcError) as caught:
        call_to_the_end(api, method, fields, **options)
    return caught.value


def call_to_the_end(api: ReflectionClient, *arguments: Any, **options: Any) -> None:
    """Makes a call, unary or streaming, and reads it to its end."""
    reply = api.call(*arguments, **options)
    if isinstance(reply, grpc.Call):
        list(reply)
