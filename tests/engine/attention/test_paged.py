"""The reference attention is compared with torch's own, with explicit masks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from engine.attention.linear_bias import LinearBias
from engine.attention.paged import (
    AttentionStep,
    ReferenceAttention,
    attending,
    paged_attention_forward,
)
from engine.batch.model_input import AttentionInput

BLOCK_SIZE = 4
NUM_BLOCKS = 32
LENGTHS = [(1, 1), (1, 9), (5, 5), (3, 11), (8, 8), (2, 17)]  # new tokens, tokens after the step


@dataclass(frozen=True)
class Case:
    """A batch whose keys and values are in the cache, and also as contiguous tensors."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    batch: AttentionInput
    keys: list[Tensor]  # [context, num_kv_heads, head_dim] of each sequence
    values: list[Tensor]


def make_case(
    *, num_heads: int = 4, num_kv_heads: int = 2, key_dim: int = 8, value_dim: int = 8
) -> Case:
    """Sequences of `LENGTHS` in random blocks; unused slots hold NaN."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    backend = ReferenceAttention()
    nan = float("nan")
    key_cache = torch.full((NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, key_dim), nan)
    value_cache = torch.full((NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, value_dim), nan)
    order = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    tables = torch.zeros(len(LENGTHS), 5, dtype=torch.int32)
    keys, values, slots, starts = [], [], [], [0]
    for row, (num_new, context) in enumerate(LENGTHS):
        for index in range(-(-context // BLOCK_SIZE)):
            tables[row, index] = order.pop()
        positions = torch.arange(context)
        where = tables[row][positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        keys.append(noise(context, num_kv_heads, key_dim))
        values.append(noise(context, num_kv_heads, value_dim))
        backend.write_kv(keys[-1], values[-1], key_cache, value_cache, where)
        slots.append(where[-num_new:])
        starts.append(starts[-1] + num_new)
    batch = AttentionInput(
        slot_mapping=torch.cat(slots),
        block_tables=tables,
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor([context for _, context in LENGTHS], dtype=torch.int32),
    )
    query = noise(starts[-1], num_heads, key_dim)
    return Case(query, key_cache, value_cache, batch, keys, values)


def attend(
    case: Case,
    scale: float,
    *,
    sliding_window: int | None = None,
    chunk_size: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    linear_bias: LinearBias | None = None,
) -> Tensor:
    """The reference attention over the case's cache."""
    return ReferenceAttention().paged_attention(
        case.query,
        case.key_cache,
        case.value_cache,
        case.batch.block_tables,
        case.batch.query_start_loc,
        case.batch.context_lens,
        scale,
        sliding_window=sliding_window,
        chunk_size=chunk_size,
        softcap=softcap,
        sinks=sinks,
        linear_bias=linear_bias,
    )


