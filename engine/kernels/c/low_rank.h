/* Low-rank updates of a linear layer, a different one for each row.
 *
 * The update of a layer by an adapter is up @ down: `down` [rank, K] is stored as groups of RANKS
 * ranks, each [K / NR, RANKS, NR], and `up` [N, rank] as panels of NR outputs, each [rank, NR]; both
 * are padded with zeros, and stored in 16 bits where that holds every number exactly, the NR numbers in
 * the order of a panel's columns. A layer that was merged of several has several parts, each a range of
 * its outputs with updates of its own. Rows of one adapter are computed some at a time, wherever they
 * are in the batch.
 *
 * A vector of `down` holds several k of one rank, whose products are added up lane by lane and the lanes
 * at the end: so there are enough sums to wait for none of them, however few rows share a pass.
 */

#define LATER_BYTES 393216 /* prefetched for after a product: they stay in the L2 cache */

#define UPDATE_ROWS 4 /* rows that share a pass over an adapter's matrices */
#define RANKS 4       /* of `down` that are next to each other */
#if W == 16
#define UPDATE_SUMS 16 /* that fit the registers, with what is added to them */
#define UP_SUMS 2
#else
#define UPDATE_SUMS 8
#define UP_SUMS 1
#endif

typedef struct {
    const char *down, *up;
    int64_t rank; /* 0 where the adapter does not change the part */
    int64_t format;
} Update;

typedef struct {
    int64_t first, columns; /* of the layer's outputs */
} Part;

typedef struct {
    const Update *updates; /* [num_parts, num_slots] */
    const Part *parts;
    const int64_t *slots; /* [M], below zero for rows without an adapter */
    int64_t num_parts, num_slots;
} Updates;

typedef struct {
    int64_t first, rows, slot; /* in the rows sorted by slot */
} UpdateTile;

/* The updates of some rows, on which threads work together: an item is one part of one tile. */
typedef struct {
    Updates u;
    const float *x; /* [m, k] */
    float *y;
    int64_t y_stride, m, n, k;
    int64_t *order, *ends; /* [m], [num_slots] */
    UpdateTile *tiles;
    Bytes *matrices; /* [m, num_parts, 2]: room for those that threads prefetch */
    char *inner;
    size_t inner_bytes; /* of a thread */
    int64_t num_tiles, rank; /* the largest */
    Share *shares;
    int64_t num_threads;
} UpdatedRows;

INLINE Update update_of(const Updates *u, int64_t part, int64_t slot) {
    return u->updates[part * u->num_slots + slot];
}

/* Keeps a vector that several rows are multiplied with in a register. Compilers read it again for each
 * row, as an operand in memory, and a processor reads fewer vectors in a cycle than it could multiply. */
INLINE vf held(vf v) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__AVX__)
    __asm__("" : "+x"(v));
#endif
    return v;
}

