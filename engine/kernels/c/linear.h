/* A linear layer over packed weights, in fp32 or 16 bits.
 *
 * Weights [N, K] are stored as panels of NR output columns, each panel [K, NR]:
 *
 *     panel 0: k=0: n=0..NR-1 | k=1: n=0..NR-1 | ...      panel 1: k=0: n=NR..2NR-1 | ...
 *
 * so a panel is one sequential stream whose vectors hold NR outputs. The last panel is padded with
 * zeros. A register tile keeps up to MR rows x NR columns of y and adds one broadcast x per row.
 *
 * Weights of 16 bits are widened in registers, so results are those of the same weights in fp32. In
 * bfloat16 the columns n and n + W of a panel are the halves of a lane; in float16 they are in order.
 *
 * In pairs of bfloat16 a lane has two steps of K of one column, of which K has half as many lanes.
 * Activations are rounded to pairs as well, and one instruction multiplies both halves of a lane.
 */

#if W == 8
#define KC 256        /* depth of one K block: KC x NR weights and a tile's rows stay in the first cache */
#else
#define KC 512        /* likewise, in the inner caches */
#endif
#define KLD (KC + 16) /* row stride of packed activations: off powers of two, for the cache sets */
#define MC 192        /* activation rows packed at a time: MC x KC of them fit the L2 cache */
#define PANELS 4      /* panels that share a pass over the activations */

#define AHEAD 8192        /* bytes between a weight and what a lone tile prefetches with it */

typedef enum { IN_FLOAT32, IN_BFLOAT16, IN_FLOAT16, IN_PAIRS } Format;

EXPORT int tw_panel_width(void) { return NR; }
EXPORT int tw_vector_width(void) { return W; }

#if defined(__AVX512F__) || (defined(__F16C__) && W == 8) || defined(__aarch64__)
#define HAS_FLOAT16 1 /* whether one instruction widens it */
#else
#define HAS_FLOAT16 0
#endif

EXPORT int tw_has_float16(void) { return HAS_FLOAT16; }

/* Whether pairs are faster than weights of 16 bits that are widened. */
EXPORT int tw_multiplies_pairs(void) {
#if defined(__AVX512BF16__)
    return 1;
#else
    return 0;
#endif
}

/* Of a number, or of a pair. */
INLINE int64_t weight_bytes(Format format) {
    return format == IN_FLOAT32 || format == IN_PAIRS ? 4 : 2;
}

/* c + the products of two pairs: first that of the upper halves is added, then that of the lower. */
INLINE vf add_pairs(vf a, vf b, vf c) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
    const vi upper = (vi){} + (int32_t)0xffff0000;
    c = madd((vf)((vi)a & upper), (vf)((vi)b & upper), c);
    return madd((vf)((vi)a << 16), (vf)((vi)b << 16), c);
#endif
}

/* The bits of the nearest bfloat16, the even one of two; NaN stays NaN. */
INLINE uint32_t bfloat16_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    return (bits & 0x7fffffff) > 0x7f800000 ? nan : nearest;
}

INLINE float pair_of(float lower, float upper) {
    uint32_t bits = bfloat16_bits(lower) | bfloat16_bits(upper) << 16;
    float pair;
    memcpy(&pair, &bits, sizeof pair);
    return pair;
}

/* Rounds numbers to pairs; an odd one is paired with zero. */
static void round_to_pairs(const float *x, int64_t count, float *to) {
    for (int64_t i = 0; i < count / 2; i++) to[i] = pair_of(x[2 * i], x[2 * i + 1]);
    if (count % 2) to[count / 2] = pair_of(x[count - 1], 0.0f);
}

typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2), may_alias));

/* W numbers of a matrix, from its i-th on, as fp32; all formats convert exactly. */
INLINE vf load_wide(const Format format, const char *matrix, int64_t i) {
    if (format == IN_FLOAT32 || format == IN_PAIRS) return load((const float *)matrix + i);
    const char *at = matrix + i * 2;
#if defined(__AVX512F__)
    if (format == IN_FLOAT16) return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__F16C__) && W == 8
    if (format == IN_FLOAT16) return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#elif defined(__aarch64__)
    if (format == IN_FLOAT16) return (vf)vcvt_f32_f16(vld1_f16((const float16_t *)at));
