"""A service to call, at an address, and the client package of this checkout."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import pytest

from tests.paths import REPOSITORY

CLIENT = REPOSITORY / "clients" / "python"
sys.path.insert(0, str(CLIENT / "src"))  # before any client that is installed

from tests.service.api.harness import Service  # noqa: E402
from tests.service.fakes import ADMINS, eventually, listening  # noqa: E402


@dataclass
class Served:
    """A service over a scripted engine, and where it listens."""

    service: Service
    address: str


@pytest.fixture
async def served() -> AsyncGenerator[Served]:
    service = Service()
    handlers = service.handlers()
    async with listening(handlers, service.metrics, authenticator=ADMINS) as port:
        yield Served(service, f"127.0.0.1:{port}")
    await eventually(service.is_idle)
