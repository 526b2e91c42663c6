"""Temperature, top-k, top-p and typical-p: they drop tokens that are too unlikely.

The scores of a row are divided by its temperature. Top-k keeps the `top_k` largest of them, and
those that equal the last one. Of these, top-p keeps the fewest that hold the share `top_p` of their
probability. Of these, typical-p keeps the fewest that hold the share `typical_p`, starting with
those whose surprise is nearest to the average (Meister, Pimentel, Wiher, Cotterell: Locally typical
sampling, TACL 2023): a token has the average surprise if its score is the mean of the scores under
their own distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.sampling import sampling_kernels

_NEVER = float("-inf")


def truncate(scores: Tensor, limits: Tensor) -> Tensor:
    """Returns the scores with -inf for dropped tokens; may overwrite those it is given.

    Args:
        scores: float32 [num_rows, vocab_size].
        limits: float32 [4, num_rows]: temperature, top-k, top-p and typical-p of each row. A top-k
            of the vocabulary's size or more and shares of 1 drop nothing.
    """
    kernels = sampling_kernels(scores.device.type)
    if kernels is None:
        return in_torch(scores, limits)
    kernels.truncate(scores, limits)
    return scores


def in_torch(scores: Tensor, limits: Tensor) -> Tensor:
    """`truncate` in several passes over the vocabulary, where there is no kernel for it."""
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
    """Keeps the first tokens of an order that together hold a share of the probability."""
    probs = torch.softmax(scores, dim=-1).gather(1, order)
    before = probs.cumsum(-1) - probs  # the first has none before it
    drop = torch.zeros_like(scores, dtype=torch.bool)
    return scores.masked_fill(drop.scatter_(1, order, (before >= shares) & (shares < 1)), _NEVER)
