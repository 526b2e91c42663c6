"""JSON and server-sent events, byte for byte as TGI sends them.

Key order, nulls and number formats are the contract's: a key that is left out and one that is null
mean different things to clients. Nothing here decides anything.
"""

from __future__ import annotations

from typing import Any

import orjson

from .chat import ChatAnswer, ChatDelta
from .completions import CompletionAnswer, CompletionDelta
from .errors import ServiceError
from .generation import Generation, PrefillToken, Token, TokenEvent
from .server_info import ServerInfo
from .tokenizer import TokenSpan

JSON = "application/json"
SSE = "text/event-stream"
DONE = b"data: [DONE]\n\n"


def sse(payload: bytes) -> bytes:
    """One server-sent event."""
    return b"data: " + payload + b"\n\n"


def error(failure: ServiceError) -> bytes:
    """The body of an error, or of an event that reports one."""
    return orjson.dumps({"error": failure.message, "error_type": failure.kind.error_type})


def generation(result: Generation) -> bytes:
    """GenerateResponse."""
    return orjson.dumps(_generation(result))


def generation_list(result: Generation) -> bytes:
    """What `/` answers: a list of one."""
    return orjson.dumps([_generation(result)])


def token_event(index: int, event: TokenEvent) -> bytes:
    """StreamResponse: text and details are null until the last event, not absent."""
    body: dict[str, Any] = {"index": index, "token": _token(event.token)}
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


def tokens(spans: list[TokenSpan]) -> bytes:
    """TokenizeResponse."""
    return orjson.dumps(
        [
            {"id": span.token_id, "text": span.text, "start": span.start, "stop": span.stop}
            for span in spans
        ]
    )


def info(server: ServerInfo) -> bytes:
    """Info, nulls included."""
    return orjson.dumps(server.to_contract())


def chat_completion(answer: ChatAnswer) -> bytes:
    """ChatCompletion."""
    return orjson.dumps(
        {
            "object": "chat.completion",
            **_head(answer.created, answer.server),
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": answer.text},
                    "logprobs": _chat_logprobs(answer.logprobs),
                    "finish_reason": answer.finish_reason,
                }
            ],
            "usage": _usage(answer.num_prompt_tokens, answer.num_completion_tokens),
        }
    )


def chat_chunk(delta: ChatDelta) -> bytes:
    """ChatCompletionChunk."""
    return orjson.dumps(
        {
            "object": "chat.completion.chunk",
            **_head(delta.created, delta.server),
            "choices": [
                {
                    "index": 0,
                    "delta": {"role": "assistant", "content": delta.text},
                    "logprobs": _chat_logprobs(delta.logprobs),
                    "finish_reason": delta.finish_reason,
                }
            ],
        }
    )


def completion(answer: CompletionAnswer) -> bytes:
    """CompletionFinal."""
    return orjson.dumps(
        {
            "object": "text_completion",
            **_head(answer.created, answer.server),
            "choices": [
                {
                    "index": index,
                    "text": result.generated_text,
                    "logprobs": None,
                    "finish_reason": result.finish_reason,
                }
                for index, result in enumerate(answer.generations)
            ],
            "usage": _usage(answer.num_prompt_tokens, answer.num_completion_tokens),
        }
    )


def completion_chunk(delta: CompletionDelta) -> bytes:
    """Chunk: TGI leaves the finish reason empty to the end."""
    head = _head(delta.created, delta.server)
    choice = {"index": delta.index, "text": delta.text, "logprobs": None, "finish_reason": ""}
    return orjson.dumps(
        {
            "object": "text_completion",
            "id": head["id"],
            "created": head["created"],
            "choices": [choice],
            "model": head["model"],
            "system_fingerprint": head["system_fingerprint"],
        }
    )


def _head(created: int, server: ServerInfo) -> dict[str, Any]:
    return {
        "id": "",
        "created": created,
        "model": server.model_id,
        "system_fingerprint": server.system_fingerprint,
    }


def _usage(num_prompt: int, num_completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


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
        body["best_of_sequences"] = [_loser(item) for item in result.best_of_sequences]
    return body | _top_tokens(result)


def _loser(result: Generation) -> dict[str, Any]:
    return {"generated_text": result.generated_text, **_summary(result), **_top_tokens(result)}


def _summary(result: Generation) -> dict[str, Any]:
    return {
        "finish_reason": result.finish_reason,
        "generated_tokens": len(result.tokens),
        "seed": result.seed,
        "prefill": [_prefill(token) for token in result.prefill],
        "tokens": [_token(token) for token in result.tokens],
    }


def _top_tokens(result: Generation) -> dict[str, Any]:
    """The key and its lists; neither when nobody asked."""
    if not result.top_tokens:
        return {}
    return {"top_tokens": [[_token(token) for token in step] for step in result.top_tokens]}


def _chat_logprobs(entries: list[tuple[Token, list[Token]]] | None) -> dict[str, Any] | None:
    if entries is None:
        return None
    return {
        "content": [
            {
                "token": token.text,
                "logprob": token.logprob,
                "top_logprobs": [
                    {"token": other.text, "logprob": other.logprob} for other in top_tokens
                ],
            }
            for token, top_tokens in entries
        ]
    }
