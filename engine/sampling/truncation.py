"""What is too unlikely to be chosen: temperature, top-k, top-p and typical-p.

The scores of a row are divided by its temperature; the largest `top_k` of them stay, and those that
equal the last; of these the fewest stay that hold the share `top_p` of their probability; and of
these the fewest that hold the share `typical_p`, beginning with those that are as surprising as the
average (Meister, Pimentel, Wiher, Cotterell: Locally typical sampling, TACL 2023): a token is that
where its score is the mean of the scores under their own distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.sampling import sampling_kernels

_NEVER = float("-inf")


def truncate(scores: Tensor, limits: Tensor) -> Tensor:
    """The scores, with -inf for what is dropped; may write into those it is given.

    Args:
        scores: float32 [num_rows, vocab_size].
        limits: float32 [4, num_rows], for each row its temperature, top-k, top-p and typical-p. A
            top-k of the vocabulary's size and shares of 1 drop nothing.
    """
    kernels = sampling_kernels(scores.device.type)
    if kernels is None:
        return in_torch(scores, limits)
    kernels.truncate(scores, limits)
    return scores


def in_torch(scores: Tensor, limits: Tensor) -> Tensor:
    """The same in several passes over the vocabulary, where there is no kernel for it."""
    temperatures, top_ks, top_ps, typical_ps = limits.unsqueeze(2)
    scores = scores / temperatures
    vocab_size = scores.shape[1]
    if bool((top_ks < vocab_size).any()):
        ks = top_ks.clamp(1, vocab_size).long()
        ordered = torch.sort(scores, descending=True).values
        scores = scores.masked_fill(scores < ordered.gather(1, ks - 1), _NEVER)
    if bool((top_ps < 1).any()):
        order = torch.sort(scores, descending=True, stable=True).indices
        scores = _first_of(order, scores, top_ps)
    if bool((typical_ps < 1).any()):
        probs = torch.softmax(scores, dim=-1)
        mean = (probs * scores).nansum(-1, keepdim=True)  # 0 times -inf is a NaN
        order = torch.sort((scores - mean).abs(), stable=True).indices
        scores = _first_of(order, scores, typical_ps)
    return scores


def _first_of(order: Tensor, scores: Tensor, shares: Tensor) -> Tensor:
    """Keeps the tokens that come first in an order and hold a share of the probability."""
    probs = torch.softmax(scores, dim=-1).gather(1, order)
    before = probs.cumsum(-1) - probs  # the first has none before it
    drop = torch.zeros_like(scores, dtype=torch.bool)
    return scores.masked_fill(drop.scatter_(1, order, (before >= shares) & (shares < 1)), _NEVER)
