"""Attention over the paged cache as Triton programs: what one program computes, not who starts it.

Query heads that share a key head are computed together, so that each key is read once: a program
has rows, and row r is the query token r // GROUP with the head r % GROUP of its group. Sequences
with few query tokens (decode, guessed tokens) have one set of rows and many keys, and are split
along the keys; all others are cut into tiles of rows::

    attend_splits   (sequence, key head, split)  rows x the split's keys -> a part of the result
    merge_splits    (sequence, row, key head)    the parts of a row      -> its result
    attend_tiles    (tile, key head)             rows x all their keys   -> the result

Logits carry a factor of log2(e), because GPUs have exp2 and not exp. Sums are fp32. A row that sees
nothing gives zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _visible_from(position, WINDOW: tl.constexpr):
    """The first key position that the query at `position` sees."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    return first


@triton.jit
def _load_query(
    query, tokens, heads, is_row, token_stride, head_stride, DIM: tl.constexpr, LANES: tl.constexpr
):
    """The query rows [ROWS, LANES], with zeros where there is none."""
    lanes = tl.arange(0, LANES)
    rows = tokens.to(tl.int64) * token_stride + heads.to(tl.int64) * head_stride
    mask = is_row[:, None] & (lanes < DIM)[None, :]
    return tl.load(query + rows[:, None] + lanes[None, :], mask=mask, other=0.0)


