"""Permits: a fixed number of them, always returned, none granted after closing."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from contextvars import copy_context

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.call_record import begin_record
from service.errors import ErrorKind, ServiceError
from service.generation.admission import Admission


def kind_of_refusal(admission: Admission, count: int = 1) -> ErrorKind:
    with pytest.raises(ServiceError) as refused, admission.permit(count):
        pass
    return refused.value.kind


def test_requests_above_the_limit_are_refused() -> None:
    admission = Admission(2)
    with ExitStack() as inside:
        inside.enter_context(admission.permit())
        inside.enter_context(admission.permit())
        assert admission.num_active == 2
        assert kind_of_refusal(admission) is ErrorKind.OVERLOADED
        assert admission.num_active == 2
    assert admission.num_active == 0


def test_several_permits_are_granted_together_or_not_at_all() -> None:
    admission = Admission(3)
    with admission.permit(2):
        assert admission.num_active == 2
        assert kind_of_refusal(admission, 2) is ErrorKind.OVERLOADED
        with admission.permit(1):
            assert admission.num_active == 3
    assert kind_of_refusal(admission, 4) is ErrorKind.OVERLOADED


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, GeneratorExit])
def test_a_permit_is_returned_whatever_ends_the_block(error: type[BaseException]) -> None:
    admission = Admission(1)
    with pytest.raises(error), admission.permit():
        raise error
    assert admission.num_active == 0


def test_after_closing_new_permits_are_refused_and_held_ones_stay() -> None:
    admission = Admission(2)
    with admission.permit():
        admission.close()
        assert admission.num_active == 1
        assert kind_of_refusal(admission) is ErrorKind.UNHEALTHY
    assert admission.num_active == 0


async def test_one_caller_cannot_hold_all_permits() -> None:
    admission = Admission(4, max_per_caller=2)
    begin_record(None, "greedy")
    with admission.permit(2):
        text = "one caller may have 2 requests at a time"
        with pytest.raises(ServiceError, match=text), admission.permit():
            pass
        begin_record(None, "modest")
        with admission.permit(), admission.permit():
            assert admission.num_active == 4
            assert kind_of_refusal(admission) is ErrorKind.OVERLOADED
        begin_record(None, "greedy")
    with admission.permit(2):
        assert admission.num_active == 2


async def test_a_caller_gets_its_share_though_another_holds_all_permits() -> None:
    admission = Admission(4)
    begin_record(None, "greedy")
    with admission.permit(4):
        assert kind_of_refusal(admission) is ErrorKind.OVERLOADED
        begin_record(None, "modest")
        with admission.permit(), admission.permit():
            assert kind_of_refusal(admission) is ErrorKind.OVERLOADED, "half of them is its share"
            begin_record(None, "third")
            assert kind_of_refusal(admission, 2) is ErrorKind.OVERLOADED
            with admission.permit():
                assert admission.num_active == 7


@given(st.integers(1, 8), st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), max_size=40))
def test_never_are_more_than_twice_as_many_held(limit: int, asked: list[tuple[int, int]]) -> None:
    admission = Admission(limit)
    with ExitStack() as inside:

        def ask(caller: int, count: int) -> None:
            begin_record(None, f"caller {caller}")
            with suppress(ServiceError):
                inside.enter_context(admission.permit(count))

        for caller, count in asked:
            copy_context().run(ask, caller, count)
        assert admission.num_active <= 2 * limit
    assert admission.num_active == 0


async def test_a_limit_of_one_is_one() -> None:
    admission = Admission(1)
    begin_record(None, "first")
    with admission.permit():
        begin_record(None, "second")
        assert kind_of_refusal(admission) is ErrorKind.OVERLOADED


async def test_permits_go_back_to_whom_they_were_given() -> None:
    admission = Admission(4, max_per_caller=1)
    begin_record(None, "first")
    with admission.permit():
        begin_record(None, "second")  # whoever the task works for by then
    with admission.permit():
        begin_record(None, "first")
        with admission.permit() as permit:
            permit.release()
            permit.release()
            assert admission.num_active == 1


def test_a_refusal_says_when_to_come_again() -> None:
    admission = Admission(1)
    with admission.permit(), pytest.raises(ServiceError) as refused, admission.permit():
        pass
    assert refused.value.retry_after_s == 1
