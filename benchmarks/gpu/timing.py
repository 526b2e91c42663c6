"""How long work takes on a device, when its caches hold other data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_FLUSHED_BYTES = 256 << 20  # more than the second-level cache of any GPU


def median_s(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """The median seconds of some work after a warm-up.

    On a GPU they are those of the device alone: a buffer is written before each run, which empties
    its caches and gives the host time to launch the work.
    """
    work()
    if device.type != "cuda":
        return statistics.median(_host_s(work) for _ in range(repeats))
    work()
    buffer = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)
    return statistics.median(_device_s(work, buffer) for _ in range(repeats))


def _host_s(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _device_s(work: Callable[[], object], buffer: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    buffer.zero_()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000
