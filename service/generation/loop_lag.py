"""How late the event loop runs what is due: all streams of a service process wait that long."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry

from ..metrics.histogram import HistogramFamily

_INTERVAL_S = 0.02  # between two samples, each of which takes some microseconds
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class LoopLag:
    """Samples of the event loop's lateness.

    Args:
        registry: what shows them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = HistogramFamily(
            "tokenwire_event_loop_lag_seconds",
            "How late the service's event loop was, sampled 50 times a second",
            _SECONDS,
            registry,
        ).of()

    async def sample(self) -> None:
        """Takes samples until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _INTERVAL_S
            await asyncio.sleep(_INTERVAL_S)
            self._lag.observe(max(loop.time() - due, 0.0))
