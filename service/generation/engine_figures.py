"""The last figures of each engine, and those of all together."""

from __future__ import annotations

from dataclasses import fields

from engine.protocol.request import EngineStats

_NAMES = tuple(item.name for item in fields(EngineStats))


class EngineFigures:
    """What the engines have told last, by their numbers."""

    def __init__(self) -> None:
        self._last: dict[int, EngineStats] = {}
        self._gone: dict[int, EngineStats] = {}

    def of(self, engine: int) -> EngineStats:
        """Those of an engine; zeros if it is gone, or has not told any."""
        return self._last.get(engine) or EngineStats()

    def note(self, engine: int, stats: EngineStats) -> EngineStats | None:
        """Notes what an engine tells; returns what it, or one in its place, has told before."""
        before = self._last.get(engine) or self._gone.get(engine)
        self._last[engine] = stats
        return before

    def lose(self, engine: int) -> None:
        """An engine is gone, and nothing runs in it."""
        if engine in self._last:
            self._gone[engine] = self._last.pop(engine)

    def total(self) -> EngineStats:
        """The sum over all engines."""
        told = list(self._last.values())
        if len(told) == 1:
            return told[0]
        return EngineStats(**{name: sum(getattr(one, name) for one in told) for name in _NAMES})
