"""Chooses a token in each row of scores, in one pass over them where there is a kernel for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.sampling import sampling_kernels


class Choice(NamedTuple):
    """The chosen tokens, and what turns the score of any token into its log-probability.

    `ids` int64 [num_rows] with their `logprobs` float32 [num_rows]; `largest` float32 [num_rows],
    the largest scores; `norms` float32 [num_rows], the logarithms of the sums of exp(score -
    largest). A log-probability is (score - largest) - norm: in this order small values stay exact.
    In a row with a NaN, and in one whose largest score is infinite, `norms` and `logprobs` are NaN.
    """

    ids: Tensor
    logprobs: Tensor
    largest: Tensor
    norms: Tensor


def choose(scores: Tensor, draws: Tensor | None = None) -> Choice:
    """Chooses a token in every row.

    Args:
        scores: float32 [num_rows, vocab_size].
        draws: float64 [num_rows] in [0, 1): the chosen token is the first at which the cumulative
            probability exceeds the draw. Below 0, and without draws, it is the likeliest token, the
            first of equal ones.
    """
    kernels = sampling_kernels(scores.device.type)
    return in_torch(scores, draws) if kernels is None else Choice(*kernels.choose(scores, draws))


def in_torch(scores: Tensor, draws: Tensor | None = None) -> Choice:
    """`choose` in several passes over the vocabulary, where there is no kernel for it."""
    largest, ids = scores.max(dim=-1)
    shifted = scores - largest.unsqueeze(1)
    norms = torch.logsumexp(shifted, dim=-1)
    if draws is not None:
        # In float64: float32 would lose terms of a sum of 128k. Strictly above the draw: an id of
        # probability 0 does not raise the sum and is never chosen.
        mass = shifted.exp().cumsum(-1, dtype=torch.float64)
        goal = (draws * mass[:, -1]).unsqueeze(1)
        drawn = torch.searchsorted(mass, goal, right=True).squeeze(1).clamp(max=mass.shape[1] - 1)
        ids = torch.where((draws < 0) | norms.isnan(), ids, drawn)
    logprobs = shifted.gather(1, ids.unsqueeze(1)).squeeze(1) - norms
    return Choice(ids, logprobs, largest, norms)
