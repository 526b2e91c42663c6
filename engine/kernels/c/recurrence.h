/* Layers with a state, token by token.
 *
 * Each token's result follows from the state before it by the same operations, so it does not depend on
 * how a text is divided among steps. Tokens of several at once would be sums over chunks, in an order
 * that depends on where a chunk begins.
 */

#define CHAINS 4 /* of sums over a state's rows: one would wait for each of its additions */

typedef enum { DELTA, DELTA_OF_ROWS, ADDED } Rule;

typedef struct {
    const float *query, *key, *value; /* [tokens, …] */
    const float *decay, *beta;
    float *y;
    int64_t key_step, value_step, head_step, decay_step; /* between tokens */
} DeltaTokens;

/* sums of factors[i] * state[i], and of other chains after each other */
INLINE void add_up(vf chains[CHAINS][NV], vf sums[NV]) {
    for (int v = 0; v < NV; v++)
        sums[v] = (chains[0][v] + chains[1][v]) + (chains[2][v] + chains[3][v]);
}

/* delta = (value - delta of the decayed state) * beta, where `delta` has what the state has for the key */
INLINE void find_delta(const Rule rule, const float *key, const float *decay, float beta, int64_t rows,
                       const float *state, vf delta[NV]) {
    vf chains[CHAINS][NV] = {}, sums[NV];
    for (int64_t i = 0; i < rows; i += CHAINS)
        UNROLL for (int c = 0; c < CHAINS; c++) {
            float factor = rule == DELTA_OF_ROWS ? key[i + c] * decay[i + c] : key[i + c];
            UNROLL for (int v = 0; v < NV; v++)
                chains[c][v] = madd(splat(factor), load(state + (i + c) * NR + v * W), chains[c][v]);
        }
    add_up(chains, sums);
    UNROLL for (int v = 0; v < NV; v++) {
        vf kept = rule == DELTA_OF_ROWS ? sums[v] : sums[v] * splat(decay[0]);
        delta[v] = (delta[v] - kept) * splat(beta);
    }
}

/* NR columns of one head's state [rows, NR]: state = decay * state + key (x) delta, where delta is beta
 * times what the value has beside what the decayed state has for the key; or the value, if ADDED. */
INLINE void delta_columns(const Rule rule, DeltaTokens t, int64_t tokens, int64_t rows, int64_t columns,
                          float *state) {
    for (int64_t n = 0; n < tokens; n++) {
        const float *key = t.key + n * t.key_step, *query = t.query + n * t.key_step;
        const float *decays = t.decay + n * t.decay_step;
        float value[NR] = {0};
        memcpy(value, t.value + n * t.value_step, (size_t)columns * sizeof(float));
        vf chains[CHAINS][NV] = {}, delta[NV], sums[NV];
        UNROLL for (int v = 0; v < NV; v++) delta[v] = load(value + v * W);
        if (rule != ADDED) find_delta(rule, key, decays, t.beta[n * t.head_step], rows, state, delta);
        for (int64_t i = 0; i < rows; i += CHAINS)
            UNROLL for (int c = 0; c < CHAINS; c++) {
                vf decay = splat(decays[rule == DELTA_OF_ROWS ? i + c : 0]);
                UNROLL for (int v = 0; v < NV; v++) {
                    float *at = state + (i + c) * NR + v * W;
                    vf changed = madd(splat(key[i + c]), delta[v], load(at) * decay);
                    store(at, changed);
                    chains[c][v] = madd(splat(query[i + c]), changed, chains[c][v]);
                }
            }
        add_up(chains, sums);
        memcpy(t.y + n * t.value_step, sums, (size_t)columns * sizeof(float));
    }
}

/* The gated delta rule. query, key: [batch, tokens, key_heads, key_size], of which key_size is a multiple
 * of CHAINS; value, y: [batch, tokens, heads, value_size]; decay (0 … 1): [batch, tokens, heads,
 * decay_size], of which decay_size is 1 or key_size; beta: [batch, tokens, heads], or NULL (and decay_size
 * 1) for values that are added as they are; state: [batch, heads, key_size, value_size], changed.
 * Returns 0, or -1 if out of memory. */
