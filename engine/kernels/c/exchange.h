/* Exchanges between processes.
 *
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
