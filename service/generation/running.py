"""The calls that generate, so that they can be ended by their id."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..call_record import CallRecord, current_record


class RunningCall:
    """One generation of a call.

    Args:
        record: the call's, by which all its generations are known.
    """

    def __init__(self, record: CallRecord) -> None:
        self.record = record


class RunningCalls:
    """All generations of all calls. Several calls may have one id, and a call several generations.

    Args:
        abort: ends those of a call that the engine computes.
        own_only: whether callers can end only calls of their own. For servers that ask for keys:
            on others anybody can call himself anything.
    """

    def __init__(self, abort: Callable[[CallRecord], None], *, own_only: bool = False) -> None:
        self._abort = abort
        self._own_only = own_only
        self._calls: list[RunningCall] = []

    @contextmanager
    def entered(self) -> Iterator[RunningCall]:
        """Holds a generation of the current call, until it is complete."""
        call = RunningCall(current_record() or CallRecord(""))
        self._calls.append(call)
        try:
            yield call
        finally:
            self._calls.remove(call)

    def abort(self, request_id: str, caller: str | None) -> int:
        """Ends the generations of the calls that have an id; returns how many there were.

        Args:
            request_id: the calls' id.
            caller: who asks for that, if it is known.
        """
        found = [
            call
            for call in self._calls
            if call.record.request_id == request_id
            and not (self._own_only and caller != call.record.caller)
        ]
        for record in {id(call.record): call.record for call in found}.values():
            record.is_aborted = True
            self._abort(record)
        return len(found)
