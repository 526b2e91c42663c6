"""Grammars that are refused, and a server that supports no grammars."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests.e2e.contract import events
from tests.e2e.grammars import BY_SCHEMA, CHAT, DATE, UNENFORCEABLE, check_refused
from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import PROMPT, Stack, running
from tests.e2e.tools import TOOLS


class TestRefused:
    @pytest.mark.parametrize(
        ("grammar", "said", "field"),
        [
            ({"type": "json", "value": UNENFORCEABLE}, "uniqueItems", ""),
            ({"type": "json", "value": {"type": "klingon"}}, "klingon", ""),
            ({"type": "json", "value": {"not": {}}}, "", ""),
            ({"type": "json", "value": "{"}, "grammar is not valid: ", ""),
            ({"type": "json", "value": "[]"}, "it is not an object", ""),
            ({"type": "json", "value": [1]}, "grammar is not supported", ""),
            ({"type": "json", "value": {"minimum": 1e300}}, "1e+300 cannot be enforced", ""),
            ({"type": "regex", "value": "["}, "regex", ""),
            ({"type": "regex", "value": 5}, "expected a string", ""),
            ({"type": "regex"}, "missing field `value`", ".value"),
            ({"value": "a"}, "missing field `type`", ".type"),
        ],
    )
    def test_invalid_grammar_is_a_422_that_names_its_field(
        self, stack: Stack, api: ReflectionClient, grammar: Any, said: str, field: str
    ) -> None:
        body = {"inputs": PROMPT, "parameters": {"grammar": grammar}}
        named = check_refused(stack, api, "/generate", "Generate", body, said)
        assert named == f"parameters.grammar{field}"

    def test_invalid_grammar_is_an_error_event_in_a_stream(
        self, stack: Stack, api: ReflectionClient
    ) -> None:
        grammar = {"type": "json", "value": UNENFORCEABLE}
        body = {"inputs": PROMPT, "parameters": {"grammar": grammar}}
        (event,) = events(stack.http.post("/generate_stream", json=body))
        assert json.loads(event)["error_type"] == "validation"
        with pytest.raises(grpc.RpcError, match="uniqueItems"):
            api.collect("GenerateStream", body)


@pytest.fixture(scope="module")
def without_grammars(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A server that supports no grammars."""
    log_path = tmp_path_factory.mktemp("without_grammars") / "log"
    with running(log_path, "--disable-grammar-support") as stack:
        yield stack


class TestWithoutGrammars:
    @pytest.mark.parametrize(
        ("path", "method", "body"),
        [
            ("/generate", "Generate", {"inputs": PROMPT, "parameters": {"grammar": DATE}}),
            ("/v1/chat/completions", "Chat", {**CHAT, "response_format": BY_SCHEMA}),
            ("/v1/chat/completions", "Chat", {**CHAT, "tools": TOOLS}),
            ("/v1/chat/completions", "Chat", {**CHAT, "tools": TOOLS, "tool_choice": "required"}),
        ],
    )
    def test_requests_that_need_a_grammar_are_refused(
        self, without_grammars: Stack, path: str, method: str, body: dict[str, Any]
    ) -> None:
        api = ReflectionClient(without_grammars.through_envoy)
        check_refused(without_grammars, api, path, method, body, "grammar is not supported")

    def test_other_requests_are_served(self, without_grammars: Stack) -> None:
        assert without_grammars.generate()["generated_text"]
        for more in (
            {"response_format": {"type": "text"}},
            {"tools": TOOLS, "tool_choice": "none"},
        ):
            reply = without_grammars.http.post("/v1/chat/completions", json={**CHAT, **more})
            assert reply.status_code == 200
