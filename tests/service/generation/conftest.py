"""Engines in threads, a proxy to them, and a client of the proxy."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.server import EngineServer
from service.generation.engine_client import EngineClient
from tests.service.fakes import INFO, TIMEOUT_S
from tests.service.generation.engines import SocketProxy, StartEngine


@pytest.fixture
def start_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartEngine]:
    """Serves an engine in a thread; returns the path of its socket."""
    monkeypatch.setattr("engine.server._IDLE_STEP_S", 0.01)
    running: list[tuple[EngineServer, threading.Thread, Engine]] = []

    def start(engine: Engine) -> Path:
        path = tmp_path / f"engine{len(running)}.sock"
        server = EngineServer(engine, INFO, path)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread, engine))
        return path

    yield start
    for server, thread, engine in running:
        server.stop()
        gate = engine._executor._forward.gate  # type: ignore[attr-defined]
        if gate is not None:
            gate.release(1000)
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


@pytest.fixture
async def proxy(tmp_path: Path, start_engine: StartEngine) -> AsyncGenerator[SocketProxy]:
    """A proxy to engines, which is closed before they are."""
    proxy = SocketProxy(tmp_path / "proxy.sock")
    await proxy.open()
    yield proxy
    await proxy.close()


@pytest.fixture
async def client(proxy: SocketProxy) -> AsyncGenerator[EngineClient]:
    """A client of the proxy's current engine."""
    client = EngineClient(proxy.path)
    yield client
    await client.close()
