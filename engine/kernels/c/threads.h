/* Threads, their scratch memory, and the memory they read. */

#define SERIAL_WORK 100000 /* multiply-adds below which waking threads costs more than it saves */

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
