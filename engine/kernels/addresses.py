"""Addresses of tensors for the C kernels, which take them for what they are told they are."""

from __future__ import annotations

import torch
from torch import Tensor


def flat(tensor: Tensor, dtype: torch.dtype) -> int:
    """Check that a tensor is contiguous, and return its address.

    Raises:
        ValueError: it is not, or has another dtype.
    """
    if tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(f"expected a contiguous tensor of {dtype}")
    return tensor.data_ptr()


def head_rows(tensor: Tensor) -> int:
    """Check that the head rows of a tensor [T, heads, D] are contiguous, and return its address.

    Raises:
        ValueError: they are not, or not fp32.
    """
    if tensor.dtype != torch.float32 or tensor.stride(2) != 1:
        raise ValueError("expected fp32 with contiguous head rows")
    return tensor.data_ptr()


def expert_ends(ends: Tensor | None) -> tuple[int | None, int]:
    """The address of the ends of experts' rows, and the number of experts; 1 without ends."""
    return (None, 1) if ends is None else (flat(ends, torch.int64), ends.numel())
