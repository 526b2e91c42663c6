"""`tokenwire envoy`: reads its settings when it starts, and lets calls end when told to end."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.envoy.fake_service import DEADLINE, FakeService, Messages
from tests.envoy.gateway import poll
from tests.envoy.lone_gateway import lone_gateway

SSE = "text/event-stream"


@pytest.fixture
def service() -> Iterator[FakeService]:
    service = FakeService(Messages())
    service.reset()
    yield service
    service.stop()


def hold_streams(service: FakeService) -> Any:
    """Makes streams send one event, and another when the gate is open that is returned."""
    gate = service.gate()
    events = [
        service.messages.reply("GenerateStream", b"data:%d\n\n" % number, content_type=SSE)
        for number in (1, 2)
    ]

    async def stream(_request: Any, _context: Any) -> AsyncIterator[Any]:
        yield events[0]
        await gate.wait()
        yield events[1]

    service.behave("GenerateStream", stream)
    return gate


def test_told_to_end_it_lets_calls_end_and_takes_no_others(
    service: FakeService, tmp_path: Path
) -> None:
    gate = hold_streams(service)
    with lone_gateway(service.port, tmp_path) as gateway:
        with gateway.client.stream("POST", "/generate_stream", json={"inputs": "x"}) as reply:
            chunks = reply.iter_text()
            assert next(chunks) == "data:1\n\n"
            gateway.process.send_signal(signal.SIGTERM)
            poll(gateway.is_closed, "the port is closed")
            assert gateway.process.poll() is None
            gate.open()
            assert "".join(chunks) == "data:2\n\n"
        assert gateway.process.wait(DEADLINE) == 0
        assert "calls have not ended" not in gateway.log.read_text()


@pytest.mark.parametrize("way", ["time", "signal"])
def test_calls_that_do_not_end_are_cut_when_the_time_is_over_or_a_second_signal_comes(
    service: FakeService, tmp_path: Path, way: str
) -> None:
    hold_streams(service)
    seconds = "0.2" if way == "time" else "1000"
    with lone_gateway(service.port, tmp_path, TOKENWIRE_DRAIN_SECONDS=seconds) as gateway:
        with gateway.client.stream("POST", "/generate_stream", json={"inputs": "x"}) as reply:
            chunks = reply.iter_text()  # when it is forgotten, the connection is closed
            next(chunks)
            gateway.process.send_signal(signal.SIGTERM)
            if way == "signal":
                poll(gateway.is_closed, "the port is closed")
                gateway.process.send_signal(signal.SIGTERM)
            assert gateway.process.wait(DEADLINE) == 0
        said = "1 calls have not ended within 0.2 s" in gateway.log.read_text()
        assert said == (way == "time")


def test_its_settings_come_from_the_environment(service: FakeService, tmp_path: Path) -> None:
    with lone_gateway(service.port, tmp_path, TOKENWIRE_MAX_REQUEST_BYTES="1000") as gateway:
        reply = gateway.client.post("/generate", json={"inputs": "x" * 1000})
        assert reply.status_code == 413


def test_it_ends_when_envoy_does_and_envoy_when_it_does(
    service: FakeService, tmp_path: Path
) -> None:
    with lone_gateway(service.port, tmp_path) as gateway:
        gateway.envoy().kill()
        assert gateway.process.wait(DEADLINE) not in (0, None)
    with lone_gateway(service.port, tmp_path) as gateway:
        envoy = gateway.envoy()
        gateway.process.kill()
        poll(lambda: not envoy.is_running() or envoy.status() == "zombie", "Envoy's end")