EXPORT int tw_gated_delta_rule(const float *query, const float *key, const float *value,
                               const float *decay, const float *beta, float *state, float *y,
                               int64_t batch, int64_t tokens, int64_t key_heads, int64_t heads,
                               int64_t key_size, int64_t value_size, int64_t decay_size,
                               int num_threads) {
    const int64_t blocks = ceil_div(value_size, NR), work = batch * heads * blocks;
    const size_t bytes = rounded((size_t)(key_size * NR) * sizeof(float));
    char *memory = scratch(bytes * (size_t)num_threads);
    if (!memory) return -1;
    if (work * tokens * key_size * NR < SERIAL_WORK) num_threads = 1;
    PARALLEL {
        int64_t workers = num_workers(), id = thread_id();
        float *own = (float *)(memory + bytes * (size_t)id);
        for (int64_t w = work * id / workers; w < work * (id + 1) / workers; w++) {
            int64_t column = w % blocks * NR, head = w / blocks % heads, b = w / blocks / heads;
            int64_t columns = min64(NR, value_size - column), first = b * tokens;
            int64_t key_at = (first * key_heads + head / (heads / key_heads)) * key_size;
            int64_t value_at = (first * heads + head) * value_size + column;
            int64_t head_at = first * heads + head;
            float *whole = state + (b * heads + head) * key_size * value_size + column;
            if (columns < NR) memset(own, 0, bytes);
            for (int64_t i = 0; i < key_size; i++)
                memcpy(own + i * NR, whole + i * value_size, (size_t)columns * sizeof(float));
            DeltaTokens t = {query + key_at, key + key_at, value + value_at, decay + head_at * decay_size,
                             beta ? beta + head_at : NULL, y + value_at, key_heads * key_size,
                             heads * value_size, heads, heads * decay_size};
            if (!beta) delta_columns(ADDED, t, tokens, key_size, columns, own);
            else if (decay_size == 1) delta_columns(DELTA, t, tokens, key_size, columns, own);
            else delta_columns(DELTA_OF_ROWS, t, tokens, key_size, columns, own);
            for (int64_t i = 0; i < key_size; i++)
                memcpy(whole + i * value_size, own + i * NR, (size_t)columns * sizeof(float));
        }
    }
    return 0;
}

/* A state space. Tokens: `value`, y [tokens, rows], `step`, and what rows share, `input` and `output`. */
typedef struct {
    const float *value, *step, *input, *output;
    float *y;
    int64_t value_step, step_step, shared_step; /* between tokens */
} ScanTokens;

/* `size` numbers as whole vectors: where they are, or a copy that ends with zeros */
INLINE const float *whole_vectors(const float *x, int64_t size, float *copy) {
    if (size % W == 0) return x;
    memset(copy + size / W * W, 0, W * sizeof(float));
    return memcpy(copy, x, (size_t)size * sizeof(float));
}

/* `count` rows of a state [W, width], whole vectors each: state = decay * state + value (x) input, and
 * y = state * output. Steps are decays of all rows or, with `rates` [W, width], a row's time. */
INLINE void scan_rows(ScanTokens t, int64_t tokens, int64_t count, int64_t size, const float *rates,
                      float *state, int64_t width, float *copies) {
    for (int64_t n = 0; n < tokens; n++) {
        const float *value = t.value + n * t.value_step, *step = t.step + n * t.step_step;
        const float *input = whole_vectors(t.input + n * t.shared_step, size, copies);
        const float *output = whole_vectors(t.output + n * t.shared_step, size, copies + width);
        vf sums[W] = {};
        for (int64_t r = 0; r < count; r++) {
            const vf added = splat(value[r]), time = splat(step[rates ? r : 0]);
            float *row = state + r * width;
            vf sum = {};
            for (int64_t i = 0; i < width; i += W) {
                vf decay = rates ? exp_v(time * load(rates + r * width + i)) : time;
                vf changed = madd(added, load(input + i), load(row + i) * decay);
                store(row + i, changed);
                sum = madd(changed, load(output + i), sum);
            }
            sums[r] = sum;
        }
        vf found = row_sums(sums);
        memcpy(t.y + n * t.value_step, &found, (size_t)count * sizeof(float));
    }
}

/* Copies rows of `size` numbers from places `from_step` apart to places `to_step` apart. */
INLINE void copy_rows(const float *from, int64_t from_step, float *to, int64_t to_step, int64_t count,
                      int64_t size) {
    for (int64_t r = 0; r < count; r++)
        memcpy(to + r * to_step, from + r * from_step, (size_t)size * sizeof(float));
}

