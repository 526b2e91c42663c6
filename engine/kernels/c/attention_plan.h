/* Paged attention: how its work is divided, and what a worker has.
 *
 * Work is cut twice. A tile is a run of queries of one sequence with all query heads of one KV
 * head; its rows are (query, head) pairs, query-major. An item is a tile against one split of the
 * KV range the tile can see:
 *
 *     position:   0 ............ context - queries ............ context
 *     KV range:       [ split 0 | split 1 | ... up to the last query of the tile ]
 *     tile:                                 [ q0 .. q0 + count )
 *
 * Each split of a row is summed up by itself: (max, sum, values). Then the splits are merged in
 * order. Where a tile's splits are items of their own, they are merged after a barrier; otherwise
 * whoever computes the tile merges each when it is complete. A split in which a row sees nothing
 * changes no bit of the row, so it does not matter which other rows are in the tile.
 */

#define TILE 64            /* cache positions processed at once */
#define BURST 4            /* rows prefetched at once */
#define LINE (CACHE_LINE / 4) /* floats */
#define MAX_D 576          /* head size: the latents of DeepSeek V3, with a rotated key */
#define DLD (MAX_D + 16)   /* row stride of head-size scratch rows */
#define SLD (TILE + 16)    /* row stride of the score rows */
#define SCORE_ROWS (MR / 2) /* rows of a tile of scores, which has two accumulators for each */
#define DIRECT_ROWS 4      /* for up to this many query rows, keys are not transposed */
#define TARGET_ROWS 96     /* query rows (positions x heads of the group) of a prefill tile */
#define SPLIT 512          /* positions of a KV split; a multiple of TILE */
#define ENOUGH_TILES 8     /* of one sequence, for threads to share its work without splits */
#define MASKED (-1e30f)    /* in place of minus infinity; keeps every exp argument finite */

EXPORT int tw_max_head_size(void) { return MAX_D; }

typedef struct {
    float *out; /* [T, H, D] */
    const float *query;
    int64_t query_token, query_head;
    const float *key_cache, *value_cache; /* logically [blocks, block_size, Hkv, D] */
    int64_t block_stride, token_stride, head_stride;
    const int32_t *block_tables;
    int64_t table_stride;
    const int32_t *query_start, *context_lens;
    int64_t num_seqs, num_heads, num_kv_heads, head_size, block_size;
    float scale;
    int64_t window; /* 0: none */
    int64_t chunk;  /* likewise; a query sees no position before its own chunk */
    float softcap;  /* likewise */
    const float *sinks;
    const float *slopes; /* of a bias by the positions of keys; NULL: none */
    float rounded_scale; /* of a bias that is rounded; 0: it is exact */
} Attention;

typedef struct {
    int32_t sequence, kv_head;
    int64_t query, count; /* rows of the query tensor */
    int64_t position;     /* of the first query */
    int64_t low, high;    /* KV range that any row of the tile sees; low is a multiple of TILE */
    int64_t num_items;    /* one, or one for each split */
    int64_t partial; /* offset of the first split's partial result, in floats */
} Tile;

typedef struct {
    int64_t tile, index; /* of the item within the tile */
} Item;

typedef struct {
    Tile *tiles;
    Item *items;
    float *partials;
    char *workers; /* per-thread scratch */
    int64_t num_tiles, num_items, num_partials, worker_bytes;
    int64_t work; /* multiply-adds of the scores */
} Plan;

typedef struct {
    float *query;  /* [rows, DLD], scaled */
    float *values; /* [rows, DLD], the running weighted sum */
    float *scores; /* [rows, SLD] */
    float *keys;   /* [D, TILE] transposed, or [TILE, DLD] where rows need padding */
    float *staged; /* [TILE, DLD] padded values */
    float *top, *sum, *next_top, *decay;
    float *merged_values, *merged_top, *merged_sum; /* of the tile's splits before this one */
    int has_merged;                                 /* whether there are any */
    int64_t head_size;
    const float *key_rows[TILE], *value_rows[TILE];
    const float *next_keys[TILE], *next_values[TILE]; /* of the positions after these */
} Worker;

INLINE int64_t padded(int64_t d) { return ceil_div(d, W) * W; }
INLINE int64_t group(const Attention *a) { return a->num_heads / a->num_kv_heads; }
INLINE int64_t tile_queries(const Attention *a) { return max64(1, TARGET_ROWS / group(a)); }
INLINE int64_t partial_size(const Attention *a, int64_t rows) {
    return rows * (padded(a->head_size) + 2);
}

/* The first position that the query at a position sees; it never falls as positions rise. */
INLINE int64_t visible_from(const Attention *a, int64_t position) {
    int64_t low = a->window ? max64(0, position - a->window + 1) : 0;
    return a->chunk ? max64(low, position / a->chunk * a->chunk) : low;
}

/* Splits that a range touches, at least one. */
INLINE int64_t num_splits(int64_t low, int64_t high) {
    return max64(1, ceil_div(high, SPLIT) - low / SPLIT);
}

static void plan_sequence(const Attention *a, int64_t s, Plan *plan, int write) {
    int64_t start = a->query_start[s], queries = a->query_start[s + 1] - start;
    int64_t first = a->context_lens[s] - queries, step = tile_queries(a);
    int64_t tiles = ceil_div(queries, step) * a->num_kv_heads;
    for (int64_t h = 0; h < a->num_kv_heads; h++)
        for (int64_t q = 0; q < queries; q += step) {
            int64_t count = min64(step, queries - q), position = first + q;
            int64_t high = max64(0, position + count);
            int64_t low = min64(high, visible_from(a, position)) / TILE * TILE;
            int64_t items = queries > 1 && tiles >= ENOUGH_TILES ? 1 : num_splits(low, high);
            if (write) {
                for (int64_t i = 0; i < items; i++)
                    plan->items[plan->num_items + i] = (Item){plan->num_tiles, i};
                plan->tiles[plan->num_tiles] = (Tile){(int32_t)s, (int32_t)h, start + q, count,
                    position, low, high, items, plan->num_partials};
            }
            plan->work += count * group(a) * (high - low) * a->head_size;
            plan->num_tiles++;
            plan->num_items += items;
            if (items > 1) plan->num_partials += items * partial_size(a, count * group(a));
        }
}

