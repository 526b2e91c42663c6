"""Deadlines and retries, which gRPC itself applies: they are in a channel's service config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .rpcs import SERVICE

_GENERATION = ("Generate", "GenerateStream", "Chat", "Completions")
_RETRIED = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
_MIN_BACKOFF_S = 0.01  # with 1 ms gRPC may never make the next attempt: grpc/grpc issue 41036


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How many seconds a call may take, from its beginning to its last message."""

    generation_s: float = 600.0
    tokenize_s: float = 30.0
    info_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often and when a call is made again that failed before its first message.

    gRPC draws each pause at random: up to a limit that begins with `initial_backoff_s` and grows by
    `multiplier` to `max_backoff_s`. It makes 5 attempts at most.

    Raises:
        ValueError: a value that gRPC cannot work with.
    """

    max_attempts: int = 4
    initial_backoff_s: float = 0.25
    max_backoff_s: float = 5.0
    multiplier: float = 2.0

    def __post_init__(self) -> None:
        if self.max_attempts < 2 or self.multiplier <= 0:
            raise ValueError("a retry policy needs 2 attempts at least, and a positive multiplier")
        if min(self.initial_backoff_s, self.max_backoff_s) < _MIN_BACKOFF_S:
            raise ValueError(f"pauses between attempts take {_MIN_BACKOFF_S} s at least")

    def to_config(self) -> dict[str, Any]:
        """As a service config has it."""
        return {
            "maxAttempts": self.max_attempts,
            "initialBackoff": _duration(self.initial_backoff_s),
            "maxBackoff": _duration(self.max_backoff_s),
            "backoffMultiplier": self.multiplier,
            "retryableStatusCodes": list(_RETRIED),
        }


DEFAULT_TIMEOUTS = Timeouts()
DEFAULT_RETRIES = RetryPolicy()


def channel_options(timeouts: Timeouts, retries: RetryPolicy | None) -> list[tuple[str, Any]]:
    """The options of a channel. Answers may be of any size: a long text has many tokens."""
    return [
        ("grpc.service_config", _service_config(timeouts, retries)),
        ("grpc.max_receive_message_length", -1),
    ]


def _service_config(timeouts: Timeouts, retries: RetryPolicy | None) -> str:
    """A service config, as JSON. Health is not retried: it shall tell how things are now."""
    generation = _method_config(_GENERATION, timeouts.generation_s, retries)
    tokenize = _method_config(("Tokenize",), timeouts.tokenize_s, retries)
    info = _method_config(("Info",), timeouts.info_s, retries)
    health = _method_config(("Health",), timeouts.info_s, None)
    return json.dumps({"methodConfig": [generation, tokenize, info, health]})


def _method_config(
    names: tuple[str, ...], timeout_s: float, retries: RetryPolicy | None
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "name": [{"service": SERVICE, "method": name} for name in names],
        "timeout": _duration(timeout_s),
    }
    if retries is not None:
        config["retryPolicy"] = retries.to_config()
    return config


def _duration(seconds: float) -> str:
    return f"{seconds:.9f}s"