#endif
    vi bits = __builtin_convertvector(*(const vh *)at, vi);
    if (format == IN_BFLOAT16) return (vf)(bits << 16);
    vf magnitude = (vf)((bits & 0x7fff) << 13) * 0x1p112f; /* the exponent's other bias */
    return (vf)((vi)magnitude | ((bits & 0x8000) << 16));
}

/* Where column j of a panel is, in elements. */
INLINE int64_t column_place(Format format, int64_t j) {
    return format == IN_BFLOAT16 ? j % W * 2 + j / W : j;
}

INLINE void pack_panel(const Format format, const char *weight, int64_t row_stride, int64_t k,
                       int64_t columns, char *panel) {
    const int64_t size = weight_bytes(format);
    for (int64_t i = 0; i < k; i++, panel += NR * size)
        for (int64_t j = 0; j < NR; j++) {
            char *to = panel + column_place(format, j) * size;
            if (j < columns)
                memcpy(to, weight + (j * row_stride + i) * size, (size_t)size);
            else
                memset(to, 0, (size_t)size);
        }
}

/* weight: [N, K] with a row stride in elements of the format, which `packed` has as well. */
EXPORT void tw_pack_weight(const char *weight, int64_t row_stride, int64_t n, int64_t k,
                           char *packed, int format, int num_threads) {
    int64_t panels = ceil_div(n, NR), size = weight_bytes(format);
    PARALLEL {
        int64_t workers = num_workers(), id = thread_id();
        for (int64_t p = panels * id / workers; p < panels * (id + 1) / workers; p++) {
            const char *from = weight + p * NR * row_stride * size;
            char *to = packed + p * k * NR * size;
            int64_t columns = min64(NR, n - p * NR);
            switch (format) {
                case IN_PAIRS:
                case IN_FLOAT32: pack_panel(IN_FLOAT32, from, row_stride, k, columns, to); break;
                case IN_BFLOAT16: pack_panel(IN_BFLOAT16, from, row_stride, k, columns, to); break;
                case IN_FLOAT16: pack_panel(IN_FLOAT16, from, row_stride, k, columns, to); break;
            }
        }
    }
}

typedef struct {
    const float *start; /* [NR] to add on the first K block, or NULL */
    float *y;
    int64_t y_stride;
    int64_t columns; /* of this panel, at most NR */
    int first;       /* whether it is the first K block */
} Output;

/* Adds sums [rows, NR] to y. Not inlined: it is 1 / KC of the work, in every tile. */
static __attribute__((noinline)) void add_sums(int rows, const float *sums, Output out) {
    for (int r = 0; r < rows; r++, sums += NR, out.y += out.y_stride) {
        const float *base = out.first ? out.start : out.y;
        if (out.columns == NR && base) {
            for (int v = 0; v < NR; v += W) store(out.y + v, load(base + v) + load(sums + v));
        } else {
            for (int64_t i = 0; i < out.columns; i++)
                out.y[i] = sums[i] + (base ? base[i] : 0.0f);
        }
    }
}

/* What the tiles of some rows prefetch while they pass over the same weights, each a part of what is
 * needed after them: so memory is read while all of them compute, not only while the first does, and
 * beyond the ends of pages, where hardware prefetchers stop. */
typedef struct {
    const char *next;
    int64_t stride; /* bytes for each step of NR columns */
} Fetch;

/* The part of tile t of several; a lone tile stays a little ahead of itself. Panels follow each other
 * in memory. */
INLINE Fetch fetch_part(const void *weights, const void *after, int64_t bytes, int64_t step, int64_t t,
                        int64_t tiles) {
    if (tiles == 1) return (Fetch){(const char *)weights + AHEAD, step};
    return (Fetch){(const char *)after + bytes * t / tiles, step / tiles};
}

typedef struct {
    const char *from, *to;
} Bytes;

