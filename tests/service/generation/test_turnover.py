"""When to come again: as long as it takes until enough requests have ended, at this rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.generation.turnover import Turnover


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("ends", "count", "seconds"),
    [(10, 1, 1), (10, 4, 4), (5, 1, 2), (1, 1, 10), (1, 9, 60), (0, 1, 10)],
)
def test_the_rate_of_the_last_seconds_says_when(ends: int, count: int, seconds: int) -> None:
    clock = Clock()
    turnover = Turnover(clock)
    clock.now = 10.0
    for _ in range(ends):
        turnover.note_end()
    assert turnover.seconds_for(count) == seconds


def test_processes_that_share_the_load_end_as_many() -> None:
    clock = Clock()
    turnover = Turnover(clock, num_alike=4)
    clock.now = 12.0
    for _ in range(3):
        turnover.note_end()
    assert turnover.seconds_for(2) == 2


def test_a_server_that_has_just_begun_says_one_second() -> None:
    assert Turnover(Clock()).seconds_for(100) == 1


def test_old_ends_do_not_count() -> None:
    clock = Clock()
    turnover = Turnover(clock)
    for _ in range(1000):
        turnover.note_end()
    clock.now = 100.0
    turnover.note_end()
    assert turnover.seconds_for(1) == 30


@given(st.lists(st.floats(0, 100), max_size=30), st.integers(1, 1000))
def test_it_is_always_a_minute_at_most(gaps: list[float], count: int) -> None:
    clock = Clock()
    turnover = Turnover(clock)
    for gap in gaps:
        clock.now += gap
        turnover.note_end()
    assert 1 <= turnover.seconds_for(count) <= 60
