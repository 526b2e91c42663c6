"""Chooses the next token of each sequence, and reports how likely it was."""

from __future__ import annotations

import torch
from torch import Tensor

from . import logits as logits_processing
from .random_numbers import to_signed, uniform
from .request import Token
from .sequence import Sequence


def sample(logits: Tensor, sequences: list[Sequence]) -> list[Token]:
    """One token per row.

    A row depends on its own logits, parameters, seed and position only. Log-probabilities are those
    after all filters, as in TGI; a row whose logits are not numbers gets a NaN for one.

    Args:
        logits: float32 [num_rows, vocab_size]; may be overwritten.
        sequences: the rows' sequences, before the token is appended.
    """
    scores = logits_processing.process(logits, sequences)
    logprobs = torch.log_softmax(scores, dim=-1)
    ids = _choose(logprobs, sequences)
    chosen = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)
    tops = _top_tokens(logprobs, sequences)
    # The step's only synchronisation with the device: float64 carries ids and logprobs exactly.
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


def _choose(logprobs: Tensor, sequences: list[Sequence]) -> Tensor:
    """Int64 [num_rows]: the likeliest token, or where sampling is on the one drawn."""
    ids = logprobs.argmax(dim=-1)
    rows = [row for row, seq in enumerate(sequences) if seq.request.sampling.do_sample]
    if not rows:
        return ids
    seeds = [to_signed(sequences[row].request.sampling.seed) for row in rows]
    positions = [sequences[row].num_tokens for row in rows]
    index = torch.tensor(rows, device=logprobs.device)
    draws = uniform(
        torch.tensor(seeds, device=logprobs.device), torch.tensor(positions, device=logprobs.device)
    )
    return ids.index_copy(0, index, _draw(logprobs[index], draws))


def _draw(logprobs: Tensor, draws: Tensor) -> Tensor:
    """Inverts the cumulative distribution: float64, since 128k terms would not survive float32."""
    mass = logprobs.double().exp().cumsum(-1)
    # Strictly above the draw: an id without probability does not raise the sum and is never hit.
    goal = (draws * mass[:, -1]).unsqueeze(1)
    return torch.searchsorted(mass, goal, right=True).squeeze(1).clamp(max=mass.shape[1] - 1)


def _top_tokens(logprobs: Tensor, sequences: list[Sequence]) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest tokens of each row that asks, with all that tie with the last; never -inf."""
    result: list[tuple[tuple[int, float], ...]] = [() for _ in sequences]
    for row, sequence in enumerate(sequences):
        wanted = min(sequence.request.sampling.top_n_tokens, logprobs.shape[1])
        if wanted:
            threshold = torch.topk(logprobs[row], wanted).values[-1]
            ids = torch.nonzero((logprobs[row] >= threshold) & logprobs[row].isfinite()).flatten()
            pairs = zip(ids.tolist(), logprobs[row, ids].tolist(), strict=True)
            result[row] = tuple(sorted(pairs, key=lambda pair: -pair[1]))
    return result
