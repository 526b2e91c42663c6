"""Small requests are read at once, and no large one makes those of middle size wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from service.errors import ErrorKind, ServiceError
from service.workers.lanes import LARGE_BYTES, Lanes

SMALL, MIDDLE, LARGE = 10, 1000, LARGE_BYTES + 1


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes(3 * LARGE)
    yield made
    made.close()


async def test_small_requests_are_read_on_the_event_loop(lanes: Lanes) -> None:
    assert await lanes.run(SMALL, SMALL, threading.get_ident) == threading.get_ident()
    assert await lanes.run(MIDDLE, SMALL, threading.get_ident) != threading.get_ident()


async def test_requests_of_middle_size_do_not_wait_for_a_large_one(lanes: Lanes) -> None:
    gate = threading.Event()
    large = asyncio.create_task(lanes.run(LARGE, SMALL, gate.wait))
    assert await lanes.run(MIDDLE, SMALL, int, "7") == 7
    assert not large.done()
    gate.set()
    assert await large


async def test_large_ones_wait_for_each_other_up_to_a_number_of_bytes(lanes: Lanes) -> None:
    gate = threading.Event()
    waiting = [asyncio.create_task(lanes.run(LARGE, SMALL, gate.wait)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(ServiceError) as refused:
        await lanes.run(LARGE, SMALL, gate.wait)
    assert refused.value.kind is ErrorKind.OVERLOADED
    assert await lanes.run(MIDDLE, SMALL, int, "7") == 7
    gate.set()
    assert await asyncio.gather(*waiting) == [True] * 3


async def test_a_failure_is_the_callers(lanes: Lanes) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        await lanes.run(LARGE, SMALL, int, "x")
