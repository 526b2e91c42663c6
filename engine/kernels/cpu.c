/* The CPU kernels: paged attention, KV scatter, linear layers over prepacked weights in fp32, 16 bits,
 * int8 and int4, low-rank updates of them, sampling, exchanges between processes; and the replay of recorded calls.
 *
 * Plain C11 with GCC/Clang vector extensions; the vector width follows the compile target. Only
 * madd, HOLD, read_step, dot4 and dot8 are written for instruction sets, and have portable versions. Built and loaded by
 * build.py, called through cpu.py.
 *
 * A row's result is the same, bit for bit, in any batch, with any number of threads, and however
 * the tokens of its sequence are divided among steps. Sums over K run in blocks of KC in a fixed
 * order. Attention adds up positions in runs and splits that start at multiples of TILE and SPLIT,
 * whatever queries share a tile. So keys and values that are computed again, many at a time, equal
 * those that were computed one by one. Where a product and a sum round once it says madd: compilers
 * do not decide it (build.py), since they would for one number of rows and not for another.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
#define W 16       /* lanes of a vector */
#define LOG_W 4
#define MR 12      /* rows of a register tile: MR * NV accumulators must fit the register file */
#elif defined(__AVX__)
#define W 8
#define LOG_W 3
#define MR 6
#elif defined(__aarch64__)
#define W 4
#define LOG_W 2
#define MR 12
#else
#define W 4
#define LOG_W 2
#define MR 6
#endif
#if defined(__AVX512VNNI__)
#define VNNI 1
#define DOT(sums, unsigned_bytes, bytes) \
    (vi)_mm512_dpbusd_epi32((__m512i)(sums), (__m512i)(unsigned_bytes), (__m512i)(bytes))
#elif defined(__AVXVNNI__) && W == 8
#define VNNI 1
#define DOT(sums, unsigned_bytes, bytes) \
    (vi)_mm256_dpbusd_avx_epi32((__m256i)(sums), (__m256i)(unsigned_bytes), (__m256i)(bytes))
#elif defined(__AVX512BW__)
#define WORDS 1
#define MADD_WORDS(a, b) (vi)_mm512_madd_epi16((__m512i)(a), (__m512i)(b))
#define MADD_BYTES(a, b) (vs)_mm512_maddubs_epi16((__m512i)(a), (__m512i)(b))
#elif defined(__AVX2__) && W == 8
#define WORDS 1
#define MADD_WORDS(a, b) (vi)_mm256_madd_epi16((__m256i)(a), (__m256i)(b))
#define MADD_BYTES(a, b) (vs)_mm256_maddubs_epi16((__m256i)(a), (__m256i)(b))
#endif
#define NV 2          /* vectors (columns) of a register tile */
#define NR (NV * W)   /* columns of a weight panel */
#if W == 8
#define KC 256        /* depth of one K block: KC x NR weights and a tile's rows stay in the first cache */
#else
#define KC 512        /* likewise, in the inner caches */
#endif
#define KLD (KC + 16) /* row stride of packed activations: off powers of two, for the cache sets */
#define MC 192        /* activation rows packed at a time: MC x KC of them fit the L2 cache */
#define PANELS 4      /* panels that share a pass over the activations */

#define QK 1024            /* depth of a block of int8 activations */
#define QLD (QK + 64)      /* its row stride: off powers of two, for the cache sets */
#define LEAST_SCALE 1e-30f /* of int8 rows: smaller scales are raised to this */

#define AHEAD 8192        /* bytes between a weight and what a lone tile prefetches with it */

#define LATER_BYTES 393216 /* prefetched for after a product: they stay in the L2 cache */

#define SLICE 4096 /* scores processed at once: they stay in the first-level cache */
#define GROUP 64   /* scores that share a precomputed maximum, to find the largest ones */
#define FEW 32     /* scores that hold most of the mass of nearly any distribution */

#define TILE 64            /* cache positions processed at once */
#define BURST 4            /* rows prefetched at once */
#define CACHE_LINE 64      /* bytes */
#define LINE (CACHE_LINE / 4) /* floats */
#define MAX_D 576          /* head size: the latents of DeepSeek V3, with a rotated key */
#define DLD (MAX_D + 16)   /* row stride of head-size scratch rows */
#define SLD (TILE + 16)    /* row stride of the score rows */
#define SCORE_ROWS (MR / 2) /* rows of a tile of scores, which has two accumulators for each */
#define DIRECT_ROWS 4      /* for up to this many query rows, keys are not transposed */
#define TARGET_ROWS 96     /* query rows (positions x heads of the group) of a prefill tile */
#define SPLIT 512          /* positions of a KV split; a multiple of TILE */
#define ENOUGH_TILES 8     /* of one sequence, for threads to share its work without splits */
#define SERIAL_WORK 100000 /* multiply-adds below which waking threads costs more than it saves */
#define MASKED (-1e30f)    /* in place of minus infinity; keeps every exp argument finite */

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#if defined(__AVX2__) && W == 8
/* Keeps a vector in its register: with 16 of them compilers read weights again for each row of a tile,
 * or move sums to memory, to have a register for what is needed later. */
#define HOLD(vector) __asm__("" : "+x"(vector))
#else
#define HOLD(vector) (void)0
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef float vfu __attribute__((vector_size(W * 4), aligned(4), may_alias));

typedef int16_t vs __attribute__((vector_size(W * 4)));

INLINE vi splat_bytes(const void *p) { /* four bytes in every lane */
    int32_t four;
    memcpy(&four, p, sizeof four);
    return four - (vi){};
}
INLINE vf load(const float *p) { return *(const vfu *)p; }
INLINE void store(float *p, vf v) { *(vfu *)p = v; }
INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* a > b ? a : b, so b if one of them is NaN. */
INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return pick(a > b, a, b);
#endif
}

/* a * b + c, rounded once where the processor can. */
INLINE vf madd(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && W == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

/* A vector that several instructions use: GCC would have each of them read it from memory again. */
INLINE vf in_register(vf v) {
#if defined(__x86_64__)
    __asm__("" : "+v"(v));
#endif
    return v;
}

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if W == 16
#define LOW_LANES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_LANES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define LANES 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#elif W == 8
#define LOW_LANES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_LANES 4, 12, 5, 13, 6, 14, 7, 15
#define LANES 0, 1, 2, 3, 4, 5, 6, 7
#else
#define LOW_LANES 0, 4, 1, 5
#define HIGH_LANES 2, 6, 3, 7
#define LANES 0, 1, 2, 3
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
#if W == 8 /* AVX has no instruction for it, but two that together make both of them */
INLINE vf halves_low(vf a, vf b) { return SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13); }
INLINE vf halves_high(vf a, vf b) { return SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15); }
INLINE vf interleave_low(vf a, vf b) {
    return SHUFFLE(halves_low(a, b), halves_high(a, b), 0, 1, 2, 3, 8, 9, 10, 11);
}
INLINE vf interleave_high(vf a, vf b) {
    return SHUFFLE(halves_low(a, b), halves_high(a, b), 4, 5, 6, 7, 12, 13, 14, 15);
}
#else
INLINE vf interleave_low(vf a, vf b) { return SHUFFLE(a, b, LOW_LANES); }
INLINE vf interleave_high(vf a, vf b) { return SHUFFLE(a, b, HIGH_LANES); }
#endif

/* log2(W) rounds of perfect shuffles transpose a W x W tile ... */
INLINE void transpose(vf v[W]) {
    vf t[W];
    UNROLL for (int round = W; round > 1; round /= 2) {
        UNROLL for (int i = 0; i < W / 2; i++) {
            t[2 * i] = interleave_low(v[i], v[i + W / 2]);
            t[2 * i + 1] = interleave_high(v[i], v[i + W / 2]);
        }
        UNROLL for (int i = 0; i < W; i++) v[i] = t[i];
    }
}