@triton.jit
def _attend(
    query,
    positions,
    begin,
    end,
    table,
    key_cache,
    value_cache,
    key_block_stride,
    key_slot_stride,
    value_block_stride,
    value_slot_stride,
    scale,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attends from query [ROWS, KEY_LANES] to the key positions begin … end - 1.

    `positions` [ROWS] are those of the rows; `table` and the caches point to the sequence's blocks
    and to the key head. Slots outside are never used: they may hold anything, even NaN.

    Returns:
        The weighted sum of values [ROWS, VALUE_LANES], the largest logit and the sum of the weights
        exp2(logit - largest) [ROWS], all fp32.
    """
    key_lanes = tl.arange(0, KEY_LANES)
    value_lanes = tl.arange(0, VALUE_LANES)
    largest = tl.full([query.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([query.shape[0]], tl.float32)
    output = tl.zeros([query.shape[0], VALUE_LANES], tl.float32)
    for start in range(begin, end, TILE):
        keys = start + tl.arange(0, TILE)
        is_key = keys < end
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        slots = keys % BLOCK_SIZE
        key_rows = blocks * key_block_stride + slots * key_slot_stride
        value_rows = blocks * value_block_stride + slots * value_slot_stride
        key = tl.load(
            key_cache + key_rows[None, :] + key_lanes[:, None],
            mask=is_key[None, :] & (key_lanes < KEY_DIM)[:, None],
            other=0.0,
        ).to(query.dtype)
        logits = tl.dot(query, key, input_precision="ieee") * scale
        if SOFTCAP > 0:
            cap = SOFTCAP * LOG2_E
            # tanh(x) = 2 sigmoid(2x) - 1, which neither end overflows
            logits = cap * (2.0 / (1.0 + tl.exp2(logits * (-2.0 * LOG2_E / cap))) - 1.0)
        visible = is_key[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
        logits = tl.where(visible, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        # A row that has seen nothing yet has no largest logit: -inf - -inf would not be a number.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(logits - base[:, None])
        decay = tl.exp2(largest - base)
        value = tl.load(
            value_cache + value_rows[:, None] + value_lanes[None, :],
            mask=is_key[:, None] & (value_lanes < VALUE_DIM)[None, :],
            other=0.0,
        ).to(query.dtype)
        total = total * decay + tl.sum(weights, 1)
        output = output * decay[:, None]
        output += tl.dot(weights.to(query.dtype), value, input_precision="ieee")
        largest = new_largest
    return output, largest, total


@triton.jit
def _finish(output, largest, total, sinks, heads, is_row, HAS_SINKS: tl.constexpr):
    """Adds the sinks to the weights and divides by their sum: [ROWS, LANES]."""
    if HAS_SINKS:
        sink = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
        base = tl.maximum(largest, sink)
        decay = tl.exp2(largest - base)
        total = total * decay + tl.exp2(sink - base)
        output = output * decay[:, None]
    return output / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _store_rows(
    output,
    result,
    tokens,
    heads,
    is_row,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
):
    """Writes rows [ROWS, LANES] into output, contiguous [num_tokens, HEADS, DIM]."""
    lanes = tl.arange(0, LANES)
    rows = (tokens.to(tl.int64) * HEADS + heads) * DIM
    mask = is_row[:, None] & (lanes < DIM)[None, :]
    tl.store(output + rows[:, None] + lanes[None, :], result.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _query_span(query_start_loc, sequence, IS_DECODE: tl.constexpr):
    """A sequence's first query token, and how many it has."""
    first = sequence
    count = 1
    if not IS_DECODE:
        first = tl.load(query_start_loc + sequence)
        count = tl.load(query_start_loc + sequence + 1) - first
    return first, count


@triton.jit
def _splits(
    context, num_query, LEAST_SPLIT: tl.constexpr, MAX_SPLITS: tl.constexpr, WINDOW: tl.constexpr
):
    """Where the first split of a sequence begins, and how many keys each has.

    It follows from the sequence alone. So its sums have the same order in every batch.
    """
    begin = _visible_from(context - num_query, WINDOW) // LEAST_SPLIT * LEAST_SPLIT
    size = LEAST_SPLIT * tl.cdiv(context - begin, LEAST_SPLIT * MAX_SPLITS)
    return begin, tl.maximum(size, LEAST_SPLIT)


@triton.jit(do_not_specialize=["num_splits", "table_stride"])
def attend_splits(
    output,
    parts,
    part_largest,
    part_total,
    query,
    key_cache,
    value_cache,
    block_tables,
    query_start_loc,
    context_lens,
    sinks,
    scale,
    num_splits,
    table_stride,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    ROWS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_DECODE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Attends from the few query tokens of a sequence to a split of its keys.

    With IS_WHOLE there is but one split, and its result goes to the output. Otherwise it goes to
    `parts` fp32 [num_seqs, KV_HEADS, PART_ROWS, num_splits, VALUE_DIM] and to `part_largest` and
    `part_total` fp32 [num_seqs, KV_HEADS, PART_ROWS, num_splits].
    """
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, num_query = _query_span(query_start_loc, sequence, IS_DECODE)
    if num_query * GROUP > ROWS:
        return  # attend_tiles has it
    context = tl.load(context_lens + sequence)
    begin, size = _splits(context, num_query, LEAST_SPLIT, MAX_SPLITS, WINDOW)
    begin += split * size
    end = tl.minimum(begin + size, context)
    if (not IS_WHOLE) and begin >= end:
        return  # merge_splits knows how many there are

    rows = tl.arange(0, ROWS)
    is_row = rows < num_query * GROUP
    tokens, heads = first + rows // GROUP, kv_head * GROUP + rows % GROUP
    tile = _load_query(
        query, tokens, heads, is_row, query_token_stride, query_head_stride, KEY_DIM, KEY_LANES
    )
    result, largest, total = _attend(
        tile,
        context - num_query + rows // GROUP,
        begin,
        end,
        block_tables + sequence.to(tl.int64) * table_stride,
        key_cache + kv_head.to(tl.int64) * key_head_stride,
        value_cache + kv_head.to(tl.int64) * value_head_stride,
        key_block_stride,
        key_slot_stride,
        value_block_stride,
        value_slot_stride,
        scale,
        BLOCK_SIZE,
        KEY_DIM,
        VALUE_DIM,
        KEY_LANES,
        VALUE_LANES,
        TILE,
        WINDOW,
        SOFTCAP,
    )
    if IS_WHOLE:
        result = _finish(result, largest, total, sinks, heads, is_row, HAS_SINKS)
        _store_rows(output, result, tokens, heads, is_row, KV_HEADS * GROUP, VALUE_DIM, VALUE_LANES)
    else:
        lanes = tl.arange(0, VALUE_LANES)
        part = (sequence.to(tl.int64) * KV_HEADS + kv_head) * PART_ROWS + rows
        part = part * num_splits + split
        tl.store(part_largest + part, largest, mask=is_row)
        tl.store(part_total + part, total, mask=is_row)
        tl.store(
            parts + part[:, None] * VALUE_DIM + lanes[None, :],
            result,
            mask=is_row[:, None] & (lanes < VALUE_DIM)[None, :],
        )


@triton.jit(do_not_specialize=["num_splits"])
def merge_splits(
    output,
    parts,
    part_largest,
    part_total,
    query_start_loc,
    context_lens,
    sinks,
    num_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    ROWS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_DECODE: tl.constexpr,
):
    """Puts the parts of one row together."""
    sequence, row, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, num_query = _query_span(query_start_loc, sequence, IS_DECODE)
    if num_query * GROUP > ROWS or row >= num_query * GROUP:
        return
    context = tl.load(context_lens + sequence)
    begin, size = _splits(context, num_query, LEAST_SPLIT, MAX_SPLITS, WINDOW)

    splits, lanes = tl.arange(0, MAX_SPLITS), tl.arange(0, VALUE_LANES)
    is_split = splits < tl.cdiv(context - begin, size)
    part = (sequence.to(tl.int64) * KV_HEADS + kv_head) * PART_ROWS + row
    part = part * num_splits + splits
    largest = tl.load(part_largest + part, mask=is_split, other=float("-inf"))
    total = tl.load(part_total + part, mask=is_split, other=0.0)
    values = tl.load(
        parts + part[:, None] * VALUE_DIM + lanes[None, :],
        mask=is_split[:, None] & (lanes < VALUE_DIM)[None, :],
        other=0.0,
    )
    overall = tl.max(largest, 0)
    weights = tl.exp2(largest - tl.where(overall == float("-inf"), 0.0, overall))

    # The row as a set of one, which is what the helpers take.
    zero = tl.zeros([1], tl.int32)
    tokens, heads = zero + first + row // GROUP, zero + kv_head * GROUP + row % GROUP
    is_row = zero == 0
    result = _finish(
        tl.sum(values * weights[:, None], 0)[None, :],
        zero + overall,
        zero + tl.sum(total * weights, 0),
        sinks,
        heads,
        is_row,
        HAS_SINKS,
    )
    _store_rows(output, result, tokens, heads, is_row, KV_HEADS * GROUP, VALUE_DIM, VALUE_LANES)


@triton.jit
def _owner(query_start_loc, num_seqs, tile, TOKENS: tl.constexpr):
    """The sequence that a tile belongs to, and the number of its first tile.

    Sequence i has the tiles from start(i) // TOKENS + i up to those of the next one: at least as
    many as it needs, and at most one too many. So the grid needs no number that only the device
    knows.
    """
    low = tile * 0
    high = low + num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        is_before = tl.load(query_start_loc + middle) // TOKENS + middle <= tile
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle)
    return low, tl.load(query_start_loc + low) // TOKENS + low


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def attend_tiles(
    output,
    query,
    key_cache,
    value_cache,
    block_tables,
    query_start_loc,
    context_lens,
    sinks,
    scale,
    num_seqs,
    table_stride,
    query_token_stride,
    query_head_stride,
    key_block_stride,
    key_slot_stride,
    key_head_stride,
    value_block_stride,
    value_slot_stride,
    value_head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Attends from a tile of query tokens to all keys that they see.

    Sequences whose rows fit into SPLIT_ROWS are left to attend_splits.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    TOKENS: tl.constexpr = ROWS // GROUP
    sequence, first_tile = _owner(query_start_loc, num_seqs, tile, TOKENS)
    first, num_query = _query_span(query_start_loc, sequence, False)
    skipped = (tile - first_tile) * TOKENS
    if num_query * GROUP <= SPLIT_ROWS or skipped >= num_query:
        return
    context = tl.load(context_lens + sequence)
    num_tokens = tl.minimum(num_query - skipped, TOKENS)
    position = context - num_query + skipped

    rows = tl.arange(0, ROWS)
    is_row = rows < num_tokens * GROUP
    tokens, heads = first + skipped + rows // GROUP, kv_head * GROUP + rows % GROUP
    block = _load_query(
        query, tokens, heads, is_row, query_token_stride, query_head_stride, KEY_DIM, KEY_LANES
    )
    result, largest, total = _attend(
        block,
        position + rows // GROUP,
        _visible_from(position, WINDOW) // TILE * TILE,
        position + num_tokens,
        block_tables + sequence.to(tl.int64) * table_stride,
        key_cache + kv_head.to(tl.int64) * key_head_stride,
        value_cache + kv_head.to(tl.int64) * value_head_stride,
        key_block_stride,
        key_slot_stride,
        value_block_stride,
        value_slot_stride,
        scale,
        BLOCK_SIZE,
        KEY_DIM,
        VALUE_DIM,
        KEY_LANES,
        VALUE_LANES,
        TILE,
        WINDOW,
        SOFTCAP,
    )
    result = _finish(result, largest, total, sinks, heads, is_row, HAS_SINKS)
    _store_rows(output, result, tokens, heads, is_row, KV_HEADS * GROUP, VALUE_DIM, VALUE_LANES)
