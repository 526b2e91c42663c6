"""Callers take turns, and no place is lost whoever goes away."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from service.call_record import begin_record
from service.workers.turns import Turns


class Room:
    """Callers in one place after the other; notes who held it."""

    def __init__(self, num_places: int = 1) -> None:
        self.turns = Turns(num_places)
        self.held: list[str] = []
        self.num_inside = self.most_inside = 0

    async def visit(self, caller: str) -> None:
        begin_record(None, caller)
        async with self.turns.place():
            self.held.append(caller)
            self.num_inside += 1
            self.most_inside = max(self.most_inside, self.num_inside)
            try:
                await asyncio.sleep(0)
            finally:
                self.num_inside -= 1


async def test_a_caller_with_one_request_does_not_wait_for_all_of_another_one() -> None:
    room = Room()
    await asyncio.gather(*(room.visit(caller) for caller in 6 * "a" + "b" + "c"))
    assert "".join(room.held) == "aabcaaaa"


async def test_requests_of_one_caller_are_taken_in_their_order() -> None:
    turns, held = Turns(1), []

    async def visit(number: int) -> None:
        async with turns.place():
            held.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*map(visit, range(5)))
    assert held == [0, 1, 2, 3, 4]


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), min_size=1, max_size=20),
)
def test_no_place_is_lost_when_waiting_requests_are_cancelled(
    num_places: int, visits: list[tuple[str, int]]
) -> None:
    async def check() -> None:
        room = Room(num_places)
        tasks = []
        for caller, patience in visits:
            task = asyncio.create_task(room.visit(caller))
            tasks.append((task, patience))
        for step in range(13):
            for task, patience in tasks:
                if patience == step:
                    task.cancel()
            await asyncio.sleep(0)
        for task, _ in tasks:
            with suppress(asyncio.CancelledError):
                await task
        assert room.most_inside <= num_places
        async with asyncio.timeout(60):
            await asyncio.gather(*(room.visit("last") for _ in range(num_places)))
        assert room.most_inside <= num_places

    asyncio.run(check())