/* sums[rows][W], from `first` on: x times some ranks of a group of `down`, in W lanes. */
INLINE void times_ranks(const int rows, const int ranks, const Format format, const float *const *x,
                        int64_t k, const char *group, const int first, vf sums[UPDATE_ROWS][W]) {
    const int64_t step = NR * weight_bytes(format);
    vf acc[UPDATE_ROWS][RANKS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int q = 0; q < ranks; q++) acc[r][q] = splat(0.0f);
    for (int64_t i = 0; i < k; i += NR, group += RANKS * step) {
        UNROLL for (int v = 0; v < NV; v++) {
            vf a[UPDATE_ROWS];
            UNROLL for (int r = 0; r < rows; r++) a[r] = held(load(x[r] + i + v * W));
            UNROLL for (int q = 0; q < ranks; q++) {
                vf b[NV];
                read_step(format, group + q * step, b);
                b[v] = held(b[v]);
                UNROLL for (int r = 0; r < rows; r++) acc[r][q] = madd(a[r], b[v], acc[r][q]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int q = 0; q < ranks; q++) sums[r][first + q] += acc[r][q];
}

/* inner[rows]: x [k] times W ranks of `down`. */
INLINE void times_down(const int rows, const Format format, const float *const *x, int64_t k,
                       const char *panel, float *inner, int64_t stride) {
    const int ranks = rows * RANKS > UPDATE_SUMS ? UPDATE_SUMS / rows : RANKS;
    const int64_t step = NR * weight_bytes(format), whole = k / NR * NR, block = RANKS * step;
    vf sums[UPDATE_ROWS][W] = {};
    float last[UPDATE_ROWS][NR];
    const float *rest[UPDATE_ROWS];
    if (whole < k)
        for (int r = 0; r < rows; r++) {
            rest[r] = last[r];
            for (int64_t i = 0; i < NR; i++) last[r][i] = whole + i < k ? x[r][whole + i] : 0.0f;
        }
    for (int g = 0; g < W; g += RANKS, panel += ceil_div(k, NR) * block)
        UNROLL for (int q = 0; q < RANKS; q += ranks) {
            times_ranks(rows, ranks, format, x, whole, panel + q * step, g + q, sums);
            if (whole < k)
                times_ranks(rows, ranks, format, rest, NR, panel + whole / NR * block + q * step,
                            g + q, sums);
        }
    for (int r = 0; r < rows; r++) store(inner + r * stride, row_sums(sums[r]));
}

/* y[r] += inner[r] times a panel of `up`, for the first `columns` of the panel. */
INLINE void times_up(const int rows, const Format format, const float *inner, int64_t stride,
                     int64_t rank, const char *panel, float *const *y, int64_t columns) {
    vf sums[UPDATE_ROWS][UP_SUMS][NV];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int s = 0; s < UP_SUMS; s++)
            UNROLL for (int v = 0; v < NV; v++) sums[r][s][v] = splat(0.0f);
    const int64_t step = NR * weight_bytes(format);
    int64_t q = 0;
    for (; q + UP_SUMS <= rank; q += UP_SUMS)
        UNROLL for (int s = 0; s < UP_SUMS; s++) {
            vf b[NV];
            read_step(format, panel + (q + s) * step, b);
            UNROLL for (int v = 0; v < NV; v++) b[v] = held(b[v]);
            UNROLL for (int r = 0; r < rows; r++) {
                vf a = splat(inner[r * stride + q + s]);
                UNROLL for (int v = 0; v < NV; v++)
                    sums[r][s][v] = madd(a, b[v], sums[r][s][v]);
            }
        }
    for (; q < rank; q++)
        UNROLL for (int r = 0; r < rows; r++) {
            vf a = splat(inner[r * stride + q]), b[NV];
            read_step(format, panel + q * step, b);
            UNROLL for (int v = 0; v < NV; v++) sums[r][0][v] = madd(a, b[v], sums[r][0][v]);
        }
    UNROLL for (int r = 0; r < rows; r++) {
        float *to = y[r], flat[NR];
        UNROLL for (int v = 0; v < NV; v++) {
            UNROLL for (int s = 1; s < UP_SUMS; s++) sums[r][0][v] += sums[r][s][v];
            if (columns >= NR)
                store(to + v * W, load(to + v * W) + sums[r][0][v]);
            else
                store(flat + v * W, sums[r][0][v]);
        }
        if (columns < NR)
            for (int64_t i = 0; i < columns; i++) to[i] += flat[i];
    }
}

/* The update of one part, of a tile's rows; inner: room for UPDATE_ROWS rows of its rank. */
INLINE void update_part(const int rows, const Format format, const Update *update, Part place,
                        const int64_t *order, const float *x, float *y, int64_t y_stride,
                        int64_t k, float *inner) {
    const float *from[UPDATE_ROWS];
    float *to[UPDATE_ROWS];
    int64_t rank = update->rank, stride = ceil_div(rank, W) * W, bytes = weight_bytes(format);
    int64_t panel = ceil_div(k, NR) * NR * bytes;
    for (int r = 0; r < rows; r++) from[r] = x + order[r] * k;
    for (int64_t q = 0; q < rank; q += W)
        times_down(rows, format, from, k, update->down + q * panel, inner + q, stride);
    for (int64_t j = 0; j < place.columns; j += NR) {
        for (int r = 0; r < rows; r++) to[r] = y + order[r] * y_stride + place.first + j;
        times_up(rows, format, inner, stride, rank, update->up + j * rank * bytes, to,
                 place.columns - j);
    }
}

static void update_rows(const Update *update, Part place, int64_t rows, const int64_t *order,
                        const float *x, float *y, int64_t y_stride, int64_t k, float *inner) {
#define CALL(rows, format) \
    update_part(rows, format, update, place, order, x, y, y_stride, k, inner)
#define CASES(format) \
    switch (rows) { \
        ROW_CASE(1, CALL(1, format)) ROW_CASE(2, CALL(2, format)) \
        ROW_CASE(3, CALL(3, format)) ROW_CASE(4, CALL(4, format)) \
    } \
    break
    switch (update->format) {
        case IN_FLOAT32: CASES(IN_FLOAT32);
        case IN_BFLOAT16: CASES(IN_BFLOAT16);
        case IN_FLOAT16: CASES(IN_FLOAT16);
    }
#undef CASES
#undef CALL
}

/* The largest rank that a slot has in any part; 0 for a slot without an update. */
static int64_t largest_rank(const Updates *u, int64_t slot) {
    int64_t largest = 0;
    for (int64_t part = 0; part < u->num_parts; part++)
        largest = max64(largest, update_of(u, part, slot).rank);
    return largest;
}

/* Sorts the rows that have an update by slot, and divides those of each slot into tiles; ends:
 * room for a number per slot. Returns how many tiles there are. */
static int64_t plan_updates(const Updates *u, int64_t m, int64_t *ends, int64_t *order,
                            UpdateTile *tiles) {
    int64_t first = 0, num_tiles = 0;
    memset(ends, 0, (size_t)u->num_slots * sizeof(int64_t));
    for (int64_t t = 0; t < m; t++)
        if (u->slots[t] >= 0) ends[u->slots[t]]++;
    for (int64_t slot = 0; slot < u->num_slots; slot++) {
        int64_t rows = largest_rank(u, slot) ? ends[slot] : 0;
        ends[slot] = rows ? first : -1;
        for (int64_t r = 0; r < rows; r += UPDATE_ROWS)
            tiles[num_tiles++] = (UpdateTile){first + r, min64(UPDATE_ROWS, rows - r), slot};
        first += rows;
    }
    for (int64_t t = 0; t < m; t++)
        if (u->slots[t] >= 0 && ends[u->slots[t]] >= 0) order[ends[u->slots[t]]++] = t;
    return num_tiles;
}

/* Sets where the arrays are in `memory`, if there is any; returns the bytes that they take. */
static size_t lay_out(UpdatedRows *p, char *memory, int64_t num_threads) {
    size_t order = rounded((size_t)p->m * sizeof(int64_t));
    size_t ends = rounded((size_t)p->u.num_slots * sizeof(int64_t));
    size_t tiles = rounded((size_t)p->m * sizeof(UpdateTile));
    size_t matrices = rounded((size_t)(2 * p->m * p->u.num_parts) * sizeof(Bytes));
    p->inner_bytes = rounded((size_t)(UPDATE_ROWS * ceil_div(p->rank, W) * W) * sizeof(float));
    if (memory) {
        p->order = (int64_t *)memory;
        p->ends = (int64_t *)(memory + order);
        p->tiles = (UpdateTile *)(memory + order + ends);
        p->matrices = (Bytes *)(memory + order + ends + tiles);
        p->inner = memory + order + ends + tiles + matrices;
    }
    return order + ends + tiles + matrices + (size_t)num_threads * p->inner_bytes;
}

/* Whether all slots are there; finds the largest rank. */
static int check_slots(UpdatedRows *p) {
    for (int64_t t = 0; t < p->m; t++)
        if (p->u.slots[t] >= p->u.num_slots) return 0;
    for (int64_t slot = 0; slot < p->u.num_slots; slot++)
        p->rank = max64(p->rank, largest_rank(&p->u, slot));
    return 1;
}

INLINE int64_t num_items(const UpdatedRows *p) { return p->num_tiles * p->u.num_parts; }

/* A thread's part of the updates; all threads of a region call it. */
static void add_to_rows(const UpdatedRows *p) {
    int64_t id = thread_id();
    float *inner = (float *)(p->inner + (size_t)id * p->inner_bytes);
    for (Range r; (r = claim(p->shares, p->num_threads, id, 1)).to;) {
        const UpdateTile *tile = p->tiles + r.from / p->u.num_parts;
        int64_t part = r.from % p->u.num_parts;
        Update update = update_of(&p->u, part, tile->slot);
        if (update.rank)
            update_rows(&update, p->u.parts[part], tile->rows, p->order + tile->first, p->x, p->y,
                        p->y_stride, p->k, inner);
    }
}

/* Notes both matrices of an item at `to`; returns their bytes. */
static int64_t note_matrices(const UpdatedRows *p, int64_t item, Bytes to[2]) {
    int64_t part = item % p->u.num_parts;
    Update u = update_of(&p->u, part, p->tiles[item / p->u.num_parts].slot);
    int64_t number = weight_bytes((Format)u.format);
    int64_t down = ceil_div(u.rank, W) * W * ceil_div(p->k, NR) * NR * number;
    int64_t up = ceil_div(p->u.parts[part].columns, NR) * NR * u.rank * number;
    to[0] = (Bytes){u.down, u.down + down};
    to[1] = (Bytes){u.up, u.up + up};
    return down + up;
}

/* What a thread is going to read for its share of the updates, during a product of so many steps. */
static Later later_of(const UpdatedRows *p, int64_t steps) {
    int64_t n = num_workers(), id = thread_id(), parts = p->u.num_parts, bytes = 0;
    int64_t from = num_items(p) * id / n, to = num_items(p) * (id + 1) / n;
    Bytes *matrices = p->matrices + 2 * from, *last = matrices;
    for (int64_t i = from; i < to && bytes < LATER_BYTES; i++) {
        const UpdateTile *tile = p->tiles + i / parts;
        int is_noted = i - parts >= from && tile[-1].slot == tile->slot; /* for the tile before */
        int64_t added = is_noted ? 0 : note_matrices(p, i, last);
        if (added) last += 2;
        bytes += added;
    }
    if (steps < 1) last = matrices;
    return (Later){matrices, last, 0, min64(CACHE_LINE, ceil_div(bytes, max64(1, steps)))};
}

/* y[M, N] += up @ down @ x[M, K], with the updates in each row's slot; rows with a slot below zero
 * are not touched. 0, -1 if out of memory, -2 if there is no such slot. */
EXPORT int tw_add_updates(const float *x, float *y, int64_t y_stride, const int64_t *slots,
                          const Update *updates, const Part *parts, int64_t num_parts,
                          int64_t num_slots, int64_t m, int64_t n, int64_t k, int num_threads) {
    UpdatedRows p = {.u = {updates, parts, slots, num_parts, num_slots}, .x = x, .y = y,
                     .y_stride = y_stride, .m = m, .n = n, .k = k};
    if (!check_slots(&p)) return -2;
    char *memory = scratch(lay_out(&p, NULL, num_threads));
    if (!memory) return -1;
    lay_out(&p, memory, num_threads);
    p.num_tiles = plan_updates(&p.u, m, p.ends, p.order, p.tiles);
    if (num_items(&p) < 2 || p.num_tiles * UPDATE_ROWS * p.rank * (n + k) < SERIAL_WORK)
        num_threads = 1;
    Share shares[num_threads];
    deal(shares, num_threads, num_items(&p));
    p.shares = shares;
    p.num_threads = num_threads;
    PARALLEL { add_to_rows(&p); }
    return 0;
}

/* `tw_linear`, and `tw_add_updates` to its results, by threads that are woken once, and prefetch the
 * updates' matrices during the product. */
EXPORT int tw_adapted_linear(const float *x, const char *packed, const float *bias, float *y,
                             const int64_t *slots, const Update *updates, const Part *parts,
                             int64_t num_parts, int64_t num_slots, int64_t m, int64_t n,
                             int64_t inputs, int format, int num_threads) {
    if (m > MC) {
        int status = tw_linear(x, packed, bias, y, m, n, inputs, format, NULL, 1, num_threads);
        return status ? status : tw_add_updates(x, y, n, slots, updates, parts, num_parts,
                                                num_slots, m, n, inputs, num_threads);
    }
    const Linear l = linear_of(packed, bias, n, inputs, (Format)format);
    UpdatedRows p = {.u = {updates, parts, slots, num_parts, num_slots}, .x = x, .y = y,
                     .y_stride = n, .m = m, .n = n, .k = inputs};
    if (!check_slots(&p)) return -2;
    char *memory = scratch(packed_bytes(&l, m) + lay_out(&p, NULL, num_threads));
    if (!memory) return -1;
    lay_out(&p, memory + packed_bytes(&l, m), num_threads);
    p.num_tiles = plan_updates(&p.u, m, p.ends, p.order, p.tiles);
    if (m * n * l.k < SERIAL_WORK) num_threads = 1;
    Share shares[num_threads], update_shares[num_threads];
    deal(shares, num_threads, ceil_div(n, NR));
    deal(update_shares, num_threads, num_items(&p));
    p.shares = update_shares;
    p.num_threads = num_threads;
    const Segment all = {0, 0, m};
    const Product product = {.l = l, .x = x, .packed = (float *)memory, .y = y, .m = m,
                             .inputs = inputs, .segments = &all, .num_segments = 1,
                             .shares = shares, .num_threads = num_threads};
    int64_t panels = ceil_div(n, NR) / num_threads; /* of a thread; all tiles but the first prefetch */
    int64_t steps = panels * (ceil_div(m, MR) - 1) * l.k;
    PARALLEL {
        Later later = later_of(&p, steps);
        multiply(&product, &later);
        if (p.num_tiles) {
            BARRIER
            add_to_rows(&p);
        }
    }
    return 0;
}
