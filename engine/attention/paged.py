"""Attention over the paged KV cache, as one function that every transformers model can call.

`install` registers it with transformers' attention interface. A model then calls it with the query,
key and value of all tokens of the step; it writes key and value into the cache and attends through
the block tables. A backend computes both: `ReferenceAttention` is plain torch, correct and runs
anywhere; the kernels are tested against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ..batch.model_input import AttentionInput, Span
from .deferred_rope import pending_rotation
from .kv_cache import to_cache_format
from .latent import latent_attention
from .linear_bias import LinearBias
from .span_attention import attend_within

IMPLEMENTATION = "tokenwire_paged"


class AttentionBackend(Protocol):
    """The interface of attention kernels.

    Caches are [num_blocks, block_size, num_kv_heads, head_dim]; the key's and the value's head size
    may differ, and a cache may be in an 8-bit format (`to_cache_format`). A query token at position
    p of its sequence attends to the positions max(0, p - sliding_window + 1) … p; with chunks, only
    to those from the start of its chunk, p // chunk_size * chunk_size, on.
    """

    def write_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Stores key and value [num_tokens, num_kv_heads, head_dim] in their slots.

        `slot_mapping` is int64 [num_tokens]. Kernels skip tokens with a negative slot.
        """

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        query_start_loc: Tensor,
        context_lens: Tensor,
        scale: float,
        *,
        sliding_window: int | None = None,
        chunk_size: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        linear_bias: LinearBias | None = None,
    ) -> Tensor:
        """Attends from every query token to the cached tokens of its own sequence.

        Args:
            query: [num_tokens, num_heads, head_dim], the tokens of all sequences concatenated.
            key_cache: with this step's keys already written, as are the values.
            value_cache: as key_cache.
            block_tables: int32 [num_seqs, max_blocks].
            query_start_loc: int32 [num_seqs + 1], where each sequence's tokens start.
            context_lens: int32 [num_seqs], cached tokens, this step's included.
            scale: factor on the dot products.
            sliding_window: how many of the latest positions a token sees, its own included.
            chunk_size: positions of a chunk; a token sees none of the chunks before its own.
            softcap: bounds the scaled logits: softcap * tanh(logits / softcap).
            sinks: [num_heads], extra logits that take part in the softmax and carry no value.
            linear_bias: is added to the scaled logits, before they are bounded.

        Returns:
            [num_tokens, num_heads, head_dim of the values].
        """


