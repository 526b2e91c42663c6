"""What is too unlikely to be chosen: temperature, top-k and top-p, which most requests have.

The scores of a row are divided by its temperature; the largest `top_k` of them stay, and those that
equal the last; of these the fewest stay that hold the share `top_p` of their probability.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .kernels import cpu as cpu_kernels
from .kernels import has_triton

_NEVER = float("-inf")
_LIKELY_TOKENS = 256


def truncate(scores: Tensor, limits: Tensor) -> Tensor:
    """The scores, with -inf for what is dropped; may write into those it is given.

    Args:
        scores: float32 [num_rows, vocab_size].
        limits: float32 [3, num_rows], for each row its temperature, top-k and top-p. A top-k of the
            vocabulary's size and a top-p of 1 drop nothing.
    """
    kernel = _kernel(scores.device.type)
    if kernel is None:
        return in_torch(scores, limits)
    kernel(scores, limits)
    return scores


def in_torch(scores: Tensor, limits: Tensor) -> Tensor:
    """The same in several passes over the vocabulary, where there is no kernel for it."""
    temperatures, top_ks, top_ps = limits.unsqueeze(2)
    scores = scores / temperatures
    vocab_size = scores.shape[1]
    if bool((top_ks < vocab_size).any()):
        ks = top_ks.clamp(1, vocab_size).long()
        ordered = torch.sort(scores, descending=True).values
        scores = scores.masked_fill(scores < ordered.gather(1, ks - 1), _NEVER)
    if bool((top_ps < 1).any()):
        probs = torch.softmax(scores, dim=-1)
        likeliest, order = torch.sort(probs, descending=True, stable=True)
        before = likeliest.cumsum(-1) - likeliest  # the mass of all likelier tokens; first: 0
        drop = torch.zeros_like(scores, dtype=torch.bool)
        drop.scatter_(1, order, (before >= top_ps) & (top_ps < 1))
        scores = scores.masked_fill(drop, _NEVER)
    return scores


@cache
def _kernel(device: str) -> Callable[[Tensor, Tensor], None] | None:
    if device == "cpu":
        kernels = cpu_kernels.load()
        return None if kernels is None else kernels.truncate
    if not has_triton():
        return None
    from .kernels.triton_sampling import truncate as in_triton

    return in_triton