def visible(num_new: int, context: int, window: int | None, chunk: int | None = None) -> Tensor:
    """Bool [num_new, context], computed entry by entry."""
    return torch.tensor(
        [
            [
                k <= q
                and (window is None or k >= q - window + 1)
                and (chunk is None or k // chunk == q // chunk)
                for k in range(context)
            ]
            for q in range(context - num_new, context)
        ]
    )


def per_sequence(case: Case) -> list[tuple[Tensor, Tensor, Tensor, int, int]]:
    """Query, key, value as [heads, tokens, size], with the numbers of new and of all tokens."""
    rows = torch.split(case.query, [num_new for num_new, _ in LENGTHS])
    groups = case.query.shape[1] // case.key_cache.shape[2]
    return [
        (
            query.transpose(0, 1),
            key.repeat_interleave(groups, 1).transpose(0, 1),
            value.repeat_interleave(groups, 1).transpose(0, 1),
            *lengths,
        )
        for query, key, value, lengths in zip(rows, case.keys, case.values, LENGTHS, strict=True)
    ]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_matches_torch_with_windows_and_groups(
    window: int | None, num_heads: int, num_kv_heads: int
) -> None:
    case = make_case(num_heads=num_heads, num_kv_heads=num_kv_heads)
    expected = [
        scaled_dot_product_attention(
            query, key, value, attn_mask=visible(num_new, context, window), scale=0.3
        ).transpose(0, 1)
        for query, key, value, num_new, context in per_sequence(case)
    ]
    actual = attend(case, 0.3, sliding_window=window)
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_matches_torch_with_chunks(chunk: int, window: int | None) -> None:
    case = make_case()
    expected = [
        scaled_dot_product_attention(
            query, key, value, attn_mask=visible(num_new, context, window, chunk), scale=0.3
        ).transpose(0, 1)
        for query, key, value, num_new, context in per_sequence(case)
    ]
    actual = attend(case, 0.3, sliding_window=window, chunk_size=chunk)
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_value_size_may_differ_from_key_size() -> None:
    case = make_case(key_dim=8, value_dim=6)
    expected = [
        scaled_dot_product_attention(
            query, key, value, attn_mask=visible(num_new, context, None), scale=1.0
        ).transpose(0, 1)
        for query, key, value, num_new, context in per_sequence(case)
    ]
    actual = attend(case, 1.0)
    assert actual.shape[-1] == 6
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_softcap_and_sinks_match_an_explicit_softmax(window: int | None) -> None:
    case = make_case()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    expected = []
    for query, key, value, num_new, context in per_sequence(case):
        logits = 2.0 * torch.tanh(query @ key.transpose(1, 2) / 2.0)
        weights = logits.exp() * visible(num_new, context, window)
        total = weights.sum(-1, keepdim=True) + sinks.exp().view(-1, 1, 1)
        expected.append((weights / total @ value).transpose(0, 1))
    actual = attend(case, 1.0, softcap=2.0, sinks=sinks, sliding_window=window)
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rounded_scale", [None, 0.5])
def test_a_linear_bias_is_added_to_the_scaled_logits(rounded_scale: float | None) -> None:
    case = make_case()
    slopes = torch.tensor([0.7, 0.3, 0.1, 0.05])
    expected = []
    for query, key, value, num_new, context in per_sequence(case):
        positions = torch.arange(context)
        if rounded_scale is None:
            bias = slopes[:, None] * positions
        else:
            bias = (slopes[:, None].bfloat16() * positions).float() * rounded_scale
        hidden = torch.where(visible(num_new, context, None), 0.0, float("-inf"))
        mask = bias[:, None] + hidden
        rows = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
        expected.append(rows.transpose(0, 1))
    actual = attend(case, 0.3, linear_bias=LinearBias(slopes, rounded_scale))
    torch.testing.assert_close(actual, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_writing_touches_only_its_slots() -> None:
    key_cache, value_cache = torch.zeros(3, 2, 1, 4), torch.zeros(3, 2, 1, 5)
    ReferenceAttention().write_kv(
        torch.full((2, 1, 4), 7.0),
        torch.full((2, 1, 5), 8.0),
        key_cache,
        value_cache,
        torch.tensor([5, 0]),
    )
    assert key_cache.flatten(2).sum(-1).tolist() == [[28, 0], [0, 0], [0, 28]]
    assert value_cache.flatten(2).sum(-1).tolist() == [[40, 0], [0, 0], [0, 40]]


def test_a_layer_call_writes_then_attends_with_the_default_scale() -> None:
    case = make_case()
    num_tokens = case.query.shape[0]
    key, value = torch.randn(num_tokens, 2, 8), torch.randn(num_tokens, 2, 8)
    layer = nn.Module()
    layer.layer_idx = 5  # type: ignore[assignment]
    step = AttentionStep({5: (case.key_cache, case.value_cache)}, case.batch, ReferenceAttention())

    with attending(step):
        output, weights = paged_attention_forward(
            layer,
            case.query.transpose(0, 1).unsqueeze(0),
            key.transpose(0, 1).unsqueeze(0),
            value.transpose(0, 1).unsqueeze(0),
            None,
        )

    assert weights is None
    assert output.shape == (1, num_tokens, 4, 8)
    stored = case.key_cache.view(-1, 2, 8)[case.batch.slot_mapping]
    assert torch.equal(stored, key)
    assert torch.equal(output[0], attend(case, 8**-0.5))
