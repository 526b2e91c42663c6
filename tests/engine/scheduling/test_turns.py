"""Callers take turns by the tokens computed for them, and nobody saves turns up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.turns import Turns


def test_a_caller_that_comes_back_starts_with_the_least_served_of_the_others() -> None:
    turns = Turns()
    turns.enter("early")
    turns.enter("busy")
    turns.charge("early", 100)
    turns.charge("busy", 900)
    turns.enter("late")
    assert turns.served("late") == 100


def test_being_alone_costs_nothing_later() -> None:
    turns = Turns()
    turns.enter("alone")
    turns.charge("alone", 10_000)
    turns.leave("alone")
    turns.enter("next")
    turns.enter("alone")
    assert turns.served("next") == turns.served("alone") == 10_000


def test_a_caller_that_leaves_for_a_moment_keeps_its_count() -> None:
    turns = Turns()
    turns.enter("greedy")
    turns.enter("modest")
    turns.charge("greedy", 50)
    turns.leave("greedy")
    turns.enter("greedy")
    assert (turns.served("greedy"), turns.served("modest")) == (50, 0)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 50))))
def test_the_memory_for_callers_is_bounded(calls: list[tuple[int, int]]) -> None:
    turns = Turns()
    for name, num_tokens in [*calls, *((name, 1) for name in range(5000))]:
        turns.enter(str(name))
        turns.charge(str(name), num_tokens)
        turns.leave(str(name))
    assert len(turns._served) <= 4096
    assert not turns._present


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 64)), min_size=1, max_size=60))
def test_callers_that_always_have_work_get_the_same(sizes: list[tuple[str, int]]) -> None:
    """Whoever is next gets a piece of work: no two are further apart than a piece."""
    turns = Turns()
    for caller in "abc":
        turns.enter(caller)
    for _, size in sizes:
        turns.charge(min("abc", key=turns.served), size)
    served = [turns.served(caller) for caller in "abc"]
    assert max(served) - min(served) <= 64


def test_one_caller_alone_shares_with_nobody() -> None:
    turns = Turns()
    turns.enter("a")
    turns.enter("a")
    turns.leave("a")
    assert not turns.are_shared


def test_turns_are_shared_while_another_caller_is_there_and_for_a_while_after() -> None:
    turns = Turns()
    turns.enter("a")
    turns.enter("b")
    assert turns.are_shared
    turns.leave("b")
    steps = 0
    while turns.are_shared:
        turns.step()
        steps += 1
    assert 16 < steps < 1024
    turns.enter("b")
    assert turns.are_shared


def test_a_caller_that_comes_back_is_not_another_one() -> None:
    turns = Turns()
    for _ in range(3):
        turns.enter("a")
        assert not turns.are_shared
        turns.leave("a")
    turns.enter("b")
    assert turns.are_shared
