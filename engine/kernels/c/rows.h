/* Row-wise operations. */

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

/* The sigmoid, and 0 where that is no normal number. */
INLINE vf sigmoid_v(vf x) { return pick(x < -87.0f, splat(0.0f), sigmoid_of(x, splat(1.0f))); }

/* x times the share of a normal distribution below it, of which the part in the nearer tail is computed:
 * Abramowitz and Stegun, 7.1.26, with x / sqrt(2) for x. */
INLINE vf gelu_erf_v(vf x) {
    vf size = pick(x < 0.0f, -x, x), t = 1.0f / (size * 0.2316418882f + 1.0f);
    vf tail = splat(0.5307027145f);
    tail = madd(tail, t, splat(-0.7265760135f));
    tail = madd(tail, t, splat(0.7107068705f));
    tail = madd(tail, t, splat(-0.1422483680f));
    tail = madd(tail, t, splat(0.1274147960f)) * t * exp_v(x * x * -0.5f);
    return x * pick(x < 0.0f, tail, 1.0f - tail);
}

/* log(1 + exp(x)); above 20 it is x, as torch has it. */
INLINE float softplus_1(float x) { return x > 20.0f ? x : log1pf(exp_1(x)); }

typedef enum { SIGMOID, SILU, GELU, GELU_TANH, SOFTPLUS } Activation;

/* y = activation(x), numbers from .. to - 1; as in `gate_rows`, each by the same operations. */
INLINE void activate_share(vf (*activation)(vf), const float *x, float *y, int64_t from, int64_t to) {
    int64_t i = from;
    for (; i + W <= to; i += W) store(y + i, activation(load(x + i)));
    for (; i < to; i++) y[i] = activation(splat(x[i]))[0];
}

EXPORT int tw_activate(const float *x, float *y, int64_t n, int activation, int num_threads) {
    if (n < SERIAL_WORK / 8) num_threads = 1;
    PARALLEL {
        int64_t workers = num_workers(), id = thread_id();
        int64_t from = n * id / workers, to = n * (id + 1) / workers;
        switch ((Activation)activation) {
            case SIGMOID: activate_share(sigmoid_v, x, y, from, to); break;
            case SILU: activate_share(silu_v, x, y, from, to); break;
            case GELU: activate_share(gelu_erf_v, x, y, from, to); break;
            case GELU_TANH: activate_share(gelu_v, x, y, from, to); break;
            case SOFTPLUS: for (int64_t i = from; i < to; i++) y[i] = softplus_1(x[i]); break;
        }
    }
    return 0;
}
