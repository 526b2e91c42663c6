/* Paged attention: weighted sums of values, merged over the splits of a sequence. */

/* values = values * decay + weights @ V for one register tile. */
INLINE void value_tile(const int rows, const int vectors, const Worker *w, int64_t row, int64_t c,
                       int64_t n) {
    const int64_t d = w->head_size;
    vf acc[MR][4];
    const float *p = w->scores + row * SLD;
    float *values = w->values + row * DLD + c;
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            acc[r][v] = load(values + r * DLD + v * W) * w->decay[row + r];
    for (int64_t t = 0; t < n; t++) {
        vf b[4];
        UNROLL for (int v = 0; v < vectors; v++) b[v] = load(w->value_rows[t] + c + v * W);
        /* with few rows memory is the limit: prefetch the next keys */
        if (rows <= DIRECT_ROWS && c == 0 && t % BURST == 0)
            prefetch_rows(w->next_keys + t, BURST, d);
        UNROLL for (int r = 0; r < rows; r++) {
            vf a = splat(p[r * SLD + t]);
            UNROLL for (int v = 0; v < vectors; v++) acc[r][v] = madd(a, b[v], acc[r][v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) store(values + r * DLD + v * W, acc[r][v]);
}

static void value_pair(int rows, const Worker *w, int64_t row, int64_t c, int64_t n) {
#define CALL(k) value_tile(k, 2, w, row, c, n)
    switch (rows) { ROW_CASES(CALL) }
#undef CALL
}

static void value_single(int rows, const Worker *w, int64_t row, int64_t c, int64_t n) {
#define CALL(k) value_tile(k, 1, w, row, c, n)
    switch (rows) { ROW_CASES(CALL) }
#undef CALL
}

static void value_quad(int rows, const Worker *w, int64_t row, int64_t c, int64_t n) {
    switch (rows) {
        case 1: value_tile(1, 4, w, row, c, n); break;
        case 2: value_tile(2, 4, w, row, c, n); break;
#if MR == 12
        case 3: value_tile(3, 4, w, row, c, n); break;
        case 4: value_tile(4, 4, w, row, c, n); break;
#endif
        default:
            value_pair(rows, w, row, c, n);
            value_pair(rows, w, row, c + 2 * W, n);
    }
}

static void add_values(const Worker *w, int64_t from, int64_t to, int64_t width, int64_t n) {
    int64_t tiles = ceil_div(to - from, MR);
    for (int64_t t = 0; t < tiles; t++) {
        int64_t a = from + (to - from) * t / tiles, b = from + (to - from) * (t + 1) / tiles;
        int64_t c = 0;
        int rows = (int)(b - a);
        for (; rows <= DIRECT_ROWS && c + 4 * W <= width; c += 4 * W) value_quad(rows, w, a, c, n);
        for (; c + 2 * W <= width; c += 2 * W) value_pair(rows, w, a, c, n);
        for (; c < width; c += W) value_single(rows, w, a, c, n);
    }
}

/* Scores, softmax and weighted sum for a run of at most TILE positions. Rows that see none of them
 * are left out: queries before them, and those whose window or chunk starts after them. */
static void attend(const Attention *a, const Tile *t, Worker *w, int64_t from, int64_t n) {
    int64_t g = group(a), d = a->head_size, rows = t->count * g;
    int64_t first = max64(0, from - t->position);
    int64_t last = t->count;
    if (a->window) last = min64(last, from + n - 1 + a->window - t->position);
    if (a->chunk) last = min64(last, ((from + n - 1) / a->chunk + 1) * a->chunk - t->position);
    if (first >= last) return;
    score(w, first * g, last * g, d, n, rows);
    if (a->slopes) add_biases(a, t, w, first, last, from, n);
    for (int64_t q = first; q < last; q++) {
        int64_t position = t->position + q;
        int64_t low = max64(0, visible_from(a, position) - from);
        int64_t high = min64(n, position + 1 - from);
        for (int64_t r = q * g; r < (q + 1) * g; r++) mask_row(w, r, n, low, high, a->softcap);
    }
    /* one loop after the other: within one each row would wait for its maximum */
    find_decays(w, first * g, last * g);
    for (int64_t r = first * g; r < last * g; r++) weigh_row(w, r, n);
    add_values(w, first * g, last * g, padded(d), n);
}

/* Divides by the sum, the sink's share included, and writes the head's row of the output. */
static void finish_row(const Attention *a, const Tile *t, int64_t r, const float *values, float top,
                       float sum) {
    int64_t g = group(a), head = t->kv_head * g + r % g, d = a->head_size;
    float *out = a->out + ((t->query + r / g) * a->num_heads + head) * d;
    float keep = 1.0f;
    if (a->sinks) {
        float max = a->sinks[head] > top ? a->sinks[head] : top;
        keep = exp_1(top - max);
        sum = sum * keep + exp_1(a->sinks[head] - max);
    }
    float factor = sum == 0.0f ? 0.0f : keep / sum; /* a row that sees nothing yields zeros */
    for (int64_t i = 0; i < d; i++) out[i] = values[i] * factor;
}

/* The last item that no worker has taken, or NULL: later tiles of a sequence see more positions, so
 * they start first. */
static const Item *take_item(const Plan *plan, atomic_int_fast64_t *taken) {
    int64_t i = atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
    return i < plan->num_items ? plan->items + plan->num_items - 1 - i : NULL;
}

static Range item_range(const Plan *plan, const Item *item) {
    const Tile *t = plan->tiles + item->tile;
    if (t->num_items == 1) return (Range){t->low, t->high};
    int64_t split = t->low / SPLIT + item->index;
    return (Range){max64(t->low, split * SPLIT), min64(t->high, (split + 1) * SPLIT)};
}

static void find_first_rows(const Attention *a, const Plan *plan, const Item *item, Worker *w) {
    Range r = item_range(plan, item);
    find_rows(a, plan->tiles + item->tile, r.from, min64(TILE, r.to - r.from), w);
}

/* Adds a split's row to the row of the splits before it. To a row that has seen nothing it adds
 * nothing but itself, and one that has seen nothing adds nothing: both are exact. Not inlined, so
 * that all rows round alike. */
static __attribute__((noinline)) void merge_row(float *top, float *sum, float *values,
                                                float part_top, float part_sum,
                                                const float *part_values, int64_t width) {
    float max = part_top > *top ? part_top : *top;
    float keep = exp_1(*top - max), share = exp_1(part_top - max);
    *top = max;
    *sum = *sum * keep + part_sum * share;
    for (int64_t i = 0; i < width; i += W)
        store(values + i, load(values + i) * keep + load(part_values + i) * share);
}

/* Merges the split that is complete into those before it, and starts the next. */
static void end_split(Worker *w, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        float *values = w->merged_values + r * DLD, *part = w->values + r * DLD;
        if (w->has_merged) {
            merge_row(w->merged_top + r, w->merged_sum + r, values, w->top[r], w->sum[r], part,
                      padded(w->head_size));
        } else {
            w->merged_top[r] = w->top[r];
            w->merged_sum[r] = w->sum[r];
            memcpy(values, part, (size_t)padded(w->head_size) * sizeof(float));
        }
    }
    w->has_merged = 1;
    clear_sums(w, rows);
}

/* Stores the sums of an item, one of several of its tile: they are merged later. */
static void store_partial(const Attention *a, const Plan *plan, const Worker *w,
                          const Item *item) {
    const Tile *t = plan->tiles + item->tile;
    int64_t rows = t->count * group(a), width = padded(a->head_size);
    float *to = plan->partials + t->partial + item->index * partial_size(a, rows);
    for (int64_t r = 0; r < rows; r++, to += width + 2) {
        to[0] = w->top[r];
        to[1] = w->sum[r];
        memcpy(to + 2, w->values + r * DLD, (size_t)width * sizeof(float));
    }
}

/* Stores the result of an item: in the output, or to be merged. */
static void finish_item(const Attention *a, const Plan *plan, Worker *w, const Item *item) {
    const Tile *t = plan->tiles + item->tile;
    if (t->num_items > 1) {
        store_partial(a, plan, w, item);
        return;
    }
    int64_t rows = t->count * group(a);
    int is_merged = w->has_merged;
    if (is_merged) end_split(w, rows);
    const float *values = is_merged ? w->merged_values : w->values;
    const float *top = is_merged ? w->merged_top : w->top;
    const float *sum = is_merged ? w->merged_sum : w->sum;
    for (int64_t r = 0; r < rows; r++) finish_row(a, t, r, values + r * DLD, top[r], sum[r]);
}

/* Computes items until none is left. The next item is taken during the last run of positions of the
 * one before, so that its first keys are prefetched: with few rows memory is the limit. */
static void run_items(const Attention *a, const Plan *plan, Worker *w,
                      atomic_int_fast64_t *taken) {
    const Item *item = take_item(plan, taken), *next;
    if (item) find_first_rows(a, plan, item, w);
    for (; item; item = next) {
        const Tile *t = plan->tiles + item->tile;
        Range r = item_range(plan, item);
        load_queries(a, t, w);
        int64_t from = r.from, n = min64(TILE, r.to - from);
        prefetch_rows(w->next_keys, n, a->head_size);
        do {
            int64_t after = from + n, num_next = min64(TILE, r.to - after);
            advance(a, n, w);
            next = num_next > 0 ? item : take_item(plan, taken);
            if (next && next != item)
                find_first_rows(a, plan, next, w);
            else
                find_rows(a, t, after, num_next, w);
            if (n > 0) attend(a, t, w, from, n);
            if (after % SPLIT == 0 && num_next > 0) end_split(w, t->count * group(a));
            from = after;
            n = num_next;
        } while (n > 0);
        finish_item(a, plan, w, item);
    }
}

static void merge_splits(const Attention *a, const Plan *plan, int64_t index) {
    const Tile *t = plan->tiles + index;
    int64_t rows = t->count * group(a), width = padded(a->head_size);
    int64_t stride = partial_size(a, rows);
    for (int64_t r = 0; r < rows; r++) {
        float *row = plan->partials + t->partial + r * (width + 2);
        for (int64_t i = 1; i < t->num_items; i++) {
            const float *part = row + i * stride;
            merge_row(row, row + 1, row + 2, part[0], part[1], part + 2, width);
        }
        finish_row(a, t, r, row + 2, row[0], row[1]);
    }
}

/* Returns 0, or -1 if out of memory. */
EXPORT int tw_paged_attention(float *out, const float *query, int64_t query_token,
                              int64_t query_head, const float *key_cache, const float *value_cache,
                              int64_t block_stride, int64_t token_stride, int64_t head_stride,
                              const int32_t *block_tables, int64_t table_stride,
                              const int32_t *query_start, const int32_t *context_lens,
                              int64_t num_seqs, int64_t num_heads, int64_t num_kv_heads,
                              int64_t head_size, int64_t block_size, float scale, int64_t window,
                              int64_t chunk, float softcap, const float *sinks, const float *slopes,
                              float rounded_scale, int num_threads) {
    const Attention a = {out, query, query_token, query_head, key_cache, value_cache, block_stride,
                         token_stride, head_stride, block_tables, table_stride, query_start,
                         context_lens, num_seqs, num_heads, num_kv_heads, head_size, block_size,
                         scale, window, chunk, softcap, sinks, slopes, rounded_scale};
    Plan plan;
    if (make_plan(&a, num_threads, &plan)) return -1;
    if (plan.num_items == 1 || plan.work < SERIAL_WORK) num_threads = 1;
    atomic_int_fast64_t next_item = 0, next_tile = 0;
    PARALLEL {
        Worker *w = make_worker(&a, &plan);
        run_items(&a, &plan, w, &next_item);
        if (plan.num_partials) {
            BARRIER
            int64_t i;
            while ((i = atomic_fetch_add_explicit(&next_tile, 1, memory_order_relaxed)) <
                   plan.num_tiles)
                if (plan.tiles[i].num_items > 1) merge_splits(&a, &plan, i);
        }
    }
    return 0;
}
