"""Makes request messages of the arguments of the clients.

Schemas travel as text: in a protobuf `Value` the order of keys and integers beyond 2**53 are lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value

from . import options
from .pb import chat_pb2, completions_pb2, generate_pb2

_M = TypeVar("_M", bound=Message)


def generate(
    inputs: options.Prompt, given: options.GenerateOptions
) -> generate_pb2.GenerateRequest:
    """A text to continue. Parameters are always sent: without any a server would sample."""
    fields: dict[str, Any] = dict(given)
    request_id = fields.pop("request_id", None)
    images = [_image(image) for image in fields.pop("images", ())]
    if (grammar := given.get("grammar")) is not None:
        fields["grammar"] = _grammar(grammar)
    parameters = generate_pb2.GenerateParameters(**fields)
    prompt: dict[str, Any] = (
        {"inputs": inputs} if isinstance(inputs, str) else {"input_ids": _token_ids(inputs)}
    )
    return generate_pb2.GenerateRequest(
        **prompt, parameters=parameters, request_id=request_id, images=images
    )


def chat(
    messages: Iterable[options.ChatMessage | Mapping[str, Any]],
    given: options.ChatOptions,
    *,
    stream: bool,
) -> chat_pb2.ChatRequest:
    """A conversation to continue."""
    fields: dict[str, Any] = dict(given)
    _name_usage(fields)
    if (tools := given.get("tools")) is not None:
        fields["tools"] = [_parsed(tool, chat_pb2.Tool()) for tool in tools]
    if (choice := given.get("tool_choice")) is not None:
        fields["tool_choice"] = _parsed(choice, Value())
    if (variables := given.get("chat_template_kwargs")) is not None:
        fields["chat_template_kwargs"] = _parsed(variables, Struct())
    if (documents := given.get("documents")) is not None:
        fields["documents"] = [_parsed(document, Struct()) for document in documents]
    if (wanted := given.get("response_format")) is not None:
        fields["response_format"] = _response_format(wanted)
    turns = [_turn(message) for message in messages]
    return chat_pb2.ChatRequest(messages=turns, stream=stream, **fields)


def _turn(message: Mapping[str, Any]) -> chat_pb2.Message:
    """A turn; its parts are not JSON, since they may have bytes."""
    fields = dict(message)
    parts = [_part(part) for part in fields.pop("parts", ())]
    turn = _parsed(fields, chat_pb2.Message())
    turn.parts.extend(parts)
    return turn


def _part(part: str | options.Image) -> chat_pb2.ContentPart:
    if isinstance(part, str):
        return chat_pb2.ContentPart(text=part)
    return chat_pb2.ContentPart(image=_image(part))


def _image(image: options.Image) -> generate_pb2.Image:
    if isinstance(image, bytes):
        return generate_pb2.Image(data=image)
    return generate_pb2.Image(**image)


def completions(
    prompts: str | Iterable[options.Prompt], given: options.CompletionsOptions, *, stream: bool
) -> completions_pb2.CompletionsRequest:
    """Prompts to continue: all texts, or all token ids."""
    fields: dict[str, Any] = dict(given)
    _name_usage(fields)
    given_prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    texts = [prompt for prompt in given_prompts if isinstance(prompt, str)]
    ids = [_token_ids(prompt) for prompt in given_prompts if not isinstance(prompt, str)]
    return completions_pb2.CompletionsRequest(prompt=texts, prompt_ids=ids, stream=stream, **fields)


def _token_ids(ids: Sequence[int]) -> generate_pb2.TokenIds:
    return generate_pb2.TokenIds(ids=ids)


def _name_usage(fields: dict[str, Any]) -> None:
    """Puts `include_usage` where the requests have it."""
    if (include := fields.pop("include_usage", None)) is not None:
        fields["stream_options"] = chat_pb2.StreamOptions(include_usage=include)


def _grammar(grammar: options.Grammar | Mapping[str, Any]) -> generate_pb2.Grammar:
    return generate_pb2.Grammar(type=grammar["type"], value=_schema(grammar["value"]))


def _response_format(
    wanted: options.ResponseFormat | Mapping[str, Any],
) -> chat_pb2.ResponseFormat:
    fields: dict[str, Any] = {}
    for name in ("value", "schema"):
        if (value := wanted.get(name)) is not None:
            fields[name] = _schema(value)
    if (named := wanted.get("json_schema")) is not None:
        given = dict(named)
        if (schema := given.pop("schema", None)) is not None:
            given["schema"] = _schema(schema)
        fields["json_schema"] = chat_pb2.JsonSchema(**given)
    return chat_pb2.ResponseFormat(type=f"TYPE_{wanted['type'].upper()}", **fields)


def _schema(schema: Any) -> Value:
    return Value(string_value=schema if isinstance(schema, str) else json.dumps(schema))


def _parsed(plain: Any, message: _M) -> _M:
    """A message of JSON values.

    Raises:
        ValueError: they do not fit it.
    """
    try:
        return json_format.ParseDict(plain, message)
    except json_format.ParseError as error:
        raise ValueError(str(error)) from error
