"""A running service over a scripted engine, which must be idle after each test."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from service.api import rpc
from tests.service.api.harness import POOL, Service
from tests.service.fakes import serving


@pytest.fixture
async def service() -> AsyncGenerator[Service]:
    service = Service()
    async with serving(rpc.handlers(service.servicer, POOL), service.metrics) as channel:
        service.channel = channel
        yield service
        assert service.client.num_open == 0
        assert service.admission.num_active == 0
