"""Replies of calls as streams: one alone, and messages until nobody reads them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..codec.presenter import Reply
from ..errors import ErrorKind, ServiceError
from .call import Call


async def alone(reply: Reply) -> AsyncGenerator[Reply]:
    """The reply of a call that asked for no stream."""
    yield reply


def as_it_is(reply: Reply) -> Reply:
    """Presents what is a reply already."""
    return reply


async def read(messages: AsyncGenerator[Reply], call: Call) -> AsyncGenerator[Reply]:
    """Messages, until the caller does not read them any more.

    Raises:
        ServiceError: it does not.
    """
    async with aclosing(messages):
        call.end_unread_by(messages.aclose)
        async for message in messages:
            yield message
    if call.failure is not None:
        raise call.failure


def check_unary(stream: bool) -> None:
    """Refuses a stream where there is one reply.

    Raises:
        ServiceError: the caller wants a stream.
    """
    if stream:
        raise ServiceError(
            ErrorKind.VALIDATION, "`stream` must not be set: this method is unary", field="stream"
        )