/* Matrices that a thread reads after a product, which most tiles of the product prefetch instead of the
 * next panel: at each step one more, where a processor has nothing else to wait for. */
typedef struct {
    const Bytes *next, *last;
    int64_t done;   /* bytes of the next matrix */
    int64_t stride; /* bytes for each step; 0 to prefetch nothing */
} Later;

/* The part of tile t of several: the first prefetches the next panel, the others what comes later. */
INLINE Fetch fetch_later(Later *later, const char *after, int64_t depth, int64_t step, int64_t t) {
    if (t == 0) return (Fetch){after, step};
    const Fetch part = {later->next->from + later->done, later->stride};
    later->done += later->stride * depth;
    if (later->next->from + later->done >= later->next->to) {
        later->next++;
        later->done = 0;
    }
    return part;
}

/* Where a first cache holds the next weights as well (W == 8), three tiles or more prefetch into it:
 * they touch each line several times, and each time would miss that cache otherwise. */
INLINE void fetch_step(Fetch *fetch) {
    if (W == 8 && fetch->stride < CACHE_LINE / 2)
        __builtin_prefetch(fetch->next, 0, 3);
    else
        __builtin_prefetch(fetch->next, 0, 2);
    if (NR * 4 > CACHE_LINE && fetch->stride > CACHE_LINE) /* only of a lone tile */
        __builtin_prefetch(fetch->next + CACHE_LINE, 0, 2);
    fetch->next += fetch->stride;
}

/* Reads the NR weights of one k as fp32. */
INLINE void read_step(const Format format, const char *step, vf b[NV]) {
    if (format == IN_BFLOAT16) {
        vi pairs = *(const vi *)step;
        b[0] = (vf)(pairs << 16);
        b[1] = (vf)(pairs & (int32_t)0xffff0000);
        return;
    }
    UNROLL for (int v = 0; v < NV; v++) b[v] = load_wide(format, step, v * W);
}

INLINE void linear_tile(const int rows, const Format format, const float *x, int64_t depth,
                        const char *panel, Fetch fetch, Output out) {
    const int64_t step = NR * weight_bytes(format);
    vf acc[MR][NV];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++) acc[r][v] = splat(0.0f);
    for (int64_t k = 0; k < depth; k++, panel += step) {
        vf b[NV];
        read_step(format, panel, b);
        UNROLL for (int v = 0; v < NV; v++) HOLD(b[v]);
        fetch_step(&fetch);
        UNROLL for (int r = 0; r < rows; r++) {
            vf a = splat(x[r * KLD + k]);
            UNROLL for (int v = 0; v < NV; v++)
                acc[r][v] = format == IN_PAIRS ? add_pairs(a, b[v], acc[r][v])
                                               : madd(a, b[v], acc[r][v]);
        }
    }
    vf sums[MR * NV];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++) sums[r * NV + v] = acc[r][v];
    add_sums(rows, (const float *)sums, out);
}

#define ROW_CASE(n, ...) \
    case n: __VA_ARGS__; break;
#if MR == 12
#define ROW_CASES(call) \
    ROW_CASE(1, call(1)) ROW_CASE(2, call(2)) ROW_CASE(3, call(3)) ROW_CASE(4, call(4)) \
    ROW_CASE(5, call(5)) ROW_CASE(6, call(6)) ROW_CASE(7, call(7)) ROW_CASE(8, call(8)) \
    ROW_CASE(9, call(9)) ROW_CASE(10, call(10)) ROW_CASE(11, call(11)) ROW_CASE(12, call(12))
#else
#define ROW_CASES(call) \
    ROW_CASE(1, call(1)) ROW_CASE(2, call(2)) ROW_CASE(3, call(3)) ROW_CASE(4, call(4)) \
    ROW_CASE(5, call(5)) ROW_CASE(6, call(6))
#endif

