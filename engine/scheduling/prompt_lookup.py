"""Guesses at the next tokens: what followed the last few tokens when they stood in the text before.

A guess is checked by the model in the same step and costs nothing but that step's spare arithmetic
when it is wrong. Known as prompt lookup or n-gram speculation (Saxena, Prompt Lookup Decoding,
2023); TGI's `--speculate` does the same.
"""

from __future__ import annotations

_SIZES = (3, 2)  # tokens that must agree; longer agreements are tried first


class Drafter:
    """Guesses for one sequence. It learns the sequence's tokens as they come, O(1) each.

    Args:
        max_tokens: tokens of a guess at most.
    """

    __slots__ = ("_follower", "_length", "_max_tokens", "_num_known")

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._length = max_tokens  # of the next guess; wrong ones make it shorter
        self._num_known = 0
        self._follower: dict[tuple[int, ...], int] = {}  # some tokens -> index of what came next

    def propose(self, token_ids: list[int]) -> list[int]:
        """A guess at what follows these tokens; often none."""
        self._learn(token_ids)
        for size in _SIZES:
            if len(token_ids) > size:
                at = self._follower.get(tuple(token_ids[-size:]))
                if at is not None:
                    return token_ids[at : at + self._length]
        return []

    def report(self, num_proposed: int, num_accepted: int) -> None:
        """Tells how good a guess was: good ones become longer, bad ones shorter."""
        if num_accepted == num_proposed:
            self._length = min(self._max_tokens, 2 * self._length)
        elif 2 * num_accepted < num_proposed:
            self._length = max(1, self._length // 2)

    def _learn(self, token_ids: list[int]) -> None:
        """Notes what followed each group of tokens; the last group's follower is not known yet."""
        for at in range(max(self._num_known, 1), len(token_ids)):
            for size in _SIZES:
                if at >= size:
                    self._follower[tuple(token_ids[at - size : at])] = at
        self._num_known = len(token_ids)