/* ... and the same shuffles with an addition at each round give the W row sums. */
INLINE vf row_sums(vf v[W]) {
    UNROLL for (int half = W / 2; half > 0; half /= 2) {
        UNROLL for (int i = 0; i < half; i++)
            v[i] = interleave_low(v[i], v[i + half]) + interleave_high(v[i], v[i + half]);
    }
    return v[0];
}

/* Each lane's partner, `distance` lanes before or after it. */
INLINE vf partners(vf v, const int distance) {
#if W == 16
    if (distance == 8)
        return SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    if (distance == 4)
        return SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    if (distance == 2)
        return SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif W == 8
    if (distance == 4) return SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    if (distance == 2) return SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    return SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    if (distance == 2) return SHUFFLE(v, v, 2, 3, 0, 1);
    return SHUFFLE(v, v, 1, 0, 3, 2);
#endif
}

/* Folding a vector onto itself log2(W) times leaves the result in every lane. */
INLINE vf horizontal_max(vf v) {
    UNROLL for (int half = W / 2; half > 0; half /= 2) v = larger(v, partners(v, half));
    return v;
}

INLINE vf horizontal_sum(vf v) {
    UNROLL for (int half = W / 2; half > 0; half /= 2) v += partners(v, half);
    return v;
}

/* exp for arguments in [-87, 88], clamped below; NaN stays NaN. About 1 ulp. */
INLINE vf exp_v(vf x) {
    const vf magic = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    x = larger(splat(-87.0f), x);
    vf biased = madd(x, splat(1.44269504089f), magic);
    vf n = biased - magic;
    vf r = madd(n, splat(2.12194440e-4f), madd(n, splat(-0.693359375f), x));
    vf p = splat(1.9875691500e-4f);
    p = madd(p, r, splat(1.3981999507e-3f));
    p = madd(p, r, splat(8.3334519073e-3f));
    p = madd(p, r, splat(4.1665795894e-2f));
    p = madd(p, r, splat(1.6666665459e-1f));
    p = madd(p, r, splat(5.0000001201e-1f));
    p = madd(p, r * r, r) + 1.0f;
    return p * (vf)(((vi)biased << 23) + 0x3f800000);
}

INLINE float exp_1(float x) { return exp_v(splat(x))[0]; }

INLINE vf tanh_v(vf x) {
    vf square = x * x;
    vf series = splat(-17.0f / 315.0f);
    series = series * square + 2.0f / 15.0f;
    series = series * square - 1.0f / 3.0f;
    series = x + x * square * series;
    vf bounded = pick(x > 9.0f, splat(9.0f), x);
    vf exact = 1.0f - 2.0f / (exp_v(2.0f * bounded) + 1.0f);
    return pick((square < 0.04f), series, exact);
}

/* ---- threads and scratch ------------------------------------------------------------------ */

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
typedef struct {
    size_t size;
    void *memory;
} Scratch;

static void scratch_free(void *p) {
    free(((Scratch *)p)->memory);
    free(p);
}
static void scratch_init(void) { pthread_key_create(&scratch_key, scratch_free); }

/* One growing buffer per calling thread: a step allocates nothing. NULL if out of memory. */
static void *scratch(size_t size) {
    pthread_once(&scratch_once, scratch_init);
    Scratch *s = pthread_getspecific(scratch_key);
    if (!s) {
        if (!(s = calloc(1, sizeof *s))) return NULL;
        pthread_setspecific(scratch_key, s);
    }
    if (!s->memory || s->size < size) { /* also for size 0, since NULL means failure */
        free(s->memory);
        s->size = (size + size / 4 + 4096) & ~(size_t)4095;
        s->memory = aligned_alloc(4096, s->size);
        if (!s->memory) s->size = 0;
    }
    return s->memory;
}

INLINE size_t rounded(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

/* A worker's share of the iterations of a loop. A worker that has finished its own share continues
 * with those of other workers. So each reads memory front to back, which is fastest, and a worker
 * that loses its processor does not delay the others. */
typedef struct {
    _Alignas(64) atomic_int_fast64_t next;
    int64_t end;
} Share;

typedef struct {
    int64_t from, to;
} Range;

static void deal(Share *shares, int64_t num_shares, int64_t count) {
    for (int64_t i = 0; i < num_shares; i++) {
        atomic_init(&shares[i].next, count * i / num_shares);
        shares[i].end = count * (i + 1) / num_shares;
    }
}

/* The next `step` iterations for a worker; empty if nothing is left in any share. */
static Range claim(Share *shares, int64_t num_shares, int64_t worker, int64_t step) {
    for (int64_t i = 0; i < num_shares; i++) {
        Share *s = shares + (worker + i) % num_shares;
        if (atomic_load_explicit(&s->next, memory_order_relaxed) >= s->end) continue;
        int64_t from = atomic_fetch_add_explicit(&s->next, step, memory_order_relaxed);
        if (from < s->end) return (Range){from, min64(from + step, s->end)};
    }
    return (Range){0, 0};
}

#ifdef _OPENMP
#define PARALLEL _Pragma("omp parallel num_threads(num_threads) if (num_threads > 1)")
#define BARRIER _Pragma("omp barrier")
INLINE int thread_id(void) { return omp_get_thread_num(); }
INLINE int num_workers(void) { return omp_get_num_threads(); }
#else
#define PARALLEL (void)num_threads;
#define BARRIER
INLINE int thread_id(void) { return 0; }
INLINE int num_workers(void) { return 1; }
#endif

EXPORT int tw_has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* Binds each thread of the pool to a processor of its own; processors[i] is for thread i. */
EXPORT void tw_pin_threads(const int *processors, int num_threads) {
#if defined(_OPENMP) && defined(__linux__)
#pragma omp parallel num_threads(num_threads)
    {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(processors[omp_get_thread_num()], &set);
        sched_setaffinity(0, sizeof set, &set);
    }
#else
    (void)processors, (void)num_threads;
#endif
}

EXPORT int tw_max_head_size(void) { return MAX_D; }

/* Asks for huge pages for a large buffer: fewer TLB misses while weights are read. */
EXPORT void tw_advise_huge(void *start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    uintptr_t first = ((uintptr_t)start + 4095) & ~(uintptr_t)4095;
    uintptr_t last = ((uintptr_t)start + (uintptr_t)bytes) & ~(uintptr_t)4095;
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)start;
    (void)bytes;
#endif
}

/* ---- KV scatter --------------------------------------------------------------------------- */

/* Rotates one head: element i of the first `rotary` ones pairs with i + rotary / 2, as in
 * transformers' apply_rotary_pos_emb; the elements after them are copied. */
