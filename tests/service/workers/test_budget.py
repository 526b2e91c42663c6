"""Bytes are held while they are worked on, and no more than allowed."""

from __future__ import annotations

import pytest

from service.errors import ErrorKind, ServiceError
from service.workers.budget import ByteBudget


def test_bytes_above_the_budget_are_refused_until_others_are_done() -> None:
    budget = ByteBudget(10)
    with budget.hold(6), budget.hold(4):
        with pytest.raises(ServiceError) as refused, budget.hold(1):
            pass
        assert refused.value.kind is ErrorKind.OVERLOADED
        assert budget.num_held == 10
    assert budget.num_held == 0
    with budget.hold(10):
        pass


def test_one_request_alone_may_have_any_size() -> None:
    budget = ByteBudget(10)
    with budget.hold(1000), pytest.raises(ServiceError), budget.hold(1):
        pass


def test_bytes_are_given_back_whatever_ends_the_block() -> None:
    budget = ByteBudget(10)
    with pytest.raises(ValueError, match="x"), budget.hold(5):
        raise ValueError("x")
    assert budget.num_held == 0


def test_bytes_may_be_taken_by_and_by() -> None:
    budget = ByteBudget(10)
    with budget.growing() as take, budget.growing() as other:
        take(4)
        take(5)
        with pytest.raises(ServiceError):
            other(2)
        other(1)
        assert budget.num_held == 10
    assert budget.num_held == 0
    with budget.growing() as take:
        take(9)
        take(1000)
