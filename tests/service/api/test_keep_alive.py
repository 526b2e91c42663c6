"""Silent streams are kept alive: fillers never overtake, delay or meet a message, and none is left.

Nothing here depends on how long something takes: the interval is a millisecond where silence is
wanted, and too long to matter where it is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from service.api.call import Call
from tests.service.fakes import TIMEOUT_S, eventually

pytestmark = pytest.mark.usefixtures("no_task_left")

FILLER = b"filler"
SHORT_S = 0.001


class Context:
    """A call of grpc.aio: records what is sent, and fails if two messages are at the same time."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.is_free = asyncio.Event()  # whether the caller reads
        self.is_free.set()
        self.failure: Exception | None = None
        self.num_writing = 0

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def write(self, message: bytes) -> None:
        assert not self.num_writing
        self.num_writing += 1
        try:
            await self.is_free.wait()
            if self.failure is not None:
                raise self.failure
            self.sent.append(message)
        finally:
            self.num_writing -= 1


@pytest.fixture
async def context() -> Context:
    return Context()


@pytest.fixture
async def call(context: Context) -> AsyncGenerator[Call]:
    made: Any = Call(context, from_gateway=False)  # type: ignore[arg-type]
    async with asyncio.timeout(TIMEOUT_S):
        yield made
    await made.aclose()


async def test_every_interval_of_silence_sends_a_filler(call: Call, context: Context) -> None:
    call.keep_alive(FILLER, SHORT_S)
    await eventually(lambda: context.sent[:3] == [FILLER] * 3)
    await call.write(b"a")
    await eventually(lambda: context.sent[-1] == FILLER)
    assert context.sent.count(b"a") == 1


async def test_there_are_no_fillers_before_they_are_asked_for(call: Call, context: Context) -> None:
    await call.write(b"a")
    await asyncio.sleep(3 * SHORT_S)
    assert context.sent == [b"a"]


async def test_a_caller_that_does_not_read_gets_no_fillers(call: Call, context: Context) -> None:
    context.is_free.clear()
    writing = asyncio.create_task(call.write(b"a"))
    await eventually(lambda: context.num_writing == 1)
    call.keep_alive(FILLER, SHORT_S)
    await asyncio.sleep(5 * SHORT_S)  # `Context.write` fails where two messages meet
    context.is_free.set()
    await writing
    assert context.sent[0] == b"a"


async def test_a_message_waits_for_a_filler_that_is_being_sent(
    call: Call, context: Context
) -> None:
    context.is_free.clear()
    call.keep_alive(FILLER, SHORT_S)
    await eventually(lambda: context.num_writing == 1)
    writing = asyncio.create_task(call.write(b"a"))
    await asyncio.sleep(3 * SHORT_S)
    assert not writing.done()
    context.is_free.set()
    await writing
    assert context.sent[:2] == [FILLER, b"a"]


async def test_a_filler_that_fails_fails_nothing_else(call: Call, context: Context) -> None:
    context.failure = RuntimeError("the caller is gone")
    call.keep_alive(FILLER, SHORT_S)
    await asyncio.sleep(3 * SHORT_S)
    context.failure = None
    await call.write(b"a")
    assert b"a" in context.sent


async def test_an_ended_stream_sends_no_more(call: Call, context: Context) -> None:
    context.is_free.clear()
    call.keep_alive(FILLER, SHORT_S)
    await eventually(lambda: context.num_writing == 1)
    await call.aclose()
    assert context.num_writing == 0
    context.is_free.set()
    await asyncio.sleep(3 * SHORT_S)
    assert context.sent == []
