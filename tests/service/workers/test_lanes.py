"""Small requests are read at once, and no large one makes those of middle size wait."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator

import pytest

from service.errors import ErrorKind, ServiceError
from service.workers.lanes import LARGE_BYTES, Lanes

DEADLINE_S = 60.0
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


async def test_what_a_failed_large_request_took_is_freed_soon(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.workers.heap._SOON_S", 0.0)
    freed = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Body:
        """What a request took."""

    def refuse(body: Body) -> None:
        error = ValueError("refused")
        body.error = error  # type: ignore[attr-defined]  # they hold each other through the frame
        raise error

    body = Body()
    weakref.finalize(body, loop.call_soon_threadsafe, freed.set)
    with pytest.raises(ValueError, match="refused"):
        await lanes.run(LARGE, SMALL, refuse, body)
    del body
    await asyncio.wait_for(freed.wait(), DEADLINE_S)


async def test_large_requests_are_read_at_a_bounded_rate(
    lanes: Lanes, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[float] = []
    sleep = asyncio.sleep

    async def noted(delay: float) -> None:
        delays.append(delay)
        await sleep(0)

    monkeypatch.setattr("service.workers.lanes.asyncio.sleep", noted)
    num_bytes = 1000 * LARGE  # for seconds
    for _ in range(2):
        await lanes.run(num_bytes, SMALL, int)
    first, second = delays
    assert first <= 0 < second <= num_bytes / 20e6
    await lanes.run_read(num_bytes, SMALL, int)  # what was read has waited already
    await lanes.run(MIDDLE, SMALL, int)
    assert len(delays) == 2
