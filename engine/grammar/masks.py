"""Masks: which tokens the grammars of a step's rows allow."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ..threads import unpin
from .backend_llguidance import LlguidanceMatcher, MaskFiller
from .backend_outlines import OutlinesMatcher
from .matcher import Matcher


class TokenMasks:
    """Fills the masks of a step while the model's forward runs.

    Args:
        vocab_size: width of the model's logits.
        num_threads: threads that fill.
    """

    def __init__(self, vocab_size: int, num_threads: int = 2) -> None:
        self._num_words = -(-vocab_size // 32)
        self._filler = MaskFiller(num_threads)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks", initializer=unpin)

    def start(self, matchers: Sequence[Matcher]) -> Future[NDArray[np.int32]]:
        """Starts to fill int32 [len(matchers), ceil(vocab_size / 32)].

        Bit i % 32 of word i // 32 is set if token i is allowed. Once the masks are filled, each
        matcher's `check` raises if its row is invalid.
        """
        return self._thread.submit(self._fill, list(matchers))

    def _fill(self, matchers: list[Matcher]) -> NDArray[np.int32]:
        masks = np.zeros((len(matchers), self._num_words), dtype=np.int32)
        rows: list[tuple[LlguidanceMatcher, int]] = []
        for row, matcher in enumerate(matchers):
            if isinstance(matcher, LlguidanceMatcher):
                rows.append((matcher, row))
            elif isinstance(matcher, OutlinesMatcher):
                matcher.fill(masks[row])
        self._filler.fill(rows, masks)
        return masks
