"""Attention among tokens that see each other is that of one softmax over all that they see."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention import span_attention
from engine.attention.span_attention import attend_within

BLOCK_SIZE, KV_HEADS, GROUPS, HEAD = 4, 2, 3, 8
MAX_BLOCKS = 9


def plain(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None
) -> Tensor:
    """One token and one head after the other."""
    end = len(key)
    rows = []
    for index, token in enumerate(query):
        position = end - len(query) + index
        first = 0 if window is None else max(0, position - window + 1)
        heads = []
        for head, vector in enumerate(token):
            logits = key[first:, head // GROUPS] @ vector * 0.3
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            heads.append(logits.softmax(0) @ value[first:, head // GROUPS])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@settings(max_examples=30)
@given(
    end=st.integers(1, MAX_BLOCKS * BLOCK_SIZE),
    length=st.integers(1, 20),
    window=st.none() | st.integers(1, 40),
    softcap=st.none() | st.just(1.5),
)
def test_tokens_see_those_before_and_after_them(
    end: int, length: int, window: int | None, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(end)
    table = torch.randperm(MAX_BLOCKS + 3, generator=generator).int()[:MAX_BLOCKS]
    shape = (MAX_BLOCKS + 3, BLOCK_SIZE, KV_HEADS, HEAD)
    keys, values = torch.randn(2, *shape, generator=generator)
    query = torch.randn(min(length, end), KV_HEADS * GROUPS, HEAD, generator=generator)
    found = attend_within(
        query, keys, values, table, end, 0.3, sliding_window=window, softcap=softcap
    )
    key, value = (part[table.long()].flatten(0, 1)[:end] for part in (keys, values))
    torch.testing.assert_close(found, plain(query, key, value, window, softcap))


def test_long_texts_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, MAX_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD, generator=generator)
    query = torch.randn(11, KV_HEADS * GROUPS, HEAD, generator=generator)
    table = torch.arange(MAX_BLOCKS).int()
    whole = attend_within(query, keys, values, table, 30, 0.3, sliding_window=9)
    monkeypatch.setattr(span_attention, "_MAX_ELEMENTS", 300)
    parts = attend_within(query, keys, values, table, 30, 0.3, sliding_window=9)
    torch.testing.assert_close(parts, whole)
