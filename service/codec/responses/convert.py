"""Responses as generated messages."""

from __future__ import annotations

from typing import Any

from ...call_record import current_record
from ...openai.responses.event import Event
from ...openai.responses.item import Item, ScoredTokens
from ...openai.responses.response import Response
from ...pb.tokenwire import v1 as pb


def response(result: Response) -> pb.Response:
    """A response."""
    record = current_record()
    is_cut = result.status == "incomplete"
    return pb.Response(
        id=result.head.id,
        created_at=result.head.created,
        model=result.head.model,
        status=result.status,
        incomplete_reason="max_output_tokens" if is_cut else None,
        output=[_item(item) for item in result.items],
        usage=_usage(result),
        metadata=result.repeated["metadata"],
        request_id="" if record is None else record.request_id,
    )


def event(item: Event) -> pb.ResponseEvent:
    """What is new in a response."""
    message = pb.ResponseEvent(type=item.type, sequence_number=item.number)
    if item.response is not None:
        message.response = response(item.response)
    if item.item is not None:
        for name, value in _of_item(item, item.item).items():
            setattr(message, name, value)
        message.output_index = item.output_index
    return message


def _usage(result: Response) -> pb.ResponseUsage | None:
    usage = result.usage
    if usage is None:
        return None
    return pb.ResponseUsage(
        input_tokens=usage.num_prompt_tokens,
        cached_tokens=usage.num_cached_tokens,
        output_tokens=usage.num_completion_tokens,
        reasoning_tokens=result.num_reasoning_tokens,
        total_tokens=usage.num_prompt_tokens + usage.num_completion_tokens,
    )


def _item(item: Item) -> pb.ResponseItem:
    message = pb.ResponseItem(id=item.id, type=item.kind, status=item.status)
    if item.kind == "function_call":
        message.call_id, message.name, message.arguments = item.call_id, item.name, item.arguments
        return message
    message.content = [] if item.text is None else [_part(item)]
    message.role = "assistant" if item.kind == "message" else None
    return message


def _part(item: Item) -> pb.ResponsePart:
    kind = "reasoning_text" if item.kind == "reasoning" else "output_text"
    return pb.ResponsePart(type=kind, text=item.text or "", logprobs=_logprobs(item.logprobs))


def _logprobs(scored: ScoredTokens) -> list[pb.ChatLogprob]:
    return [
        pb.ChatLogprob(
            token=token.text,
            logprob=token.logprob,
            top_logprobs=[
                pb.ChatTopLogprob(token=other.text, logprob=other.logprob) for other in tops
            ],
        )
        for token, tops in scored
    ]


def _of_item(about: Event, item: Item) -> dict[str, Any]:
    """What an event says about an item, as in JSON."""
    _, subject, verb = about.type.rsplit(".", 2)
    if subject == "output_item":
        return {"item": _item(item)}
    fields: dict[str, Any] = {"item_id": item.id}
    if about.is_part:
        fields |= {"content_index": 0, "logprobs": _logprobs(about.logprobs)}
    if verb == "delta":
        return {**fields, "delta": about.delta}
    if subject == "content_part":
        return {**fields, "part": _part(item)}
    if about.is_part:
        return {**fields, "text": item.text}
    return {**fields, "name": item.name, "arguments": item.arguments}
