"""Samples the next token of each sequence, with its log-probability."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ..protocol.request import Token
from ..scheduling.sequence import SampledSequence
from ..transfer import Download, upload
from . import logits as logits_processing
from .choice import Choice, choose
from .random_numbers import uniform
from .watermark import Watermark

_MAX_TIES = 32  # beyond `top_n_tokens`: flat logits would otherwise report the whole vocabulary


class SampledTokens:
    """The next token of each row, on the device; on the host after `wait`.

    Args:
        ids: int64 [num_rows].
        logprobs: float32 [num_rows], of the ids.
        tops: for each row how many of the likeliest tokens it asks for; 0 for none.
        top_ids: int64 [rows that ask for any, k]: the likeliest tokens, if some row asks.
        top_logprobs: float32 [rows that ask for any, k].
    """

    def __init__(
        self,
        ids: Tensor,
        logprobs: Tensor,
        tops: list[int],
        top_ids: Tensor | None = None,
        top_logprobs: Tensor | None = None,
    ) -> None:
        self.ids = ids
        self._tops = tops
        # One copy for everything, in float32: it represents all integers up to 2^24, so all ids.
        packed = torch.cat([ids.float(), logprobs])
        self._num_likely = 0
        if top_ids is not None and top_logprobs is not None:
            self._num_likely = top_ids.shape[1]
            packed = torch.cat([packed, top_ids.flatten(), top_logprobs.flatten()])
        self._packed = Download(packed)

    def wait(self) -> list[Token]:
        """One token per row. If a row's logits are not numbers, its log-probability is NaN."""
        numbers, num_rows = self._packed.wait().tolist(), len(self._tops)
        chosen = [
            Token(int(token_id), logprob + 0.0)  # no -0.0
            for token_id, logprob in zip(
                numbers[:num_rows], numbers[num_rows : 2 * num_rows], strict=True
            )
        ]
        if not self._num_likely:
            return chosen
        top = numbers[2 * num_rows :]
        ids, logprobs = (self._rows(half) for half in (top[: len(top) // 2], top[len(top) // 2 :]))
        return [
            token._replace(top=_top(next(ids), next(logprobs), wanted)) if wanted else token
            for token, wanted in zip(chosen, self._tops, strict=True)
        ]

    def _rows(self, numbers: list[float]) -> Iterator[list[float]]:
        """The numbers of each row that asks for likeliest tokens."""
        size = self._num_likely
        return (numbers[start : start + size] for start in range(0, len(numbers), size))


def sample(
    logits: Tensor,
    sequences: list[SampledSequence],
    watermark: Watermark | None = None,
    masks: logits_processing.RowMasks | None = None,
    sampled_ids: Tensor | None = None,
) -> SampledTokens:
    """Samples one token per row.

    A row depends on its own logits, parameters, seed and position only. Log-probabilities are those
    after all filters, as in TGI.

    Args:
        logits: float32 [num_rows, vocab_size]; may be overwritten.
        sequences: the rows' sequences, before the token is appended.
        watermark: for the rows that ask for it; it is applied before everything else, as in TGI.
        masks: the tokens that the rows with a grammar allow.
        sampled_ids: int64 [rows of the previous step]: tokens that the host has not read yet.
    """
    if watermark is not None:
        watermark.apply(logits, sequences)
    scores = logits_processing.process(logits, sequences, masks, sampled_ids)
    choice = choose(scores, _draws(sequences, scores.device))
    tops = [sequence.request.sampling.top_n_tokens for sequence in sequences]
    if not any(tops):
        return SampledTokens(choice.ids, choice.logprobs, tops)
    return SampledTokens(choice.ids, choice.logprobs, tops, *_likeliest(scores, choice, tops))


def _likeliest(scores: Tensor, choice: Choice, tops: list[int]) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of the rows that ask for any, and their log-probabilities.

    Only of these rows: to look through all of them takes longer than to choose a token in each.
    """
    largest, norms = choice.largest, choice.norms
    if not all(tops):
        asking = upload([row for row, wanted in enumerate(tops) if wanted], scores.device)
        scores, largest, norms = scores[asking], largest[asking], norms[asking]
    values, ids = torch.topk(scores, min(max(tops) + _MAX_TIES, scores.shape[1]))
    return ids, values - largest.unsqueeze(1) - norms.unsqueeze(1)


def prompt_logprobs(logits: Tensor, target_ids: list[int]) -> Download:
    """The log-probability of each target id in its row of float32 [len(target_ids), vocab_size]."""
    targets = upload(target_ids, logits.device, torch.int64).unsqueeze(1)
    return Download(torch.log_softmax(logits, dim=-1).gather(1, targets).squeeze(1))


def prompt_tops(logits: Tensor, top_n: int) -> Download:
    """The likeliest tokens of each row of float32 [num_rows, vocab_size].

    Returns:
        float32 [num_rows, 2, top_n]: ids, which float32 has exactly up to 2^24, and
        log-probabilities, equal to those of `prompt_logprobs`.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    values, ids = torch.topk(logprobs, min(top_n, logits.shape[1]))
    return Download(torch.stack([ids.float(), values], dim=1))


def _draws(sequences: list[SampledSequence], device: torch.device) -> Tensor | None:
    """Float64 [num_rows]: random numbers for rows with `do_sample`, -1 for others.

    They are functions of a sequence's seed and length. None if no row has `do_sample`.
    """
    params = [sequence.request.sampling for sequence in sequences]
    if not any(p.do_sample for p in params):
        return None
    draws = uniform([p.seed for p in params], [sequence.num_tokens for sequence in sequences])
    return upload(np.where([p.do_sample for p in params], draws, -1.0), device)


def _top(ids: list[float], logprobs: list[float], wanted: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens of a row, and those that tie with the last; none of probability 0."""
    threshold = logprobs[min(wanted, len(logprobs)) - 1]
    likely = [
        (int(token_id), logprob)
        for token_id, logprob in zip(ids, logprobs, strict=True)
        if logprob >= threshold and logprob > float("-inf")
    ]
    return tuple(sorted(likely, key=lambda pair: (-pair[1], pair[0])))
