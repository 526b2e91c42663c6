"""Triton kernels that write keys and values into the paged cache, and may rotate keys before.

A program writes all heads of one token. A cache in an 8-bit format saturates, see
`engine.attention.kv_cache.to_cache_format`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store(target, states, mask, LARGEST: tl.constexpr):
    """Stores fp32 in the target's dtype. LARGEST bounds 8-bit formats and is 0 for others."""
    if LARGEST > 0:
        # Comparisons with NaN are false, so NaN is stored as NaN.
        states = tl.where(states > LARGEST, LARGEST, states)
        states = tl.where(states < -LARGEST, -LARGEST, states)
    tl.store(target, states.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _store_heads(
    target,
    states,
    token_stride,
    head_stride,
    TARGET_STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_LANES: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Copies the elements FIRST … DIM - 1 of the token's heads."""
    token = tl.program_id(0).to(tl.int64)
    heads, lanes = tl.arange(0, HEAD_LANES)[:, None].to(tl.int64), tl.arange(0, LANES)[None, :]
    mask = (heads < HEADS) & (lanes >= FIRST) & (lanes < DIM)
    source = states + token * token_stride + heads * head_stride + lanes
    rows = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    _store(target + heads * TARGET_STRIDE + lanes, rows, mask, LARGEST)


@triton.jit
def _store_rotated(
    target,
    states,
    cos,
    sin,
    token_stride,
    head_stride,
    cos_stride,
    sin_stride,
    TARGET_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_LANES: tl.constexpr,
    HALF: tl.constexpr,
    HALF_LANES: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Rotates the first 2 * HALF elements of the token's heads, and copies the others."""
    token = tl.program_id(0).to(tl.int64)
    heads, lanes = tl.arange(0, HEAD_LANES)[:, None].to(tl.int64), tl.arange(0, HALF_LANES)[None, :]
    is_lane = lanes < HALF
    mask = (heads < HEADS) & is_lane
    source = states + token * token_stride + heads * head_stride + lanes
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    cosines, sines = cos + token * cos_stride + lanes, sin + token * sin_stride + lanes
    first_cos = tl.load(cosines, mask=is_lane, other=0.0).to(tl.float32)
    first_sin = tl.load(sines, mask=is_lane, other=0.0).to(tl.float32)
    second_cos = tl.load(cosines + HALF, mask=is_lane, other=0.0).to(tl.float32)
    second_sin = tl.load(sines + HALF, mask=is_lane, other=0.0).to(tl.float32)
    rows = target + heads * TARGET_STRIDE + lanes
    _store(rows, first * first_cos - second * first_sin, mask, LARGEST)
    _store(rows + HALF, second * second_cos + first * second_sin, mask, LARGEST)
    if 2 * HALF < DIM:
        _store_heads(
            target,
            states,
            token_stride,
            head_stride,
            TARGET_STRIDE,
            2 * HALF,
            HEADS,
            HEAD_LANES,
            DIM,
            LANES,
            LARGEST,
        )


@triton.jit
def _slot_row(cache, slot, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The address of a slot's first head; the next head is BLOCK_SIZE * DIM elements further."""
    return cache + (slot // BLOCK_SIZE * HEADS * BLOCK_SIZE + slot % BLOCK_SIZE) * DIM


@triton.jit
def write_kv(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    HEADS: tl.constexpr,
    HEAD_LANES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Stores a token's key and value; a negative slot is skipped."""
    slot = tl.load(slot_mapping + tl.program_id(0)).to(tl.int64)
    if slot < 0:
        return
    _store_heads(
        _slot_row(key_cache, slot, HEADS, KEY_DIM, BLOCK_SIZE),
        key,
        key_token_stride,
        key_head_stride,
        BLOCK_SIZE * KEY_DIM,
        0,
        HEADS,
        HEAD_LANES,
        KEY_DIM,
        KEY_LANES,
        LARGEST,
    )
    _store_heads(
        _slot_row(value_cache, slot, HEADS, VALUE_DIM, BLOCK_SIZE),
        value,
        value_token_stride,
        value_head_stride,
        BLOCK_SIZE * VALUE_DIM,
        0,
        HEADS,
        HEAD_LANES,
        VALUE_DIM,
        VALUE_LANES,
        LARGEST,
    )


@triton.jit
def rotary_write_kv(
    output,
    query,
    key,
    value,
    cos,
    sin,
    key_cache,
    value_cache,
    slot_mapping,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    cos_stride,
    sin_stride,
    QUERY_HEADS: tl.constexpr,
    QUERY_HEAD_LANES: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_LANES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    HALF: tl.constexpr,
    HALF_LANES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Rotates a token's query and key, and stores its key and value unless its slot is negative.

    The query is written to `output`, contiguous [num_tokens, QUERY_HEADS, KEY_DIM]. Of the three
    programs of a token the first computes the query, the second the key and the third the value.
    """
    token, part = tl.program_id(0), tl.program_id(1)
    if part == 0:
        _store_rotated(
            output + token.to(tl.int64) * QUERY_HEADS * KEY_DIM,
            query,
            cos,
            sin,
            query_token_stride,
            query_head_stride,
            cos_stride,
            sin_stride,
            KEY_DIM,
            QUERY_HEADS,
            QUERY_HEAD_LANES,
            HALF,
            HALF_LANES,
            KEY_DIM,
            KEY_LANES,
            0.0,
        )
        return
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot < 0:
        return
    if part == 1:
        _store_rotated(
            _slot_row(key_cache, slot, HEADS, KEY_DIM, BLOCK_SIZE),
            key,
            cos,
            sin,
            key_token_stride,
            key_head_stride,
            cos_stride,
            sin_stride,
            BLOCK_SIZE * KEY_DIM,
            HEADS,
            HEAD_LANES,
            HALF,
            HALF_LANES,
            KEY_DIM,
            KEY_LANES,
            LARGEST,
        )
    else:
        _store_heads(
            _slot_row(value_cache, slot, HEADS, VALUE_DIM, BLOCK_SIZE),
            value,
            value_token_stride,
            value_head_stride,
            BLOCK_SIZE * VALUE_DIM,
            0,
            HEADS,
            HEAD_LANES,
            VALUE_DIM,
            VALUE_LANES,
            LARGEST,
        )
