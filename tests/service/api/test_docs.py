"""The API documentation: our additions merged into the contract, and the files of its page."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import orjson
import pytest

from service.api import docs
from service.bundled import OPENAPI
from service.codec import render
from service.errors import ErrorKind, ServiceError
from service.generation.generation import Token, TokenEvent
from service.generation.parameters import Parameters
from service.openai import chat_answer
from service.openai.chat import ChatRequest, Message
from service.openai.chat_answer import ChatStream
from service.openai.completion_logprobs import ScoredToken
from service.openai.completions import CompletionAnswer
from service.openai.tools import Tool
from service.routes import DOCS_ASSETS, REST_ROUTES
from tests.service.fakes import ANSWER_HEAD, generation

# Target, patch, result: RFC 7396, appendix A.
RFC_7396: list[tuple[Any, Any, Any]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"a": "foo"}, None, None),
    ({"a": "foo"}, "bar", "bar"),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "result"), RFC_7396)
def test_merge_patch(target: Any, patch: Any, result: Any) -> None:
    before = copy.deepcopy((target, patch))
    assert docs.merge_patch(target, patch) == result
    assert (target, patch) == before


def test_merge_patch_keeps_the_order() -> None:
    merged = docs.merge_patch({"b": 1, "a": {"y": 1}}, {"c": 3, "a": {"x": 2}, "b": 2})
    assert orjson.dumps(merged) == b'{"b":2,"a":{"y":1,"x":2},"c":3}'


DOCUMENT = orjson.loads(docs.open_api())
CONTRACT = orjson.loads((OPENAPI / "contract.json").read_bytes())


def assert_contained(part: Any, whole: Any, path: str = "") -> None:
    """Everything of a document is in another, with the same value; objects and lists may grow."""
    if isinstance(part, dict):
        assert isinstance(whole, dict), path
        for key, value in part.items():
            assert key in whole, f"{path}/{key}"
            assert_contained(value, whole[key], f"{path}/{key}")
    elif isinstance(part, list):
        assert isinstance(whole, list), path
        assert [item for item in part if item not in whole] == [], path
    else:
        assert type(part) is type(whole), path
        assert part == whole, path


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def operations() -> list[dict[str, Any]]:
    return [operation for item in DOCUMENT["paths"].values() for operation in item.values()]


def test_the_document_has_the_whole_contract() -> None:
    contract = {key: value for key, value in CONTRACT.items() if key != "info"}
    assert_contained(contract, DOCUMENT)
    assert DOCUMENT["info"]["title"] == "Tokenwire"
    assert DOCUMENT["info"]["version"] == CONTRACT["info"]["version"]


def test_the_document_has_the_additions() -> None:
    added = set(DOCUMENT["paths"]) - set(CONTRACT["paths"])
    assert added == {
        "/ping",
        "/invocations",
        "/chat_tokenize",
        "/v1/responses",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/models",
        "/v1/models/{id}",
        "/openapi.json",
    }
    assert set(DOCUMENT["paths"]["/"]) == {"get", "post"}
    schemas = DOCUMENT["components"]["schemas"]
    assert "max_completion_tokens" in schemas["ChatRequest"]["properties"]
    assert all(
        "stream_options" in schemas[name]["properties"]
        for name in ("ChatRequest", "CompletionRequest")
    )


def test_every_reference_of_the_document_resolves() -> None:
    found = set(references(DOCUMENT))
    assert len(found) > 20
    for reference in found:
        node: Any = DOCUMENT
        assert reference.startswith("#/")
        for key in reference.removeprefix("#/").split("/"):
            node = node[key]
        assert isinstance(node, dict)


def test_every_operation_of_the_document_is_complete() -> None:
    names = [operation["operationId"] for operation in operations()]
    assert len(set(names)) == len(names)
    tags = {tag["name"] for tag in DOCUMENT["tags"]}
    for operation in operations():
        assert set(operation["tags"]) <= tags
        assert operation["responses"]
        for response in operation["responses"].values():
            assert "$ref" in response or response["description"]


def test_every_path_of_the_document_is_served() -> None:
    routes = {path.replace("=**", ""): methods for path, methods in REST_ROUTES.items()}
    for path, item in DOCUMENT["paths"].items():
        assert {method.upper() for method in item} <= set(routes[path])


@pytest.mark.parametrize("asset", DOCS_ASSETS)
def test_every_file_that_the_page_asks_for_is_there(asset: str) -> None:
    _, page = docs.file("")
    assert f'"/docs/{asset}"'.encode() in page
    content_type, data = docs.file(asset)
    assert content_type in ("text/css", "text/javascript", "image/png")
    assert data


@pytest.mark.parametrize("asset", ["index.html", "../docs.py", "/etc/passwd", "swagger-ui.css/"])
def test_other_files_are_not_found(asset: str) -> None:
    with pytest.raises(ServiceError, match="Not Found") as refused:
        docs.file(asset)
    assert refused.value.kind is ErrorKind.NOT_FOUND


def checked(name: str, value: Any) -> None:
    """Checks a value against one of the document's schemas, of which no field is unknown."""
    jsonschema.validate(value, closed({"$ref": f"#/components/schemas/{name}"}))


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of the document as JSON Schema, in which objects have what is listed alone."""
    if "$ref" in schema:
        return closed(DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    made = dict(schema)
    for key in ("items", "additionalProperties"):
        if key in made:
            made[key] = closed(made[key])
    if "properties" in made:
        made["properties"] = {key: closed(item) for key, item in made["properties"].items()}
        made.setdefault("additionalProperties", False)
    is_nullable = made.pop("nullable", False)
    return {"anyOf": [made, {"type": "null"}]} if is_nullable else made


CALL = '{"function": {"_name": "f", "a": 1}}'
WANTED = ChatRequest(
    messages=(Message(role="user", content="x"),),
    parameters=Parameters(),
    tools=(Tool(name="f"),),
    tool_call_format="openai",
)


def test_calls_in_the_form_of_openai_are_as_the_document_says() -> None:
    token = Token(9, CALL, -0.5, False)
    result = generation(tokens=[token], top_tokens=[], text=CALL, finish_reason="eos_token")
    answer = chat_answer.answer(WANTED, result, ANSWER_HEAD)
    (choice,) = orjson.loads(render.chat_completion([answer]))["choices"]
    checked("OpenAiToolCallMessage", choice["message"])
    assert choice["message"]["tool_calls"]
    parts = ChatStream(WANTED, ANSWER_HEAD).push(TokenEvent(token, [], result))
    chunks = [orjson.loads(render.chat_chunk(part)) for part in parts]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    made = [delta for delta in deltas if delta.get("tool_calls")]
    assert len(made) > 1
    for delta in made:
        checked("OpenAiToolCallDelta", delta)


def test_log_probabilities_of_completions_are_as_the_document_says() -> None:
    first = ScoredToken(text="a", logprob=None, tops=None, offset=0)
    second = ScoredToken(text="b", logprob=-0.5, tops={"b": -0.5, "c": None}, offset=1)
    answer = CompletionAnswer(
        head=ANSWER_HEAD, choices=[[generation()]], logprobs=[[first, second]]
    )
    (choice,) = orjson.loads(render.completion(answer))["choices"]
    checked("CompletionLogprobs", choice["logprobs"])
    assert choice["logprobs"]["text_offset"] == [0, 1]
