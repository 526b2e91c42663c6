"""How many draft tokens are verified: as many as give more tokens per second."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.draft_lengths import draft_lengths

OFFERS = st.lists(st.tuples(st.floats(0.01, 0.99), st.integers(0, 3)), min_size=1, max_size=3)


def rate(
    offers: list[tuple[float, int]], lengths: tuple[int, ...], num_decoding: int, row_share: float
) -> float:
    """Expected tokens in the time of a step without draft tokens."""
    gains = [
        p**number
        for (p, _), length in zip(offers, lengths, strict=True)
        for number in range(1, length + 1)
    ]
    return (num_decoding + sum(gains)) / (1 + row_share * len(gains))


@given(OFFERS, st.integers(0, 5), st.floats(0, 1))
def test_no_other_lengths_give_more(
    offers: list[tuple[float, int]], num_others: int, row_share: float
) -> None:
    num_decoding = len(offers) + num_others
    lengths = tuple(draft_lengths(offers, num_decoding, row_share))
    every = itertools.product(*(range(most + 1) for _, most in offers))
    best = max(rate(offers, other, num_decoding, row_share) for other in every)
    assert rate(offers, lengths, num_decoding, row_share) == pytest.approx(best)


def test_rows_that_cost_nothing_are_all_used() -> None:
    assert draft_lengths([(0.01, 4), (0.9, 2), (0.5, 0)], 3, 0.0) == [4, 2, 0]


def test_where_a_row_costs_as_much_as_a_step_gives_nothing_is_drafted() -> None:
    assert draft_lengths([(0.9, 6)] * 8, 8, 1 / 8) == [0] * 8


def test_without_offers_there_are_no_lengths() -> None:
    assert draft_lengths([], 4, 0.1) == []
