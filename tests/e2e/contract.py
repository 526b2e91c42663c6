"""Checks live replies against the OpenAPI document.

The schemas of the document become JSON Schema and are closed: a key that the document does not name
is an error. `DEVIATIONS` lists every difference between server and document that is intended.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from jsonschema import Draft202012Validator, FormatChecker, TypeChecker
from jsonschema.exceptions import best_match
from jsonschema.validators import extend
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from service.api import docs

DOCUMENT: dict[str, Any] = json.loads(docs.open_api())  # TGI's contract with our additions
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
DONE = "[DONE]"
JSON = "application/json"
SSE = "text/event-stream"

_URI = "urn:contract"
_PREFIX = "#/components/schemas/"
_OPENAI_REASONS = ["stop", "length", "tool_calls"]
_FINISH_REASON = {"type": "string", "enum": _OPENAI_REASONS}
_LOGPROBS = {"anyOf": [{"type": "null"}, {"$ref": f"{_PREFIX}CompletionLogprobs"}]}


@dataclass(frozen=True, slots=True)
class Deviation:
    """What the server sends instead of what the document says.

    Args:
        source: where the behaviour of TGI was recorded: a section, or a row of section 10.1, of the
            notes on TGI 2.1.2 that preceded this project. They are not in the repository.
        schema: the component.
        properties: new properties, or replacements of the document's.
        always: keys that are never left out, though the document allows it.
    """

    source: str
    schema: str
    properties: dict[str, Any] = field(default_factory=dict)
    always: tuple[str, ...] = ()


def _choices_ending_with(finish_reason: dict[str, Any]) -> dict[str, Any]:
    """Choices of `/v1/completions`: those of streams and of whole answers share a component."""
    choice = {"$ref": _PREFIX + "CompletionComplete"}
    ending = {"properties": {"finish_reason": finish_reason}}
    return {"choices": {"type": "array", "items": {"allOf": [choice, ending]}}}


# Two rows concern no schema and are in `Checker.check`: 1 (`/` answers a list of one element) and 2
# (a failure inside a stream is an event of a 200). Rows 17, 18 and 27 need nothing, since the
# document agrees with TGI's router: the object `tool_calls`, any `arguments`, the null `logprob`.
DEVIATIONS = (
    Deviation("15", "ChatCompletion", {"object": {"const": "chat.completion"}}, ("object",)),
    Deviation(
        "15", "ChatCompletionChunk", {"object": {"const": "chat.completion.chunk"}}, ("object",)
    ),
    Deviation("15", "CompletionFinal", {"object": {"const": "text_completion"}}, ("object",)),
    Deviation("15", "Chunk", {"object": {"const": "text_completion"}}, ("object",)),
    # `logprobs` is null or OpenAI's object, never a list.
    Deviation("16", "CompletionComplete", {"logprobs": _LOGPROBS}, ("logprobs",)),
    Deviation("25", "StreamResponse", {}, ("generated_text", "details")),
    # A null is written instead of leaving the key out.
    Deviation("2.1", "Details", {}, ("seed",)),
    Deviation("2.1", "BestOfSequence", {}, ("seed",)),
    Deviation("2.1", "StreamDetails", {}, ("seed",)),
    Deviation("2.1", "ChatCompletionComplete", {"finish_reason": _FINISH_REASON}, ("logprobs",)),
    Deviation("2.1", "ChatCompletionChoice", {}, ("logprobs", "finish_reason")),
    Deviation("5.1", "Info", {}, tuple(SCHEMAS["Info"]["properties"].keys() - {"replayed_share"})),
    # The paths of OpenAI have OpenAI's finish reasons, which TGI's later versions have, too. In a
    # stream of completions it is empty before the end.
    Deviation("2.5", "ChatCompletionChoice", {"finish_reason": {"enum": [None, *_OPENAI_REASONS]}}),
    Deviation("2.6", "CompletionFinal", _choices_ending_with(_FINISH_REASON)),
    Deviation("2.6", "Chunk", _choices_ending_with({"enum": ["", *_OPENAI_REASONS]})),
)


def resolve(item: dict[str, Any]) -> dict[str, Any]:
    """Follows references into the document; any other item is returned as it is."""
    while "$ref" in item:
        target: Any = DOCUMENT
        for key in item["$ref"].removeprefix("#/").split("/"):
            target = target[key]
        item = target
    return item


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, description) of every operation in the document."""
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def documented_statuses() -> set[tuple[str, str, int]]:
    """Every documented status: (method, path, status)."""
    return {
        (method, path, int(status))
        for method, path, operation in operations()
        for status in operation["responses"]
    }


def response_schemas() -> set[str]:
    """The components that describe replies: all but those that only requests refer to."""
    requests: set[str] = set()
    replies: set[str] = set()
    for _, _, operation in operations():
        _collect(operation.get("requestBody"), requests)
        _collect(operation["responses"], replies)
    return replies | (SCHEMAS.keys() - requests)


def _collect(item: Any, names: set[str]) -> None:
    """Adds the names of all components that an item refers to, directly or indirectly."""
    if isinstance(item, list):
        for part in item:
            _collect(part, names)
    elif isinstance(item, dict):
        reference = item.get("$ref", "")
        name = reference.removeprefix(_PREFIX)
        if reference and name not in names:
            if reference.startswith(_PREFIX):
                names.add(name)
            _collect(resolve(item), names)
        for part in item.values():
            _collect(part, names)


