"""A running service over a scripted engine, which must be idle after each test."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from tests.service.api.harness import Service
from tests.service.fakes import eventually


@pytest.fixture
async def service() -> AsyncGenerator[Service]:
    async with Service().running() as service:
        yield service
        await eventually(service.is_idle)
