/* Vectors as wide as the compile target has them, and what is computed with them in all kernels. */

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
#define CACHE_LINE 64      /* bytes */

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