INLINE void rotate_head(const float *x, const float *cosine, const float *sine, int64_t rotary,
                        int64_t head_size, float *to) {
    int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        to[i] = a * cosine[i] - b * sine[i];
        to[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
    memcpy(to + rotary, x + rotary, (size_t)(head_size - rotary) * sizeof(float));
}

EXPORT int tw_rotate_query(const float *query, int64_t token_stride, int64_t head_stride,
                            const float *cosine, const float *sine, int64_t rotary_stride,
                            int64_t rotary, float *output, int64_t num_tokens, int64_t num_heads,
                            int64_t head_size, int num_threads) {
    if (num_tokens * num_heads * head_size < SERIAL_WORK) num_threads = 1;
    PARALLEL {
        int64_t n = num_workers(), id = thread_id();
        for (int64_t t = num_tokens * id / n; t < num_tokens * (id + 1) / n; t++)
            for (int64_t h = 0; h < num_heads; h++)
                rotate_head(query + t * token_stride + h * head_stride, cosine + t * rotary_stride,
                            sine + t * rotary_stride, rotary, head_size,
                            output + (t * num_heads + h) * head_size);
    }
    return 0;
}

/* key, value: [T, Hkv, D] with a token stride and a head stride; slots below zero are skipped.
 * cosine, sine: [T, rotary] with a token stride; a rotary of 0 stores the keys as they are. */
EXPORT int tw_rotate_write_kv(const float *key, const float *value, int64_t key_token,
                               int64_t key_head, int64_t value_token, int64_t value_head,
                               const float *cosine, const float *sine, int64_t rotary_stride,
                               int64_t rotary, float *key_cache, float *value_cache,
                               int64_t block_stride, int64_t token_stride, int64_t head_stride,
                               const int64_t *slots, int64_t num_tokens, int64_t num_kv_heads,
                               int64_t head_size, int64_t block_size, int num_threads) {
    if (num_tokens * num_kv_heads * head_size < SERIAL_WORK) num_threads = 1;
    PARALLEL {
        int64_t n = num_workers(), id = thread_id();
        for (int64_t t = num_tokens * id / n; t < num_tokens * (id + 1) / n; t++) {
            if (slots[t] < 0) continue;
            int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
            int64_t at = block * block_stride + offset * token_stride;
            for (int64_t h = 0; h < num_kv_heads; h++) {
                rotate_head(key + t * key_token + h * key_head, cosine + t * rotary_stride,
                            sine + t * rotary_stride, rotary, head_size,
                            key_cache + at + h * head_stride);
                memcpy(value_cache + at + h * head_stride, value + t * value_token + h * value_head,
                       (size_t)head_size * sizeof(float));
            }
        }
    }
    return 0;
}

/* ---- linear layer over packed weights ----------------------------------------------------- */
/*
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

/* A thread's part of a product; all threads of a region call it. */
static void multiply(const Product *p, Later *later) {
    const Linear *l = &p->l;
    int64_t id = thread_id(), panels = ceil_div(l->n, NR);
    int64_t step = panels_at_once(p->m, panels, p->num_threads);
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
        for (int64_t k0 = 0; k0 < l->k; k0 += KC)
            for (int64_t panel = r.from; panel < r.to; panel++)
                linear_slab(l, r, panel, k0, blocks + k0 / KC * x_block, p->m, p->y, later);
}

/* y[M, N] = x[M, inputs] @ W^T + bias. Returns 0, or -1 if out of memory. */
EXPORT int tw_linear(const float *x, const char *packed, const float *bias, float *y, int64_t m,
                     int64_t n, int64_t inputs, int format, int num_threads) {
    const Linear l = linear_of(packed, bias, n, inputs, (Format)format);
    int64_t chunk = min64(m, MC);
    float *rows = scratch(packed_bytes(&l, chunk));
    if (!rows) return -1;
    if (m * n * l.k < SERIAL_WORK) num_threads = 1;
    for (int64_t m0 = 0; m0 < m; m0 += chunk) {
        Share shares[num_threads];
        deal(shares, num_threads, ceil_div(n, NR));
        const Product product = {.l = l, .x = x + m0 * inputs, .packed = rows, .y = y + m0 * n,
                                 .m = min64(chunk, m - m0), .inputs = inputs, .shares = shares,
                                 .num_threads = num_threads};
        PARALLEL {
            Later nothing = {0};
            multiply(&product, &nothing);
        }
    }
    return 0;
}

/* ---- linear layers whose activations are rounded ------------------------------------------ */
/*
 * Rows of activations become integers ("levels") from -127 to 127 times a scale per row, in K blocks
 * of QK. What follows is shared by the layers of int8 and int4 weights.
 */

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
 * panel's outputs. Or the same layer of several experts, whose panels follow each other, and whose
 * rows do: expert e has those before ends[e] that the experts before it do not have. */
typedef struct RoundingLinear {
    const void *layer;
    const char *packed; /* its panels */
    int64_t n, k, panel_bytes;
    const int64_t *ends; /* NULL for a layer without experts */
    int64_t num_experts; /* 1 for such */
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

/* The rows of a chunk that one expert has. */
typedef struct {
    int64_t expert, from, to;
} Segment;

/* Finds the segments of the `rows` rows from m0 on, and returns their number. */
static int64_t find_segments(const RoundingLinear *l, int64_t m0, int64_t rows, Segment *segments) {
    if (!l->ends) {
        segments[0] = (Segment){0, 0, rows};
        return 1;
    }
    int64_t count = 0, from = 0;
    for (int64_t e = 0; e < l->num_experts && from < rows; e++) {
        int64_t to = min64(l->ends[e] - m0, rows);
        if (to <= from) continue;
        segments[count++] = (Segment){e, from, to};
        from = to;
    }
    return count;
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
        deal(shares, num_threads, panels * find_segments(l, m0, rows.rows, segments));
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

/* ---- linear layer over int8 weights ------------------------------------------------------- */
/*
 * Weights are integers from -127 to 127 times a scale per output column; activations are rounded to
 * integers ("levels") times a scale per row. Panels are NR columns wide as above, with four steps
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
 * NULL, or has the ends of the rows of experts (see RoundingLinear); here and below. */
EXPORT int tw_int8_linear(const float *x, const int8_t *packed, const float *scales,
                          const int32_t *columns, const float *bias, float *y, int64_t m,
                          int64_t n, int64_t k, const int64_t *ends, int64_t num_experts,
                          int num_threads) {
    const Int8Linear layer = {packed, scales, columns, bias, k};
    const RoundingLinear l = {&layer, (const char *)packed, n, k, ceil_div(k, 4) * NR * 4, ends,
                              num_experts, 0, sizeof(Level), round_int8, int8_rows};
    return multiply_rounded(&l, x, y, m, num_threads);
}

/* ---- linear layer over int8 weights in groups --------------------------------------------- */
/*
 * As above, but every GROUP_K weights of a column have a scale of their own, as in GGUF's Q8_0. Scales
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
    const RoundingLinear l = {&layer, (const char *)packed, n, k, k * NR, ends, num_experts, 0,
                              sizeof(Level), round_int8, grouped_int8_rows};
    return multiply_rounded(&l, x, y, m, num_threads);
}

/* ---- linear layer over int4 weights ------------------------------------------------------- */
/*
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
    const RoundingLinear l = {&layer, (const char *)packed, n, k, k / 2 * NR, ends, num_experts,
                              k / group, sizeof(SmallLevel), round_int4, int4_rows};
    return multiply_rounded(&l, x, y, m, num_threads);
}

/* ---- low-rank updates of a linear layer, a different one for each row --------------------- */
/*
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
        int status = tw_linear(x, packed, bias, y, m, n, inputs, format, num_threads);
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
    const Product product = {.l = l, .x = x, .packed = (float *)memory, .y = y, .m = m,
                             .inputs = inputs, .shares = shares, .num_threads = num_threads};
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

/* ---- row-wise operations ------------------------------------------------------------------ */

/* y = x / rms(x) * (offset + weight), row by row; x [rows, width] contiguous, y alike. */
EXPORT int tw_rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t width,
                        float epsilon, float offset, int num_threads) {
    if (rows * width < SERIAL_WORK) num_threads = 1;
    PARALLEL {
        int64_t n = num_workers(), id = thread_id();
        for (int64_t r = rows * id / n; r < rows * (id + 1) / n; r++) {
            const float *in = x + r * width;
            float *out = y + r * width;
            vf squares[2] = {};
            int64_t i = 0;
            float total = 0.0f;
            for (; i + 2 * W <= width; i += 2 * W) {
                vf a = load(in + i), b = load(in + i + W);
                squares[0] = madd(a, a, squares[0]);
                squares[1] = madd(b, b, squares[1]);
            }
            for (; i < width; i++) total += in[i] * in[i];
            total += horizontal_sum(squares[0] + squares[1])[0];
            float scale = 1.0f / sqrtf(total / (float)width + epsilon);
            for (i = 0; i + W <= width; i += W)
                store(out + i, load(in + i) * scale * (load(weight + i) + offset));
            for (; i < width; i++) out[i] = in[i] * scale * (weight[i] + offset);
        }
    }
    return 0;
}

/* y[i] = x[index[i]], rows of `width` numbers; a negative index counts from the end. Returns 0, or
 * -2 if an index is out of range. */
EXPORT int tw_take_rows(const float *x, int64_t row_stride, int64_t num_rows, const int64_t *index,
                        float *y, int64_t n, int64_t width, int num_threads) {
    for (int64_t i = 0; i < n; i++)
        if (index[i] < -num_rows || index[i] >= num_rows) return -2;
    if (n * width < SERIAL_WORK) num_threads = 1;
    PARALLEL {
        int64_t workers = num_workers(), id = thread_id();
        for (int64_t i = n * id / workers; i < n * (id + 1) / workers; i++)
            memcpy(y + i * width, x + (index[i] + (index[i] < 0) * num_rows) * row_stride,
                   (size_t)width * sizeof(float));
    }
    return 0;
}

/* y = a + b, n numbers each */
EXPORT int tw_add(const float *a, const float *b, float *y, int64_t n, int num_threads) {
    if (n < SERIAL_WORK) num_threads = 1;
    PARALLEL {
        int64_t workers = num_workers(), id = thread_id();
        for (int64_t i = n * id / workers; i < n * (id + 1) / workers; i++) y[i] = a[i] + b[i];
    }
    return 0;
}

/* x / (1 + exp(-y)) */
INLINE vf sigmoid_of(vf y, vf x) {
    vf negative = -y;
    return x / (exp_v(pick(negative > 88.0f, splat(88.0f), negative)) + 1.0f);
}

INLINE vf silu_v(vf x) { return sigmoid_of(x, x); }

/* GELU by its usual formula with tanh(y), since (1 + tanh(y)) / 2 is the sigmoid of 2y. */
INLINE vf gelu_v(vf x) { return sigmoid_of(x * (x * x * 0.0713548163f + 1.5957691216f), x); }

/* y = activation(gate) * up. Columns after the last whole vector are computed in vectors as well:
 * so a number's result does not depend on where in a row or a thread's share it is. */
INLINE void gate_rows(vf (*activation)(vf), const float *gate, int64_t gate_stride, const float *up,
                      int64_t up_stride, float *y, int64_t rows, int64_t width, int num_threads) {
    if (rows * width < SERIAL_WORK / 8) num_threads = 1;
    PARALLEL {
        int64_t n = num_workers(), id = thread_id();
        for (int64_t r = rows * id / n; r < rows * (id + 1) / n; r++) {
            const float *g = gate + r * gate_stride, *u = up + r * up_stride;
            float *out = y + r * width;
            int64_t i = 0;
            for (; i + W <= width; i += W) store(out + i, activation(load(g + i)) * load(u + i));
            for (; i < width; i++) out[i] = activation(splat(g[i]))[0] * u[i];
        }
    }
}

/* Rows of gate and up may be slices of one wider tensor. */
EXPORT int tw_silu_and_mul(const float *gate, int64_t gate_stride, const float *up,
                           int64_t up_stride, float *y, int64_t rows, int64_t width,
                           int num_threads) {
    gate_rows(silu_v, gate, gate_stride, up, up_stride, y, rows, width, num_threads);
    return 0;
}

EXPORT int tw_gelu_and_mul(const float *gate, int64_t gate_stride, const float *up,
                           int64_t up_stride, float *y, int64_t rows, int64_t width,
                           int num_threads) {
    gate_rows(gelu_v, gate, gate_stride, up, up_stride, y, rows, width, num_threads);
    return 0;
}

/* ---- choosing tokens ---------------------------------------------------------------------- */
/*
 * A row is cut into slices of a fixed size, whose results are merged in order: so a row's result is
 * the same for any number of threads and rows. A slice is read from memory once; later passes over
 * it find it in the first-level cache.
 */

typedef struct {
    float top, sum; /* the maximum, and the sum of exp(score - top) */
    int64_t index;  /* of the first maximum */
} Peak;

typedef struct {
    const float *scores;
    int64_t n;
} Slice;

/* Slice i of rows of n scores each, counted row after row. */
static Slice nth_slice(const float *scores, int64_t row_stride, int64_t n, int64_t i) {
    int64_t slices = ceil_div(n, SLICE), from = i % slices * SLICE;
    return (Slice){scores + i / slices * row_stride + from, min64(SLICE, n - from)};
}

/* Vector i of n scores, filled up with minus infinity. */
INLINE vf load_scores(const float *x, int64_t n, int64_t i) {
    if ((i + 1) * W <= n) return load(x + i * W);
    float lanes[W];
    for (int64_t j = 0; j < W; j++) lanes[j] = i * W + j < n ? x[i * W + j] : -INFINITY;
    return load(lanes);
}

/* With a NaN score the sum is NaN. The slice `ahead` is prefetched meanwhile. */
static Peak find_peak(Slice slice, Slice ahead) {
    const float *x = slice.scores;
    int64_t n = slice.n;
    int64_t vectors = ceil_div(n, W);
    vf tops[4];
    UNROLL for (int v = 0; v < 4; v++) tops[v] = splat(-INFINITY);
    for (int64_t i = 0; i < vectors; i += 4)
        UNROLL for (int v = 0; v < 4; v++) tops[v] = larger(load_scores(x, n, i + v), tops[v]);
    vf top = horizontal_max(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
    vf shift = pick(top == -INFINITY, splat(0.0f), top);
    vf sums[4] = {}; /* four sums of a quarter of the terms each round less than one sum */
    vi lane = (vi){LANES}, first = (vi){} + INT32_MAX;
    for (int64_t i = 0; i < vectors; i += 4)
        UNROLL for (int v = 0; v < 4; v++, lane += W) {
            vf score = load_scores(x, n, i + v);
            if ((i + v) * W < ahead.n) __builtin_prefetch(ahead.scores + (i + v) * W);
            sums[v] += exp_v(score - shift);
            vi earlier = (score == top) & (lane < first);
            first = (earlier & lane) | (~earlier & first);
        }
    vf sum = horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    Peak peak = {top[0], sum[0], first[0]};
    UNROLL for (int j = 1; j < W; j++) peak.index = min64(peak.index, first[j]);
    return peak;
}

/* What a slice adds to the sum of exp(score - top) of its row, whose maximum is `top`. */
INLINE double mass_of(Peak peak, float top) {
    return peak.top == -INFINITY ? 0.0 : (double)(peak.sum * exp_1(peak.top - top));
}

/* exp(difference), exactly 0 for differences below -87. */
INLINE vf weight_v(vf difference) {
    return pick(difference >= -87.0f, exp_v(difference), splat(0.0f));
}

/* The index at which the running sum of a slice's weights first exceeds `goal`; if rounding keeps
 * it below, the last index with a weight above 0. */
static int64_t find_in_slice(Slice slice, float top, double goal) {
    int64_t last = 0;
    double sum = 0.0;
    for (int64_t i = 0; i < ceil_div(slice.n, W); i++) {
        vf weights = weight_v(load_scores(slice.scores, slice.n, i) - top);
        double next = sum + (double)horizontal_sum(weights)[0];
        if (next == sum) continue;
        for (int j = 0; j < W; j++) {
            if (weights[j] == 0.0f) continue;
            last = i * W + j;
            sum += (double)weights[j];
            if (sum > goal) return last;
        }
    }
    return last;
}

typedef struct {
    const float *scores;
    int64_t row_stride, n;
    const double *draws; /* in [0, 1); below 0 the likeliest is chosen, with NULL for all rows */
    int64_t *ids;
    float *logprobs, *max, *norm;
} Choice;

/* The first token at which the cumulative probability exceeds the row's draw. */
static int64_t draw(const Choice *c, const Peak *peaks, int64_t slices, int64_t row, float top) {
    double total = 0.0, before = 0.0, mass = 0.0;
    for (int64_t s = 0; s < slices; s++) total += mass_of(peaks[s], top);
    double goal = total * c->draws[row];
    int64_t last = 0; /* slice with any mass, in case rounding keeps the sum below the goal */
    for (int64_t s = 0; s < slices; s++) {
        double more = mass_of(peaks[s], top);
        if (more == 0.0) continue;
        before += mass;
        mass = more;
        last = s;
        if (before + mass > goal) break;
    }
    Slice slice = nth_slice(c->scores, c->row_stride, c->n, row * slices + last);
    return last * SLICE + find_in_slice(slice, top, goal - before);
}

/* As in torch: NaN counts as the maximum, the first of equal ones is taken, and if the maximum is
 * infinite the norm is NaN, since infinity minus infinity is. */
static void choose_in_row(const Choice *c, const Peak *peaks, int64_t slices, int64_t row) {
    const float *x = c->scores + row * c->row_stride;
    int64_t best = 0;
    for (int64_t s = 1; s < slices; s++)
        if (peaks[s].top > peaks[best].top) best = s;
    float top = peaks[best].top, sum = 0.0f;
    for (int64_t s = 0; s < slices; s++) sum += peaks[s].sum * exp_1(peaks[s].top - top);
    int64_t id = best * SLICE + peaks[best].index;
    for (int64_t i = 0; isnan(sum) && i < c->n; i++)
        if (isnan(x[i])) {
            top = NAN;
            id = i;
            break;
        }
    if (c->draws && c->draws[row] >= 0.0 && !isnan(sum)) id = draw(c, peaks, slices, row, top);
    c->ids[row] = id;
    c->max[row] = top;
    c->norm[row] = logf(sum);
    c->logprobs[row] = x[id] - top - c->norm[row];
}

/* For scores [rows, n]: per row a token and its log-probability, the maximum, and
 * log(sum(exp(score - maximum))). Returns 0, or -1 if out of memory. */
EXPORT int tw_choose(const float *scores, int64_t row_stride, int64_t rows, int64_t n,
                     const double *draws, int64_t *ids, float *logprobs, float *max, float *norm,
                     int num_threads) {
    const Choice choice = {scores, row_stride, n, draws, ids, logprobs, max, norm};
    int64_t slices = ceil_div(n, SLICE);
    Peak *peaks = scratch((size_t)(rows * slices) * sizeof(Peak));
    if (!peaks) return -1;
    if (rows * n < SERIAL_WORK) num_threads = 1;
    Share shares[num_threads];
    deal(shares, num_threads, rows * slices);
    PARALLEL {
        int64_t workers = num_workers(), id = thread_id();
        Range r;
        while ((r = claim(shares, num_threads, id, 1)).to) {
            int64_t next = min64(r.to, rows * slices - 1);
            peaks[r.from] = find_peak(nth_slice(scores, row_stride, n, r.from),
                                      nth_slice(scores, row_stride, n, next));
        }
        BARRIER
        for (int64_t r = rows * id / workers; r < rows * (id + 1) / workers; r++)
            choose_in_row(&choice, peaks + r * slices, slices, r);
    }
    return 0;
}

/* ---- truncating distributions ------------------------------------------------------------- */
/*
 * The scores that a row keeps are those in a window, so only its edges are searched for. The maxima
 * of groups of GROUP scores bound the search: at least k scores are as large as the k-th largest
 * maximum.
 */

typedef struct {
    float *x;     /* scores */
    float *tops;  /* the maximum of each group of scores */
    float *found; /* scratch for n + groups numbers, or NULL */
    int64_t n, groups;
    float top; /* the maximum */
} Row;

typedef struct {
    float low, high; /* scores in [low, high) */
} Window;

typedef struct {
    Window all, sure; /* scores outside of `all` are dropped, those inside of `sure` are kept; */
    double left;      /* of the scores in between the first ones are kept, up to this mass */
} Cut;

/* Divides by a temperature and finds the maxima. Returns 0 for rows without a finite one. */
static int prepare_row(Row *row, float temperature) {
    int64_t vectors = GROUP / W;
    float top = -INFINITY;
    int has_nan = 0;
    for (int64_t g = 0; g < row->groups; g++) {
        float *x = row->x + g * GROUP;
        int64_t n = min64(GROUP, row->n - g * GROUP), i = 0;
        vf tops = splat(-INFINITY);
        vi nans = (vi){};
        for (; i < vectors && (i + 1) * W <= n; i++) {
            vf score = load(x + i * W);
            if (temperature != 1.0f) store(x + i * W, score /= temperature);
            tops = larger(score, tops);
            nans |= score != score;
        }
        float most = horizontal_max(tops)[0];
        for (int j = 0; j < W; j++) has_nan |= nans[j];
        for (i *= W; i < n; i++) {
            x[i] /= temperature;
            if (x[i] > most) most = x[i];
            has_nan |= isnan(x[i]);
        }
        row->tops[g] = most;
        if (most > top) top = most;
    }
    row->top = top;
    return !has_nan && isfinite(top);
}

/* The k-th largest of n numbers, which are reordered: Hoare's selection. */
static float kth_largest(float *x, int64_t n, int64_t k) {
    int64_t from = 0, to = n - 1, at = k - 1;
    while (from < to) {
        float pivot = x[(from + to) / 2];
        int64_t i = from, j = to;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) {
                float swapped = x[i];
                x[i++] = x[j];
                x[j--] = swapped;
            }
        }
        if (at <= j) to = j;
        else if (at >= i) from = i;
        else break;
    }
    return x[at];
}

/* Copies the scores in a window to `found`; returns how many they are. */
static int64_t find(const Row *row, Window window) {
    int64_t count = 0;
    for (int64_t g = 0; g < row->groups; g++) {
        if (row->tops[g] < window.low) continue;
        const float *x = row->x + g * GROUP;
        int64_t n = min64(GROUP, row->n - g * GROUP);
        for (int64_t i = 0; i < n; i++) {
            row->found[count] = x[i]; /* without a branch, which would be hard to predict */
            count += (x[i] >= window.low) & (x[i] < window.high);
        }
    }
    return count;
}

/* Copies the largest k scores, and some more, to `found`; returns how many they are. */
static int64_t find_largest(const Row *row, int64_t k) {
    Window window = {-INFINITY, INFINITY};
    if (k < row->groups) {
        memcpy(row->found, row->tops, (size_t)row->groups * sizeof(float));
        window.low = kth_largest(row->found, row->groups, k);
    }
    return find(row, window);
}

static float cut_at_k(const Row *row, int64_t k) {
    return kth_largest(row->found, find_largest(row, k), k);
}

typedef struct {
    double mass; /* the sum of exp(score - top) */
    int64_t count;
} Weight;

static Weight weigh(const Row *row, Window window) {
    double mass = 0.0;
    vi counts = (vi){};
    for (int64_t from = 0; from < row->groups; from += SLICE / GROUP) {
        int64_t to = min64(from + SLICE / GROUP, row->groups);
        vf sums = splat(0.0f); /* of a slice's terms only, which limits the error of rounding */
        for (int64_t g = from; g < to; g++) {
            if (row->tops[g] < window.low) continue;
            Slice group = {row->x + g * GROUP, min64(GROUP, row->n - g * GROUP)};
            for (int64_t i = 0; i < ceil_div(group.n, W); i++) {
                vf score = load_scores(group.scores, group.n, i);
                vi is_in = (score >= window.low) & (score < window.high); /* -1 where true */
                sums += pick(is_in, weight_v(score - row->top), splat(0.0f));
                counts -= is_in;
            }
        }
        mass += (double)horizontal_sum(sums)[0];
    }
    Weight weight = {mass, 0};
    UNROLL for (int j = 0; j < W; j++) weight.count += counts[j];
    return weight;
}

/* The scores in a window, as a row without `found`. */
static Row narrow(const Row *row, Window window) {
    int64_t n = find(row, window);
    Row part = {row->found, row->found + n, NULL, n, ceil_div(n, GROUP), row->top};
    for (int64_t g = 0; g < part.groups; g++) part.tops[g] = window.high;
    return part;
}

/* All scores with any mass. */
INLINE Window whole_window(const Row *row) {
    return (Window){row->top - 87.0f, nextafterf(row->top, INFINITY)};
}

/* Keeps the fewest of the largest scores that hold a share of the mass of all scores >= `least`.
 * The window `edge` holds the smallest score that is kept, and shrinks until it holds no other. */
static Cut cut_at_mass(const Row *whole, float least, float share) {
    Row row = *whole;
    Window edge = whole_window(whole);
    if (least > edge.low) edge.low = least;
    Weight between = weigh(&row, edge);
    double left = between.mass * (double)share; /* of the goal, below the window's end */
    memcpy(row.found, row.tops, (size_t)row.groups * sizeof(float));
    float middle = kth_largest(row.found, row.groups, min64(FEW, row.groups)); /* may hold most */
    while (between.count > 1) {
        if (middle <= edge.low || middle >= edge.high)
            middle = edge.low + (edge.high - edge.low) / 2;
        if (middle <= edge.low || middle >= edge.high) break; /* all of them are equal */
        Weight upper = weigh(&row, (Window){middle, edge.high});
        if (upper.mass >= left) {
            edge.low = middle;
            between = upper;
        } else {
            edge.high = middle;
            left -= upper.mass;
            between.count -= upper.count;
        }
        if (row.found && between.count < row.n / 8) row = narrow(&row, edge);
        middle = edge.low;
    }
    return (Cut){{edge.low, INFINITY}, {edge.high, INFINITY}, left};
}

/* The mean of the scores under their own distribution. A token with this score is as surprising as
 * tokens are on average. */
static float mean_score(const Row *row) {
    double mass = 0.0, moment = 0.0;
    for (int64_t from = 0; from < row->n; from += SLICE) {
        Slice slice = {row->x + from, min64(SLICE, row->n - from)};
        vf sums = splat(0.0f), moments = splat(0.0f);
        for (int64_t i = 0; i < ceil_div(slice.n, W); i++) {
            vf difference = load_scores(slice.scores, slice.n, i) - row->top;
            vf weights = weight_v(difference);
            sums += weights;
            moments += weights * pick(weights > 0.0f, difference, splat(0.0f));
        }
        mass += (double)horizontal_sum(sums)[0];
        moment += (double)horizontal_sum(moments)[0];
    }
    return row->top + (float)(moment / mass);
}

/* Keeps the fewest of the scores nearest to the mean that hold a share of the mass. */
static Cut cut_around_mean(const Row *row, float share) {
    float centre = mean_score(row), near = 0.0f, far = 88.0f;
    Cut cut = {whole_window(row), {INFINITY, -INFINITY}, 0.0};
    Weight all = weigh(row, cut.all), sure = {0.0, 0};
    double goal = all.mass * (double)share;
    while (all.count - sure.count > 1) {
        float middle = near + (far - near) / 2;
        if (middle <= near || middle >= far) break; /* all at the edges are equally far */
        Window window = {centre - middle, nextafterf(centre + middle, INFINITY)};
        int is_all = window.low == cut.all.low && window.high == cut.all.high;
        int is_sure = window.low == cut.sure.low && window.high == cut.sure.high;
        Weight weight = is_all ? all : is_sure ? sure : weigh(row, window);
        if (weight.mass >= goal) {
            far = middle;
            cut.all = window;
            all = weight;
        } else {
            near = middle;
            cut.sure = window;
            sure = weight;
        }
    }
    cut.left = goal - sure.mass;
    return cut;
}

/* Sets dropped scores to -inf. */
static void apply_cut(const Row *row, Cut cut) {
    double left = cut.left;
    for (int64_t g = 0; g < row->groups; g++) {
        float *x = row->x + g * GROUP;
        int64_t n = min64(GROUP, row->n - g * GROUP);
        if (row->tops[g] < cut.all.low) {
            for (int64_t i = 0; i < n; i++) x[i] = -INFINITY;
            continue;
        }
        for (int64_t i = 0; i < n; i++) {
            int stays = x[i] >= cut.all.low && x[i] < cut.all.high;
            if (stays && !(x[i] >= cut.sure.low && x[i] < cut.sure.high)) {
                stays = left > 0.0;
                left -= (double)exp_1(x[i] - row->top);
            }
            x[i] = stays ? x[i] : -INFINITY;
        }
    }
}

/* Scores [rows, n] are divided by a temperature. Then all but these are set to -inf: the top_k
 * largest; of these the fewest of the largest that hold the share top_p; of these the fewest of
 * those nearest to the mean that hold the share typical_p. Scores that equal the k-th largest are
 * kept; at the edge of a share the first of equal ones are. Rows with a NaN or without a finite
 * maximum keep all scores. A top_k of at least n and shares of at least 1 drop nothing. Returns 0,
 * or -1 if out of memory. */
EXPORT int tw_truncate(float *scores, int64_t row_stride, int64_t rows, int64_t n,
                       const float *temperature, const float *top_k, const float *top_p,
                       const float *typical_p, int num_threads) {
    int64_t groups = ceil_div(n, GROUP), room = n + 2 * groups;
    if (rows * n < SERIAL_WORK) num_threads = 1;
    float *memory = scratch((size_t)(room * num_threads) * sizeof(float));
    if (!memory) return -1;
    atomic_int_fast64_t next = 0;
    PARALLEL {
        float *own = memory + room * thread_id();
        int64_t r;
        while ((r = atomic_fetch_add_explicit(&next, 1, memory_order_relaxed)) < rows) {
            Row row = {scores + r * row_stride, own, own + groups, n, groups, 0.0f};
            if (!prepare_row(&row, temperature[r])) continue;
            Cut cut = {{-INFINITY, INFINITY}, {-INFINITY, INFINITY}, 0.0};
            if (top_k[r] < (float)n)
                cut.all.low = cut.sure.low = cut_at_k(&row, max64(1, (int64_t)top_k[r]));
            if (top_p[r] < 1.0f) cut = cut_at_mass(&row, cut.all.low, top_p[r]);
            if (cut.all.low > -INFINITY) apply_cut(&row, cut);
            if (typical_p[r] < 1.0f) apply_cut(&row, cut_around_mean(&row, typical_p[r]));
        }
    }
    return 0;
}

/* ---- paged attention ---------------------------------------------------------------------- */
/*
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

/* A score is the sum of W chains, one for each lane: chain l adds up the products of the elements
 * l, l + W, l + 2W ... in order. Chains are added in pairs, l with l + W/2, those sums l with l +
 * W/4, and so on. So the vectors of one key give a score as well as transposed keys do. */

/* Scores of up to DIRECT_ROWS query rows against n positions, as dot products with cached keys. */
INLINE void score_direct(const int rows, const Worker *w, int64_t d, int64_t n) {
    int64_t whole = d / W * W;
    for (int64_t t = 0; t < n; t += W) {
        vf part[DIRECT_ROWS][W];
        for (int i = 0; i < W; i += 2) {
            const float *k0 = w->key_rows[min64(t + i, n - 1)];
            const float *k1 = w->key_rows[min64(t + i + 1, n - 1)];
            prefetch_rows(w->value_rows + t + i, min64(2, n - t - i), d); /* needed next */
            vf s0[DIRECT_ROWS] = {}, s1[DIRECT_ROWS] = {};
            int64_t c = 0;
            for (; c < whole; c += W) {
                vf a0 = load(k0 + c), a1 = load(k1 + c);
                UNROLL for (int r = 0; r < rows; r++) {
                    vf q = load(w->query + r * DLD + c);
                    s0[r] = madd(q, a0, s0[r]);
                    s1[r] = madd(q, a1, s1[r]);
                }
            }
            if (c < d) {
                vf a0 = load_part(k0 + c, d - c), a1 = load_part(k1 + c, d - c);
                UNROLL for (int r = 0; r < rows; r++) {
                    vf q = load(w->query + r * DLD + c);
                    s0[r] = madd(q, a0, s0[r]);
                    s1[r] = madd(q, a1, s1[r]);
                }
            }
            UNROLL for (int r = 0; r < rows; r++) part[r][i] = s0[r], part[r][i + 1] = s1[r];
        }
        UNROLL for (int r = 0; r < rows; r++) store(w->scores + r * SLD + t, row_sums(part[r]));
    }
}

/* The place of lanes l and l + W / 2, a pair, in the order in which pairs are added up: l with its bits
 * reversed. It is its own inverse. */
INLINE int pair_place(int l) {
    int place = 0;
    UNROLL for (int bit = 1, reversed = W / 4; reversed > 0; bit *= 2, reversed /= 2)
        if (l & bit) place += reversed;
    return place;
}

/* Keys as panels of NR positions, each [pair of chains][step of both][2][NR], as score_tile reads them. */
static void transpose_keys(const Worker *w, int64_t d, int64_t n) {
    int64_t steps = ceil_div(d, W);
    for (int64_t t = 0; t < n; t += W) {
        float *panel = w->keys + t / NR * steps * W * NR + t % NR;
        for (int64_t step = 0; step < steps; step++) {
            vf v[W];
            UNROLL for (int i = 0; i < W; i++)
                v[i] = load_part(w->key_rows[min64(t + i, n - 1)] + step * W, d - step * W);
            transpose(v);
            UNROLL for (int i = 0; i < W; i++) {
                int64_t pair = pair_place(i % (W / 2)), half = i / (W / 2);
                store(panel + ((pair * steps + step) * 2 + half) * NR, v[i]);
            }
        }
    }
}

/* The same for transposed keys. Both chains of a pair run at once, so that their sum never leaves the
 * registers. Pairs come in the order of their reversed bits, so that the two to be added are neighbours:
 * as in a binary counter, sums[i] waits for its partner on level i. */
INLINE void score_tile(const int rows, const float *query, const float *keys, int64_t steps,
                       float *s) {
    vf sums[LOG_W][SCORE_ROWS][NV];
    UNROLL for (int i = 0; i < W / 2; i++) {
        vf low[SCORE_ROWS][NV], high[SCORE_ROWS][NV];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < NV; v++) low[r][v] = high[r][v] = splat(0.0f);
        const float *q = query + pair_place(i);
        for (int64_t step = 0; step < steps; step++, q += W, keys += 2 * NR) {
            vf b[NV]; /* one chain after the other, for want of registers */
            UNROLL for (int v = 0; v < NV; v++) b[v] = in_register(*(const vf *)(keys + v * W));
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int v = 0; v < NV; v++)
                    low[r][v] = madd(splat(q[r * DLD]), b[v], low[r][v]);
            UNROLL for (int v = 0; v < NV; v++) b[v] = in_register(*(const vf *)(keys + NR + v * W));
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int v = 0; v < NV; v++)
                    high[r][v] = madd(splat(q[r * DLD + W / 2]), b[v], high[r][v]);
        }
        int level = 0;
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < NV; v++) low[r][v] += high[r][v];
        for (; i >> level & 1; level++)
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int v = 0; v < NV; v++) low[r][v] += sums[level][r][v];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < NV; v++) sums[level][r][v] = low[r][v];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < NV; v++) store(s + r * SLD + v * W, sums[LOG_W - 1][r][v]);
}

