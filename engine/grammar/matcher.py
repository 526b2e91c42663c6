"""What a grammar's library has to give: the seam between the engine and such libraries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Matcher(Protocol):
    """The state of a sequence in its grammar. `masks.py` fills masks of those it knows."""

    def copy(self) -> Matcher:
        """Another matcher in the same state."""

    def advance(self, token_ids: Sequence[int]) -> None:
        """Consumes tokens.

        Raises:
            GrammarError: the grammar does not allow them.
        """

    def forced(self) -> list[int]:
        """Tokens that must come next, as far as the library tells; often none.

        Raises:
            GrammarError: there are too many of them.
        """

    @property
    def is_over(self) -> bool:
        """Whether nothing but the end of the text can follow."""

    def check(self) -> None:
        """Raises an error of the last call, or of the last mask that was filled.

        Raises:
            GrammarError: the grammar is too complex, or allows no token.
        """