static void linear_rows(Format format, int rows, const float *x, int64_t depth, const char *panel,
                        Fetch fetch, Output out) {
#define CALL(n) linear_tile(n, IN_FLOAT32, x, depth, panel, fetch, out)
#define CALL_BFLOAT16(n) linear_tile(n, IN_BFLOAT16, x, depth, panel, fetch, out)
#define CALL_FLOAT16(n) linear_tile(n, IN_FLOAT16, x, depth, panel, fetch, out)
#define CALL_PAIRS(n) linear_tile(n, IN_PAIRS, x, depth, panel, fetch, out)
    if (format == IN_BFLOAT16)
        switch (rows) { ROW_CASES(CALL_BFLOAT16) }
    else if (format == IN_FLOAT16)
        switch (rows) { ROW_CASES(CALL_FLOAT16) }
    else if (format == IN_PAIRS)
        switch (rows) { ROW_CASES(CALL_PAIRS) }
    else
        switch (rows) { ROW_CASES(CALL) }
#undef CALL
#undef CALL_BFLOAT16
#undef CALL_FLOAT16
#undef CALL_PAIRS
}

/* All rows of one panel and one K block; rows are divided evenly among as few tiles as possible. */
static void linear_block(Format format, int64_t rows, const float *x, int64_t depth,
                         const char *panel, const char *after, Output out, Later *later) {
    int64_t tiles = ceil_div(rows, MR), step = NR * weight_bytes(format);
    for (int64_t t = 0; t < tiles; t++) {
        int64_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
        Output at = out;
        at.y += from * out.y_stride;
        int has_more = tiles > 1 && later->next < later->last;
        linear_rows(format, (int)(to - from), x + from * KLD, depth, panel,
                    has_more ? fetch_later(later, after, depth, step, t)
                             : fetch_part(panel, after, depth * step, step, t, tiles), at);
    }
}

typedef struct {
    const char *packed;
    const float *bias;
    int64_t n, k;
    Format format;
} Linear;

/* Where one K block of one panel is. */
INLINE const char *slab_of(const Linear *l, int64_t p, int64_t k0) {
    return l->packed + (p * l->k + k0) * NR * weight_bytes(l->format);
}

/* The layer of one of several experts. */
INLINE Linear layer_of(const Linear *l, int64_t expert) {
    int64_t panel = expert * ceil_div(l->n, NR);
    const float *bias = l->bias ? l->bias + panel * NR : NULL;
    return (Linear){slab_of(l, panel, 0), bias, l->n, l->k, l->format};
}

/* The slab that a thread computes after one of its panels `of`. */
static const char *next_slab(const Linear *l, Range of, int64_t p, int64_t k0) {
    if (p + 1 < of.to) return slab_of(l, p + 1, k0);
    return k0 + KC < l->k ? slab_of(l, of.from, k0 + KC) : slab_of(l, of.to, 0);
}

/* One K block of one panel, a slab; x holds that K block of all rows. */
static void linear_slab(const Linear *l, Range of, int64_t p, int64_t k0, const float *x, int64_t rows,
                        float *y, Later *later) {
    float start[NR] = {0};
    Output out = {NULL, y + p * NR, l->n, min64(NR, l->n - p * NR), k0 == 0};
    if (l->bias && out.first) {
        memcpy(start, l->bias + p * NR, (size_t)out.columns * sizeof(float));
        out.start = start;
    }
    linear_block(l->format, rows, x, min64(KC, l->k - k0), slab_of(l, p, k0),
                 next_slab(l, of, p, k0), out, later);
}

/* x [M, inputs] into K blocks of rows: [K / KC][M][KLD], of numbers or of pairs. */
static void pack_rows(const float *x, int64_t m, int64_t inputs, int in_pairs, float *to, int64_t id,
                      int64_t n) {
    int64_t block = in_pairs ? 2 * KC : KC;
    for (int64_t r = m * id / n; r < m * (id + 1) / n; r++)
        for (int64_t i = 0; i < inputs; i += block) {
            float *at = to + (i / block * m + r) * KLD;
            int64_t count = min64(block, inputs - i);
            if (in_pairs)
                round_to_pairs(x + r * inputs + i, count, at);
            else
                memcpy(at, x + r * inputs + i, (size_t)count * sizeof(float));
        }
}

