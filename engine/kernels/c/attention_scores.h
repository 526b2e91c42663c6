/* Paged attention: scores of queries against keys, biased, masked, and turned into weights. */

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