static void score_rows(int rows, const float *q, const float *keys, int64_t steps, float *s) {
    switch (rows) {
        case 1: score_tile(1, q, keys, steps, s); break;
        case 2: score_tile(2, q, keys, steps, s); break;
        case 3: score_tile(3, q, keys, steps, s); break;
#if SCORE_ROWS == 6
        case 4: score_tile(4, q, keys, steps, s); break;
        case 5: score_tile(5, q, keys, steps, s); break;
        case 6: score_tile(6, q, keys, steps, s); break;
#endif
    }
}

static void score(const Worker *w, int64_t from, int64_t to, int64_t d, int64_t n, int64_t total) {
    if (total <= DIRECT_ROWS) {
        switch (total) {
            case 1: score_direct(1, w, d, n); break;
            case 2: score_direct(2, w, d, n); break;
            case 3: score_direct(3, w, d, n); break;
            default: score_direct(4, w, d, n);
        }
        return;
    }
    transpose_keys(w, d, n);
    int64_t tiles = ceil_div(to - from, SCORE_ROWS), steps = ceil_div(d, W);
    for (int64_t t = 0; t < tiles; t++) {
        int64_t a = from + (to - from) * t / tiles, b = from + (to - from) * (t + 1) / tiles;
        for (int64_t c = 0; c < n; c += NR)
            score_rows((int)(b - a), w->query + a * DLD, w->keys + c * steps * W, steps,
                       w->scores + a * SLD + c);
    }
}