/* With many rows a thread takes several panels at a time, to read x less often. */
static int64_t panels_at_once(int64_t rows, int64_t panels, int64_t num_threads) {
    if (rows <= 4 * MR) return 1;
    return max64(1, min64(PANELS, panels / (4 * num_threads)));
}

/* A product of some rows, at most MC, on which threads work together. */
typedef struct {
    Linear l;
    const float *x; /* [m, inputs] */
    float *packed;  /* room for `packed_bytes` */
    float *y;
    int64_t m, inputs;
    const Segment *segments; /* of the rows; a layer without experts has one */
    int64_t num_segments;
    Share *shares;
    int64_t num_threads;
} Product;

INLINE Linear linear_of(const char *packed, const float *bias, int64_t n, int64_t inputs,
                        Format format) {
    return (Linear){packed, bias, n, format == IN_PAIRS ? ceil_div(inputs, 2) : inputs, format};
}

INLINE size_t packed_bytes(const Linear *l, int64_t m) {
    return rounded((size_t)(ceil_div(l->k, KC) * m * KLD) * sizeof(float));
}

/* Some panels of the outputs of a segment's rows; blocks: the K blocks of all rows, x_block apart. */
static void multiply_segment(const Product *p, const Segment *s, Range panels, const float *blocks,
                             int64_t x_block, Later *later) {
    const Linear l = layer_of(&p->l, s->expert);
    for (int64_t k0 = 0; k0 < l.k; k0 += KC)
        for (int64_t panel = panels.from; panel < panels.to; panel++)
            linear_slab(&l, panels, panel, k0, blocks + k0 / KC * x_block + s->from * KLD,
                        s->to - s->from, p->y + s->from * l.n, later);
}

/* A thread's part of a product; all threads of a region call it. Shares are of the panels of all
 * segments, one segment after the other. */
static void multiply(const Product *p, Later *later) {
    const Linear *l = &p->l;
    int64_t id = thread_id(), panels = ceil_div(l->n, NR);
    int64_t step = panels_at_once(p->m / max64(1, p->num_segments), panels, p->num_threads);
    int in_pairs = l->format == IN_PAIRS;
    const float *blocks = p->packed;
    int64_t x_block = p->m * KLD;
    if (p->m > 1 || in_pairs) {
        pack_rows(p->x, p->m, p->inputs, in_pairs, p->packed, id, num_workers());
        BARRIER
    } else { /* the K blocks of one row are in order already */
        blocks = p->x;
        x_block = KC;
    }
    Range r;
    while ((r = claim(p->shares, p->num_threads, id, step)).to)
        while (r.from < r.to) {
            int64_t first = r.from % panels, count = min64(r.to - r.from, panels - first);
            multiply_segment(p, p->segments + r.from / panels, (Range){first, first + count}, blocks,
                             x_block, later);
            r.from += count;
        }
}

/* y[M, N] = x[M, inputs] @ W^T + bias. Returns 0, or -1 if out of memory. `ends` is NULL, or has the
 * ends of the rows of experts (see experts.h). */
EXPORT int tw_linear(const float *x, const char *packed, const float *bias, float *y, int64_t m,
                     int64_t n, int64_t inputs, int format, const int64_t *ends,
                     int64_t num_experts, int num_threads) {
    const Linear l = linear_of(packed, bias, n, inputs, (Format)format);
    int64_t chunk = min64(m, MC);
    float *rows = scratch(packed_bytes(&l, chunk));
    if (!rows) return -1;
    if (m * n * l.k < SERIAL_WORK) num_threads = 1;
    for (int64_t m0 = 0; m0 < m; m0 += chunk) {
        Share shares[num_threads];
        Segment segments[MC];
        Product product = {.l = l, .x = x + m0 * inputs, .packed = rows, .y = y + m0 * n,
                           .m = min64(chunk, m - m0), .inputs = inputs, .segments = segments,
                           .shares = shares, .num_threads = num_threads};
        product.num_segments = find_segments((Experts){ends, num_experts}, m0, product.m, segments);
        deal(shares, num_threads, ceil_div(n, NR) * product.num_segments);
        PARALLEL {
            Later nothing = {0};
            multiply(&product, &nothing);
        }
    }
    return 0;
}
