"""Triton kernels of attention over the paged cache; `triton_attention.py` launches them.

Query heads that share a key head are computed together, so that each key is read once: a program
computes rows, of which row r is the query token r // GROUP with the head r % GROUP of its group.
Sequences with few query tokens (decoding, with draft tokens) have few rows and many keys, and are
split along the keys; all others are cut into tiles of rows::

    attend_splits  (sequence, key head, split)          rows x keys of splits  -> parts of results
    merge_splits   (sequence, head of group, key head)  the parts of a row     -> its result
    attend_tiles   (tile, key head)                     rows x all their keys  -> the results

A group of query heads may be too large for the registers of a program; then SHARES programs share a
key head, and for them it counts as so many key heads, of smaller groups.

In memory a cache is [num_blocks, KV_HEADS // SHARES, BLOCK_SIZE, head size]. Kernels are compiled
for that: with strides as arguments, heads of 72 or 120 would be loaded two bytes at a time.

Logits have a factor of log2(e), because GPUs have exp2 and not exp. Sums are fp32. A row that sees
no key gives zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SEQUENCES_AT_ONCE = tl.constexpr(256)  # in the search for a tile's sequence


@triton.jit
def _visible_from(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first key position that the query at `position` sees."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    if CHUNK > 0:
        first = tl.maximum(position // CHUNK * CHUNK, first)
    return first


@triton.jit
def _to_bfloat16(x):
    """Finite fp32 numbers rounded to bfloat16, the even one of two, as fp32."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _bias(slopes, positions, keys, ROUNDED_SCALE: tl.constexpr):
    """The linear bias [ROWS, KEYS] of heads with slopes [ROWS]; by the distance if it is exact."""
    if ROUNDED_SCALE > 0:
        places = _to_bfloat16(keys.to(tl.float32))
        bias = _to_bfloat16(slopes[:, None] * places[None, :]) * ROUNDED_SCALE
    else:
        bias = slopes[:, None] * (keys[None, :] - positions[:, None]).to(tl.float32)
    return bias


