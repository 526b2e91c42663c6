"""JSON and server-sent events, byte for byte as TGI sends them.

Key order, nulls and number formats are the contract's: a key that is left out and one that is null
mean different things to clients. What an answer contains is decided elsewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from operator import attrgetter
from typing import Any, TypeVar

import orjson

from ..error_bodies import ErrorFormat, openai_body, tgi_body
from ..errors import ServiceError
from ..generation.float32 import shortest_float32
from ..generation.generation import Generation, PrefillToken, Token, TokenEvent
from ..generation.server_info import ServerInfo
from ..openai.chat_answer import ChatAnswer, ChatDelta, Scored
from ..openai.completion_logprobs import ScoredToken
from ..openai.completions import CompletionAnswer, CompletionDelta
from ..openai.finish_reasons import finish_word
from ..openai.head import Head
from ..openai.tool_calls import ToolCall
from ..openai.usage import StreamUsage, Usage
from ..text.tokenizer import TokenSpan
from ..workers.courtesy import give_way

JSON = "application/json"
SSE = "text/event-stream"
_IMAGE_LIMITS = ("max_images", "max_image_bytes", "max_image_pixels", "fetches_images")
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b":\n\n"
_BOOLEANS = {False: b',"special":false', True: b',"special":true'}
_SLICE = 128  # of a list: a third of a millisecond's work with likeliest tokens
_T = TypeVar("_T")
_NUM_TOKENS = 16_384  # whose beginnings are kept: the most frequent of a large vocabulary, 3 MB


def sse(payload: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + payload + b"\n\n"


def error(failure: ServiceError, form: ErrorFormat = "tgi") -> bytes:
    """The body of an error, or of an event that reports one."""
    return orjson.dumps(error_body(failure, failure.message, form))


def error_body(failure: ServiceError, message: str, form: ErrorFormat) -> dict[str, Any]:
    """What `error` renders, with another text."""
    kind = failure.kind
    if form == "tgi":
        return tgi_body(message, kind.error_type)
    return openai_body(
        message, kind.error_type, kind.http_status, param=failure.field, code=failure.code
    )


def generation(result: Generation) -> bytes:
    """GenerateResponse."""
    return orjson.dumps(_generation(result))


def generation_list(result: Generation) -> bytes:
    """What `/` answers: a list of one."""
    return orjson.dumps([_generation(result)])


def token_event(event: TokenEvent) -> bytes:
    """StreamResponse: text and details are null until the last event, not absent."""
    if event.generation is None and not event.top_tokens:
        return _token_alone(event.number, *event.token)
    body: dict[str, Any] = {"index": event.number, "token": _token(event.token)}
    if event.top_tokens:
        body["top_tokens"] = [_token(token) for token in event.top_tokens]
    result = event.generation
    body["generated_text"] = None if result is None else result.generated_text
    body["details"] = None
    if result is not None and result.request.details:
        body["details"] = {
            "finish_reason": result.finish_reason,
            "generated_tokens": len(result.tokens),
            "seed": result.seed,
        }
    return orjson.dumps(body)


def _token_alone(
    number: int, token_id: int, text: str, logprob: float | None, special: bool
) -> bytes:
    """StreamResponse as for all tokens of a stream but the last: half of the time of a dict."""
    parts = (number, _id_and_text(token_id, text), orjson.dumps(logprob), _BOOLEANS[special])
    return b'{"index":%d,"token":%b%b%b},"generated_text":null,"details":null}' % parts


@lru_cache(_NUM_TOKENS)
def _id_and_text(token_id: int, text: str) -> bytes:
    """The beginning of a token, which is the same almost whenever it comes."""
    return b'{"id":%d,"text":%b,"logprob":' % (token_id, orjson.dumps(text))


def tokens(spans: list[TokenSpan]) -> bytes:
    """TokenizeResponse."""
    return b"".join(token_parts([spans], None))


def chat_tokens(prompt: str, spans: list[TokenSpan]) -> bytes:
    """ChatTokenizeResponse."""
    return b"".join(token_parts([spans], prompt))


def token_parts(slices: Iterable[list[TokenSpan]], prompt: str | None) -> Iterator[bytes]:
    """TokenizeResponse, or with a prompt ChatTokenizeResponse, part by part: it may be large."""
    yield b"[" if prompt is None else b'{"tokenize_response":['
    separator = b""
    for spans in slices:
        yield separator + orjson.dumps(_spans(spans))[1:-1]
        separator = b","
    yield b"]" if prompt is None else b'],"templated_text":' + orjson.dumps(prompt) + b"}"


def models(server: ServerInfo) -> bytes:
    """ListModelsResponse, as later versions of TGI have it."""
    return orjson.dumps(
        {"object": "list", "data": [_model(server, name) for name in server.model_names]}
    )


def model(server: ServerInfo, name: str) -> bytes:
    """Model, of the model or an adapter."""
    return orjson.dumps(_model(server, name))


def info(server: ServerInfo, replayed_share: float | None) -> bytes:
    """Info, nulls included; what TGI lacks there only where it says something."""
    ours = {
        "adapter_ids": server.adapters.names,
        "notes": server.engine.notes,
        "ranks": [rank._asdict() for rank in server.ranks],
        **{name: getattr(server.limits, name) for name in _IMAGE_LIMITS},
    }
    told = {key: value for key, value in ours.items() if value}
    if replayed_share is not None:  # that nothing was replayed says something
        told["replayed_share"] = shortest_float32(replayed_share)
    return orjson.dumps(server.to_contract() | told)


def chat_completion(answers: Sequence[ChatAnswer]) -> bytes:
    """ChatCompletion, of all answers to a conversation."""
    return orjson.dumps(
        {
            "object": "chat.completion",
            **_head(answers[0].head),
            "choices": [
                {
                    "index": index,
                    "message": _message(answer),
                    "logprobs": _chat_logprobs(answer.logprobs),
                    "finish_reason": finish_word(answer.finish_reason),
                }
                for index, answer in enumerate(answers)
            ],
            "usage": _usage(Usage.together(answer.usage for answer in answers)),
        }
    )


def chat_chunk(delta: ChatDelta) -> bytes:
    """ChatCompletionChunk."""
    reason = delta.finish_reason
    return orjson.dumps(
        {
            "object": "chat.completion.chunk",
            **_head(delta.head),
            "choices": [
                {
                    "index": delta.index,
                    "delta": _delta(delta),
                    "logprobs": _chat_logprobs(delta.logprobs),
                    "finish_reason": None if reason is None else finish_word(reason),
                }
            ],
        }
    )


def _message(answer: ChatAnswer) -> dict[str, Any]:
    """A turn: in the contract's form it has either content or calls, in OpenAI's both keys.

    Text before a call is content in both. Arguments are a text in both: the contract allows any
    type, and all clients can read a text.
    """
    reasoning = {"reasoning_content": answer.reasoning} if answer.reasoning else {}
    if not answer.calls:
        return {"role": "assistant", "content": answer.text, **reasoning}
    is_openai = answer.tool_call_format == "openai"
    made = [(_openai_call if is_openai else _contract_call)(call) for call in answer.calls]
    content = {"content": answer.text or None} if is_openai or answer.text else {}
    return {"role": "assistant", **content, **reasoning, "tool_calls": made}


def _openai_call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _contract_call(call: ToolCall) -> dict[str, Any]:
    described = {"description": None, "name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": described}


def _delta(delta: ChatDelta) -> dict[str, Any]:
    """A part of a turn: calls are one object in the contract's form, a list in OpenAI's.

    OpenAI's helper for streams concatenates all roles, so in its form only the first part has one.
    """
    call = delta.call
    is_openai = delta.tool_call_format == "openai"
    role = {} if is_openai and not delta.is_first else {"role": "assistant"}
    if delta.reasoning:
        return {**role, "content": "", "reasoning_content": delta.reasoning}
    if call is None:
        return {**role, "content": delta.text}
    if is_openai:
        made: dict[str, Any] = {"index": call.index, "function": {"arguments": call.arguments}}
        if call.name is not None:
            made |= {"id": delta.call_id, "type": "function"}
            made["function"] = {"name": call.name, "arguments": call.arguments}
        return {**role, "content": None, "tool_calls": [made]}
    function = {"name": call.name, "arguments": call.arguments}
    one = {"index": call.index, "id": delta.call_id, "type": "function", "function": function}
    return {**role, "tool_calls": one}


def completion(answer: CompletionAnswer) -> bytes:
    """CompletionFinal."""
    return orjson.dumps(
        {
            "object": "text_completion",
            **_head(answer.head),
            "choices": [
                {
                    "index": index,
                    "text": result.generated_text,
                    "logprobs": _completion_logprobs(logprobs),
                    "finish_reason": finish_word(result.finish_reason),
                }
                for index, (result, logprobs) in enumerate(answer.scored)
            ],
            "usage": _usage(answer.usage),
        }
    )


def completion_chunk(delta: CompletionDelta) -> bytes:
    """Chunk: the finish reason is an empty string before the end, as in TGI, not null."""
    head = delta.head
    reason = "" if delta.finish_reason is None else finish_word(delta.finish_reason)
    logprobs = _completion_logprobs(delta.logprobs)
    choice = {
        "index": delta.index,
        "text": delta.text,
        "logprobs": logprobs,
        "finish_reason": reason,
    }
    return orjson.dumps(
        {
            "object": "text_completion",
            "id": head.id,
            "created": head.created,
            "choices": [choice],
            "model": head.model,
            "system_fingerprint": head.system_fingerprint,
        }
    )


def chat_usage(part: StreamUsage) -> bytes:
    """The last chunk of a stream whose caller asked for the usage: OpenAI's form."""
    return _usage_chunk("chat.completion.chunk", part)


