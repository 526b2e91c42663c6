"""A server whose grammars are outlines-core's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import regex

from tests.e2e.stack import Stack, running

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "grün"]}, "numbers": {"$ref": "#/$defs/numbers"}},
    "required": ["colour", "numbers"],
    "$defs": {"numbers": {"type": "array", "items": {"type": "integer"}, "maxItems": 2}},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    path = tmp_path_factory.mktemp("outlines") / "log"
    with running(path, "--grammar-backend=outlines", "--speculate=2") as server:
        yield server


def test_schemas_and_regular_expressions_are_enforced(server: Stack) -> None:
    for seed in range(3):
        grammar = {"type": "json", "value": SCHEMA}
        answer = server.generate(grammar=grammar, max_new_tokens=80, seed=seed, do_sample=True)
        assert answer["details"]["finish_reason"] == "eos_token"
        jsonschema.validate(json.loads(answer["generated_text"]), SCHEMA)
        grammar = {"type": "regex", "value": "(ja|nein|日本)-[0-9]{2,4}"}
        answer = server.generate(grammar=grammar, max_new_tokens=80, seed=seed, do_sample=True)
        assert regex.fullmatch(grammar["value"], answer["generated_text"])


def test_what_it_would_ignore_is_refused_by_name(server: Stack) -> None:
    properties = {**SCHEMA["properties"], "colour": {"type": "string", "format": "date"}}
    value = {**SCHEMA, "properties": properties}
    body = {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": value}}}
    reply = server.http.post("/generate", json=body)
    assert reply.status_code == 422
    assert "`format` at #/properties/colour/format" in reply.json()["error"]


def test_tool_calls_go_on(server: Stack) -> None:
    parameters = {"type": "object", "properties": {"city": {"enum": ["Bonn", "Ulm"]}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    body = {
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [tool],
        "tool_choice": "required",
        "max_tokens": 100,
    }
    reply = server.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    (call,) = reply.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
