"""A checker with one worker process, and a record of its trials."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from service.grammar import checker as module
from service.grammar.checker import GrammarChecker
from service.workers.process import WorkerProcess
from tests.service.fakes import TIMEOUT_S
from tests.service.grammar.checking import checking


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """No grammar counts as slow, however busy this machine is."""
    monkeypatch.setattr(module, "_SOON_S", TIMEOUT_S)


@pytest.fixture
async def checker() -> AsyncGenerator[GrammarChecker]:
    """A checker with one process, and all the time that a busy machine may need."""
    async with checking() as checker:
        yield checker


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every grammar that is given to a process, in order."""
    seen: list[bytes] = []
    ask = WorkerProcess.ask

    async def spy(self: Any, request: bytes, deadline_s: float) -> dict[str, str]:
        seen.append(request)
        return await ask(self, request, deadline_s)

    monkeypatch.setattr(WorkerProcess, "ask", spy)
    return seen