/* Counts, allocates, then writes the work list. */
static int make_plan(const Attention *a, int num_threads, Plan *plan) {
    memset(plan, 0, sizeof *plan);
    for (int64_t s = 0; s < a->num_seqs; s++) plan_sequence(a, s, plan, 0);
    size_t rows = (size_t)(tile_queries(a) * group(a));
    size_t worker = rounded(sizeof(Worker)) + 3 * rounded(rows * DLD * 4) +
                    rounded(rows * SLD * 4) + 2 * rounded(TILE * DLD * 4) + 6 * rounded(rows * 4);
    size_t tiles = rounded((size_t)plan->num_tiles * sizeof(Tile));
    size_t items = rounded((size_t)plan->num_items * sizeof(Item));
    size_t partials = rounded((size_t)plan->num_partials * 4);
    char *memory = scratch(tiles + items + partials + worker * (size_t)num_threads);
    if (!memory) return -1;
    *plan = (Plan){(Tile *)memory, (Item *)(memory + tiles), (float *)(memory + tiles + items),
                   memory + tiles + items + partials, 0, 0, 0, (int64_t)worker, 0};
    for (int64_t s = 0; s < a->num_seqs; s++) plan_sequence(a, s, plan, 1);
    return 0;
}

static Worker *make_worker(const Attention *a, const Plan *plan) {
    char *at = plan->workers + (int64_t)thread_id() * plan->worker_bytes;
    size_t rows = (size_t)(tile_queries(a) * group(a));
    Worker *w = (Worker *)at;
    at += rounded(sizeof(Worker));
#define TAKE(field, floats) (w->field = (float *)at, at += rounded((floats) * 4))
    w->head_size = a->head_size;
    TAKE(query, rows * DLD);
    TAKE(values, rows * DLD);
    TAKE(scores, rows * SLD);
    TAKE(keys, TILE * DLD);
    TAKE(staged, TILE * DLD);
    TAKE(top, rows);
    TAKE(sum, rows);
    TAKE(next_top, rows);
    TAKE(decay, rows);
    TAKE(merged_values, rows * DLD);
    TAKE(merged_top, rows);
    TAKE(merged_sum, rows);
#undef TAKE
    return w;
}

/* Starts the sums of a split. */
static void clear_sums(Worker *w, int64_t rows) {
    for (int64_t r = 0; r < rows; r++) {
        memset(w->values + r * DLD, 0, (size_t)padded(w->head_size) * sizeof(float));
        w->top[r] = MASKED;
        w->sum[r] = 0.0f;
    }
}

static void load_queries(const Attention *a, const Tile *t, Worker *w) {
    int64_t g = group(a), d = a->head_size, width = padded(d);
    w->has_merged = 0;
    clear_sums(w, t->count * g);
    for (int64_t r = 0; r < t->count * g; r++) {
        const float *q = a->query + (t->query + r / g) * a->query_token +
                         (t->kv_head * g + r % g) * a->query_head;
        float *to = w->query + r * DLD;
        for (int64_t i = 0; i < d; i++) to[i] = q[i] * a->scale;
        for (int64_t i = d; i < width; i++) to[i] = 0.0f;
    }
}

/* Row pointers of positions [from, from + n); no other function uses the block table. */
static void find_rows(const Attention *a, const Tile *t, int64_t from, int64_t n, Worker *w) {
    const int32_t *table = a->block_tables + t->sequence * a->table_stride;
    int64_t block = from / a->block_size, offset = from % a->block_size;
    for (int64_t i = 0; i < n; block++, offset = 0) {
        int64_t at = table[block] * a->block_stride + offset * a->token_stride +
                     t->kv_head * a->head_stride;
        for (; i < n && offset < a->block_size; i++, offset++, at += a->token_stride) {
            w->next_keys[i] = a->key_cache + at;
            w->next_values[i] = a->value_cache + at;
        }
    }
    for (int64_t i = n; i < TILE; i++) w->next_keys[i] = w->key_rows[0];
}

/* Makes the rows that were found last the current ones. */
static void advance(const Attention *a, int64_t n, Worker *w) {
    int64_t d = a->head_size, width = padded(d);
    memcpy(w->key_rows, w->next_keys, sizeof w->key_rows);
    memcpy(w->value_rows, w->next_values, sizeof w->value_rows);
    if (width == d) return;
    for (int64_t i = 0; i < n; i++) { /* whole vectors would read past the row: copy and pad */
        float *v = w->staged + i * DLD;
        memcpy(v, w->value_rows[i], (size_t)d * sizeof(float));
        memset(v + d, 0, (size_t)(width - d) * sizeof(float));
        w->value_rows[i] = v;
    }
}

/* Prefetches rows into the second-level cache. Blocks are scattered in memory and hardware
 * prefetchers start anew in each, so rows are prefetched well before their use. */
INLINE void prefetch_rows(const float *const *rows, int64_t n, int64_t d) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < d; c += LINE) __builtin_prefetch(rows[i] + c, 0, 2);
}

INLINE vf load_part(const float *p, int64_t count) {
    if (count >= W) return load(p);
    float lanes[W] = {0};
    for (int64_t i = 0; i < count; i++) lanes[i] = p[i];
    return load(lanes);
}
