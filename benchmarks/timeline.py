"""How long a GPU is busy during some work, from the kernels that torch's profiler records."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def device_busy_s(work: Callable[[], object], device: torch.device) -> float | None:
    """Seconds in which at least one kernel or copy ran; None if the profiler recorded none.

    The profiler slows down the host but not the kernels: compare with a duration without it.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize(device)
    intervals = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    return covered(intervals) / 1e6 if intervals else None  # from microseconds


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
