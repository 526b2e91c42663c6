"""What several folders of these tests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest


@pytest.fixture
async def no_task_left() -> AsyncGenerator[None]:
    """Fails a test after which a task is still running."""
    yield
    assert asyncio.all_tasks() <= {asyncio.current_task()}