INLINE vf to_bfloat16(vf x) { /* of finite numbers, the even one of two */
    vi bits = (vi)x;
    return (vf)((bits + 0x7fff + (bits >> 16 & 1)) & (int32_t)0xffff0000);
}

/* Adds a head's bias to a row of scores, whose query is at a position, against the n positions from
 * `from` on. By the distance it is exact; where it is rounded, it goes by the key's position. Not
 * inlined, so that all rows round alike. */
static __attribute__((noinline)) void add_bias(const Attention *a, float *s, int64_t head,
                                               int64_t position, int64_t from, int64_t n) {
    vf slope = splat(a->slopes[head]);
    int64_t origin = a->rounded_scale > 0.0f ? 0 : position;
    for (int64_t i = 0; i < n; i += W) {
        vi places = (vi){LANES} + (int32_t)(from + i - origin);
        vf bias = __builtin_convertvector(places, vf);
        if (a->rounded_scale > 0.0f)
            bias = to_bfloat16(slope * to_bfloat16(bias)) * a->rounded_scale;
        else
            bias *= slope;
        store(s + i, load(s + i) + bias);
    }
}

/* The same for the rows of the queries [first, last) of a tile. */
static __attribute__((noinline)) void add_biases(const Attention *a, const Tile *t, Worker *w,
                                                 int64_t first, int64_t last, int64_t from,
                                                 int64_t n) {
    int64_t g = group(a);
    for (int64_t r = first * g; r < last * g; r++)
        add_bias(a, w->scores + r * SLD, t->kv_head * g + r % g, t->position + r / g, from, n);
}

