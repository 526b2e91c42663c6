"""How busy the engines are, for balancers: from their last steps, and a rate over some seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.protocol.request import StepOutput

from ..errors import ErrorKind, ServiceError
from .engine_figures import EngineFigures

WINDOW_S = 10.0

_DEFAULT_INTERVAL_S = 1.0
_MIN_INTERVAL_S = 0.1
_MAX_INTERVAL_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The load at one moment.

    Attributes:
        num_running: sequences that the engine computes.
        num_waiting: sequences that wait for room.
        kv_cache_use: the part of the cache's blocks that is in use, 0 to 1.
        tokens_per_s: tokens generated per second, over the last `WINDOW_S`.
        replayed_share: the part of the engines' steps since their start that was replayed from
            recordings, 0 to 1; None before the first step.
    """

    num_running: int
    num_waiting: int
    kv_cache_use: float
    tokens_per_s: float
    replayed_share: float | None = None


def watch_interval(given: float | None) -> float:
    """The seconds between two reports to a caller that watches the load.

    Raises:
        ServiceError: the caller wants them too often, or hardly ever.
    """
    if given is None:
        return _DEFAULT_INTERVAL_S
    if not _MIN_INTERVAL_S <= round(given, 6) <= _MAX_INTERVAL_S:  # it came as a float32
        raise ServiceError(
            ErrorKind.VALIDATION,
            f"`interval_seconds` must be >= {_MIN_INTERVAL_S} and <= {_MAX_INTERVAL_S}. "
            f"Given: {given:g}",
            field="interval_seconds",
        )
    return given


class LoadMeter:
    """Listens to the engines' steps.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._figures = EngineFigures()
        self._steps: deque[tuple[float, int]] = deque()  # when, and how many tokens it gave
        self._num_tokens = 0  # of these steps

    def step(self, output: StepOutput, engine: int = 1) -> None:
        """An engine computed a step, or sent a heartbeat.

        Its own count is taken, since other services of it have requests as well.
        """
        stats = output.stats
        before = self._figures.note(engine, stats) or stats
        num_tokens = stats.num_generated_tokens - before.num_generated_tokens
        if num_tokens < 0:  # a new engine's
            num_tokens = stats.num_generated_tokens
        if num_tokens:
            self._steps.append((self._clock(), num_tokens))
            self._num_tokens += num_tokens
        self._forget()

    def lost(self, engine: int) -> None:
        """An engine is gone, and with it what it computed."""
        self._figures.lose(engine)

    def load(self) -> Load:
        """The load now, of all engines."""
        self._forget()
        stats = self._figures.total()
        num_used = stats.num_blocks - stats.num_free_blocks
        return Load(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_cache_use=num_used / max(stats.num_blocks, 1),
            tokens_per_s=self._num_tokens / WINDOW_S,
            replayed_share=stats.num_replayed_steps / stats.num_steps if stats.num_steps else None,
        )

    def _forget(self) -> None:
        """Drops steps that are older than the window."""
        oldest = self._clock() - WINDOW_S
        while self._steps and self._steps[0][0] < oldest:
            self._num_tokens -= self._steps.popleft()[1]
