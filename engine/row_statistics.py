"""What choosing tokens needs to know of each row of scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .kernels import cpu as cpu_kernels
from .kernels import has_triton

Statistics = tuple[Tensor, Tensor, Tensor]


def row_statistics(scores: Tensor) -> Statistics:
    """The largest score of each row, where it stands, and the row's log-sum-exp above it.

    Args:
        scores: float32 [num_rows, vocab_size].

    Returns:
        Float32 [num_rows], int64 [num_rows] (the first of equals), float32 [num_rows]. In a row
        with a NaN the last is a NaN.
    """
    kernel = _kernel(scores.device.type)
    return in_torch(scores) if kernel is None else kernel(scores)


def in_torch(scores: Tensor) -> Statistics:
    """The same in four passes over the vocabulary, where there is no kernel for it."""
    largest, ids = scores.max(dim=-1)
    return largest, ids, torch.logsumexp(scores - largest.unsqueeze(1), dim=-1)


@cache
def _kernel(device: str) -> Callable[[Tensor], Statistics] | None:
    if device == "cpu":
        kernels = cpu_kernels.load()
        return None if kernels is None else kernels.row_statistics
    if not has_triton():
        return None
    from .kernels.triton_sampling import row_statistics as in_triton

    return in_triton
