"""Ids and names in the answers of OpenAI's endpoints, over both faces."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.e2e.reflection_client import ReflectionClient
from tests.e2e.stack import PROMPT, Stack
from tests.e2e.typed_messages import rest, rest_events

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 3}
COMPLETION: dict[str, Any] = {"prompt": ["One, two,", PROMPT], "max_tokens": 3}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
# path, RPC, the field of its whole answer and of a part, body, how ids begin
ENDPOINTS = [
    ("/v1/chat/completions", "Chat", ("completion", "chunk"), CHAT, "chatcmpl"),
    ("/v1/completions", "Completions", ("completion", "completion"), COMPLETION, "cmpl"),
]
endpoints = pytest.mark.parametrize(("path", "method", "kinds", "body", "prefix"), ENDPOINTS)


def check_ids(ids: list[str], prefix: str) -> str:
    """Checks that all parts of an answer have one id; returns it."""
    (found,) = set(ids)
    assert re.fullmatch(f"{prefix}-[0-9a-f]{{32}}", found)
    return found


@endpoints
def test_all_parts_of_an_answer_have_its_id_and_no_other_answer_has_it(
    stack: Stack,
    api: ReflectionClient,
    path: str,
    method: str,
    kinds: tuple[str, str],
    body: dict[str, Any],
    prefix: str,
) -> None:
    whole, part = kinds
    streamed = {**body, **USAGE}
    replies = [
        [rest(stack, path, body)["id"]],
        [event["id"] for event in rest_events(stack, path, streamed)],
        [getattr(reply, whole).id for reply in api.collect(method, body)],
        [getattr(reply, part).id for reply in api.collect(method, streamed)],
        [api.call(f"{method}Unary", body).id],
    ]
    assert len({check_ids(ids, prefix) for ids in replies}) == len(replies)


@endpoints
@pytest.mark.parametrize("name", ["gpt-4o-mini", "some org/名前", "tgi", "", None])
def test_answer_names_the_model_as_its_request_does(
    stack: Stack,
    api: ReflectionClient,
    path: str,
    method: str,
    kinds: tuple[str, str],
    body: dict[str, Any],
    prefix: str,
    name: str | None,
) -> None:
    del prefix
    body = body if name is None else {**body, "model": name}
    own = stack.http.get("/info").json()["model_id"]
    expected = {own if name in ("tgi", "", None) else name}
    assert {rest(stack, path, body)["model"]} == expected
    streamed = {**body, **USAGE}
    assert {event["model"] for event in rest_events(stack, path, streamed)} == expected
    replies = api.collect(method, streamed)
    assert {getattr(reply, kinds[1]).model for reply in replies} == expected
