"""What several folders of these tests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from tests.service.fakes import eventually


@pytest.fixture
async def no_task_left() -> AsyncGenerator[None]:
    """Fails a test after which a task goes on; gRPC's own end some turns after their call."""
    yield
    await eventually(lambda: asyncio.all_tasks() <= {asyncio.current_task()})
