/* Layers with a state, token by token.
 *
 * Each token's result follows from the state before it by the same operations, so it does not depend on
 * how a text is divided among steps. Tokens of several at once would be sums over chunks, in an order
 * that depends on where a chunk begins.
 */

#define CHAINS 4 /* of sums over a state's rows: one would wait for each of its additions */

typedef struct {
    const float *query, *key, *value; /* [tokens, …] */
    const float *decay, *beta;
    float *y;
    int64_t key_step, value_step, head_step; /* between tokens */
} DeltaTokens;

/* sums of factors[i] * state[i], and of other chains after each other */
INLINE void add_up(vf chains[CHAINS][NV], vf sums[NV]) {
    for (int v = 0; v < NV; v++)
        sums[v] = (chains[0][v] + chains[1][v]) + (chains[2][v] + chains[3][v]);
}

/* NR columns of one head's state [rows, NR]: state = decay * state + key (x) delta, where delta is beta
 * times what the value has beside what the decayed state has for the key. */
static void delta_columns(DeltaTokens t, int64_t tokens, int64_t rows, int64_t columns, float *state) {
    for (int64_t n = 0; n < tokens; n++) {
        const float *key = t.key + n * t.key_step, *query = t.query + n * t.key_step;
        const vf decay = splat(t.decay[n * t.head_step]), beta = splat(t.beta[n * t.head_step]);
        float value[NR] = {0};
        memcpy(value, t.value + n * t.value_step, (size_t)columns * sizeof(float));
        vf chains[CHAINS][NV] = {}, delta[NV];
        for (int64_t i = 0; i < rows; i += CHAINS)
            UNROLL for (int c = 0; c < CHAINS; c++)
                UNROLL for (int v = 0; v < NV; v++)
                    chains[c][v] = madd(splat(key[i + c]), load(state + (i + c) * NR + v * W), chains[c][v]);
        add_up(chains, delta);
        UNROLL for (int v = 0; v < NV; v++)
            delta[v] = (load(value + v * W) - delta[v] * decay) * beta;
        memset(chains, 0, sizeof chains);
        for (int64_t i = 0; i < rows; i += CHAINS)
            UNROLL for (int c = 0; c < CHAINS; c++)
                UNROLL for (int v = 0; v < NV; v++) {
                    float *at = state + (i + c) * NR + v * W;
                    vf changed = madd(splat(key[i + c]), delta[v], load(at) * decay);
                    store(at, changed);
                    chains[c][v] = madd(splat(query[i + c]), changed, chains[c][v]);
                }
        vf sums[NV];
        add_up(chains, sums);
        memcpy(t.y + n * t.value_step, sums, (size_t)columns * sizeof(float));
    }
}

/* The gated delta rule. query, key: [batch, tokens, key_heads, key_size], of which key_size is a multiple
 * of CHAINS; value, y: [batch, tokens, heads, value_size]; decay (0 … 1), beta: [batch, tokens, heads];
 * state: [batch, heads, key_size, value_size], changed. Returns 0, or -1 if out of memory. */
EXPORT int tw_gated_delta_rule(const float *query, const float *key, const float *value,
                               const float *decay, const float *beta, float *state, float *y,
                               int64_t batch, int64_t tokens, int64_t key_heads, int64_t heads,
                               int64_t key_size, int64_t value_size, int num_threads) {
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
            delta_columns((DeltaTokens){query + key_at, key + key_at, value + value_at, decay + head_at,
                                        beta + head_at, y + value_at, key_heads * key_size,
                                        heads * value_size, heads},
                          tokens, key_size, columns, own);
            for (int64_t i = 0; i < key_size; i++)
                memcpy(whole + i * value_size, own + i * NR, (size_t)columns * sizeof(float));
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
