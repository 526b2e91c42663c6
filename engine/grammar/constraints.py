"""The grammars of the requests in the engine: who stands where, and what a step may choose from."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..protocol.errors import GrammarError
from ..protocol.request import Request
from ..sampling.logits import RowMasks
from ..scheduling.sequence import SampledSequence, Sequence
from ..transfer import upload
from .backend_llguidance import GrammarCompiler, Matcher, TokenMasks


@dataclass(frozen=True, slots=True)
class PendingMasks:
    """Masks of a step's rows that are being filled."""

    rows: list[int]
    filled: Future[NDArray[np.int32]]

    def wait(self, device: torch.device) -> RowMasks:
        """The masks, once they are there."""
        return RowMasks(self.rows, upload(self.filled.result().view(np.uint8), device))


class Constraints:
    """One matcher for each request with a grammar.

    Args:
        compiler: compiles the requests' sources.
        masks: fills their masks.
    """

    def __init__(self, compiler: GrammarCompiler, masks: TokenMasks) -> None:
        self._compiler = compiler
        self._masks = masks
        self._matchers: dict[str, Matcher] = {}

    def prepare(self, request: Request, done: Callable[[], object]) -> bool:
        """Makes ready what `add` needs, in the background if it takes time.

        Returns:
            Whether everything is ready now; if not, `done` is called later from another thread.
        """
        eos = request.eos_token_ids
        if not request.grammar or self._compiler.is_ready(request.grammar, eos):
            return True
        self._compiler.prepare(request.grammar, eos, done)
        return False

    def add(self, request: Request) -> None:
        """Takes in a request, behind the tokens that it resumes from.

        Raises:
            GrammarError: its grammar cannot be compiled, or forbids those tokens.
        """
        matcher = self._compiler.compile(request.grammar, request.eos_token_ids)
        matcher.advance(request.resumed_token_ids)
        self._matchers[request.request_id] = matcher

    def drop(self, request_id: str) -> None:
        """Forgets a request, if it is there."""
        self._matchers.pop(request_id, None)

    def start(self, sequences: list[SampledSequence]) -> PendingMasks | None:
        """Begins to fill the masks of those rows that have a grammar; those have no guesses."""
        if not self._matchers:
            return None
        rows = [row for row, seq in enumerate(sequences) if seq.request.grammar]
        if not rows:
            return None
        matchers = [self._matchers[sequences[row].request.request_id] for row in rows]
        return PendingMasks(rows, self._masks.start(matchers))

    def advance(self, sequence: Sequence, token_id: int) -> list[int]:
        """Goes on behind a token; the tokens after it that the grammar leaves no choice about.

        They need no forward: with one token allowed, its probability is 1. They are canonical, in
        the tokenizer's own spelling of the text that must follow.

        Raises:
            GrammarError: the token is not allowed, or the grammar has become too complex.
        """
        matcher = self._matchers.get(sequence.request_id)
        if matcher is None:
            return []
        matcher.advance([token_id])
        try:
            forced = matcher.forced()
        except GrammarError as error:
            request = sequence.request
            self._compiler.condemn(request.grammar, request.eos_token_ids, error)
            raise
        matcher.advance(forced)
        if matcher.is_over and sequence.request.eos_token_ids:
            forced.append(min(sequence.request.eos_token_ids))
        return forced

    def check(self, sequence: Sequence) -> None:
        """Raises what filling a sequence's mask came upon.

        Raises:
            GrammarError: the grammar is too complex, or has come to a dead end.
        """
        matcher = self._matchers.get(sequence.request_id)
        if matcher is not None:
            matcher.check()
