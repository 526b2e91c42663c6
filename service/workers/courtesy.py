"""Threads that compute while the event loop waits, and let it go first when it does not.

All threads of a process share the interpreter's lock. A thread that computes gets it as often as
the loop does, so beside it a turn of the loop takes twice as long, and waits after each call of
gRPC.
"""

from __future__ import annotations

import selectors
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")
_LOOK_S = 0.0001  # between two looks whether the loop is idle
_MAX_LOOKS = 20  # then the thread gets on all the same: the loop may be busy all the time
_TURN_S = 0.0003  # of work between two waits: else many short parts would wait for each of them


class _Turn(threading.local):
    """A thread's turn: since when it works without having given way."""

    since = 0.0


_turn = _Turn()


class _Loop:
    """The process's event loop, as its selector knows it: where there is none, it is idle."""

    is_idle = True
    thread = 0


class IdleSelector(selectors.DefaultSelector):
    """A selector for an event loop that tells threads when it has nothing to do."""

    def select(self, timeout: float | None = None) -> Any:
        """See selectors."""
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        _Loop.thread = threading.get_ident()
        _Loop.is_idle = True
        try:
            return super().select(timeout)
        finally:
            _Loop.is_idle = False

    def close(self) -> None:
        """See selectors."""
        _Loop.is_idle = True
        super().close()


def give_way() -> None:
    """Between two parts of a thread's work: waits until the loop is idle, but not for long.

    A thread whose turn has just begun does not wait, nor does the loop itself. So beside a loop
    that never rests a thread works an eighth of the time.
    """
    if time.perf_counter() - _turn.since < _TURN_S:
        return
    for _ in range(_MAX_LOOKS):
        if _Loop.is_idle or threading.get_ident() == _Loop.thread:
            break
        time.sleep(_LOOK_S)
    _turn.since = time.perf_counter()


def giving_way(items: Iterable[_T]) -> Iterator[_T]:
    """The same items, giving way between them."""
    for item in items:
        give_way()
        yield item
