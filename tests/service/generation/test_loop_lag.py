"""How late the event loop is, is seen by whoever looks at the metrics."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from prometheus_client import CollectorRegistry

from service.generation.loop_lag import LoopLag
from tests.service.fakes import eventually


def number_above(registry: CollectorRegistry, seconds: str) -> float:
    name = "tokenwire_event_loop_lag_seconds"
    total = registry.get_sample_value(f"{name}_count") or 0.0
    return total - (registry.get_sample_value(f"{name}_bucket", {"le": seconds}) or 0.0)


async def test_work_that_holds_the_loop_is_seen() -> None:
    registry = CollectorRegistry()
    sampling = asyncio.create_task(LoopLag(registry).sample())
    await asyncio.sleep(0)  # it waits for its first sample
    asyncio.get_running_loop().call_soon(time.sleep, 0.15)  # longer than its wait by over 0.1 s
    await eventually(lambda: number_above(registry, "0.1") >= 1)
    sampling.cancel()
    with suppress(asyncio.CancelledError):
        await sampling
