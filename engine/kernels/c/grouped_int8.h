/* A linear layer over int8 weights in groups.
 *
 * As in int8.h, but every GROUP_K weights of a column have a scale of their own, as in GGUF's Q8_0. Scales
 * are float16, which is what such files have, or the same numbers in fp32 where no instruction widens
 * them.
 *
 * The sum of a group is a whole number, and exact. Groups are added in fp32, in order, for each
 * output: so this too depends neither on the batch nor on the instruction set.
 */

#define GROUP_K 32

#if HAS_FLOAT16
#define SCALE_FORMAT IN_FLOAT16
#else
#define SCALE_FORMAT IN_FLOAT32
#endif

typedef struct {
    const int8_t *packed; /* [panels, K / 4, NR, 4] */
    const char *scales;   /* [panels, K / GROUP_K, NR] */
    const float *bias;    /* [panels * NR] */
    int64_t k;
} GroupedInt8Linear;

/* Subtracts from sums over a group what the offset of its levels has added. */
INLINE void take_offset(const int rows, const int8_t *panel, vi sums[MR][NV]) {
#if VNNI
    vi added[NV] = {};
    for (int g = 0; g < GROUP_K / 4; g++)
        UNROLL for (int v = 0; v < NV; v++)
            added[v] = DOT(added[v], (vi){} + (int32_t)0x80808080,
                           *(const vi *)(panel + (g * NR + v * W) * 4));
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++) sums[r][v] -= added[v];
#else
    (void)rows, (void)panel, (void)sums; /* there is none */
#endif
}

/* y = sums over groups * row scale + bias, which is the panel's. */
INLINE void write_grouped(const int rows, vf sums[MR][NV], const float *row_scales, const float *bias,
                          Target to) {
    for (int r = 0; r < rows; r++, to.y += to.stride) {
        vf out[NV];
        for (int v = 0; v < NV; v++)
            out[v] = madd(sums[r][v], splat(row_scales[r]), load(bias + v * W));
        memcpy(to.y, out, (size_t)to.columns * sizeof(float));
    }
}

INLINE void grouped_int8_tile(const int rows, const GroupedInt8Linear *l, int64_t p, const Level *x,
                              int64_t block_stride, const float *row_scales, Fetch fetch, Target to) {
    const int64_t num_groups = l->k / GROUP_K, scale_bytes = NR * weight_bytes(SCALE_FORMAT);
    const int8_t *panel = l->packed + p * l->k * NR;
    const char *scales = l->scales + p * num_groups * scale_bytes;
    vf acc[MR][NV];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++) acc[r][v] = splat(0.0f);
    for (int64_t k = 0; k < l->k; k += GROUP_K, panel += GROUP_K * NR, scales += scale_bytes) {
        vi sums[MR][NV];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < NV; v++) sums[r][v] = (vi){};
        dot4(rows, x + k / QK * block_stride + k % QK, GROUP_K / 4, panel, &fetch, sums);
        take_offset(rows, panel, sums);
        UNROLL for (int v = 0; v < NV; v++) {
            vf scale = load_wide(SCALE_FORMAT, scales, v * W);
            UNROLL for (int r = 0; r < rows; r++)
                acc[r][v] = madd(__builtin_convertvector(sums[r][v], vf), scale, acc[r][v]);
        }
    }
    write_grouped(rows, acc, row_scales, l->bias + p * NR, to);
}

static void grouped_int8_rows(const void *layer, int64_t p, const Rounded *x, int64_t from, int rows,
                              Fetch fetch, Target to) {
    const Level *levels = (const Level *)x->levels + from * QLD;
#define CALL(n) grouped_int8_tile(n, layer, p, levels, x->rows * QLD, x->scales + from, fetch, to)
    switch (rows) { ROW_CASES(CALL) }
#undef CALL
}

/* y[M, N] = x[M, K] @ W^T + bias, x rounded to 8 bits row by row; K is a multiple of GROUP_K, which
 * divides QK. 0, or -1 if out of memory. */
EXPORT int tw_grouped_int8_linear(const float *x, const int8_t *packed, const char *scales,
                                  const float *bias, float *y, int64_t m, int64_t n, int64_t k,
                                  const int64_t *ends, int64_t num_experts, int num_threads) {
    const GroupedInt8Linear layer = {packed, scales, bias, k};
    const RoundingLinear l = {&layer, (const char *)packed, n, k, k * NR, {ends, num_experts}, 0,
                              sizeof(Level), round_int8, grouped_int8_rows};
    return multiply_rounded(&l, x, y, m, num_threads);
}
