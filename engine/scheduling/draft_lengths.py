"""How many draft tokens are worth the rows that they take in a step."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def draft_lengths(
    offers: Sequence[tuple[float, int]], num_decoding: int, row_share: float
) -> list[int]:
    """The numbers of draft tokens with which a step gives the most tokens per second.

    The j-th draft token of a sequence is accepted if all before it are, with probability p^j. Rows
    are added one by one, the likeliest first, as long as what a row is expected to give is more per
    second than what the step gives without it.

    Args:
        offers: for each sequence p, the probability that a draft token is accepted if those before
            it are, and how many it has at the most.
        num_decoding: sequences in the step, each of which gets one token in any case.
        row_share: what a row adds to a step without draft tokens, as a share of that step's time.

    Returns:
        For each offer how many of its draft tokens the step should verify.
    """
    lengths = [0] * len(offers)
    heap = [(-p, index) for index, (p, most) in enumerate(offers) if most > 0 and p > 0]
    heapq.heapify(heap)
    num_tokens, time = float(num_decoding), 1.0  # expected tokens, and time in plain steps
    while heap:
        gain, index = heap[0]
        if -gain * time < row_share * num_tokens:
            break
        num_tokens, time = num_tokens - gain, time + row_share
        lengths[index] += 1
        p, most = offers[index]
        if lengths[index] < most:
            heapq.heapreplace(heap, (gain * p, index))
        else:
            heapq.heappop(heap)
    return lengths
