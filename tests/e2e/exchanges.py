"""Requests that together cause every kind of reply of the OpenAPI document."""

from __future__ import annotations

from typing import Any

from tests.e2e.stack import PROMPT
from tests.e2e.tools import CONTRACT_TOOLS, TOOLS, WEATHER_QUESTION

Exchange = tuple[str, str, dict[str, Any] | None]  # method, path, JSON body

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": 4,
    "seed": 1,
}
COMPLETION: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0.0}
LOGPROBS: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
CALL: dict[str, Any] = {
    "messages": [{"role": "user", "content": WEATHER_QUESTION}],
    "tools": CONTRACT_TOOLS,
    "tool_choice": "required",
    "max_tokens": 100,
    "temperature": 0.0,
}
RESPONSE: dict[str, Any] = {"input": PROMPT, "max_output_tokens": 4}
RESPONSE_CALL: dict[str, Any] = {
    "input": WEATHER_QUESTION,
    "tools": [{"type": "function", **tool["function"]} for tool in TOOLS],
    "tool_choice": "required",
    "temperature": 0.0,
}
FORMAT: dict[str, Any] = {"response_format": {"type": "json_object"}}
GRAMMAR: dict[str, Any] = {"grammar": {"type": "regex", "value": "[a-c]{3}"}}
EVERYTHING: dict[str, Any] = {
    "details": True,
    "decoder_input_details": True,
    "top_n_tokens": 2,
    "seed": 2**64 - 1,
    "do_sample": True,
}


def generate(**parameters: Any) -> dict[str, Any]:
    """A body for /generate; 4 tokens unless told otherwise."""
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, **parameters}}


# Requests that are answered with 200; together they get every kind of reply.
EXCHANGES: dict[str, Exchange] = {
    "root": ("GET", "/", None),
    "health": ("GET", "/health", None),
    "ping": ("GET", "/ping", None),
    "info": ("GET", "/info", None),
    "metrics": ("GET", "/metrics", None),
    "models": ("GET", "/v1/models", None),
    "model": ("GET", "/v1/models/tokenwire/demo", None),
    "openapi": ("GET", "/openapi.json", None),
    "tokenize": ("POST", "/tokenize", {"inputs": "¿Qué? 🙂"}),
    "chat tokenize": ("POST", "/chat_tokenize", CHAT),
    "generate": ("POST", "/generate", generate()),
    "generate, details": ("POST", "/generate", generate(details=True)),
    "generate, everything": ("POST", "/generate", generate(**EVERYTHING)),
    "generate, best of": (
        "POST",
        "/generate",
        generate(best_of=2, do_sample=True, details=True, top_n_tokens=1),
    ),
    "generate, improbable tokens": (
        "POST",
        "/generate",
        generate(top_k=1, top_n_tokens=5, details=True),
    ),
    "generate, grammar": (
        "POST",
        "/generate",
        generate(details=True, top_n_tokens=2, best_of=2, do_sample=True, **GRAMMAR),
    ),
    "stream": ("POST", "/generate_stream", generate()),
    "stream, details": (
        "POST",
        "/generate_stream",
        generate(details=True, top_n_tokens=2, do_sample=True, seed=0),
    ),
    "stream, grammar": ("POST", "/generate_stream", generate(details=True, **GRAMMAR)),
    "compat": ("POST", "/", generate(details=True)),
    "compat stream": ("POST", "/", {**generate(details=True), "stream": True}),
    "chat": ("POST", "/v1/chat/completions", CHAT),
    "chat, logprobs": ("POST", "/v1/chat/completions", {**CHAT, **LOGPROBS}),
    "chat, improbable": ("POST", "/v1/chat/completions", {**CHAT, **LOGPROBS, "top_p": 0.01}),
    "chat stream": ("POST", "/v1/chat/completions", {**CHAT, "stream": True}),
    "chat stream, logprobs": ("POST", "/v1/chat/completions", {**CHAT, **LOGPROBS, **USAGE}),
    "chat, format": ("POST", "/v1/chat/completions", {**CHAT, **FORMAT}),
    "chat, call": ("POST", "/v1/chat/completions", CALL),
    "chat, call, logprobs": ("POST", "/v1/chat/completions", {**CALL, **LOGPROBS}),
    "chat stream, call": ("POST", "/v1/chat/completions", {**CALL, "stream": True}),
    "chat stream, call, logprobs": ("POST", "/v1/chat/completions", {**CALL, **LOGPROBS, **USAGE}),
    "chat stream, unfinished call": (
        "POST",
        "/v1/chat/completions",
        {**CALL, "stream": True, "max_tokens": 12},
    ),
    "completion": ("POST", "/v1/completions", COMPLETION),
    "completion, logprobs": ("POST", "/v1/completions", {**COMPLETION, "logprobs": 2}),
    "completions": ("POST", "/v1/completions", {**COMPLETION, "prompt": [PROMPT, "One"]}),
    "completion stream": ("POST", "/v1/completions", {**COMPLETION, "stream": True}),
    "completions stream": (
        "POST",
        "/v1/completions",
        {**COMPLETION, "prompt": ["a", "b"], **USAGE},
    ),
    "response": ("POST", "/v1/responses", RESPONSE),
    "response, logprobs": ("POST", "/v1/responses", {**RESPONSE, "top_logprobs": 2}),
    "response, call": ("POST", "/v1/responses", RESPONSE_CALL),
    "response stream": ("POST", "/v1/responses", {**RESPONSE, "stream": True}),
    "response stream, logprobs": (
        "POST",
        "/v1/responses",
        {**RESPONSE, "stream": True, "top_logprobs": 2},
    ),
    "response stream, call": ("POST", "/v1/responses", {**RESPONSE_CALL, "stream": True}),
    "response stream, unfinished call": (
        "POST",
        "/v1/responses",
        {**RESPONSE_CALL, "stream": True, "max_output_tokens": 12},
    ),
    "invocation": ("POST", "/invocations", generate(details=True)),
    "invocation stream": ("POST", "/invocations", {**generate(), "stream": True}),
    "chat invocation": ("POST", "/invocations", CHAT),
    "chat invocation stream": ("POST", "/invocations", {**CHAT, **USAGE}),
    "call invocation": ("POST", "/invocations", CALL),
    "call invocation stream": ("POST", "/invocations", {**CALL, "stream": True}),
    "completion invocation": ("POST", "/invocations", COMPLETION),
    "completion invocation stream": ("POST", "/invocations", {**COMPLETION, "stream": True}),
}

# The smallest float32: the logits become infinite, and the softmax of these is not a number.
FAILING_TEMPERATURE = 1e-45
GENERATE_422 = generate(top_p=1.0)
GENERATE_424 = generate(temperature=FAILING_TEMPERATURE)
GENERATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # path: a request that is refused, one that fails
    "/generate": (GENERATE_422, GENERATE_424),
    "/generate_stream": (GENERATE_422, GENERATE_424),
    "/": (GENERATE_422, GENERATE_424),
    "/v1/chat/completions": ({**CHAT, "top_p": 1.0}, {**CHAT, "temperature": FAILING_TEMPERATURE}),
    "/v1/completions": (
        {**COMPLETION, "top_p": 1.0},
        {**COMPLETION, "temperature": FAILING_TEMPERATURE},
    ),
    "/v1/responses": (
        {**RESPONSE, "top_p": 0.0},
        {**RESPONSE, "temperature": FAILING_TEMPERATURE},
    ),
    "/invocations": (GENERATE_422, GENERATE_424),
}
