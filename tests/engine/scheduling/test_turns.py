"""Callers take turns by the tokens computed for them, and nobody saves turns up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.turns import Turns


def test_a_caller_that_comes_back_starts_with_the_least_served_of_the_others() -> None:
    turns = Turns()
    turns.enter("early", 1)
    turns.enter("busy", 1)
    turns.charge("early", 100)
    turns.charge("busy", 900)
    turns.enter("late", 1)
    assert turns.served("late") == 99  # it is next


def test_being_alone_costs_nothing_later() -> None:
    turns = Turns()
    turns.enter("alone", 1)
    turns.charge("alone", 10_000)
    turns.leave("alone")
    turns.enter("next", 1)
    turns.enter("alone", 1)
    assert (turns.served("next"), turns.served("alone")) == (9_999, 10_000)


def test_a_caller_that_leaves_for_a_moment_keeps_its_count() -> None:
    turns = Turns()
    turns.enter("greedy", 1)
    turns.enter("modest", 1)
    turns.charge("greedy", 50)
    turns.leave("greedy")
    turns.enter("greedy", 1)
    assert (turns.served("greedy"), turns.served("modest")) == (50, 0)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 50))))
def test_the_memory_for_callers_is_bounded(calls: list[tuple[int, int]]) -> None:
    turns = Turns()
    for name, num_tokens in [*calls, *((name, 1) for name in range(5000))]:
        turns.enter(str(name), 1)
        turns.charge(str(name), num_tokens)
        turns.leave(str(name))
    assert len(turns._served) <= 4096
    assert not turns._present


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 64)), min_size=1, max_size=60))
def test_callers_that_always_have_work_get_the_same(sizes: list[tuple[str, int]]) -> None:
    """Whoever is next gets a piece of work: no two are further apart than a piece."""
    turns = Turns()
    for caller in "abc":
        turns.enter(caller, 1)
    for _, size in sizes:
        turns.charge(min("abc", key=turns.served), size)
    served = [turns.served(caller) for caller in "abc"]
    assert max(served) - min(served) <= 64


def test_one_caller_alone_shares_with_nobody() -> None:
    turns = Turns()
    turns.enter("a", 1)
    turns.enter("a", 1)
    turns.leave("a")
    assert turns.least_asked is None


def test_turns_are_shared_while_another_caller_is_there_and_for_a_while_after() -> None:
    turns = Turns()
    turns.enter("a", 1)
    turns.enter("b", 1)
    assert turns.least_asked == 1
    turns.leave("b")
    steps = 0
    while turns.least_asked is not None:
        turns.step()
        steps += 1
    assert 16 < steps < 1024
    turns.enter("b", 1)
    assert turns.least_asked == 1


def test_a_caller_that_comes_back_is_not_another_one() -> None:
    turns = Turns()
    for _ in range(3):
        turns.enter("a", 1)
        assert turns.least_asked is None
        turns.leave("a")
    turns.enter("b", 1)
    assert turns.least_asked == 1


def test_the_shortest_of_the_last_prompts_counts() -> None:
    turns = Turns()
    turns.enter("a", 5)
    turns.enter("b", 400)
    turns.enter("c", 90)
    assert turns.least_asked == 5
    turns.enter("a", 200)
    assert turns.least_asked == 90
