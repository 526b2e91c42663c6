"""Prompt lookup: draft tokens are what followed the last few tokens earlier in the same text.

The model verifies draft tokens in the same step; rejected ones cost nothing but that step's spare
arithmetic. Also known as n-gram speculation (Saxena, Prompt Lookup Decoding, 2023); TGI's
`--speculate` does the same.
"""

from __future__ import annotations

_SIZES = (3, 2)  # tokens of an n-gram that must match; longer n-grams are tried first
_KEPT = 0.9  # of a trial's weight, at each later one: a text changes


class Drafter:
    """Proposes draft tokens for one sequence. Indexing a new token of the sequence takes O(1).

    Args:
        max_tokens: the most draft tokens at a time.
    """

    __slots__ = ("_follower", "_max_tokens", "_num_accepted", "_num_known", "_num_tried")

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._num_known = 0
        self._follower: dict[tuple[int, ...], int] = {}  # n-gram -> index of the next token
        self._num_accepted, self._num_tried = 1.0, 2.0  # before any trial, one of two is accepted

    @property
    def acceptance(self) -> float:
        """The probability that a draft token is accepted if those before it are."""
        return self._num_accepted / self._num_tried

    def propose(self, token_ids: list[int]) -> list[int]:
        """Draft tokens to follow these tokens; often none."""
        self._learn(token_ids)
        for size in _SIZES:
            if len(token_ids) > size:
                at = self._follower.get(tuple(token_ids[-size:]))
                if at is not None:
                    return token_ids[at : at + self._max_tokens]
        return []

    def report(self, num_proposed: int, num_accepted: int) -> None:
        """Counts a draft that was verified. Those behind its first refused token were not tried."""
        num_tried = min(num_accepted + 1, num_proposed)
        self._num_accepted = _KEPT**num_tried * self._num_accepted + num_accepted
        self._num_tried = _KEPT**num_tried * self._num_tried + num_tried

    def _learn(self, token_ids: list[int]) -> None:
        """Indexes what followed each n-gram; the next token after the last one is not known yet."""
        for at in range(max(self._num_known, 1), len(token_ids)):
            for size in _SIZES:
                if at >= size:
                    self._follower[tuple(token_ids[at - size : at])] = at
        self._num_known = len(token_ids)