/* Masks a row of scores and finds the new maximum. Only lanes [low, high) are visible. */
INLINE void mask_row(Worker *w, int64_t r, int64_t n, int64_t low, int64_t high, float softcap) {
    float *s = w->scores + r * SLD;
    int64_t vectors = ceil_div(n, W);
    vf top = splat(w->top[r]);
    if (low == 0 && high >= vectors * W && softcap <= 0.0f) {
        for (int64_t i = 0; i < vectors; i++) top = larger(load(s + i * W), top);
    } else {
        for (int64_t i = 0; i < vectors; i++) {
            vf x = load(s + i * W);
            if (softcap > 0.0f) x = softcap * tanh_v(x / softcap);
            vi lane = (vi){LANES} + (int32_t)(i * W);
            x = pick((lane >= (int32_t)low) & (lane < (int32_t)high), x, splat(MASKED));
            top = larger(x, top);
            store(s + i * W, x);
        }
    }
    w->next_top[r] = horizontal_max(top)[0];
}

/* What the sums of rows [from, to) shrink by as their maxima rise: some rows to a vector, so those
 * beside the range are computed as well. */
static void find_decays(Worker *w, int64_t from, int64_t to) {
    for (int64_t r = from / W * W; r < to; r += W)
        store(w->decay + r, exp_v(load(w->top + r) - load(w->next_top + r)));
}