@runtime_checkable
class RotaryBackend(Protocol):
    """An `AttentionBackend` that can also rotate query and key while it writes the cache."""

    def rotary_write_kv(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """Rotates query and key, stores key and value, and returns the rotated query.

        Args:
            query: [num_tokens, num_heads, head_dim].
            key: [num_tokens, num_kv_heads, head_dim]; tokens with a negative slot are not stored.
            value: as key.
            cos: [num_tokens, rotary_dim]. Of the first `rotary_dim` elements of a head, an even
                number, the first half pairs with the second; the other elements are not rotated.
            sin: as cos.
            key_cache: see `AttentionBackend`.
            value_cache: as key_cache.
            slot_mapping: int64 [num_tokens].
        """


class ReferenceAttention:
    """Attention in plain torch, one sequence after the other: slow, but short and correct."""

    def write_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """See `AttentionBackend.write_kv`."""
        blocks, offsets = slot_mapping // key_cache.shape[1], slot_mapping % key_cache.shape[1]
        key_cache[blocks, offsets] = to_cache_format(key, key_cache.dtype)
        value_cache[blocks, offsets] = to_cache_format(value, value_cache.dtype)

    def paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_tables: Tensor,
        query_start_loc: Tensor,
        context_lens: Tensor,
        scale: float,
        *,
        sliding_window: int | None = None,
        chunk_size: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        linear_bias: LinearBias | None = None,
    ) -> Tensor:
        """See `AttentionBackend.paged_attention`."""
        num_groups = query.shape[1] // key_cache.shape[2]
        output = query.new_empty(*query.shape[:2], value_cache.shape[-1])
        bounds, contexts = query_start_loc.tolist(), context_lens.tolist()
        for index, context in enumerate(contexts):
            rows = slice(bounds[index], bounds[index + 1])
            num_query = rows.stop - rows.start
            blocks = block_tables[index, : -(-context // key_cache.shape[1])].long()
            key = key_cache[blocks].flatten(0, 1)[:context].repeat_interleave(num_groups, 1)
            value = value_cache[blocks].flatten(0, 1)[:context].repeat_interleave(num_groups, 1)
            logits = torch.einsum("qhd,khd->hqk", query[rows].float(), key.float()) * scale
            if linear_bias is not None:
                positions = torch.arange(context, device=query.device)
                logits = logits + linear_bias.between(positions[context - num_query :], positions)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            mask = _causal_mask(num_query, context, sliding_window, chunk_size, query.device)
            logits = logits.masked_fill(~mask, float("-inf"))
            if sinks is not None:
                extra = sinks.float().view(-1, 1, 1).expand(-1, num_query, 1)
                logits = torch.cat([logits, extra], dim=-1)
            weights = torch.softmax(logits, dim=-1)[..., :context]
            output[rows] = torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)
        return output


def _causal_mask(
    num_query: int,
    context: int,
    sliding_window: int | None,
    chunk_size: int | None,
    device: torch.device,
) -> Tensor:
    """Bool [num_query, context]: the positions that each of the last `num_query` tokens sees."""
    query = torch.arange(context - num_query, context, device=device).unsqueeze(1)
    key = torch.arange(context, device=device)
    mask = key <= query
    if sliding_window is not None:
        mask = mask & (key > query - sliding_window)
    if chunk_size is not None:
        mask = mask & (key >= query // chunk_size * chunk_size)
    return mask


@dataclass(frozen=True, slots=True)
class AttentionStep:
    """What attention layers need in a forward pass: the caches, the batch, the backend.

    `chunk_sizes` are those of the layers with chunked attention, by the layer's index; `windows`
    are those of all layers that see only a part of a text. `spans` are tokens that see each other.
    """

    caches: Mapping[int, tuple[Tensor, Tensor]]
    batch: AttentionInput
    backend: AttentionBackend
    chunk_sizes: Mapping[int, int] = field(default_factory=dict)
    windows: Mapping[int, int] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()

    def places(self, layer: int, sliding_window: int | None) -> tuple[Tensor, Tensor]:
        """The slots of a layer's tokens, and its block tables.

        Args:
            layer: its index.
            sliding_window: with which it is computed now, if it has one.
        """
        batch = self.batch
        expected = self.windows.get(layer)
        if batch.window is None or expected is None or expected > batch.window.window:
            return batch.slot_mapping, batch.block_tables
        actual = self.chunk_sizes.get(layer, sliding_window)
        assert actual is not None, "a layer without its window would need blocks that are gone"
        assert actual <= expected, "a layer's window would need blocks that are gone"
        return batch.window.slot_mapping, batch.window.block_tables


_STEP: ContextVar[AttentionStep] = ContextVar("attention_step")


@contextmanager
def attending(step: AttentionStep) -> Iterator[None]:
    """Within it, models compute this step.

    It is not one of the model's arguments, since not every model hands those on to its attention.
    """
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    linear_bias: LinearBias | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers calls this in every layer, with query, key, value [1, heads, tokens, head_dim].

    Values that are narrower than those in the cache are followed by zeros there.

    Returns:
        The attended values [1, tokens, heads, head_dim], and None for the weights.
    """
    assert attention_mask is None, (
        "the model builds its own mask; the self-check refuses such models"
    )
    step, layer = _STEP.get(), _layer_index(module)
    key_cache, value_cache = step.caches[layer]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    latent = latent_attention(module)
    if latent is not None:
        query = latent.query(query)  # another width, the same scale
    slots, block_tables = step.places(layer, sliding_window)
    value_size = value.shape[-1]
    if value_size < value_cache.shape[-1]:
        value = F.pad(value, (0, value_cache.shape[-1] - value_size))
    rows = _write_step(step.backend, query, key, value, key_cache, value_cache, slots)
    output = step.backend.paged_attention(
        rows,
        key_cache,
        value_cache,
        block_tables,
        step.batch.query_start_loc,
        step.batch.context_lens,
        scale,
        sliding_window=sliding_window,
        chunk_size=step.chunk_sizes.get(layer),
        softcap=softcap,
        sinks=s_aux,
        linear_bias=linear_bias,
    )
    for span in step.spans:
        part = slice(span.row, span.row + span.length)
        output[part] = attend_within(
            rows[part],
            key_cache,
            value_cache,
            block_tables[span.sequence],
            span.end,
            scale,
            sliding_window=sliding_window,
            softcap=softcap,
        )
    if latent is not None:
        output = latent.values(output)
    elif value_size < output.shape[-1]:
        output = output[..., :value_size]
    return output.unsqueeze(0), None


def _write_step(
    backend: AttentionBackend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Writes key and value into their slots, and rotates query and key if that is pending.

    Returns:
        The rotated query [num_tokens, num_heads, head_dim].
    """
    rotation = pending_rotation(query)
    if rotation is not None and _rotates(type(backend)):
        return cast("RotaryBackend", backend).rotary_write_kv(
            _token_major(query),
            _token_major(key),
            _token_major(value),
            rotation.cos[0],
            rotation.sin[0],
            key_cache,
            value_cache,
            slots,
        )
    if rotation is not None:
        query, key = rotation.apply(query, key)
    backend.write_kv(_token_major(key), _token_major(value), key_cache, value_cache, slots)
    return _token_major(query)


@cache
def _rotates(kind: type[AttentionBackend]) -> bool:
    """Whether it is a `RotaryBackend`; cached, since the check takes longer than to rotate."""
    return issubclass(kind, RotaryBackend)


def _token_major(states: Tensor) -> Tensor:
    """A view of [1, heads, tokens, head_dim] as [tokens, heads, head_dim]."""
    return states[0].transpose(0, 1)


def _layer_index(module: nn.Module) -> int:
    """The index of a module's layer, under which its cache is found."""
    index = module.layer_idx
    assert isinstance(index, int)
    return index


def install() -> None:
    """Registers the paged attention with transformers under the name `IMPLEMENTATION`."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention_forward)
