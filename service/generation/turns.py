"""Several streams read as one, in turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

from ..errors import ServiceError

_T = TypeVar("_T")


async def round_robin(
    streams: Sequence[AsyncGenerator[_T]],
) -> AsyncGenerator[tuple[int, _T | ServiceError]]:
    """One event of each stream in turn, with the stream's number, until all have ended.

    A stream that fails yields its error in its turn; the others go on. All streams work at the same
    time: each is one event ahead of the reader.
    """
    ahead = {index: asyncio.create_task(_next(stream)) for index, stream in enumerate(streams)}
    try:
        while ahead:
            for index in list(ahead):
                event = await ahead[index]
                if event is None or isinstance(event, ServiceError):
                    del ahead[index]
                else:
                    ahead[index] = asyncio.create_task(_next(streams[index]))
                if event is not None:
                    yield index, event
    finally:
        for task in ahead.values():
            task.cancel()
        await asyncio.gather(*ahead.values(), return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[_T]) -> _T | ServiceError | None:
    """The next event of a stream, or its failure; None at its end."""
    try:
        return await anext(stream, None)
    except ServiceError as error:
        return error