def completion_usage(part: StreamUsage) -> bytes:
    """The same for completions."""
    return _usage_chunk("text_completion", part)


def _usage_chunk(kind: str, part: StreamUsage) -> bytes:
    head = _head(part.head)
    return orjson.dumps({"object": kind, **head, "choices": [], "usage": _usage(part.usage)})


def _head(head: Head) -> dict[str, Any]:
    return {
        "id": head.id,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    }


def _model(server: ServerInfo, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": server.model_id}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
    }


def _spans(spans: list[TokenSpan]) -> list[dict[str, Any]]:
    return [
        {"id": span.token_id, "text": span.text, "start": span.start, "stop": span.stop}
        for span in spans
    ]


def _token(token: Token) -> dict[str, Any]:
    return {
        "id": token.id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special,
    }


def _prefill(token: PrefillToken) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "logprob": token.logprob}


def _generation(result: Generation) -> dict[str, Any]:
    body: dict[str, Any] = {"generated_text": result.generated_text}
    if result.request.wants_details:
        body["details"] = _details(result)
    return body


def _details(result: Generation) -> dict[str, Any]:
    body = _summary(result)
    if result.best_of_sequences:
        body["best_of_sequences"] = [_best_of_sequence(item) for item in result.best_of_sequences]
    return body | _top_tokens(result)


