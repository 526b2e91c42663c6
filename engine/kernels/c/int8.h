/* A linear layer over int8 weights.
 *
 * Weights are integers from -127 to 127 times a scale per output column; activations are rounded to
 * integers ("levels") times a scale per row. Panels are NR columns wide as in linear.h, with four steps
 * of K side by side:
 *
 *     panel 0: k=0..3 of n=0 | k=0..3 of n=1 | ... n=NR-1 || k=4..7 of n=0 | ...
 *
 * Sums of products stay below 2^31 (cpu.py bounds K) and are exact, so neither their order nor the
 * instruction set shows in the result.
 */

#if VNNI
/* The instruction's first operand is unsigned: levels are stored with 128 added, and 128 times the
 * column's sum is subtracted at the end. Sums may wrap around in between. */
typedef uint8_t Level;
#define LEVEL_OFFSET 128
#elif WORDS
typedef int16_t Level; /* of four, the outer and the inner pair change places: see dot4 */
#define LEVEL_OFFSET 0
#else
/* Products and sums of up to QK of them are integers below 2^24: fp32 holds them exactly. */
typedef float Level;
#define LEVEL_OFFSET 0
#endif

#if WORDS
INLINE int64_t level_place(int64_t i) { return (i & ~(int64_t)3) | (i & 1) << 1 | (i >> 1 & 1); }
#else
INLINE int64_t level_place(int64_t i) { return i; }
#endif

typedef struct {
    const int8_t *packed;   /* [panels, ceil(K / 4), NR, 4] */
    const float *scales;    /* [panels * NR], as the next two */
    const int32_t *columns; /* sums of the columns' weights */
    const float *bias;
    int64_t k;
} Int8Linear;

/* Writes one row as levels, K block after K block, and returns its scale. */
static float round_int8(const RoundingLinear *l, const float *x, char *levels_at,
                        int64_t block_bytes, float *group_sums) {
    int64_t k = l->k;
    (void)group_sums;
    float scale = row_scale(x, k);
    int32_t levels[QK];
    for (int64_t k0 = 0; k0 < k; k0 += QK, levels_at += block_bytes) {
        Level *to = (Level *)levels_at;
        int64_t depth = min64(QK, k - k0), whole = ceil_div(depth, 4) * 4;
        find_levels(x + k0, depth, scale, levels);
        for (int64_t i = depth; i < whole; i++) levels[i] = 0;
        for (int64_t i = 0; i < whole; i++)
            to[level_place(i)] = (Level)(levels[i] + LEVEL_OFFSET);
    }
    return scale;
}

#if VNNI
/* sums += levels x weights of one K block, `groups` times four steps deep. */
INLINE void dot4(const int rows, const Level *x, int64_t groups, const int8_t *panel,
                 Fetch *fetch, vi sums[MR][NV]) {
    for (int64_t g = 0; g < groups; g++) {
        vi b[NV];
        UNROLL for (int v = 0; v < NV; v++) b[v] = *(const vi *)(panel + (g * NR + v * W) * 4);
        fetch_step(fetch);
        UNROLL for (int r = 0; r < rows; r++) {
            vi a = splat_bytes(x + r * QLD + g * 4);
            UNROLL for (int v = 0; v < NV; v++) sums[r][v] = DOT(sums[r][v], a, b[v]);
        }
    }
}
#elif WORDS
/* Of each four weights the even ones, and then the odd ones, are widened to 16 bits where they are:
 * two of them share a lane. */
