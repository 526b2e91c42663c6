"""What choosing tokens needs to know of each row of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels import cpu as cpu_kernels


def row_statistics(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest score of each row, where it stands, and the row's log-sum-exp above it.

    Args:
        scores: float32 [num_rows, vocab_size].

    Returns:
        Float32 [num_rows], int64 [num_rows] (the first of equals), float32 [num_rows]. In a row
        with a NaN the last is a NaN.
    """
    kernels = cpu_kernels.load() if scores.device.type == "cpu" else None
    if kernels is not None:  # one pass over the vocabulary instead of four
        return kernels.row_statistics(scores)
    largest, ids = scores.max(dim=-1)
    return largest, ids, torch.logsumexp(scores - largest.unsqueeze(1), dim=-1)
