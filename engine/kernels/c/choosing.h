/* Choosing tokens.
 *
 * A row is cut into slices of a fixed size, whose results are merged in order: so a row's result is
 * the same for any number of threads and rows. A slice is read from memory once; later passes over
 * it find it in the first-level cache.
 */

#define SLICE 4096 /* scores processed at once: they stay in the first-level cache */

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
