"""What a call's record has of the moments that engines tell."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing

import pytest

from service.call_record import CallRecord, begin_record
from service.errors import ServiceError
from service.generation.engine_client import EngineClient
from service.generation.generator import Generator
from service.timeline import SequenceTimeline
from service.tracing.operation import operation_plan
from tests.engine.fakes import make_engine
from tests.service.fakes import TIMEOUT_S, WordTokenizer, eventually, generation_request
from tests.service.generation.engines import (
    SocketProxy,
    StartEngine,
    collect,
    connect,
    make_request,
    take,
)


def ascending(sequence: SequenceTimeline) -> list[float]:
    """The times of a text that came to its end, in the order in which they have to be."""
    times = [sequence.submitted, sequence.started, sequence.first_token, sequence.finished]
    found = [at for at in times if at is not None]
    assert len(found) == len(times)
    assert found == sorted(found)
    return found


async def test_two_texts_of_which_one_gives_way(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    await connect(client, proxy, start_engine(make_engine(num_blocks=8)))
    record = begin_record(None)
    requests = [make_request(name, prompt_token_ids=(1, 2, 3), max_new_tokens=22) for name in "ab"]
    async with asyncio.TaskGroup() as group:
        for request in requests:
            group.create_task(collect(client, request))
    for sequence in record.sequences:
        assert record.began <= ascending(sequence)[0]
    events = [[name for name, _ in sequence.events] for sequence in record.sequences]
    assert sorted(events, key=len)[0] == []
    assert sorted(events, key=len)[1][:2] == ["preempted", "resumed"]


async def test_an_engine_that_dies_too_often(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    await connect(client, proxy, start_engine(make_engine(gate=threading.Semaphore(1))))
    record = begin_record(None)
    words = WordTokenizer(*(f"w{index}" for index in range(40)))
    generator = Generator(client, words)  # type: ignore[arg-type]
    request = generation_request(prompt_token_ids=(1, 2, 3), max_new_tokens=150)
    stream = generator.stream(request, time.monotonic(), time.monotonic())
    async with aclosing(stream) as events:
        await anext(events)
        with pytest.raises(ServiceError, match="died too often") as failed:
            async with asyncio.timeout(TIMEOUT_S):
                for _ in range(3):
                    proxy.target = start_engine(make_engine(gate=threading.Semaphore(0)))
                    greeting = client.info
                    proxy.cut()
                    await eventually(lambda greeting=greeting: client.info is not greeting)  # type: ignore[misc]
                async for _ in events:
                    pass
    record.fail(failed.value.kind.error_type)
    plan = operation_plan(record, "Generate", "m", time.monotonic())
    names = [event.name for event in plan.events]
    assert names[0] == "first_token"
    assert "engine_lost" in names
    assert [child.name for child in plan.children if child.error_type] == ["decode"]
    assert {child.error_type for child in plan.children} == {"", "generation"}


async def test_a_text_that_nobody_waits_for_ends_then(
    client: EngineClient, proxy: SocketProxy, start_engine: StartEngine
) -> None:
    await connect(client, proxy, start_engine(make_engine()))
    record: CallRecord = begin_record(None)
    async with aclosing(client.generate(make_request(max_new_tokens=150))) as outputs:
        await take(outputs, 2)
    (sequence,) = record.sequences
    assert sequence.ended is not None
    assert sequence.first_token is not None
    assert sequence.first_token <= sequence.ended <= time.monotonic()
