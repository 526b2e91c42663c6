"""Messages in an order or of a form that a real engine does not send."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from engine.protocol import wire
from engine.protocol.request import EngineStats, FinishReason, SequenceOutput, StepOutput, Token
from service.generation.engine_client import EngineClient
from service.generation.tally import Tally
from tests.service.fakes import INFO, TIMEOUT_S, eventually
from tests.service.generation.engines import make_request


class Puppet:
    """An engine's socket whose messages the test writes itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = (
            asyncio.Queue()
        )
        self.server: asyncio.Server | None = None

    async def open(self) -> None:
        self.server = await asyncio.start_unix_server(
            lambda reader, writer: self.connections.put_nowait((reader, writer)), self.path
        )

    async def connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.connections.get()


@pytest.fixture
async def puppet(tmp_path: Path) -> AsyncGenerator[Puppet]:
    puppet = Puppet(tmp_path / "puppet.sock")
    await puppet.open()
    yield puppet
    assert puppet.server is not None
    puppet.server.close()


async def received(reader: asyncio.StreamReader) -> tuple[wire.Kind, list[object]]:
    """The next message of the client."""
    async with asyncio.timeout(TIMEOUT_S):
        (size,) = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
        return wire.parse(await reader.readexactly(size))


ENDED = StepOutput(
    outputs=(
        SequenceOutput(request_id="a", token=Token(5, -0.5), finish_reason=FinishReason.EOS_TOKEN),
    )
)


async def test_finished_requests_are_not_sent_to_a_new_engine(puppet: Puppet) -> None:
    client = EngineClient(puppet.path)
    client.start()
    reader, writer = await puppet.connection()
    writer.write(wire.ready(INFO))
    await client.ready()
    outputs = client.generate(make_request("a"))
    pending = asyncio.create_task(anext(outputs))
    await received(reader)
    # A first token for the reader, and the last one, which it has not asked for yet.
    first = SequenceOutput(request_id="a", token=Token(4, -0.5))
    writer.write(wire.step(StepOutput(outputs=(first,))))
    assert await pending == first
    writer.write(wire.step(ENDED))
    await eventually(lambda: client.last_step == ENDED)
    writer.close()
    reader, writer = await puppet.connection()
    again = StepOutput(stats=EngineStats(num_steps=7))
    writer.write(wire.ready(INFO) + wire.step(again))
    await eventually(lambda: client.last_step == again)
    other = asyncio.create_task(anext(client.generate(make_request("b"))))
    try:
        _, fields = await received(reader)
        assert fields[0] == "b"
    finally:
        other.cancel()
        await outputs.aclose()
        await client.close()
        writer.close()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(wire.frame(wire.Kind.STEP, 1)[4:], id="a step with too few fields"),
        pytest.param(b"\xc1", id="no msgpack"),
        pytest.param(b"\x91\x63", id="an unknown kind"),
        pytest.param(b"\x01", id="no list"),
        pytest.param(
            wire.frame(wire.Kind.READY, {"model": "newer"})[4:],
            id="another version's greeting",
        ),
    ],
)
async def test_an_unreadable_message_only_closes_the_connection(
    puppet: Puppet, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    client = EngineClient(puppet.path)
    client.start()
    _, writer = await puppet.connection()
    with caplog.at_level(logging.ERROR, "service.generation.engine_client"):
        writer.write(wire.HEADER.pack(len(body)) + body)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                _, second = await puppet.connections.get()
            second.write(wire.ready(INFO))
            async with asyncio.timeout(TIMEOUT_S):
                assert await client.ready() == INFO
            second.close()
        finally:
            writer.close()
            with suppress(TypeError):
                await client.close()
    assert "cannot be read" in caplog.text


async def test_only_another_engine_counts_as_a_restart(puppet: Puppet) -> None:
    client = EngineClient(puppet.path)
    restarts: list[str] = []
    client.on_restart.append(lambda _: restarts.append("restart"))
    client.start()
    for number, instance in enumerate(["first", "first", "second", "third"]):
        _, writer = await puppet.connection()
        step = StepOutput(stats=EngineStats(num_steps=number + 1))
        writer.write(wire.ready(replace(INFO, instance=instance)) + wire.step(step))
        await eventually(lambda step=step: client.last_step == step)
        writer.close()
    assert len(restarts) == 2
    await client.close()


async def test_a_step_is_tallied_for_the_requests_of_this_client(puppet: Puppet) -> None:
    client = EngineClient(puppet.path)
    tallies: list[Tally] = []
    client.on_tally.append(tallies.append)
    client.start()
    _, writer = await puppet.connection()
    writer.write(wire.ready(INFO))
    await client.ready()
    outputs = client.generate(make_request("a"))
    pending = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    token = SequenceOutput("a", Token(4, -0.5), first_scheduled=True, num_cached_tokens=8)
    others = token._replace(request_id="nobody's")
    writer.write(wire.step(StepOutput(outputs=(token, others))) + wire.step(StepOutput()))
    await pending
    writer.write(wire.step(ENDED))
    await eventually(lambda: len(tallies) == 2)
    first, last = tallies
    assert (first.num_tokens, first.num_prompt_tokens, first.num_cached_tokens) == (1, 13, 8)
    assert len(first.first) == 1
    assert first.previous == {}
    assert (last.num_tokens, last.num_prompt_tokens) == (1, 0)
    assert last.previous == {first.now: 1}
    await outputs.aclose()
    await client.close()
    writer.close()
