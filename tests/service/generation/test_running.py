"""Calls are ended by their id: all of that id, and where callers are known only one's own."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from service.call_record import CallRecord, begin_record
from service.generation.running import RunningCall, RunningCalls


def as_call(request_id: str, caller: str, function: Callable[[], Any]) -> Any:
    """What a function returns inside a call."""

    def run() -> Any:
        begin_record(request_id, caller)
        return function()

    return contextvars.copy_context().run(run)


class Ended:
    """The calls that the engine was told to end, and some generations that run."""

    def __init__(self, *, own_only: bool = False) -> None:
        self.records: list[CallRecord] = []
        self.running = RunningCalls(self.records.append, own_only=own_only)
        self.inside = ExitStack()

    def enter(self, request_id: str, caller: str = "") -> RunningCall:
        return as_call(
            request_id, caller, lambda: self.inside.enter_context(self.running.entered())
        )

    def abort(self, request_id: str, caller: str = "") -> int:
        return as_call("the-abort", caller, lambda: self.running.abort(request_id, caller))


def test_what_is_not_with_the_engine_yet_is_ended_as_well() -> None:
    ended = Ended()
    first, second, other = ended.enter("a"), ended.enter("a"), ended.enter("b")
    assert ended.abort("a") == 2
    assert [call.record.is_aborted for call in (first, second, other)] == [True, True, False]
    assert {record.request_id for record in ended.records} == {"a"}


def test_generations_that_have_ended_are_forgotten() -> None:
    ended = Ended()

    def whole() -> None:
        with ended.running.entered():
            pass

    as_call("a", "", whole)
    assert ended.abort("a") == 0
    assert ended.records == []


@pytest.mark.parametrize(("own_only", "num_ended"), [(True, 1), (False, 2)])
def test_where_callers_are_known_they_end_only_their_own_calls(
    own_only: bool, num_ended: int
) -> None:
    ended = Ended(own_only=own_only)
    mine, theirs = ended.enter("a", "me"), ended.enter("a", "them")
    assert ended.abort("a", "me") == num_ended
    assert mine.record.is_aborted
    assert theirs.record.is_aborted is not own_only
