/* A linear layer over int4 weights.
 *
 * Weights are levels from 0 to 15 times a scale plus a least value, both of a group of GROUP_K or a
 * multiple of it along K; activations are rounded as for int8. In a panel a lane of 32 bits has
 * eight steps of K of one column: steps 0 to 3 in the lower halves of its bytes, 4 to 7 in the upper.
 *
 * The sum of a group is a whole number, and exact. Groups are added in fp32, in order, for each
 * output: so this too depends neither on the batch nor on the instruction set.
 */

#if VNNI || WORDS
typedef int8_t SmallLevel;
#else
typedef float SmallLevel;
#endif

typedef struct {
    const uint8_t *packed; /* [panels, K / 8, NR, 4] */
    const int32_t *groups; /* [panels, K / group, NR]: bfloat16 scales, and least values above them */
    const float *bias;     /* [panels * NR] */
    int64_t k, group;
} Int4Linear;

/* Writes one row as levels, and the sums of its groups; returns its scale. */
static float round_int4(const RoundingLinear *l, const float *x, char *levels_at,
                        int64_t block_bytes, float *group_sums) {
    int64_t group = l->k / l->num_groups;
    float scale = row_scale(x, l->k);
    int32_t levels[QK];
    for (int64_t k0 = 0; k0 < l->k; k0 += QK, levels_at += block_bytes) {
        SmallLevel *to = (SmallLevel *)levels_at;
        int64_t depth = min64(QK, l->k - k0);
        find_levels(x + k0, depth, scale, levels);
        for (int64_t i = 0; i < depth; i++) to[i] = (SmallLevel)levels[i];
        for (int64_t g = 0; g < depth; g += group) {
            int32_t sum = 0;
            for (int64_t i = g; i < g + group; i++) sum += levels[i];
            *group_sums++ = (float)sum;
        }
    }
    return scale;
}

/* sums += levels x weights of GROUP_K steps. */
INLINE void dot8(const int rows, const SmallLevel *x, const uint8_t *panel, Fetch *fetch,
                 vi sums[MR][NV]) {
#if VNNI || WORDS
#if WORDS
    /* Products of two bytes are below 2^12, so eight of them add up in 16 bits. */
    vs acc[MR][NV];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++) acc[r][v] = (vs){};
#endif
    for (int g = 0; g < GROUP_K / 8; g++) {
        fetch_step(fetch);
        UNROLL for (int upper = 0; upper < 2; upper++) {
            vi b[NV];
            UNROLL for (int v = 0; v < NV; v++) {
                b[v] = *(const vi *)(panel + (g * NR + v * W) * 4);
                HOLD(b[v]);
                b[v] = b[v] >> 4 * upper & 0x0f0f0f0f;
                HOLD(b[v]);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                vi a = splat_bytes(x + r * QLD + g * 8 + upper * 4);
                UNROLL for (int v = 0; v < NV; v++) {
#if VNNI
                    sums[r][v] = DOT(sums[r][v], b[v], a);
#else
                    acc[r][v] += MADD_BYTES(b[v], a);
                    HOLD(acc[r][v]);
#endif
                }
            }
        }
    }
#if WORDS
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++)
            sums[r][v] += MADD_WORDS(acc[r][v], 1 - (vs){});
#endif
#else
    (void)fetch; /* computing the products takes longer than reading the weights */
    for (int g = 0; g < GROUP_K / 8; g++)
        UNROLL for (int i = 0; i < 8; i++)
            UNROLL for (int v = 0; v < NV; v++) {
                vi lanes = *(const vi *)(panel + (g * NR + v * W) * 4);
                vf b = __builtin_convertvector(lanes >> (i % 4 * 8 + i / 4 * 4) & 15, vf);
                UNROLL for (int r = 0; r < rows; r++)
                    sums[r][v] += __builtin_convertvector(x[r * QLD + g * 8 + i] * b, vi);
            }
#endif
}

INLINE void int4_tile(const int rows, const Int4Linear *l, int64_t p, const SmallLevel *x,
                      int64_t block_stride, const float *group_sums, const float *row_scales,
                      Fetch fetch, Target to) {
    const int64_t num_groups = l->k / l->group;
    const uint8_t *panel = l->packed + p * l->k / 2 * NR;
    const int32_t *groups = l->groups + p * num_groups * NR;
    vf acc[MR][NV];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++) acc[r][v] = splat(0.0f);
    for (int64_t q = 0; q < num_groups; q++, groups += NR) {
        int64_t k0 = q * l->group;
        const SmallLevel *levels = x + k0 / QK * block_stride + k0 % QK;
        vi sums[MR][NV];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < NV; v++) sums[r][v] = (vi){};
        for (int64_t k = 0; k < l->group; k += GROUP_K, panel += GROUP_K / 2 * NR)
            dot8(rows, levels + k, panel, &fetch, sums);
        UNROLL for (int v = 0; v < NV; v++) {
            vi both = *(const vi *)(groups + v * W);
            vf scale = (vf)(both << 16), least = (vf)(both & (int32_t)0xffff0000);
            UNROLL for (int r = 0; r < rows; r++) {
                vf whole = __builtin_convertvector(sums[r][v], vf);
                acc[r][v] = madd(whole, scale, acc[r][v]);
                acc[r][v] = madd(splat(group_sums[r * num_groups + q]), least, acc[r][v]);
            }
        }
    }
    write_grouped(rows, acc, row_scales, l->bias + p * NR, to);
}

static void int4_rows(const void *layer, int64_t p, const Rounded *x, int64_t from, int rows,
                      Fetch fetch, Target to) {
    const Int4Linear *l = layer;
    const SmallLevel *levels = (const SmallLevel *)x->levels + from * QLD;
    const float *sums = x->group_sums + from * (l->k / l->group);
#define CALL(n) int4_tile(n, l, p, levels, x->rows * QLD, sums, x->scales + from, fetch, to)
    switch (rows) { ROW_CASES(CALL) }
#undef CALL
}

/* y[M, N] = x[M, K] @ W^T + bias, x rounded to 8 bits row by row; K is a multiple of the group,
 * which is a multiple of GROUP_K and divides QK. 0, or -1 if out of memory. */
EXPORT int tw_int4_linear(const float *x, const uint8_t *packed, const int32_t *groups,
                          const float *bias, float *y, int64_t m, int64_t n, int64_t k,
                          int64_t group, const int64_t *ends, int64_t num_experts,
                          int num_threads) {
    const Int4Linear layer = {packed, groups, bias, k, group};
    const RoundingLinear l = {&layer, (const char *)packed, n, k, k / 2 * NR,
                              {ends, num_experts}, k / group, sizeof(SmallLevel), round_int4,
                              int4_rows};
    return multiply_rounded(&l, x, y, m, num_threads);
}
