"""Chooses the next token of each sequence, and reports how likely it was."""

from __future__ import annotations

import torch
from torch import Tensor

from . import logits as logits_processing
from .random_numbers import to_signed, uniform
from .request import Token
from .sequence import SampledSequence
from .watermark import Watermark

_MAX_TIES = 32  # beyond `top_n_tokens`: flat logits would otherwise report the whole vocabulary


def sample(
    logits: Tensor,
    sequences: list[SampledSequence],
    watermark: Watermark | None = None,
    masks: logits_processing.RowMasks | None = None,
) -> list[Token]:
    """One token per row.

    A row depends on its own logits, parameters, seed and position only. Log-probabilities are those
    after all filters, as in TGI; a row whose logits are not numbers gets a NaN for one.

    Args:
        logits: float32 [num_rows, vocab_size]; may be overwritten.
        sequences: the rows' sequences, before the token is appended.
        watermark: for the rows that ask for it; it comes before everything else, as in TGI.
        masks: the tokens that rows with a grammar may have.
    """
    if watermark is not None:
        watermark.apply(logits, sequences)
    scores = logits_processing.process(logits, sequences, masks)
    # Shifted so that the likeliest is 0, which keeps log-probabilities near 0 exact. The norm is
    # subtracted only where it is wanted: a full log-softmax would write the vocabulary once more.
    scores.sub_(scores.amax(dim=-1, keepdim=True))
    norms = torch.logsumexp(scores, dim=-1, keepdim=True)
    ids = _choose(scores, norms, sequences)
    chosen = (scores.gather(1, ids.unsqueeze(1)) - norms).squeeze(1)
    tops = _top_tokens(scores, norms, sequences)
    # Where the host waits for the device; float64 carries ids and log-probabilities exactly.
    packed = torch.stack([ids.double(), chosen.double()]).tolist()
    return [
        Token(int(token_id), logprob, top)
        for token_id, logprob, top in zip(*packed, tops, strict=True)
    ]


def prompt_logprobs(logits: Tensor, target_ids: list[int]) -> list[float]:
    """The log-probability of each target after its row: logits float32 [len(target_ids), vocab]."""
    targets = torch.tensor(target_ids, device=logits.device).unsqueeze(1)
    chosen = torch.log_softmax(logits, dim=-1).gather(1, targets).squeeze(1)
    result: list[float] = chosen.tolist()
    return result


def _choose(scores: Tensor, norms: Tensor, sequences: list[SampledSequence]) -> Tensor:
    """Int64 [num_rows]: the likeliest token, or where sampling is on the one drawn."""
    ids = scores.argmax(dim=-1)
    rows = [row for row, seq in enumerate(sequences) if seq.request.sampling.do_sample]
    if not rows:
        return ids
    seeds = [to_signed(sequences[row].request.sampling.seed) for row in rows]
    positions = [sequences[row].num_tokens for row in rows]
    index = torch.tensor(rows, device=scores.device)
    draws = uniform(
        torch.tensor(seeds, device=scores.device), torch.tensor(positions, device=scores.device)
    )
    return ids.index_copy(0, index, _draw(scores[index] - norms[index], draws))


def _draw(logprobs: Tensor, draws: Tensor) -> Tensor:
    """Inverts the cumulative distribution: float64, since 128k terms would not survive float32."""
    mass = logprobs.exp().cumsum(-1, dtype=torch.float64)
    # Strictly above the draw: an id without probability does not raise the sum and is never hit.
    goal = (draws * mass[:, -1]).unsqueeze(1)
    return torch.searchsorted(mass, goal, right=True).squeeze(1).clamp(max=mass.shape[1] - 1)


def _top_tokens(
    scores: Tensor, norms: Tensor, sequences: list[SampledSequence]
) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest tokens of each row that asks, with those that tie with the last; never -inf."""
    wanted = [sequence.request.sampling.top_n_tokens for sequence in sequences]
    result: list[tuple[tuple[int, float], ...]] = [() for _ in sequences]
    if not any(wanted):
        return result
    values, ids = torch.topk(scores, min(max(wanted) + _MAX_TIES, scores.shape[1]))
    pairs = torch.stack([ids.double(), (values - norms).double()], dim=-1).tolist()
    for row, count in enumerate(wanted):
        if count:
            threshold = pairs[row][min(count, len(pairs[row])) - 1][1]
            likely = [
                (int(token_id), logprob)
                for token_id, logprob in pairs[row]
                if logprob >= threshold and logprob > float("-inf")
            ]
            result[row] = tuple(sorted(likely, key=lambda pair: (-pair[1], pair[0])))
    return result
