"""Streams that are kept alive: no message is lost, delayed or reordered, and no task is left.

Nothing here waits for time to pass: sources wait for events, and the interval is a millisecond
where silence is wanted and too long to matter where it is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from service.codec.keep_alive import with_keep_alive
from tests.service.fakes import TIMEOUT_S, eventually

pytestmark = pytest.mark.usefixtures("no_task_left")

FILLER = -1
SHORT_S = 0.001


class Source:
    """Yields its items; waits for events, raises exceptions and records how it ended."""

    def __init__(self, *items: int | asyncio.Event | Exception) -> None:
        self.items = items
        self.num_given = 0
        self.is_closed = False
        self.is_cancelled = False

    async def messages(self) -> AsyncGenerator[int]:
        try:
            for item in self.items:
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif isinstance(item, Exception):
                    raise item
                else:
                    self.num_given += 1
                    yield item
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise
        finally:
            self.is_closed = True

    def kept_alive(self, interval_s: float = TIMEOUT_S) -> AsyncGenerator[int]:
        return with_keep_alive(self.messages(), FILLER, interval_s)


@pytest.mark.parametrize("count", [0, 1, 100])
async def test_messages_keep_their_order(count: int) -> None:
    source = Source(*range(count))
    assert [item async for item in source.kept_alive()] == list(range(count))
    assert source.is_closed


async def test_every_interval_of_silence_yields_a_filler() -> None:
    more = asyncio.Event()
    stream = Source(1, more, 2).kept_alive(SHORT_S)
    async with asyncio.timeout(TIMEOUT_S), aclosing(stream):
        assert [await anext(stream) for _ in range(4)] == [1, FILLER, FILLER, FILLER]
        more.set()
        rest = [item async for item in stream]
    assert [item for item in rest if item != FILLER] == [2]


async def test_silence_before_the_first_message_is_filled() -> None:
    first = asyncio.Event()
    source = Source(first, 1)
    stream = source.kept_alive(SHORT_S)
    async with asyncio.timeout(TIMEOUT_S), aclosing(stream):
        assert await anext(stream) == FILLER
        first.set()
        assert 1 in [item async for item in stream]


async def test_a_filler_does_not_disturb_the_source() -> None:
    more = asyncio.Event()
    source = Source(more, 1)
    async with asyncio.timeout(TIMEOUT_S), aclosing(source.kept_alive(SHORT_S)) as stream:
        for _ in range(3):
            assert await anext(stream) == FILLER
        assert not source.is_closed
        more.set()
        assert 1 in [item async for item in stream]
    assert not source.is_cancelled


async def test_a_slow_reader_gets_messages_and_no_fillers() -> None:
    source = Source(*range(10))
    stream = source.kept_alive(SHORT_S)
    async with asyncio.timeout(TIMEOUT_S), aclosing(stream):
        found = [await anext(stream)]
        await eventually(lambda: source.is_closed)
        await asyncio.sleep(2 * SHORT_S)  # the reader is slow, not the source
        found += [item async for item in stream]
    assert found == list(range(10))


async def test_an_exception_is_raised_after_the_messages_before_it() -> None:
    found = []
    source = Source(1, 2, ValueError("bad luck"))
    stream = source.kept_alive()
    with pytest.raises(ValueError, match="bad luck"):
        async for item in stream:
            found.append(item)
    assert found == [1, 2]
    assert source.is_closed


async def test_an_exception_may_be_raised_before_any_message() -> None:
    with pytest.raises(ValueError, match="at once"):
        await anext(Source(ValueError("at once")).kept_alive())


async def test_an_exception_may_be_raised_after_fillers() -> None:
    later = asyncio.Event()
    stream = Source(later, ValueError("later")).kept_alive(SHORT_S)
    async with asyncio.timeout(TIMEOUT_S), aclosing(stream):
        assert await anext(stream) == FILLER
        later.set()
        with pytest.raises(ValueError, match="later"):
            while True:
                assert await anext(stream) == FILLER


async def test_closing_early_closes_the_source() -> None:
    source = Source(1, asyncio.Event())
    stream = source.kept_alive()
    assert await anext(stream) == 1
    await stream.aclose()
    assert source.is_closed
    assert source.is_cancelled


async def test_closing_early_discards_unread_messages_and_exceptions() -> None:
    source = Source(1, 2, ValueError("never raised"))
    stream = source.kept_alive()
    assert await anext(stream) == 1
    await stream.aclose()
    assert source.is_closed


async def test_closing_before_the_start_starts_nothing() -> None:
    source = Source(1)
    await source.kept_alive().aclose()
    assert source.num_given == 0


async def test_cancelling_the_reader_closes_the_source() -> None:
    source = Source(1, asyncio.Event())
    started = asyncio.Event()

    async def read() -> None:
        async with aclosing(source.kept_alive()) as stream:
            async for _ in stream:
                started.set()

    reader = asyncio.create_task(read())
    async with asyncio.timeout(TIMEOUT_S):
        await started.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
    assert source.is_closed
    assert source.is_cancelled
