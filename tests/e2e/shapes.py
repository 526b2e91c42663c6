"""Checks of the contract's objects on the wire: their keys in order, and their values."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

FINISH_REASONS = {"length", "eos_token", "stop_sequence"}
OPENAI_FINISH_REASONS = {"length", "stop"}
FINGERPRINT = "2.1.2-dev0-native"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def check_logprob(value: Any) -> None:
    """Checks a log-probability: a float32 in its shortest decimal form, at most 0."""
    assert is_number(value)
    assert math.isfinite(value)
    assert value <= 0
    assert float(str(np.float32(value))) == value


def check_token(token: dict[str, Any]) -> None:
    assert list(token) == ["id", "text", "logprob", "special"]
    assert is_count(token["id"])
    assert isinstance(token["text"], str)
    check_logprob(token["logprob"])
    assert isinstance(token["special"], bool)


def check_prefill(prefill: list[dict[str, Any]]) -> None:
    for index, token in enumerate(prefill):
        assert list(token) == ["id", "text", "logprob"]
        assert is_count(token["id"])
        assert isinstance(token["text"], str)
        if index == 0:
            assert token["logprob"] is None
        else:
            check_logprob(token["logprob"])


def check_details(
    details: dict[str, Any], *, extra: tuple[str, ...] = (), seeded: bool = False
) -> None:
    keys = ["finish_reason", "generated_tokens", "seed", "prefill", "tokens", *extra]
    assert list(details) == keys
    assert details["finish_reason"] in FINISH_REASONS
    assert details["generated_tokens"] == len(details["tokens"]) > 0
    assert is_count(details["seed"]) if seeded else details["seed"] is None
    check_prefill(details["prefill"])
    for token in details["tokens"]:
        check_token(token)


def check_usage(usage: dict[str, Any]) -> None:
    assert list(usage) == ["prompt_tokens", "completion_tokens", "total_tokens"]
    assert all(is_count(value) and value > 0 for value in usage.values())
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def check_head(body: dict[str, Any], kind: str, model: str) -> None:
    """Checks the fields that all objects of OpenAI have in common."""
    assert body["object"] == kind
    prefix = "cmpl" if kind == "text_completion" else "chatcmpl"
    assert re.fullmatch(prefix + "-[0-9a-f]{32}", body["id"])
    assert is_count(body["created"])
    assert body["model"] == model
    assert body["system_fingerprint"] == FINGERPRINT


def check_chat_logprobs(logprobs: dict[str, Any], *, num_top: int) -> None:
    assert list(logprobs) == ["content"]
    for entry in logprobs["content"]:
        assert list(entry) == ["token", "logprob", "top_logprobs"]
        check_logprob(entry["logprob"])
        assert len(entry["top_logprobs"]) >= num_top
        for top in entry["top_logprobs"]:
            assert list(top) == ["token", "logprob"]
            check_logprob(top["logprob"])


def check_error(body: dict[str, Any], error_type: str) -> None:
    assert list(body) == ["error", "error_type"]
    assert isinstance(body["error"], str)
    assert body["error"]
    assert body["error_type"] == error_type


def check_chat(
    body: dict[str, Any], model: str, *, logprobs: bool = False, num_top: int = 0
) -> None:
    keys = ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert list(body) == keys
    check_head(body, "chat.completion", model)
    (choice,) = body["choices"]
    assert list(choice) == ["index", "message", "logprobs", "finish_reason"]
    assert choice["index"] == 0
    assert list(choice["message"]) == ["role", "content"]
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert choice["finish_reason"] in OPENAI_FINISH_REASONS
    check_usage(body["usage"])
    if logprobs:
        check_chat_logprobs(choice["logprobs"], num_top=num_top)
        assert len(choice["logprobs"]["content"]) == body["usage"]["completion_tokens"]
    else:
        assert choice["logprobs"] is None


def check_chat_chunk(body: dict[str, Any], model: str, *, last: bool, logprobs: bool) -> None:
    assert list(body) == ["object", "id", "created", "model", "system_fingerprint", "choices"]
    check_head(body, "chat.completion.chunk", model)
    (choice,) = body["choices"]
    assert list(choice) == ["index", "delta", "logprobs", "finish_reason"]
    assert choice["index"] == 0
    assert list(choice["delta"]) == ["role", "content"]
    assert choice["delta"]["role"] == "assistant"
    assert isinstance(choice["delta"]["content"], str)
    if last:
        assert choice["finish_reason"] in OPENAI_FINISH_REASONS
    else:
        assert choice["finish_reason"] is None
    if logprobs:
        check_chat_logprobs(choice["logprobs"], num_top=0)
        assert len(choice["logprobs"]["content"]) == 1
    else:
        assert choice["logprobs"] is None


def check_completion(body: dict[str, Any], model: str, num_choices: int) -> None:
    keys = ["object", "id", "created", "model", "system_fingerprint", "choices", "usage"]
    assert list(body) == keys
    check_head(body, "text_completion", model)
    for index, choice in enumerate(body["choices"]):
        assert list(choice) == ["index", "text", "logprobs", "finish_reason"]
        assert choice["index"] == index
        assert isinstance(choice["text"], str)
        assert choice["logprobs"] is None
        assert choice["finish_reason"] in OPENAI_FINISH_REASONS
    assert len(body["choices"]) == num_choices
    check_usage(body["usage"])


def check_completion_chunk(body: dict[str, Any], model: str, *, last: bool) -> None:
    assert list(body) == ["object", "id", "created", "choices", "model", "system_fingerprint"]
    check_head(body, "text_completion", model)
    (choice,) = body["choices"]
    assert list(choice) == ["index", "text", "logprobs", "finish_reason"]
    assert isinstance(choice["text"], str)
    assert choice["logprobs"] is None
    if last:
        assert choice["finish_reason"] in OPENAI_FINISH_REASONS
    else:
        assert choice["finish_reason"] == ""
