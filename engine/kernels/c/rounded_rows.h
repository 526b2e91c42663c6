/* What linear layers share whose activations are rounded.
 *
 * Rows of activations become integers ("levels") from -127 to 127 times a scale per row, in K blocks
 * of QK. What follows is shared by the layers of int8 and int4 weights.
 */

#define QK 1024            /* depth of a block of int8 activations */
#define QLD (QK + 64)      /* its row stride: off powers of two, for the cache sets */
#define LEAST_SCALE 1e-30f /* of int8 rows: smaller scales are raised to this */

/* Some rows of activations, rounded. */
typedef struct {
    int64_t rows;
    float *scales;
    char *levels;      /* [K / QK][rows][QLD] of the layer's own type */
    float *group_sums; /* [rows, num_groups] */
} Rounded;

/* Where the outputs of some rows go, of one panel. */
typedef struct {
    float *y;
    int64_t stride, columns;
} Target;

/* A layer: how it rounds a row and returns its scale, and how it computes some rows, from one on, of a
 * panel's outputs. */
typedef struct RoundingLinear {
    const void *layer;
    const char *packed; /* its panels */
    int64_t n, k, panel_bytes;
    Experts experts;
    int64_t num_groups; /* of K, whose sums of levels it needs */
    int64_t level_bytes;
    float (*round_row)(const struct RoundingLinear *l, const float *x, char *to, int64_t block_bytes,
                       float *group_sums);
    void (*tile)(const void *layer, int64_t p, const Rounded *x, int64_t from, int rows, Fetch fetch,
                 Target to);
} RoundingLinear;

/* The scale of a row's levels; NaN if the row has infinities or NaN, and so is the row of the
 * result. */
static float row_scale(const float *x, int64_t k) {
    int32_t bits = 0; /* of the largest magnitude: without a sign they sort like numbers */
    for (int64_t i = 0; i < k; i++) {
        int32_t magnitude;
        memcpy(&magnitude, x + i, sizeof magnitude);
        magnitude &= INT32_MAX;
        bits = magnitude > bits ? magnitude : bits;
    }
    float top;
    memcpy(&top, &bits, sizeof top);
    if (!(top < INFINITY)) return NAN;
    float scale = top / 127.0f;
    return scale < LEAST_SCALE ? LEAST_SCALE : scale;
}

/* The levels of up to QK numbers, -127 to 127; all zero for a scale that is NaN. */
INLINE void find_levels(const float *x, int64_t count, float scale, int32_t *levels) {
    if (scale == scale)
        for (int64_t i = 0; i < count; i++) levels[i] = (int32_t)rintf(x[i] / scale);
    else
        memset(levels, 0, (size_t)count * sizeof(int32_t));
}

static void round_rows(const RoundingLinear *l, const float *x, Rounded *to, int64_t id, int64_t n) {
    int64_t row_bytes = QLD * l->level_bytes;
    for (int64_t r = to->rows * id / n; r < to->rows * (id + 1) / n; r++)
        to->scales[r] = l->round_row(l, x + r * l->k, to->levels + r * row_bytes,
                                     to->rows * row_bytes, to->group_sums + r * l->num_groups);
}

/* One panel of a segment's rows, divided evenly among as few tiles as possible. */
static void rounded_panel(const RoundingLinear *l, Segment of, int64_t p, const Rounded *x, float *y) {
    int64_t count = of.to - of.from, tiles = ceil_div(count, MR), bytes = l->panel_bytes;
    int64_t place = of.expert * ceil_div(l->n, NR) + p;
    const char *panel = l->packed + place * bytes;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t from = of.from + count * t / tiles, to = of.from + count * (t + 1) / tiles;
        const Target target = {y + from * l->n + p * NR, l->n, min64(NR, l->n - p * NR)};
        l->tile(l->layer, place, x, from, (int)(to - from),
                fetch_part(panel, panel + bytes, bytes, NR * 4, t, tiles), target);
    }
}

/* y[M, N] = x[M, K] @ W^T + bias. Returns 0, or -1 if out of memory. */
static int multiply_rounded(const RoundingLinear *l, const float *x, float *y, int64_t m,
                            int num_threads) {
    int64_t panels = ceil_div(l->n, NR), chunk = min64(m, MC);
    size_t scale_bytes = rounded((size_t)chunk * sizeof(float));
    size_t sum_bytes = rounded((size_t)(chunk * l->num_groups) * sizeof(float));
    size_t level_bytes = (size_t)(ceil_div(l->k, QK) * chunk * QLD * l->level_bytes);
    char *memory = scratch(scale_bytes + sum_bytes + level_bytes);
    if (!memory) return -1;
    if (m * l->n * l->k < 4 * SERIAL_WORK) num_threads = 1;
    for (int64_t m0 = 0; m0 < m; m0 += chunk) {
        Share shares[num_threads];
        Segment segments[MC];
        Rounded rows = {min64(chunk, m - m0), (float *)memory, memory + scale_bytes + sum_bytes,
                        (float *)(memory + scale_bytes)};
        deal(shares, num_threads, panels * find_segments(l->experts, m0, rows.rows, segments));
        PARALLEL {
            Range r;
            round_rows(l, x + m0 * l->k, &rows, thread_id(), num_workers());
            BARRIER
            while ((r = claim(shares, num_threads, thread_id(), 1)).to)
                rounded_panel(l, segments[r.from / panels], r.from % panels, &rows, y + m0 * l->n);
        }
    }
    return 0;
}
