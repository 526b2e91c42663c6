"""Limits how many generations run at a time. A request above the limit is refused at once.

One caller may hold all permits while nobody else asks. Another one then still gets its share of
them, beyond the limit, so that nobody waits for the greedy one's requests to end.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ..call_record import current_record
from ..errors import overloaded, unhealthy
from .turnover import Turnover


class Shared(Protocol):
    """Permits that several service processes count together."""

    @property
    def num_processes(self) -> int:
        """How many there are."""

    def publish(self, held: Mapping[str, int]) -> None:
        """Shows the others what this process holds, by the caller."""

    def elsewhere(self) -> Counter[str]:
        """What the others hold."""


class Admission:
    """A fixed number of permits, one per generation.

    It is used from one event loop only, so it needs no lock.

    Args:
        max_concurrent_requests: of all callers; at most twice as many where callers get their
            share after others took more than theirs.
        max_per_caller: of these, of one caller; None sets no bound of its own.
        shared: what other service processes hold, which counts as well.
    """

    def __init__(
        self,
        max_concurrent_requests: int,
        max_per_caller: int | None = None,
        shared: Shared | None = None,
    ) -> None:
        self._max = max_concurrent_requests
        self._max_per_caller = max_per_caller or max_concurrent_requests
        self._held: Counter[str] = Counter()
        self._shared = shared
        self._turnover = Turnover(num_alike=1 if shared is None else shared.num_processes)
        self._closed = asyncio.Event()

    @property
    def num_active(self) -> int:
        """Permits that this process has given."""
        return self._held.total()

    @contextmanager
    def permit(self, count: int = 1) -> Iterator[Permit]:
        """Holds `count` permits, until the end or until they are released before it.

        Raises:
            ServiceError: there are not so many left, for this caller or at all, or the server is
                shutting down.
        """
        self.check_open()
        record = current_record()
        caller = "" if record is None else record.caller
        self._check(caller, count)
        permit = Permit(self, caller, count)
        self._held[caller] += count
        self._publish()
        try:
            yield permit
        finally:
            permit.release()

    def retry_after_s(self, count: int = 1) -> int:
        """In how many seconds so many requests will have ended, at the present rate."""
        return self._turnover.seconds_for(count)

    def close(self) -> None:
        """Refuses all further permits; those held already stay valid."""
        self._closed.set()

    def check_open(self) -> None:
        """Checks that permits are given at all.

        Raises:
            ServiceError: the server is shutting down.
        """
        if self._closed.is_set():
            raise unhealthy()

    async def closed(self) -> None:
        """Returns once further permits are refused."""
        await self._closed.wait()

    def give_back(self, caller: str, count: int) -> None:
        """Takes permits back; only `Permit` calls it."""
        for _ in range(count):
            self._turnover.note_end()
        self._held[caller] -= count
        if not self._held[caller]:
            del self._held[caller]
        self._publish()

    def _publish(self) -> None:
        if self._shared is not None:
            self._shared.publish(self._held)

    def _all_held(self) -> Counter[str]:
        """The permits of all processes, by the caller."""
        return self._held if self._shared is None else self._held + self._shared.elsewhere()

    def _is_due(self, held: Counter[str], caller: str, count: int) -> bool:
        """Whether a caller gets permits beyond the limit: its share of them, and no more."""
        share = self._max // len(held.keys() | {caller})
        return held[caller] + count <= share and held.total() + count <= 2 * self._max

    def _check(self, caller: str, count: int) -> None:
        held = self._all_held()
        free = self._max - held.total()
        if count > free and not self._is_due(held, caller, count):
            raise overloaded(retry_after_s=self.retry_after_s(count - free))
        free = self._max_per_caller - held[caller]
        if count > free:
            limit = f"one caller may have {self._max_per_caller} requests at a time"
            raise overloaded(limit, retry_after_s=self.retry_after_s(count - free))


@dataclass(slots=True)
class Permit:
    """Permits that one request holds."""

    _admission: Admission
    _caller: str
    _count: int

    def release(self) -> None:
        """Gives the permits back, once: a caller that still reads holds none."""
        count, self._count = self._count, 0
        if count:
            self._admission.give_back(self._caller, count)

    def release_one(self) -> None:
        """Gives one of them back, if there is one left."""
        if self._count:
            self._count -= 1
            self._admission.give_back(self._caller, 1)
