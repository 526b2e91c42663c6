"""Fixtures of the engine's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.fakes import RUNS_AHEAD
from tests.engine.native import threads
from tests.engine.sockets import Serve, running_servers


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Computes with one thread: for small models the synchronisation of threads takes longer."""
    with threads(1):
        yield


@pytest.fixture(params=[False, True], ids=["step by step", "running ahead"])
def runs_ahead(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Runs a test with engines that wait for a step's tokens and with engines that run ahead."""
    token = RUNS_AHEAD.set(request.param)
    yield request.param
    RUNS_AHEAD.reset(token)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where an engine's server listens."""
    return tmp_path / "run" / "engine.sock"


@pytest.fixture
def serve(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts servers on it."""
    with running_servers(path, monkeypatch) as start:
        yield start
