"""`response_format` of the chat path: every spelling of a format, over REST and gRPC."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.e2e.contract import events
from tests.e2e.grammars import BY_SCHEMA, CHAT, DATE, SCHEMA, UNENFORCEABLE, check, check_refused
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import Stack


class TestResponseFormat:
    @pytest.mark.parametrize(
        "wanted",
        [
            {"type": "json", "value": json.dumps(SCHEMA)},
            {"type": "json_object", "value": json.dumps(SCHEMA)},
            {"type": "json_schema", "json_schema": {"schema": json.dumps(SCHEMA)}},
        ],
    )
    def test_schema_may_be_text(self, stack: Stack, api: ReflectionClient, wanted: Any) -> None:
        text = chat(stack, api, wanted)
        check(text)
        assert text == chat(stack, api, BY_SCHEMA)

    @pytest.mark.parametrize(
        "wanted",
        [
            {"type": "json", "value": SCHEMA},
            {"type": "json_object", "value": SCHEMA},
            {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA}},
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "animal",
                    "description": "one of three",
                    "strict": True,
                    "schema": SCHEMA,
                },
            },
        ],
    )
    def test_schema_may_be_an_object(
        self, stack: Stack, api: ReflectionClient, wanted: Any
    ) -> None:
        text = rest_chat(stack, {**CHAT, "response_format": wanted})
        assert text == rest_chat(stack, {**CHAT, "response_format": BY_SCHEMA})
        (typed,) = api.collect("Chat", {**CHAT, "response_format": wanted})
        check(typed.completion.choices[0].message.content)

    def test_json_object_alone_means_any_object(self, stack: Stack, api: ReflectionClient) -> None:
        assert chat(stack, api, {"type": "json_object"}).startswith("{")

    def test_regular_expression_is_followed(self, stack: Stack, api: ReflectionClient) -> None:
        assert re.fullmatch(DATE["value"], chat(stack, api, DATE))

    def test_text_means_no_constraint(self, stack: Stack, api: ReflectionClient) -> None:
        assert chat(stack, api, {"type": "text"}) == chat(stack, api, None)

    @pytest.mark.parametrize(
        ("wanted", "said"),
        [
            ({"type": "json"}, "missing field `value`"),
            ({"type": "regex"}, "missing field `value`"),
            ({"type": "json_schema"}, "missing field `value`"),
            ({"type": "json_schema", "json_schema": {"name": "a"}}, "missing field `value`"),
            ({"value": "a"}, "missing field `type`"),
            ({"type": "json", "value": UNENFORCEABLE}, "uniqueItems"),
            ({"type": "json_schema", "json_schema": {"schema": UNENFORCEABLE}}, "uniqueItems"),
        ],
    )
    def test_invalid_format_is_refused(
        self, stack: Stack, api: ReflectionClient, wanted: Any, said: str
    ) -> None:
        body = {**CHAT, "response_format": wanted}
        field = check_refused(stack, api, "/v1/chat/completions", "Chat", body, said)
        assert field.partition(".")[0] == "response_format"


def chat(stack: Stack, api: ReflectionClient, wanted: Any) -> str:
    """The answer in a format; checks that REST, gRPC and a stream have the same text."""
    body = {**CHAT, "response_format": wanted} if wanted is not None else CHAT
    text = rest_chat(stack, body)
    (typed,) = api.collect("Chat", body)
    assert typed.completion.choices[0].message.content == text
    streamed = events(stack.http.post("/v1/chat/completions", json={**body, "stream": True}))
    deltas = [json.loads(item)["choices"][0]["delta"] for item in streamed[:-1]]
    assert "".join(delta["content"] for delta in deltas) == text
    return text


def rest_chat(stack: Stack, body: dict[str, Any]) -> str:
    """The text of an answer over REST."""
    reply = stack.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    (choice,) = reply.json()["choices"]
    return str(choice["message"]["content"])