INLINE void dot4(const int rows, const Level *x, int64_t groups, const int8_t *panel,
                 Fetch *fetch, vi sums[MR][NV]) {
    for (int64_t g = 0; g < groups; g++) {
        fetch_step(fetch);
        UNROLL for (int odd = 0; odd < 2; odd++) {
            vs b[NV];
            UNROLL for (int v = 0; v < NV; v++) {
                b[v] = *(const vs *)(panel + (g * NR + v * W) * 4);
                HOLD(b[v]);
                b[v] = (odd ? b[v] : b[v] << 8) >> 8;
                HOLD(b[v]);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                vi a = splat_bytes(x + r * QLD + g * 4 + odd * 2);
                UNROLL for (int v = 0; v < NV; v++) {
                    sums[r][v] += MADD_WORDS(a, b[v]);
                    HOLD(sums[r][v]);
                }
            }
        }
    }
}
#else
INLINE void dot4(const int rows, const Level *x, int64_t groups, const int8_t *panel,
                 Fetch *fetch, vi sums[MR][NV]) {
    vf acc[MR][NV];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++) acc[r][v] = splat(0.0f);
    for (int64_t g = 0; g < groups; g++) {
        vi four[NV];
        UNROLL for (int v = 0; v < NV; v++) four[v] = *(const vi *)(panel + (g * NR + v * W) * 4);
        fetch_step(fetch);
        UNROLL for (int i = 0; i < 4; i++) {
            vf b[NV];
            UNROLL for (int v = 0; v < NV; v++)
                b[v] = __builtin_convertvector((four[v] << (24 - 8 * i)) >> 24, vf);
            UNROLL for (int r = 0; r < rows; r++) {
                vf a = splat(x[r * QLD + g * 4 + i]);
                UNROLL for (int v = 0; v < NV; v++) acc[r][v] = madd(a, b[v], acc[r][v]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++)
            sums[r][v] += __builtin_convertvector(acc[r][v], vi);
}
#endif

/* y = sums * (row scale * column scale) + bias. Not inlined, so that all tiles round alike. */
static __attribute__((noinline)) void write_scaled(const Int8Linear *l, int64_t p, int rows,
                                                   const vi *sums, const float *row_scales,
                                                   Target to) {
    const vi *columns = (const vi *)(l->columns + p * NR);
    const vf *scales = (const vf *)(l->scales + p * NR), *bias = (const vf *)(l->bias + p * NR);
    for (int r = 0; r < rows; r++, sums += NV, to.y += to.stride) {
        vf out[NV];
        for (int v = 0; v < NV; v++) {
            vf whole = __builtin_convertvector(sums[v] - LEVEL_OFFSET * columns[v], vf);
            out[v] = whole * (row_scales[r] * scales[v]) + bias[v];
        }
        memcpy(to.y, out, (size_t)to.columns * sizeof(float));
    }
}

INLINE void int8_tile(const int rows, const Int8Linear *l, int64_t p, const Level *x,
                      int64_t block_stride, const float *row_scales, Fetch fetch, Target to) {
    vi sums[MR][NV];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++) sums[r][v] = (vi){};
    int64_t groups = ceil_div(l->k, 4);
    const int8_t *panel = l->packed + p * groups * NR * 4;
    for (int64_t g = 0; g < groups; g += QK / 4, x += block_stride)
        dot4(rows, x, min64(QK / 4, groups - g), panel + g * NR * 4, &fetch, sums);
    vi flat[MR * NV];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++) flat[r * NV + v] = sums[r][v];
    write_scaled(l, p, rows, flat, row_scales, to);
}

static void int8_rows(const void *layer, int64_t p, const Rounded *x, int64_t from, int rows,
                      Fetch fetch, Target to) {
    const Level *levels = (const Level *)x->levels + from * QLD;
#define CALL(n) int8_tile(n, layer, p, levels, x->rows * QLD, x->scales + from, fetch, to)
    switch (rows) { ROW_CASES(CALL) }
#undef CALL
}

/* y[M, N] = x[M, K] @ W^T + bias, x rounded to 8 bits row by row. 0, or -1 if out of memory. `ends` is
 * NULL, or has the ends of the rows of experts (see experts.h); here and below. */
EXPORT int tw_int8_linear(const float *x, const int8_t *packed, const float *scales,
                          const int32_t *columns, const float *bias, float *y, int64_t m,
                          int64_t n, int64_t k, const int64_t *ends, int64_t num_experts,
                          int num_threads) {
    const Int8Linear layer = {packed, scales, columns, bias, k};
    const RoundingLinear l = {&layer, (const char *)packed, n, k, ceil_div(k, 4) * NR * 4,
                              {ends, num_experts}, 0, sizeof(Level), round_int8, int8_rows};
    return multiply_rounded(&l, x, y, m, num_threads);
}
