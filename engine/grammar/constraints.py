"""The grammars of the requests in the engine: the state of each, and the masks of a step."""

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
from .compiler import GrammarCompiler
from .masks import TokenMasks
from .matcher import Matcher


@dataclass(frozen=True, slots=True)
class PendingMasks:
    """Masks of a step's rows that are being filled."""

    rows: list[int]
    filled: Future[NDArray[np.int32]]

    def wait(self, device: torch.device) -> RowMasks:
        """Waits for the masks and returns them on a device."""
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
        """Compiles a request's grammar before `add`, in the background unless it is cached.

        Returns:
            Whether `add` can be called now; if not, `done` is called later from another thread.
        """
        eos = request.eos_token_ids
        if not request.grammar or self._compiler.is_ready(request.grammar, eos):
            return True
        self._compiler.prepare(request.grammar, eos, done)
        return False

    def add(self, request: Request) -> None:
        """Adds a request, in the state after the tokens that it resumes from.

        Raises:
            GrammarError: its grammar cannot be compiled, or forbids those tokens.
        """
        matcher = self._compiler.compile(request.grammar, request.eos_token_ids)
        matcher.advance(request.resumed_token_ids)
        self._matchers[request.request_id] = matcher

    def drop(self, request_id: str) -> None:
        """Removes a request, if it has a matcher."""
        self._matchers.pop(request_id, None)

    def start(self, sequences: list[SampledSequence]) -> PendingMasks | None:
        """Starts to fill the masks of the rows with a grammar, which have no draft tokens."""
        if not self._matchers:
            return None
        rows = [row for row, seq in enumerate(sequences) if seq.request.grammar]
        if not rows:
            return None
        matchers = [self._matchers[sequences[row].request.request_id] for row in rows]
        return PendingMasks(rows, self._masks.start(matchers))

    def advance(self, sequence: Sequence, token_id: int) -> list[int]:
        """Consumes a token; returns the tokens after it that the grammar forces.

        These need no forward: with one token allowed, its probability is 1. They are those with
        which the tokenizer itself spells the text that must follow.

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
            self._compiler.reject(request.grammar, request.eos_token_ids, error)
            raise
        matcher.advance(forced)
        if matcher.is_over and sequence.request.eos_token_ids:
            forced.append(min(sequence.request.eos_token_ids))
        return forced

    def check(self, sequence: Sequence) -> None:
        """Raises an error that occurred while a sequence's mask was filled.

        Raises:
            GrammarError: the grammar is too complex, or allows no token.
        """
        matcher = self._matchers.get(sequence.request_id)
        if matcher is not None:
            matcher.check()
