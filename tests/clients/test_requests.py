"""The options of the clients are the fields of the requests, and keep their meaning."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_type_hints

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from tokenwire_client import options, requests
from tokenwire_client.pb import chat_pb2, completions_pb2, generate_pb2

from service.codec import requests as server
from service.images.source import ImageSource
from service.pb.tokenwire import v1 as pb

SCHEMA = {"type": "object", "properties": {"z": {"maximum": 2**60 + 1}, "a": {}}}
MESSAGES: list[options.ChatMessage] = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("given", "message", "elsewhere"),
    [
        (options.GenerateOptions, generate_pb2.GenerateParameters, set()),
        (options.ChatOptions, chat_pb2.ChatRequest, {"messages"}),
        (
            options.CompletionsOptions,
            completions_pb2.CompletionsRequest,
            {"prompt", "prompt_ids", "suffix"},
        ),
        (options.ChatMessage, chat_pb2.Message, set()),
        (options.ResponseFormat, chat_pb2.ResponseFormat, set()),
        (options.Grammar, generate_pb2.Grammar, set()),
    ],
)
def test_every_field_of_a_request_is_an_option(
    given: type, message: type[Message], elsewhere: set[str]
) -> None:
    known = set(get_type_hints(given))
    if "include_usage" in known:
        known = known - {"include_usage"} | {"stream_options"}
    if message is generate_pb2.GenerateParameters:
        known -= {"request_id", "images"}  # of GenerateRequest
    elsewhere = elsewhere | {"http", "stream", "max_completion_tokens"}
    assert known == set(message.DESCRIPTOR.fields_by_name) - elsewhere


def at_server(message: Message) -> Any:
    """The request that the server makes of a message."""
    kind = getattr(pb, message.DESCRIPTOR.name)
    reader = {"GenerateRequest": server.text_request, "ChatRequest": server.chat_request}
    return reader[message.DESCRIPTOR.name](kind.parse(message.SerializeToString()))


def test_parameters_are_sent_even_without_options() -> None:
    assert requests.generate("x", {}).HasField("parameters")


@pytest.mark.parametrize("value", [SCHEMA, json.dumps(SCHEMA)])
def test_a_schema_keeps_its_keys_order_and_large_integers(value: Any) -> None:
    request = requests.generate("x", {"grammar": {"type": "json", "value": value}})
    assert at_server(request).parameters.grammar.value == json.dumps(SCHEMA)


@pytest.mark.parametrize(
    ("wanted", "kind", "value"),
    [
        ({"type": "json", "value": SCHEMA}, "json", json.dumps(SCHEMA)),
        ({"type": "regex", "value": "a+"}, "regex", "a+"),
        ({"type": "json_object"}, "json", {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
            "json",
            json.dumps(SCHEMA),
        ),
    ],
)
def test_response_formats_are_in_openais_form(wanted: Any, kind: str, value: Any) -> None:
    request = requests.chat(MESSAGES, {"response_format": wanted}, stream=False)
    grammar = at_server(request).parameters.grammar
    assert (grammar.kind, grammar.value) == (kind, value)


def test_a_response_format_of_text_is_none() -> None:
    request = requests.chat(MESSAGES, {"response_format": {"type": "text"}}, stream=False)
    assert at_server(request).parameters.grammar is None


def test_conversations_with_tools_are_in_openais_form() -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    request = requests.chat(
        [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "done"},
        ],
        {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
        stream=True,
    )
    seen = at_server(request)
    assert seen.stream
    assert [message.role for message in seen.messages] == ["user", "assistant", "tool"]
    assert seen.messages[1].tool_calls == (call,)
    assert (seen.tools[0].name, seen.tools[0].parameters) == ("f", {"type": "object"})
    assert seen.tool_choice == "required"


def test_a_tool_may_be_chosen_by_name() -> None:
    choice = {"type": "function", "function": {"name": "f"}}
    request = requests.chat(MESSAGES, {"tool_choice": choice}, stream=False)
    assert at_server(request).tool_choice == choice


def test_usage_in_streams_is_an_option() -> None:
    request = requests.completions("x", {"include_usage": True}, stream=True)
    assert json_format.MessageToDict(request) == {
        "prompt": ["x"],
        "stream": True,
        "streamOptions": {"includeUsage": True},
    }


def test_images_are_files_places_or_both_with_a_format() -> None:
    images = [b"file", {"data": b"file", "mime_type": "image/png"}, {"url": "data:x"}]
    sent = [
        ImageSource("images[0].data", data=b"file"),
        ImageSource("images[1].data", data=b"file", mime_type="image/png"),
        ImageSource("images[2].url", "data:x"),
    ]
    assert at_server(requests.generate("x", {"images": images})).images == tuple(sent)
    turn: options.ChatMessage = {"role": "user", "parts": ["a text", *images]}
    (message,) = at_server(requests.chat([turn], {}, stream=False)).messages
    text, *parts = message.content
    assert text == {"type": "text", "text": "a text"}
    assert [replace(part, field="") for part in parts] == [replace(one, field="") for one in sent]
    assert parts[0].field == "messages[0].parts[1].image.data"
