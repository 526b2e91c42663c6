"""Responses as JSON and as server-sent events, in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

import orjson

from ...error_bodies import openai_body
from ...errors import ServiceError
from ...generation.generation import Token
from ...openai.responses.event import Event
from ...openai.responses.item import Item, ScoredTokens
from ...openai.responses.response import Response
from ...openai.usage import Usage


def response(result: Response) -> bytes:
    """A response."""
    return orjson.dumps(_response(result))


def event(item: Event) -> bytes:
    """A server-sent event with a name."""
    return b"event: " + item.type.encode() + b"\ndata: " + orjson.dumps(_event(item)) + b"\n\n"


def _response(result: Response) -> dict[str, Any]:
    is_cut = result.status == "incomplete"
    return {
        "id": result.head.id,
        "object": "response",
        "created_at": result.head.created,
        "status": result.status,
        "error": None if result.failure is None else _error(result.failure),
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "model": result.head.model,
        "output": [_item(item) for item in result.items],
        "usage": None if result.usage is None else _usage(result.usage, result),
        **{name: _exactly(value) for name, value in result.repeated.items()},
    }


def _exactly(value: Any) -> orjson.Fragment:
    """A value of the request as JSON: schemas have integers of any size, which orjson refuses."""
    return orjson.Fragment(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _error(failure: ServiceError) -> dict[str, Any]:
    body = _error_body(failure)
    return {"code": body["code"], "message": body["message"]}


def _error_body(failure: ServiceError) -> dict[str, Any]:
    kind = failure.kind
    body: dict[str, Any] = openai_body(
        failure.message,
        kind.error_type,
        kind.http_status,
        param=failure.field,
        code=failure.code,
    )["error"]
    return body


def _usage(usage: Usage, result: Response) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.num_cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": result.num_reasoning_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
    }


def _item(item: Item) -> dict[str, Any]:
    head = {"id": item.id, "type": item.kind, "status": item.status}
    content = [] if item.text is None else [_part(item)]
    match item.kind:
        case "message":
            return {**head, "role": "assistant", "content": content}
        case "reasoning":
            return {**head, "summary": [], "content": content}
    return {**head, "call_id": item.call_id, "name": item.name, "arguments": item.arguments}


def _part(item: Item) -> dict[str, Any]:
    if item.kind == "reasoning":
        return {"type": "reasoning_text", "text": item.text}
    logprobs = _logprobs(item.logprobs)
    return {"type": "output_text", "text": item.text, "annotations": [], "logprobs": logprobs}


def _logprobs(scored: ScoredTokens) -> list[dict[str, Any]]:
    return [
        {**_logprob(token), "top_logprobs": [_logprob(other) for other in tops]}
        for token, tops in scored
    ]


def _logprob(token: Token) -> dict[str, Any]:
    text = token.text
    return {"token": text, "bytes": list(text.encode()), "logprob": token.logprob}


def _event(item: Event) -> dict[str, Any]:
    body: dict[str, Any] = {"type": item.type, "sequence_number": item.number}
    if item.response is not None:
        body["response"] = _response(item.response)
    if item.failure is not None:
        error = _error_body(item.failure)
        body |= {name: error[name] for name in ("code", "message", "param")}
    if item.item is not None:
        body |= {"output_index": item.output_index, **_of_item(item, item.item)}
    return body


def _of_item(about: Event, item: Item) -> dict[str, Any]:
    """What an event says about an item: its name tells which of its fields that is."""
    _, subject, verb = about.type.rsplit(".", 2)
    if subject == "output_item":
        return {"item": _item(item)}
    body: dict[str, Any] = {"item_id": item.id}
    if about.is_part:
        body["content_index"] = 0
    if verb == "delta":
        body["delta"] = about.delta
    elif subject == "content_part":
        body["part"] = _part(item)
    elif about.is_part:
        body["text"] = item.text
    else:
        body |= {"name": item.name, "arguments": item.arguments}
    return body | ({"logprobs": _logprobs(about.logprobs)} if subject == "output_text" else {})
