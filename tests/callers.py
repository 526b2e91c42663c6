"""Callers who keep servers busy while a test takes one of them away."""

from __future__ import annotations

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import httpx

from tests.e2e.stack import wait_until

NUM_CALLERS = 4


class Callers:
    """Several callers, each of whom asks one question after the other for the length of a block.

    Args:
        ask: asks a question, given the number of it, and returns the name of the server that
            answered. What it raises of HTTP or as a failed assertion is kept in `errors`.

    Attributes:
        answers: how many each server has given.
        errors: what the callers got instead of answers.
    """

    def __init__(self, ask: Callable[[int], str]) -> None:
        self.answers: Counter[str] = Counter()
        self.errors: list[str] = []
        self._ask = ask
        self._last = deque[str](maxlen=40)
        self._ended = threading.Event()
        self._numbers = itertools.count()
        self._threads = [threading.Thread(target=self._go_on) for _ in range(NUM_CALLERS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, servers: Iterable[str]) -> None:
        """Returns once each server of these names has answered again."""
        names = [*servers]
        before = self.answers.copy()
        wait_until(
            lambda: all(self.answers[name] > before[name] for name in names), f"answers of {names}"
        )

    def has_left(self, server: str) -> bool:
        """Whether this one has answered none of the last calls, which is no chance any more."""
        last = [*self._last]
        return len(last) == self._last.maxlen and server not in last

    def _go_on(self) -> None:
        while not self._ended.is_set():
            try:
                server = self._ask(next(self._numbers))
            except (httpx.HTTPError, AssertionError) as error:
                self.errors.append(repr(error))
            else:
                self.answers[server] += 1
                self._last.append(server)
