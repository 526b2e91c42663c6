"""Typed gRPC client of a Tokenwire server: `Client`, and `AsyncClient` for asyncio."""

from .aio import AsyncClient
from .client import Client
from .errors import (
    CallCancelledError,
    DeadlineExceededError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
    TokenwireError,
    UnauthenticatedError,
    UnavailableError,
)
from .policy import RetryPolicy, Timeouts

__all__ = [
    "AsyncClient",
    "CallCancelledError",
    "Client",
    "DeadlineExceededError",
    "GenerationError",
    "InvalidRequestError",
    "OverloadedError",
    "RetryPolicy",
    "Timeouts",
    "TokenwireError",
    "UnauthenticatedError",
    "UnavailableError",
]
