"""The calls that generate, so that they can be ended by their id."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..call_record import current_record
from ..errors import cancelled


class RunningCall:
    """One generation of a call."""

    def __init__(self) -> None:
        self._is_aborted = False

    def abort(self) -> None:
        """Marks it as aborted."""
        self._is_aborted = True

    def check(self) -> None:
        """To be called before it goes to the engine.

        Raises:
            ServiceError: it was aborted.
        """
        if self._is_aborted:
            raise cancelled()


class RunningCalls:
    """All generations of all calls. Several calls may have one id, and a call several generations.

    Args:
        abort: ends those of an id that the engine computes.
    """

    def __init__(self, abort: Callable[[str], None]) -> None:
        self._abort = abort
        self._calls: defaultdict[str, list[RunningCall]] = defaultdict(list)

    @contextmanager
    def entered(self) -> Iterator[RunningCall]:
        """Holds a generation of the current call."""
        record = current_record()
        call_id = "" if record is None else record.request_id
        call = RunningCall()
        self._calls[call_id].append(call)
        try:
            yield call
        finally:
            self._calls[call_id].remove(call)
            if not self._calls[call_id]:
                del self._calls[call_id]

    def abort(self, call_id: str) -> int:
        """Ends the generations of an id; returns how many there were."""
        calls = list(self._calls.get(call_id, ()))
        for call in calls:
            call.abort()
        self._abort(call_id)
        return len(calls)
