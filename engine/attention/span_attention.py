"""Attention among tokens that see each other, the later ones included, as those of an image do.

Kernels are causal. So the rows of such tokens are computed again here, in plain torch: there are
few of them, in steps with a part of a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_ELEMENTS = 2**24  # of weights that are in memory at a time


def attend_within(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    end: int,
    scale: float,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attends from the last tokens before a position to all tokens before it.

    Args:
        query: [num_tokens, num_heads, head_dim], of the positions end - num_tokens … end - 1.
        key_cache: with the keys of all these positions written, as are the values.
        value_cache: as key_cache.
        block_table: int32 [max_blocks], the sequence's.
        end: the position.
        scale: factor on the dot products.
        sliding_window: how many positions up to its own a token sees, beside the later ones.
        softcap: bounds the scaled logits.

    Returns:
        [num_tokens, num_heads, head_dim of the values].
    """
    size = key_cache.shape[1]
    positions = torch.arange(end - len(query), end, device=query.device)
    seen = end if sliding_window is None else len(query) + sliding_window - 1
    first = max(0, end - seen) // size
    blocks = block_table[first : -(-end // size)].long()
    key = key_cache[blocks].flatten(0, 1)[: end - first * size].float()
    value = value_cache[blocks].flatten(0, 1)[: end - first * size].float()
    oldest = torch.zeros_like(positions)
    if sliding_window is not None:
        oldest = positions - sliding_window + 1
    hidden = torch.arange(first * size, end, device=query.device) < oldest.unsqueeze(1)
    num_rows = max(1, _MAX_ELEMENTS // (query.shape[1] * len(key)))
    parts = zip(torch.split(query, num_rows), torch.split(hidden, num_rows), strict=True)
    return torch.cat([_attended(*part, key, value, scale, softcap) for part in parts])


def _attended(
    query: Tensor, hidden: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """`hidden` is bool [num_tokens, num_keys]; keys and values [num_keys, num_kv_heads, …]."""
    num_tokens, num_heads, _ = query.shape
    grouped = query.float().reshape(num_tokens, key.shape[1], -1, query.shape[2])
    logits = torch.einsum("qhgd,khd->hgqk", grouped, key) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)
    values = torch.einsum("hgqk,khd->qhgd", weights, value)
    return values.reshape(num_tokens, num_heads, -1).to(query.dtype)
