"""What a generation's spans are: names, times and attributes, made of a call's record.

Names are those of OpenTelemetry's conventions for generative AI, for latencies those of vLLM. This
module does not know how spans are made and sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..call_record import CallRecord, Content
from ..errors import ErrorKind
from ..generation.parameters import Parameters
from ..openai.finish_reasons import finish_word
from ..timeline import SequenceTimeline, Stage

Value = str | bool | int | float | list[str]

PROVIDER = "tokenwire"
# The RPCs that generate, with the operation that each is.
OPERATIONS = {
    "Generate": "text_completion",
    "GenerateStream": "text_completion",
    "CompatGenerate": "text_completion",
    "Completions": "text_completion",
    "CompletionsUnary": "text_completion",
    "Invocations": "text_completion",  # or a chat, which its answer's id tells
    "Chat": "chat",
    "ChatUnary": "chat",
}
_CHAT_ID = "chatcmpl-"
_MAX_NAME = 256  # characters of a model's name that a caller gives
_SEQUENCE = "tokenwire.sequence"  # which of several texts a span or an event is about

# What a call can fail of before anything of it was looked at.
_NOT_VALIDATED = {
    kind.error_type for kind in (ErrorKind.OVERLOADED, ErrorKind.UNHEALTHY, ErrorKind.CANCELLED)
}


@dataclass(frozen=True, slots=True)
class EventPlan:
    """An event of a span; `at` in seconds of the monotonic clock."""

    name: str
    at: float
    attributes: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class SpanPlan:
    """A span to be made; times in seconds of the monotonic clock.

    `error_type` is empty if it is about something that went well.
    """

    name: str
    start: float
    end: float
    attributes: Mapping[str, Value]
    events: tuple[EventPlan, ...] = ()
    error_type: str = ""
    children: tuple[SpanPlan, ...] = ()


def operation_plan(record: CallRecord, method: str, model_id: str, ended: float) -> SpanPlan:
    """The span of a call's generation, with those of its stages.

    Args:
        record: the call's.
        method: its RPC's name, one of `OPERATIONS`.
        model_id: of the model that is served.
        ended: when the call ended, in seconds of the monotonic clock.
    """
    operation = "chat" if record.answer_id.startswith(_CHAT_ID) else OPERATIONS[method]
    return SpanPlan(
        # Not with the name that the caller gives the model: there may be any number of those.
        name=f"{operation} {model_id}",
        start=record.began,
        end=ended,
        attributes={
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            **_request(record, model_id),
            **_response(record, model_id),
            **_latencies(record, ended),
            **_content(record.content),
        },
        events=tuple(sorted(_events(record), key=lambda event: event.at)),
        error_type=record.error_type,
        children=(*_stages(record, ended), *_sequences(record, ended)),
    )


def _request(record: CallRecord, model_id: str) -> dict[str, Value]:
    """What was asked for; parameters that were absent are left out."""
    parameters = record.parameters
    if not isinstance(parameters, Parameters):  # it failed before they were read
        return {"gen_ai.request.model": model_id}
    given: dict[str, Value | None] = {
        "gen_ai.request.model": (parameters.adapter_id or model_id)[:_MAX_NAME],
        "gen_ai.request.id": record.request_id,
        "gen_ai.request.max_tokens": parameters.max_new_tokens,
        "gen_ai.request.temperature": parameters.temperature,
        "gen_ai.request.top_p": parameters.top_p,
        "gen_ai.request.top_k": parameters.top_k,
        "gen_ai.request.frequency_penalty": parameters.frequency_penalty,
        "gen_ai.request.seed": _signed(parameters.seed),
        "gen_ai.request.stop_sequences": [*parameters.stop] or None,
        "gen_ai.request.choice.count": record.num_choices if record.num_choices > 1 else None,
        "gen_ai.request.stream": True if record.is_stream else None,
        "gen_ai.request.best_of": parameters.best_of,
    }
    return {name: value for name, value in given.items() if value is not None}


def _signed(seed: int | None) -> int | None:
    """A seed as a signed number of 64 bits, since attributes have no others."""
    return seed - (1 << 64) if seed is not None and seed >> 63 else seed


def _response(record: CallRecord, model_id: str) -> dict[str, Value]:
    """What the answer was."""
    attributes: dict[str, Value] = {"gen_ai.response.model": model_id}
    if record.answer_id:
        attributes["gen_ai.response.id"] = record.answer_id
    if record.finish_reasons:
        attributes["gen_ai.response.finish_reasons"] = [*map(finish_word, record.finish_reasons)]
    if record.num_prompt_tokens:
        attributes |= {
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_generated_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        }
    return attributes


def _latencies(record: CallRecord, ended: float) -> dict[str, Value]:
    """How long it took, in seconds."""
    timings = record.timings()
    given = {
        "e2e": ended - record.began,
        "time_in_queue": timings.queue,
        "time_to_first_token": timings.first_token,
        "time_in_model_prefill": timings.prefill,
        "time_in_model_decode": timings.decode,
        "time_in_model_inference": timings.inference,
    }
    return {f"gen_ai.latency.{name}": value for name, value in given.items() if value is not None}


def _content(content: Content | None) -> dict[str, Value]:
    """The texts, as JSON."""
    if content is None:
        return {}
    outputs = [
        {
            "role": "assistant",
            "parts": [{"type": "text", "content": text}],
            "finish_reason": finish_word(reason),
        }
        for text, reason in content.outputs
    ]
    return {
        "gen_ai.input.messages": json.dumps(content.input_messages, ensure_ascii=False),
        "gen_ai.output.messages": json.dumps(outputs, ensure_ascii=False),
    }


def _events(record: CallRecord) -> Iterator[EventPlan]:
    for index, sequence in enumerate(record.sequences):
        number = _number(record, index)
        if sequence.first_token is not None:
            yield EventPlan("first_token", sequence.first_token, number)
        for name, at in sequence.events:
            yield EventPlan(name, at, number)


def _number(record: CallRecord, index: int) -> dict[str, Value]:
    """Which text something is about, where there are several."""
    return {_SEQUENCE: index} if len(record.sequences) > 1 else {}


def _stages(record: CallRecord, ended: float) -> Iterator[SpanPlan]:
    stages = record.stages
    is_new = not stages and not record.sequences
    if is_new and record.error_type and record.error_type not in _NOT_VALIDATED:
        stages = [Stage("validate", record.began, ended, has_failed=True)]  # it could not be read
    for item in stages:
        error = record.error_type if item.has_failed else ""
        yield SpanPlan(item.name, item.began, item.ended or ended, {}, error_type=error)


def _sequences(record: CallRecord, ended: float) -> Iterator[SpanPlan]:
    for index, sequence in enumerate(record.sequences):
        yield from _phases(sequence, _number(record, index), record.error_type, ended)


def _phases(
    sequence: SequenceTimeline, number: Mapping[str, Value], error_type: str, ended: float
) -> Iterator[SpanPlan]:
    """The phases that a text came to; an error counts for the last of them."""
    end = sequence.finished or sequence.ended or ended
    failed = error_type if sequence.finished is None else ""
    starts = [
        ("queue", sequence.submitted),
        ("prefill", sequence.started),
        ("decode", sequence.first_token),
    ]
    begun = [(name, start) for name, start in starts if start is not None]
    for place, (name, start) in enumerate(begun):
        is_last = place == len(begun) - 1
        until = end if is_last else begun[place + 1][1]
        yield SpanPlan(name, start, max(until, start), number, error_type=failed if is_last else "")
