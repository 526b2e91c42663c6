"""Formats of the numbers that linear layers and their updates are packed in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of weights and updates
PAIRS = 3  # the format of weights whose lanes are pairs of bfloat16


def exact_dtype(
    parts: Sequence[Tensor], formats: Sequence[torch.dtype] = (torch.bfloat16, torch.float16)
) -> torch.dtype:
    """The first of these formats that holds every number of fp32 matrices as it is, or fp32."""
    for dtype in formats:
        if all(torch.equal(part.to(dtype).float(), part) for part in parts):
            return dtype
    return torch.float32