/* A selective state space, as of Mamba. value, y: [batch, tokens, heads, head_size]; input, output:
 * [batch, tokens, groups, size], each of heads / groups heads; state: [batch, heads, head_size, size],
 * changed. rates NULL: step are decays [batch, tokens, heads]. Otherwise rates are [heads, head_size, size]
 * and step [batch, tokens, heads, head_size], and decays are exp(step * rates). Returns 0, or -1 if out of
 * memory. */
EXPORT int tw_selective_scan(const float *value, const float *step, const float *rates,
                             const float *input, const float *output, float *state, float *y,
                             int64_t batch, int64_t tokens, int64_t groups, int64_t heads,
                             int64_t head_size, int64_t size, int num_threads) {
    const int64_t blocks = ceil_div(head_size, W), work = batch * heads * blocks;
    const int64_t width = ceil_div(size, W) * W, rows = heads * head_size;
    const size_t bytes = rounded((size_t)((2 * W + 2) * width) * sizeof(float));
    char *memory = scratch(bytes * (size_t)num_threads);
    if (!memory) return -1;
    if (work * W * tokens * size < SERIAL_WORK) num_threads = 1;
    PARALLEL {
        int64_t workers = num_workers(), id = thread_id();
        float *own = (float *)(memory + bytes * (size_t)id), *own_rates = own + W * width;
        memset(own, 0, bytes);
        for (int64_t w = work * id / workers; w < work * (id + 1) / workers; w++) {
            int64_t row = w % blocks * W, head = w / blocks % heads, b = w / blocks / heads;
            int64_t count = min64(W, head_size - row), at = head * head_size + row;
            int64_t group = head / (heads / groups);
            const float *in = input + (b * tokens * groups + group) * size;
            const float *out = output + (b * tokens * groups + group) * size;
            float *whole = state + (b * rows + at) * size, *here = width == size ? whole : own;
            const float *rate = rates ? rates + at * size : NULL;
            ScanTokens t = {value + b * tokens * rows + at,
                            step + b * tokens * (rates ? rows : heads) + (rates ? at : head),
                            in, out, y + b * tokens * rows + at, rows, rates ? rows : heads,
                            groups * size};
            if (width != size) copy_rows(whole, size, own, width, count, size);
            if (width != size && rates) copy_rows(rate, size, own_rates, width, count, size);
            if (rates) scan_rows(t, tokens, count, size, width == size ? rate : own_rates, here, width,
                                 own + 2 * W * width);
            else scan_rows(t, tokens, count, size, NULL, here, width, own + 2 * W * width);
            if (width != size) copy_rows(own, width, whole, size, count, size);
        }
    }
    return 0;
}

/* W sums of `taps` products of x, from x[0] on, x[1] on, … */
INLINE vf convolve(const float *x, const float *weight, int64_t taps, float bias, int is_silu) {
    vf sum = splat(bias);
    for (int64_t j = 0; j < taps; j++) sum = madd(splat(weight[j]), load(x + j), sum);
    return is_silu ? silu_v(sum) : sum;
}

/* y[r][t] = bias + the sum over j of weight[r][j] * x[r][t + j], or its SiLU; x [rows, tokens + taps - 1],
 * of which `stride` are from row to row, weight [channels, taps], bias NULL or [channels], y [rows, tokens];
 * row r is of the channel r % channels. */
EXPORT int tw_causal_conv(const float *x, int64_t stride, const float *weight, const float *bias,
                          float *y, int64_t rows, int64_t channels, int64_t tokens, int64_t taps,
                          int is_silu, int num_threads) {
    if (rows * tokens * taps < SERIAL_WORK) num_threads = 1;
    PARALLEL {
        int64_t workers = num_workers(), id = thread_id();
        for (int64_t r = rows * id / workers; r < rows * (id + 1) / workers; r++) {
            const float *in = x + r * stride, *w = weight + r % channels * taps;
            float *out = y + r * tokens, start = bias ? bias[r % channels] : 0.0f;
            int64_t t = 0;
            for (; t + W <= tokens; t += W) store(out + t, convolve(in + t, w, taps, start, is_silu));
            for (; t < tokens; t++) {
                vf sum = splat(start);
                for (int64_t j = 0; j < taps; j++) sum = madd(splat(w[j]), splat(in[t + j]), sum);
                out[t] = (is_silu ? silu_v(sum) : sum)[0];
            }
        }
    }
    return 0;
}
