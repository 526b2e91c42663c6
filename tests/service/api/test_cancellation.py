"""A call that is cancelled or reaches its deadline ends its work in the engine."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc import aio

from service.routes import SERVICE
from tests.service.api.harness import STREAMS, Service, generate_request, streamed
from tests.service.fakes import TIMEOUT_S, demo_ids, eventually, script, step


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("rest", [False, True], ids=["grpc", "rest"])
async def test_a_cancelled_stream_is_aborted_in_the_engine(
    service: Service, name: str, rest: bool
) -> None:
    service.use_script(script(step(demo_ids("x")[0]), asyncio.Event()))
    call = service.call(name, streamed(name), rest=rest)
    async with asyncio.timeout(TIMEOUT_S):
        await call.read()
    assert service.client.num_open == 1
    call.cancel()
    await eventually(service.is_idle)
    assert service.client.num_aborted == 1


async def test_a_deadline_ends_the_work_in_the_engine(service: Service) -> None:
    service.use_script(script(asyncio.Event()))
    call = service.channel.unary_unary(f"/{SERVICE}/Generate", bytes)
    with pytest.raises(aio.AioRpcError) as failed:
        await call(generate_request({}), timeout=0.2)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(service.is_idle)
