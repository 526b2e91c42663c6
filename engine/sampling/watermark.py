"""Watermarks text statistically: a detector can find the pattern, a reader cannot see it.

Each token makes a pseudo-random part of the vocabulary "green" for the next token, and the scores
of green tokens are raised: Kirchenbauer et al., A Watermark for Large Language Models, 2023,
algorithm 2.
The lists are those of TGI 2.1.1 (server/text_generation_server/utils/watermark.py) and of
`transformers.WatermarkDetector` with seeding scheme "lefthash" and a context of one token, bit for
bit. A list depends on the last token alone, so neither batching nor resumption can change it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..scheduling.sequence import SampledSequence
from ..transfer import upload
from .packed_bits import byte_table, spread

_HASH_KEY = 15485863  # the millionth prime, as in TGI and transformers
_CACHE_BYTES = 64 << 20  # of lists: all of a vocabulary of 23,000, or 4,186 of one of 128,256


class Watermark:
    """Raises the scores of green tokens.

    Args:
        vocab_size: columns of the scores.
        device: where the scores are.
        gamma: the share of the vocabulary that is green, between 0 and 1.
        delta: what is added to the scores of green tokens.
    """

    def __init__(
        self, vocab_size: int, device: torch.device, *, gamma: float = 0.5, delta: float = 2.0
    ) -> None:
        self._vocab_size = vocab_size
        self._num_green = int(vocab_size * gamma)
        self._device = device
        self._generator = torch.Generator()  # of the CPU: a GPU's would give different lists
        self._bias_of_byte = byte_table(delta, 0.0, device)
        row_bytes = -(-vocab_size // 8)
        self._green_bits = lru_cache(maxsize=max(1, _CACHE_BYTES // row_bytes))(self._pack)

    def apply(self, scores: Tensor, sequences: list[SampledSequence]) -> None:
        """Raises green tokens in those rows that ask for it, in place.

        Args:
            scores: float32 [num_rows, vocab_size], as the model gave them.
            sequences: the rows' sequences.
        """
        rows = [row for row, seq in enumerate(sequences) if seq.request.sampling.watermark]
        if not rows:
            return
        packed = torch.stack([self._green_bits(sequences[row].token_ids[-1]) for row in rows])
        bias = spread(packed, self._bias_of_byte, self._vocab_size)
        index = upload(rows, scores.device)
        scores.index_add_(0, index, bias)

    def green_ids(self, last_token_id: int) -> Tensor:
        """Int64 [int(vocab_size * gamma)]: the tokens that are green after this one."""
        self._generator.manual_seed(_HASH_KEY * last_token_id)
        return torch.randperm(self._vocab_size, generator=self._generator)[: self._num_green]

    def _pack(self, last_token_id: int) -> Tensor:
        """The green tokens as bits, the first token's lowest: uint8 [ceil(vocab_size / 8)]."""
        is_green = np.zeros(self._vocab_size, dtype=np.bool_)
        is_green[self.green_ids(last_token_id).numpy()] = True
        return upload(np.packbits(is_green, bitorder="little"), self._device)