/* Turns a row of scores into weights exp(score - max), those of masked ones exact zeros whatever
 * they held, and updates the running sum. */
INLINE void weigh_row(Worker *w, int64_t r, int64_t n) {
    float *s = w->scores + r * SLD;
    int64_t vectors = ceil_div(n, W);
    vf max = splat(w->next_top[r]), sum = splat(0.0f);
    for (int64_t i = 0; i < vectors; i++) {
        vf x = load(s + i * W);
        vf p = pick(x < 0.5f * MASKED, splat(0.0f), exp_v(x - max));
        sum += p;
        store(s + i * W, p);
    }
    w->sum[r] = w->sum[r] * w->decay[r] + horizontal_sum(sum)[0];
    w->top[r] = w->next_top[r];
}

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

/* ---- exchanges between processes ---------------------------------------------------------- */
/*
 * Processes that compute a model together, its ranks, give each other numbers through memory that
 * all of them map. All make the same exchanges in the same order. Each rank has two pieces of the
 * memory and writes into them in turn: when it writes into the first again, all others have arrived
 * at the exchange in between, and so have read what was there.
 */

#define PIECE (1 << 20) /* bytes; what is larger takes several exchanges */
#define LOOKS 2000      /* at another rank's sign, some 50 us, before waiting takes no processor */

