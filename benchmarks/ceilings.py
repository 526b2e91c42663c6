"""What a device can reach when it reads memory, copies memory and multiplies matrices.

The best of several runs counts. The number of threads is the engine's, since both use
torch's setting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

import torch


def synchronise(device: torch.device) -> None:
    """Waits until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs, after a warm-up."""
    work()
    return min(_seconds(work, device) for _ in range(repeats))


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


class Reader:
    """Measures how fast a float32 buffer is read.

    The speed of memory may double from one second to the next on a virtual machine, so whatever is
    compared with it must be measured in turns with it.

    Args:
        num_bytes: size of the buffer.
        device: the device that holds it.
    """

    @torch.inference_mode()
    def __init__(self, num_bytes: int, device: torch.device) -> None:
        columns = 4096
        self._device = device
        self._matrix = torch.ones(max(1, num_bytes // (4 * columns)), columns, device=device)
        vector = torch.ones(columns, device=device)
        # Both read everything and write almost nothing; the faster one is used.
        by_sum, by_product = self._matrix.sum, partial(torch.mv, self._matrix, vector)
        self._read = min(by_sum, by_product, key=lambda work: best_seconds(work, device, 3))

    @torch.inference_mode()
    def bandwidth(self, repeats: int = 1) -> float:
        """Bytes per second of the fastest of `repeats` reads."""
        seconds = min(_seconds(self._read, self._device) for _ in range(repeats))
        return self._matrix.nbytes / seconds


@torch.inference_mode()
def copy_bandwidth(num_bytes: int, device: torch.device, repeats: int = 10) -> float:
    """Bytes per second of copying a buffer of this size; bytes read and written both count."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_seconds(lambda: target.copy_(source), device, repeats)


@torch.inference_mode()
def matmul_rate(
    shapes: Iterable[tuple[int, int, int]],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int = 5,
) -> float:
    """Floating-point operations per second of the best of these products.

    Args:
        shapes: (rows, in_features, out_features) of each; weights are [out_features, in_features]
            in memory, as in linear layers.
        dtype: data type of both factors.
        device: the device that computes them.
        repeats: runs per shape.
    """
    rates = []
    for rows, in_features, out_features in shapes:
        x = torch.randn(rows, in_features, device=device).to(dtype)
        weight = torch.randn(out_features, in_features, device=device).to(dtype).t()
        seconds = best_seconds(lambda x=x, w=weight: torch.matmul(x, w), device, repeats)  # type: ignore[misc]
        rates.append(2 * rows * in_features * out_features / seconds)
    return max(rates)
