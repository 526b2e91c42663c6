/* Rows that are sorted by expert.
 *
 * The same layer of several experts is one weight: the panels of each, padded to whole ones, follow
 * those of the expert before it, and so do its biases. Expert e has the rows before ends[e] that the
 * experts before it do not have. A layer without experts is the case of one that has all rows.
 */

typedef struct {
    const int64_t *ends; /* NULL for a layer without experts */
    int64_t count;       /* 1 for such */
} Experts;

/* The rows of a chunk that one expert has. */
typedef struct {
    int64_t expert, from, to;
} Segment;

/* Finds the segments of the `rows` rows from m0 on, at most as many, and returns their number. */
static int64_t find_segments(Experts experts, int64_t m0, int64_t rows, Segment *segments) {
    if (!experts.ends) {
        segments[0] = (Segment){0, 0, rows};
        return 1;
    }
    int64_t count = 0, from = 0;
    for (int64_t e = 0; e < experts.count && from < rows; e++) {
        int64_t to = min64(experts.ends[e] - m0, rows);
        if (to <= from) continue;
        segments[count++] = (Segment){e, from, to};
        from = to;
    }
    return count;
}

/* Sorts the rows of tokens by expert, those of one in the order of tokens: index [tokens, top_k] has the
 * experts of each token. ends: those of each expert's rows; token_of [tokens * top_k]: whose each sorted
 * row is; place_of [tokens, top_k]: where a token's rows are. Returns 0, or -2 if there is no such
 * expert. */
EXPORT int tw_sort_by_expert(const int64_t *index, int64_t tokens, int64_t top_k,
                             int64_t num_experts, int64_t *ends, int64_t *token_of,
                             int64_t *place_of) {
    int64_t rows = tokens * top_k, first = 0;
    memset(ends, 0, (size_t)num_experts * sizeof(int64_t));
    for (int64_t i = 0; i < rows; i++) {
        if (index[i] < 0 || index[i] >= num_experts) return -2;
        ends[index[i]]++;
    }
    for (int64_t e = 0; e < num_experts; e++) {
        int64_t count = ends[e];
        ends[e] = first;
        first += count;
    }
    for (int64_t i = 0; i < rows; i++) {
        place_of[i] = ends[index[i]]++;
        token_of[place_of[i]] = i / top_k;
    }
    return 0;
}

/* y[t] = the sum over j of weights[t, j] * x[place_of[t, j]], rows of `width` numbers. */
EXPORT int tw_weigh_rows(const float *x, const int64_t *place_of, const float *weights, float *y,
                         int64_t tokens, int64_t top_k, int64_t width, int num_threads) {
    if (tokens * top_k * width < SERIAL_WORK) num_threads = 1;
    PARALLEL {
        int64_t n = num_workers(), id = thread_id();
        for (int64_t t = tokens * id / n; t < tokens * (id + 1) / n; t++) {
            const int64_t *places = place_of + t * top_k;
            const float *shares = weights + t * top_k;
            float *out = y + t * width;
            int64_t i = 0;
            for (; i + W <= width; i += W) {
                vf sum = splat(0.0f);
                for (int64_t j = 0; j < top_k; j++)
                    sum = madd(splat(shares[j]), load(x + places[j] * width + i), sum);
                store(out + i, sum);
            }
            for (; i < width; i++) {
                out[i] = 0.0f;
                for (int64_t j = 0; j < top_k; j++) out[i] += shares[j] * x[places[j] * width + i];
            }
        }
    }
    return 0;
}
