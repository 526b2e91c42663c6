"""Requests at the limits: the last values that are accepted, and a server with small limits."""

from __future__ import annotations

from typing import Any

from tests.e2e import error_texts as texts
from tests.e2e.error_texts import MAX_INPUT
from tests.e2e.refusal import CHAT, COMPLETIONS, MESSAGES, TOOLS, Row, tokens

# The flags of a server with small limits, and requests that it alone refuses or accepts.
STRICT_FLAGS = (
    "--max-best-of=1",
    "--max-input-tokens=8",
    "--max-total-tokens=32",
    "--max-stop-sequences=0",
    "--max-top-n-tokens=0",
    "--max-client-batch-size=1",
    "--max-request-bytes=1000",
)


def _strict(error: str, field: str, inputs: str = "a", **parameters: Any) -> Row:
    path = field if field == "inputs" else f"parameters.{field}"
    return Row(
        "/generate", {"inputs": inputs, "parameters": parameters}, texts.VALIDATION + error, path
    )


_LONG = "`inputs` must have less than 8 tokens. Given: "

STRICT = [
    _strict("`best_of` != 1 is not allowed for this endpoint", "best_of", best_of=2, top_k=0),
    _strict(
        "`stop` supports up to 0 stop sequences. Given: 1", "stop", stop=["x"], max_new_tokens=1
    ),
    _strict("`top_n_tokens` must be >= 0 and <= 0. Given: 1", "top_n_tokens", top_n_tokens=1),
    _strict(
        "`truncate` must be strictly positive and less than 8. Given: 9", "truncate", truncate=9
    ),
    _strict(texts.total(2, 100, 32), "max_new_tokens"),  # the default of `max_new_tokens`
    _strict(texts.total(2, 31, 32), "max_new_tokens", max_new_tokens=31),
    _strict(texts.total(8, 25, 32), "max_new_tokens", tokens(8), max_new_tokens=25),
    _strict(texts.total(8, 25, 32), "max_new_tokens", tokens(20), truncate=8, max_new_tokens=25),
    _strict(texts.total(9, 24, 32), "max_new_tokens", tokens(9), max_new_tokens=24),
    _strict(texts.total(33, 1, 32), "max_new_tokens", tokens(33), max_new_tokens=1),
    _strict(_LONG + "9", "inputs", tokens(9), max_new_tokens=23),
    _strict(_LONG + "31", "inputs", tokens(31), max_new_tokens=1),
    Row(
        COMPLETIONS,
        {"prompt": ["a", "a"]},
        "Number of prompts exceeds the maximum allowed batch size of 1",
        "prompt",
        "batch size exceeded",
    ),
    Row(
        COMPLETIONS,
        {"prompt": [tokens(9)], "max_tokens": 1, "stream": True},
        f"{texts.VALIDATION}{_LONG}9",
        "prompt",
        in_band=True,
    ),
    Row(
        CHAT,
        {"messages": [{"role": "user", "content": tokens(7)}], "max_tokens": 1},
        f"{texts.VALIDATION}{_LONG}10",
        "messages",
    ),
]

STRICT_ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "a", "parameters": {"best_of": 1, "max_new_tokens": 30}}),
    ("/generate", {"inputs": tokens(8), "parameters": {"max_new_tokens": 24}}),
    ("/generate", {"inputs": tokens(20), "parameters": {"max_new_tokens": 24, "truncate": 8}}),
    ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1, "top_n_tokens": 0}}),
    (COMPLETIONS, {"prompt": [tokens(8)], "max_tokens": 24}),
]

# Accepted by a server with the default limits.
ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    *(
        ("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1, **parameters}})
        for parameters in [
            {"temperature": 1e-30},
            {"temperature": 3.4e38},
            {"repetition_penalty": 1e-30},
            {"repetition_penalty": 3.4e38},
            {"frequency_penalty": 2},
            {"frequency_penalty": 2.0000001},
            {"frequency_penalty": -2},
            {"top_p": 1e-45},
            {"top_p": 0.9999999},
            {"typical_p": 1e-45},
            {"typical_p": 0.9999999},
            {"top_k": 1},
            {"top_k": 2**31 - 1},
            {"max_new_tokens": 1},
            {"stop": ["x"] * 4},
            {"seed": 0},
            {"seed": 2**64 - 1},
            {"seed": 1, "best_of": 1},
            {"top_n_tokens": 0},
            {"top_n_tokens": 5},
            {"truncate": 1},
            {"truncate": MAX_INPUT},
            {"best_of": 0},
            {"best_of": 2, "do_sample": True},
            {"best_of": 2, "temperature": 1.0},
            {"best_of": 2, "top_k": 1},
        ]
    ),
    ("/generate_stream", {"inputs": "a", "parameters": {"best_of": 1, "max_new_tokens": 1}}),
    ("/generate", {"inputs": tokens(MAX_INPUT), "parameters": {"max_new_tokens": 1}}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1, "n": 1}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1, "temperature": 0}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1, "presence_penalty": -1.9999999}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1, "tools": [], "response_format": None}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 1, "tools": TOOLS, "tool_choice": "none"}),
    (CHAT, {"messages": [{"role": "user", "content": ""}], "max_tokens": 1}),
    (CHAT, {"messages": [{"role": "user", "content": []}], "max_tokens": 1}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 0, "max_completion_tokens": 1}),
    (COMPLETIONS, {"prompt": ["a"] * 4, "max_tokens": 1}),
    (COMPLETIONS, {"prompt": ["a"], "max_tokens": 1, "suffix": None}),
    ("/tokenize", {"inputs": ""}),
    ("/chat_tokenize", {"messages": MESSAGES, "temperature": -1}),
    ("/invocations", {"inputs": "a", "messages": [], "prompt": [], "parameters": {"seed": 0}}),
]