@triton.jit
def _load_query(
    query, tokens, heads, is_row, token_stride, head_stride, DIM: tl.constexpr, LANES: tl.constexpr
):
    """Loads the query rows [ROWS, LANES], with zeros in other rows and lanes."""
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
    kv_head,
    key_cache,
    value_cache,
    scale,
    slopes,
    heads,
    is_row,
    KV_HEADS: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    ROUNDED_SCALE: tl.constexpr,
):
    """Attends from query [ROWS, KEY_LANES] to the key positions begin … end - 1.

    `positions` and `heads` [ROWS] are those of the rows, `table` points to the sequence's blocks.
    Slots outside are not read, and may hold anything, even NaN.

    Returns:
        The weighted sum of values [ROWS, VALUE_LANES], the largest logit and the sum of the weights
        exp2(logit - largest) [ROWS], all fp32.
    """
    key_cache += (kv_head // SHARES).to(tl.int64) * BLOCK_SIZE * KEY_DIM
    value_cache += (kv_head // SHARES).to(tl.int64) * BLOCK_SIZE * VALUE_DIM
    key_lanes = tl.arange(0, KEY_LANES)
    value_lanes = tl.arange(0, VALUE_LANES)
    if HAS_SLOPES:
        row_slopes = tl.load(slopes + heads, mask=is_row, other=0.0)
    largest = tl.full([query.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([query.shape[0]], tl.float32)
    output = tl.zeros([query.shape[0], VALUE_LANES], tl.float32)
    for start in range(begin, end, TILE):
        keys = start + tl.arange(0, TILE)
        is_key = keys < end
        blocks = tl.load(table + keys // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        rows = blocks * (KV_HEADS // SHARES * BLOCK_SIZE) + keys % BLOCK_SIZE
        key = tl.load(
            key_cache + rows[None, :] * KEY_DIM + key_lanes[:, None],
            mask=is_key[None, :] & (key_lanes < KEY_DIM)[:, None],
            other=0.0,
        ).to(query.dtype)
        logits = tl.dot(query, key, input_precision="ieee") * scale
        if HAS_SLOPES:
            logits += _bias(row_slopes, positions, keys, ROUNDED_SCALE) * LOG2_E
        if SOFTCAP > 0:
            cap = SOFTCAP * LOG2_E
            # tanh(x) = 2 sigmoid(2x) - 1, which does not overflow at either end
            logits = cap * (2.0 / (1.0 + tl.exp2(logits * (-2.0 * LOG2_E / cap))) - 1.0)
        visible = is_key[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
        if CHUNK > 0:
            visible = visible & (keys[None, :] >= (positions // CHUNK * CHUNK)[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        # A row that has not seen a key yet has -inf as its largest: -inf - -inf would be NaN.
        base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(logits - base[:, None])
        decay = tl.exp2(largest - base)
        value = tl.load(
            value_cache + rows[:, None] * VALUE_DIM + value_lanes[None, :],
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
    """Adds the sinks to the sum of the weights and divides by it: [ROWS, LANES]."""
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
    """The index of a sequence's first query token, and the number of its query tokens."""
    first = sequence
    count = 1
    if not IS_DECODE:
        first = tl.load(query_start_loc + sequence)
        count = tl.load(query_start_loc + sequence + 1) - first
    return first, count


@triton.jit
def _splits(
    context,
    num_query,
    LEAST_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The first key of a sequence's first split, the keys per split, and the number of splits.

    They depend on the sequence alone, so its sums have the same order in every batch. A head has at
    most MAX_SPLITS partial results, which are divided among the query tokens.
    """
    begin = _visible_from(context - num_query, WINDOW, CHUNK) // LEAST_SPLIT * LEAST_SPLIT
    most = MAX_SPLITS // tl.maximum(num_query, 1)
    size = LEAST_SPLIT * tl.cdiv(context - begin, LEAST_SPLIT * most)
    size = tl.maximum(size, LEAST_SPLIT)
    return begin, size, tl.cdiv(context - begin, size)


@triton.jit(do_not_specialize=["num_parts", "table_stride"])
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
    slopes,
    scale,
    num_parts,
    table_stride,
    query_token_stride,
    query_head_stride,
    KV_HEADS: tl.constexpr,
    SHARES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    ROUNDED_SCALE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_DECODE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Attends from the few query tokens of a sequence to every `num_programs(2)`-th of its splits.

    With IS_WHOLE there is a single split, whose result is written to the output. Otherwise results
    are written to `parts` fp32 [num_seqs, KV_HEADS, num_parts, VALUE_DIM], and to `part_largest`
    and `part_total` fp32 [num_seqs, KV_HEADS, num_parts]: row after row, the parts of a row next to
    each other.
    """
    sequence, kv_head = tl.program_id(0), tl.program_id(1)
    first, num_query = _query_span(query_start_loc, sequence, IS_DECODE)
    if num_query > SPLIT_TOKENS:
        return  # attend_tiles computes it
    context = tl.load(context_lens + sequence)
    begin, size, count = _splits(context, num_query, LEAST_SPLIT, MAX_SPLITS, WINDOW, CHUNK)
    if IS_WHOLE:
        count = 1  # even if there is no key to see
    if tl.program_id(2) >= count:
        return

    rows = tl.arange(0, ROWS)
    is_row = rows < num_query * GROUP
    tokens, heads = first + rows // GROUP, kv_head * GROUP + rows % GROUP
    tile = _load_query(
        query, tokens, heads, is_row, query_token_stride, query_head_stride, KEY_DIM, KEY_LANES
    )
    for split in range(tl.program_id(2), count, tl.num_programs(2)):
        result, largest, total = _attend(
            tile,
            context - num_query + rows // GROUP,
            begin + split * size,
            tl.minimum(begin + (split + 1) * size, context),
            block_tables + sequence.to(tl.int64) * table_stride,
            kv_head,
            key_cache,
            value_cache,
            scale,
            slopes,
            heads,
            is_row,
            KV_HEADS,
            SHARES,
            BLOCK_SIZE,
            KEY_DIM,
            VALUE_DIM,
            KEY_LANES,
            VALUE_LANES,
            TILE,
            WINDOW,
            CHUNK,
            SOFTCAP,
            HAS_SLOPES,
            ROUNDED_SCALE,
        )
        if IS_WHOLE:
            result = _finish(result, largest, total, sinks, heads, is_row, HAS_SINKS)
            _store_rows(
                output, result, tokens, heads, is_row, KV_HEADS * GROUP, VALUE_DIM, VALUE_LANES
            )
        else:
            lanes = tl.arange(0, VALUE_LANES)
            part = (sequence.to(tl.int64) * KV_HEADS + kv_head) * num_parts + rows * count + split
            tl.store(part_largest + part, largest, mask=is_row)
            tl.store(part_total + part, total, mask=is_row)
            tl.store(
                parts + part[:, None] * VALUE_DIM + lanes[None, :],
                result,
                mask=is_row[:, None] & (lanes < VALUE_DIM)[None, :],
            )


@triton.jit(do_not_specialize=["num_parts"])
def merge_splits(
    output,
    parts,
    part_largest,
    part_total,
    query_start_loc,
    context_lens,
    sinks,
    num_parts,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    IS_DECODE: tl.constexpr,
):
    """Combines the partial results of a head's rows."""
    sequence, kv_head = tl.program_id(0), tl.program_id(2)
    first, num_query = _query_span(query_start_loc, sequence, IS_DECODE)
    if num_query > SPLIT_TOKENS:
        return
    context = tl.load(context_lens + sequence)
    _, _, count = _splits(context, num_query, LEAST_SPLIT, MAX_SPLITS, WINDOW, CHUNK)

    splits, lanes = tl.arange(0, MAX_SPLITS), tl.arange(0, VALUE_LANES)
    is_split = splits < count
    for row in range(tl.program_id(1), num_query * GROUP, GROUP):
        part = (sequence.to(tl.int64) * KV_HEADS + kv_head) * num_parts + row * count + splits
        largest = tl.load(part_largest + part, mask=is_split, other=float("-inf"))
        total = tl.load(part_total + part, mask=is_split, other=0.0)
        values = tl.load(
            parts + part[:, None] * VALUE_DIM + lanes[None, :],
            mask=is_split[:, None] & (lanes < VALUE_DIM)[None, :],
            other=0.0,
        )
        overall = tl.max(largest, 0)
        weights = tl.exp2(largest - tl.where(overall == float("-inf"), 0.0, overall))

        # The helpers take a block of rows: here a block of one.
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
def _owner(query_start_loc, num_seqs, tile, SPLIT_TOKENS: tl.constexpr, TOKENS: tl.constexpr):
    """The sequence that a tile belongs to, or -1, and how many tiles of it come before its rows.

    Tiles are assigned to the sequences that are not split, one sequence after the other, and within
    a sequence from its end: its last rows see the most keys, so they start first. Surplus tiles
    belong to no sequence.
    """
    owner, skipped = tile * 0 - 1, tile * 0
    assigned = tile * 0
    for begin in tl.range(0, num_seqs, SEQUENCES_AT_ONCE, num_stages=1):
        sequences = begin + tl.arange(0, SEQUENCES_AT_ONCE)
        starts = query_start_loc + sequences
        is_sequence = sequences < num_seqs
        first = tl.load(starts, mask=is_sequence, other=0)
        num_query = tl.load(starts + 1, mask=is_sequence, other=0) - first
        tiles = tl.where(num_query > SPLIT_TOKENS, tl.cdiv(num_query, TOKENS), 0)
        ends = assigned + tl.cumsum(tiles, 0)
        is_owner = (ends - tiles <= tile) & (tile < ends)
        owner += tl.sum(tl.where(is_owner, sequences + 1, 0), 0)
        skipped += tl.sum(tl.where(is_owner, ends - 1 - tile, 0), 0)
        assigned += tl.sum(tiles, 0)
    return owner, skipped


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
    slopes,
    scale,
    num_seqs,
    table_stride,
    query_token_stride,
    query_head_stride,
    KV_HEADS: tl.constexpr,
    SHARES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    ROUNDED_SCALE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """Attends from a tile of query tokens to all keys that they see.

    Sequences of up to SPLIT_TOKENS query tokens are computed by attend_splits.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(1)
    sequence, skipped = _owner(query_start_loc, num_seqs, tl.program_id(0), SPLIT_TOKENS, TOKENS)
    if sequence < 0:
        return
    first, num_query = _query_span(query_start_loc, sequence, False)
    skipped *= TOKENS
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
        _visible_from(position, WINDOW, CHUNK) // TILE * TILE,
        position + num_tokens,
        block_tables + sequence.to(tl.int64) * table_stride,
        kv_head,
        key_cache,
        value_cache,
        scale,
        slopes,
        heads,
        is_row,
        KV_HEADS,
        SHARES,
        BLOCK_SIZE,
        KEY_DIM,
        VALUE_DIM,
        KEY_LANES,
        VALUE_LANES,
        TILE,
        WINDOW,
        CHUNK,
        SOFTCAP,
        HAS_SLOPES,
        ROUNDED_SCALE,
    )
    result = _finish(result, largest, total, sinks, heads, is_row, HAS_SINKS)
    _store_rows(output, result, tokens, heads, is_row, KV_HEADS * GROUP, VALUE_DIM, VALUE_LANES)
