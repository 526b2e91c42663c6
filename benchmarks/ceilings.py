"""How fast a device can be: memory read, memory copied, matrices multiplied. Best of several runs.

The same threads as the engine's are used, since torch's setting holds for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch


def synchronise(device: torch.device) -> None:
    """Waits for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest run, after one that does not count."""
    work()
    best = float("inf")
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return best


@torch.inference_mode()
def read_bandwidth(num_bytes: int, device: torch.device, repeats: int = 5) -> float:
    """Bytes per second of reading a float32 buffer of this size once.

    Both a sum and a matrix-vector product read everything and write next to nothing; whichever the
    library does better counts.
    """
    columns = 4096
    matrix = torch.ones(max(1, num_bytes // (4 * columns)), columns, device=device)
    vector = torch.ones(columns, device=device)
    by_sum = best_seconds(matrix.sum, device, repeats)
    by_product = best_seconds(lambda: torch.mv(matrix, vector), device, repeats)
    return matrix.nbytes / min(by_sum, by_product)


@torch.inference_mode()
def copy_bandwidth(num_bytes: int, device: torch.device, repeats: int = 10) -> float:
    """Bytes per second of copying a buffer of this size, read and written bytes both counted."""
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
        shapes: (rows, in_features, out_features) each; weights lie as those of linear layers do.
        dtype: of both factors.
        device: where.
        repeats: runs per shape.
    """
    rates = []
    for rows, in_features, out_features in shapes:
        x = torch.randn(rows, in_features, device=device).to(dtype)
        weight = torch.randn(out_features, in_features, device=device).to(dtype).t()
        seconds = best_seconds(lambda x=x, w=weight: torch.matmul(x, w), device, repeats)  # type: ignore[misc]
        rates.append(2 * rows * in_features * out_features / seconds)
    return max(rates)
