"""A caller that stops to read holds no permit for long, and its stream ends with an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import grpc
import h2.events
import pytest

from engine.protocol.request import FinishReason
from service.api import call
from service.errors import ServiceError, slow_reader
from service.pb.google.api import HttpBody
from service.pb.tokenwire import v1 as pb
from service.routes import SERVICE
from tests.raw_http2 import RawConnection, raw_connection
from tests.service.api.harness import REST, Service
from tests.service.fakes import (
    TIMEOUT_S,
    demo_ids,
    eventually,
    listening,
    script,
    step,
)

WINDOW = 256  # bytes: a few messages
PATH = f"/{SERVICE}/GenerateStream"
REQUEST = bytes(pb.GenerateRequest(inputs="a", parameters=pb.GenerateParameters()))
BODY = bytes(pb.GenerateRequest(http=HttpBody(data=b'{"inputs": "a", "parameters": {}}')))
NUM_TOKENS = 40
LIMIT_S = 0.2


@pytest.fixture
async def service(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Service]:
    """Its engine has everything ready at once."""
    monkeypatch.setattr(call, "MAX_UNREAD_S", LIMIT_S)
    service = Service()
    word = demo_ids("x")[0]
    steps = [step(word) for _ in range(NUM_TOKENS)]
    service.use_script(script(*steps, step(word, finish=FinishReason.LENGTH)))
    yield service
    await eventually(service.is_idle)


@pytest.fixture
def given_up(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Whether the service waits no longer for the caller."""
    event = asyncio.Event()

    def noted(seconds: float) -> ServiceError:
        event.set()
        return slow_reader(seconds)

    monkeypatch.setattr(call, "slow_reader", noted)
    return event


@pytest.fixture(params=[False, True], ids=["grpc", "rest"])
def is_rest(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
async def stalled(service: Service, is_rest: bool) -> AsyncGenerator[tuple[RawConnection, int]]:
    """A stream of which a caller has read the first bytes and no more."""
    handlers = service.handlers(from_gateway=is_rest)
    async with (
        listening(handlers, service.metrics, from_gateway=is_rest) as port,
        raw_connection(port, WINDOW) as connection,
    ):
        fields = REST if is_rest else []
        stream_id = connection.grpc(PATH, BODY if is_rest else REQUEST, fields)
        yield connection, stream_id


async def test_no_permit_is_held_once_the_engine_is_done(
    service: Service, stalled: tuple[RawConnection, int]
) -> None:
    connection, _ = stalled
    async with asyncio.timeout(TIMEOUT_S):
        await connection.of(h2.events.DataReceived)
        await eventually(lambda: service.admission.num_active == 0)


async def test_a_stream_that_is_not_read_never_ends_well(
    given_up: asyncio.Event, is_rest: bool, stalled: tuple[RawConnection, int]
) -> None:
    connection, stream_id = stalled
    async with asyncio.timeout(TIMEOUT_S):
        await connection.of(h2.events.DataReceived)
        await given_up.wait()
        connection.read_on(stream_id, 1_000_000)
        trailers = dict((await connection.of(h2.events.TrailersReceived)).headers or ())
    body = connection.data(stream_id)
    if is_rest:
        assert trailers["grpc-status"] == "0"
        text = b"the stream was not read for more than 0.2 s"
        assert body.endswith(b'data: {"error":"%s","error_type":"slow_reader"}\n\n' % text)
    else:
        assert trailers["grpc-status"] == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
