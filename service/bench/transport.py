"""What a load needs of a server, the same over every protocol."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

UNARY_TIMEOUT_S = 30.0  # of everything but generation

# TGI's API has no way to ignore the end-of-text token. But at this temperature every token is as
# likely as any other, whatever the model has learnt, so that only the seed decides: one whose draws
# miss that token in one request misses it in all. `command` finds such a seed in the warm-up.
TEMPERATURE = 1e6


@dataclass(frozen=True, slots=True)
class Task:
    """One text to generate."""

    prompt: str
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed.

    Attributes:
        error_type: REST's `error_type`, gRPC's reason, or ours: connection, timeout, incomplete.
        code: the HTTP status or the gRPC code; empty if there was no answer.
        message: the text of the error.
    """

    error_type: str
    code: str
    message: str

    def __str__(self) -> str:
        kind = " ".join(part for part in (self.error_type, self.code) if part)
        return f"{kind}: {' '.join(self.message.split())}"


class RequestFailed(Exception):
    """A request failed; every Transport raises this, not an exception of its library."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


INCOMPLETE = Failure("incomplete", "", "the stream ended before the text did")


class Transport(Protocol):
    """A way to ask the server. Everything but `close` raises RequestFailed."""

    async def token_stops(self, text: str) -> list[int]:
        """Tokenises: the offset of each token's end, 0 for tokens that the model adds."""

    async def metrics(self) -> str:
        """The server's metrics, in Prometheus' text format."""

    def stream(self, task: Task) -> AsyncGenerator[None]:
        """Generates, and yields once for each token, as soon as it arrives."""

    async def close(self) -> None:
        """Ends the connections."""