def _best_of_sequence(result: Generation) -> dict[str, Any]:
    return {"generated_text": result.generated_text, **_summary(result), **_top_tokens(result)}


def _summary(result: Generation) -> dict[str, Any]:
    return {
        "finish_reason": result.finish_reason,
        "generated_tokens": len(result.tokens),
        "seed": result.seed,
        "prefill": _listed(_prefill, result.prefill),
        "tokens": _listed(_token, result.tokens),
    }


def _top_tokens(result: Generation) -> dict[str, Any]:
    """`top_tokens` with its lists; left out when none were asked for."""
    if not result.top_tokens:
        return {}
    return {"top_tokens": _listed(lambda step: list(map(_token, step)), result.top_tokens)}


def _listed(make: Callable[[_T], Any], items: Sequence[_T]) -> list[Any] | orjson.Fragment:
    """A list of what is made of each item.

    A long one is JSON already, made slice by slice: orjson holds the interpreter's lock as long as
    a call takes.
    """
    if len(items) <= _SLICE:
        return list(map(make, items))
    made, slices = map(make, items), [b"["]
    while part := list(itertools.islice(made, _SLICE)):
        give_way()
        slices += (orjson.dumps(part)[1:-1], b",")
    slices[-1] = b"]"
    return orjson.Fragment(b"".join(slices))  # one copy: it may have megabytes


def _completion_logprobs(scored: list[ScoredToken] | None) -> dict[str, Any] | None:
    """OpenAI's older form: a list for each property, all of the same length."""
    if scored is None:
        return None
    return {
        "tokens": _listed(attrgetter("text"), scored),
        "token_logprobs": _listed(attrgetter("logprob"), scored),
        "top_logprobs": _listed(attrgetter("tops"), scored),
        "text_offset": _listed(attrgetter("offset"), scored),
    }


def _chat_logprobs(entries: Scored | None) -> dict[str, Any] | None:
    if entries is None:
        return None
    return {"content": _listed(lambda entry: _chat_logprob(*entry), entries)}


def _chat_logprob(token: Token, top_tokens: Sequence[Token]) -> dict[str, Any]:
    return {
        "token": token.text,
        "logprob": token.logprob,
        "top_logprobs": [{"token": other.text, "logprob": other.logprob} for other in top_tokens],
    }