typedef struct {
    _Alignas(CACHE_LINE) _Atomic uint32_t arrived; /* exchanges for which its numbers are there */
    _Atomic uint32_t sleepers;                     /* ranks that wait for it without looking */
} Sign;

/* A process's view of the memory, which begins with the signs. */
typedef struct {
    Sign *signs;
    char *pieces;
    int64_t rank, size;
    uint32_t count; /* of exchanges so far */
} Exchange;

INLINE char *piece_of(const Exchange *e, int64_t rank) {
    return e->pieces + (2 * rank + (e->count & 1)) * PIECE;
}

static void sleep_until_changed(Sign *sign, uint32_t seen) {
    atomic_fetch_add(&sign->sleepers, 1);
#if defined(__linux__)
    syscall(SYS_futex, &sign->arrived, FUTEX_WAIT, seen, NULL, NULL, 0); /* unless it has changed */
#endif
    atomic_fetch_sub(&sign->sleepers, 1);
}

/* Gives `bytes` bytes to all ranks and waits for theirs. */
static void meet(Exchange *e, const char *x, int64_t bytes) {
    e->count++;
    memcpy(piece_of(e, e->rank), x, (size_t)bytes);
    Sign *own = e->signs + e->rank;
    atomic_store(&own->arrived, e->count);
#if defined(__linux__)
    if (atomic_load(&own->sleepers))
        syscall(SYS_futex, &own->arrived, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
#endif
    for (int64_t rank = 0; rank < e->size; rank++) {
        Sign *sign = e->signs + rank;
        for (int64_t looks = 0;; looks++) {
            uint32_t seen = atomic_load_explicit(&sign->arrived, memory_order_acquire);
            if ((int32_t)(seen - e->count) >= 0) break;
            if (looks >= LOOKS) sleep_until_changed(sign, seen);
#if defined(__x86_64__) || defined(__i386__)
            else _mm_pause();
#endif
        }
    }
}

/* The bytes of memory that `size` ranks need, filled with zeros. */
EXPORT int64_t tw_exchange_bytes(int64_t size) {
    return size * (int64_t)(sizeof(Sign) + 2 * PIECE);
}

/* The view of a rank, or NULL; the memory starts at a page. */
EXPORT void *tw_exchange_open(char *memory, int64_t rank, int64_t size) {
    Exchange *e = malloc(sizeof(Exchange));
    if (e) *e = (Exchange){(Sign *)memory, memory + size * (int64_t)sizeof(Sign), rank, size, 0};
    return e;
}

/* y = the sum of all ranks' x, n numbers each, added in the order of the ranks. */
EXPORT int tw_exchange_sum(Exchange *e, const float *x, float *y, int64_t n) {
    const int64_t most = PIECE / (int64_t)sizeof(float);
    for (int64_t from = 0; from < n; from += most) {
        int64_t m = min64(most, n - from);
        float *out = y + from;
        meet(e, (const char *)(x + from), m * (int64_t)sizeof(float));
        memcpy(out, piece_of(e, 0), (size_t)m * sizeof(float));
        for (int64_t rank = 1; rank < e->size; rank++) {
            const float *part = (const float *)piece_of(e, rank);
            for (int64_t i = 0; i < m; i++) out[i] += part[i];
        }
    }
    return 0;
}

/* Rows of all ranks side by side: y [rows, size * width] of x [rows, width], in bytes. */
EXPORT int tw_exchange_gather(Exchange *e, const char *x, char *y, int64_t rows, int64_t width) {
    for (int64_t from = 0, n = rows * width; from < n; from += PIECE) {
        int64_t end = min64(from + PIECE, n);
        meet(e, x + from, end - from);
        for (int64_t rank = 0; rank < e->size; rank++) {
            const char *part = piece_of(e, rank);
            for (int64_t at = from; at < end;) {
                int64_t row = at / width, column = at % width;
                int64_t m = min64(width - column, end - at);
                memcpy(y + (row * e->size + rank) * width + column, part + at - from, (size_t)m);
                at += m;
            }
        }
    }
    return 0;
}

/* ---- replay of recorded calls ------------------------------------------------------------- */
/*
 * A step of a model is some 200 calls, with the same addresses every time. A call from Python takes
 * longer than many kernels, so Python records them once as a list; see kernel.py.
 */

typedef union {
    int64_t i;
    void *p;
    double f;
} Argument;

#define MAX_ARGUMENTS 26

typedef struct {
    int (*replay)(const Argument *arguments);
    Argument arguments[MAX_ARGUMENTS];
} Call;

#define I(n) a[n].i
#define P(n) a[n].p
#define F(n) (float)a[n].f
#define REPLAY(name, ...) \
    EXPORT int tw_replay_##name(const Argument *a) { return tw_##name(__VA_ARGS__); }

REPLAY(linear, P(0), P(1), P(2), P(3), I(4), I(5), I(6), I(7), I(8))
REPLAY(int8_linear, P(0), P(1), P(2), P(3), P(4), P(5), I(6), I(7), I(8), P(9), I(10), I(11))
REPLAY(grouped_int8_linear, P(0), P(1), P(2), P(3), P(4), I(5), I(6), I(7), P(8), I(9), I(10))
REPLAY(int4_linear, P(0), P(1), P(2), P(3), P(4), I(5), I(6), I(7), I(8), P(9), I(10), I(11))
REPLAY(add_updates, P(0), P(1), I(2), P(3), P(4), P(5), I(6), I(7), I(8), I(9), I(10), I(11))
REPLAY(adapted_linear, P(0), P(1), P(2), P(3), P(4), P(5), P(6), I(7), I(8), I(9), I(10), I(11), I(12),
       I(13))
REPLAY(take_rows, P(0), I(1), I(2), P(3), P(4), I(5), I(6), I(7))
REPLAY(add, P(0), P(1), P(2), I(3), I(4))
REPLAY(exchange_sum, P(0), P(1), P(2), I(3))
REPLAY(exchange_gather, P(0), P(1), P(2), I(3), I(4))
REPLAY(rms_norm, P(0), P(1), P(2), I(3), I(4), F(5), F(6), I(7))
REPLAY(silu_and_mul, P(0), I(1), P(2), I(3), P(4), I(5), I(6), I(7))
REPLAY(gelu_and_mul, P(0), I(1), P(2), I(3), P(4), I(5), I(6), I(7))
REPLAY(choose, P(0), I(1), I(2), I(3), P(4), P(5), P(6), P(7), P(8), I(9))
REPLAY(truncate, P(0), I(1), I(2), I(3), P(4), P(5), P(6), P(7), I(8))
REPLAY(rotate_query, P(0), I(1), I(2), P(3), P(4), I(5), I(6), P(7), I(8), I(9), I(10), I(11))
REPLAY(rotate_write_kv, P(0), P(1), I(2), I(3), I(4), I(5), P(6), P(7), I(8), I(9), P(10), P(11),
       I(12), I(13), I(14), P(15), I(16), I(17), I(18), I(19), I(20))
REPLAY(paged_attention, P(0), P(1), I(2), I(3), P(4), P(5), I(6), I(7), I(8), P(9), I(10), P(11),
       P(12), I(13), I(14), I(15), I(16), I(17), F(18), I(19), I(20), F(21), P(22),
       P(23), F(24), I(25))

/* Makes the calls in order. Returns 0, or the status of the first that failed. */
EXPORT int tw_replay(const Call *calls, int64_t n) {
    int status = 0;
    for (int64_t i = 0; i < n && !status; i++) status = calls[i].replay(calls[i].arguments);
    return status;
}