def events(reply: httpx.Response) -> list[str]:
    """Checks the framing of a stream and returns its payloads, without comments.

    Events of the Responses API have a name, which is also in the payload.
    """
    text = reply.text
    assert text.endswith("\n\n")
    blocks = [block for block in text.removesuffix("\n\n").split("\n\n") if block != ":"]
    return [_payload(block) for block in blocks]


def _payload(block: str) -> str:
    name, separator, rest = block.partition("\n")
    if separator:
        assert name == f"event: {json.loads(rest.removeprefix('data: '))['type']}"
        block = rest
    assert block.startswith("data: ")
    assert "\n" not in block
    return block.removeprefix("data: ")


def meant_path(path: str, body: Any) -> str:
    """The path whose replies are expected: `/invocations` answers like one of three others.

    A path with a field in it is the document's.
    """
    if path.startswith("/v1/models/"):
        return "/v1/models/{id}"
    if path != "/invocations" or not isinstance(body, dict):
        return path
    if body.get("messages"):
        return "/v1/chat/completions"
    return "/v1/completions" if body.get("prompt") else "/"


class Checker:
    """Checks replies; `exercised` has the names of the components that some reply fitted."""

    def __init__(self) -> None:
        self.exercised: set[str] = set()
        follow = Draft202012Validator.VALIDATORS["$ref"]

        def reference(validator: Any, value: str, instance: Any, schema: Any) -> Iterator[Any]:
            errors = list(follow(validator, value, instance, schema))
            if not errors:
                self.exercised.add(value.rpartition("/")[2])
            yield from errors

        self._class = extend(Draft202012Validator, {"$ref": reference}, type_checker=_TYPES)

    def check(self, method: str, path: str, reply: httpx.Response) -> None:
        """Checks a reply of any status to a request on `path`."""
        assert reply.status_code != 204
        kind = reply.headers.get("content-type", "").partition(";")[0]
        if reply.status_code >= 400:
            assert kind == JSON
            self._check({"$ref": _PREFIX + "ErrorResponse"}, reply.json())
            return
        content = DOCUMENT["paths"][path][method.lower()]["responses"]["200"].get("content")
        if content is None:
            assert reply.content == b""
        elif kind == SSE:
            self._check_events(content[SSE]["schema"], path, reply)
        else:
            schema = content[kind]["schema"]
            if (method, path) == ("POST", "/"):
                schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
            self._check(schema, reply.json() if kind == JSON else reply.text)
            if path == "/v1/completions":  # no operation refers to this union
                self._check({"$ref": _PREFIX + "Completion"}, reply.json())

    def _check_events(self, schema: dict[str, Any], path: str, reply: httpx.Response) -> None:
        payloads = events(reply)
        if path in ("/v1/chat/completions", "/v1/completions"):
            assert payloads.pop() == DONE
        assert payloads
        assert DONE not in payloads
        for payload in payloads:
            body = json.loads(payload)
            failed = "error" in body
            self._check({"$ref": _PREFIX + "ErrorResponse"} if failed else schema, body)
            if path == "/v1/completions" and not failed:
                self._check({"$ref": _PREFIX + "Completion"}, body)

    def _check(self, schema: dict[str, Any], instance: Any) -> None:
        schema = _in_document(schema)
        validator = self._class(schema, registry=_REGISTRY, format_checker=_FORMATS)
        error = best_match(validator.iter_errors(instance))
        assert error is None, f"{error.json_path}: {error.message}"


def _in_document(schema: Any) -> Any:
    """A schema with absolute references, which can be followed from any schema."""
    if isinstance(schema, dict):
        return {
            key: _URI + value if key == "$ref" else _in_document(value)
            for key, value in schema.items()
        }
    return schema


def _json_schema(schema: Any) -> Any:
    """Replaces `nullable` of OpenAPI 3.0 by what JSON Schema has for it."""
    if isinstance(schema, list):
        return [_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _json_schema(value) for key, value in schema.items() if key != "nullable"}
    if schema.get("nullable") is not True:
        return result
    if "type" in result:
        return {**result, "type": [result["type"], "null"]}
    return {"anyOf": [result, {"type": "null"}]}


def _components() -> dict[str, Any]:
    """The components with all deviations applied, closed."""
    schemas = json.loads(json.dumps(SCHEMAS))
    for item in DEVIATIONS:
        schema = schemas[item.schema]
        schema["properties"] |= item.properties
        schema["required"] = [*schema["required"], *item.always]
    for schema in schemas.values():
        if "properties" in schema:
            schema["additionalProperties"] = False
    # Both forms may fit: with our usage, the last chunk of a stream looks like a final answer.
    completion = schemas["Completion"]
    completion["anyOf"] = completion.pop("oneOf")
    return {name: _json_schema(schema) for name, schema in schemas.items()}


def _is_float32(value: Any) -> bool:
    """Whether a value is a float32 in its shortest decimal form, as serde prints it."""
    return not isinstance(value, float) or float(str(np.float32(value))) == value


_TYPES: TypeChecker = Draft202012Validator.TYPE_CHECKER.redefine(
    "integer", lambda _, value: type(value) is int
)
_FORMATS = FormatChecker(formats=())
_FORMATS.checks("float")(_is_float32)
_FORMATS.checks("int32")(lambda value: type(value) is not int or -(2**31) <= value < 2**32)
_FORMATS.checks("int64")(lambda value: type(value) is not int or -(2**63) <= value < 2**64)
_REGISTRY: Registry[Any] = Registry().with_resource(
    _URI, DRAFT202012.create_resource({"components": {"schemas": _components()}})
)
