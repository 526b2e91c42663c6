/* Replay of recorded calls.
 *
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

REPLAY(linear, P(0), P(1), P(2), P(3), I(4), I(5), I(6), I(7), P(8), I(9), I(10))
REPLAY(int8_linear, P(0), P(1), P(2), P(3), P(4), P(5), I(6), I(7), I(8), P(9), I(10), I(11))
REPLAY(grouped_int8_linear, P(0), P(1), P(2), P(3), P(4), I(5), I(6), I(7), P(8), I(9), I(10))
REPLAY(int4_linear, P(0), P(1), P(2), P(3), P(4), I(5), I(6), I(7), I(8), P(9), I(10), I(11))
REPLAY(add_updates, P(0), P(1), I(2), P(3), P(4), P(5), I(6), I(7), I(8), I(9), I(10), I(11))
REPLAY(adapted_linear, P(0), P(1), P(2), P(3), P(4), P(5), P(6), I(7), I(8), I(9), I(10), I(11), I(12),
       I(13))
REPLAY(sort_by_expert, P(0), I(1), I(2), I(3), P(4), P(5), P(6))
REPLAY(weigh_rows, P(0), P(1), P(2), P(3), I(4), I(5), I(6), I(7))
REPLAY(take_rows, P(0), I(1), I(2), P(3), P(4), I(5), I(6), I(7))
REPLAY(add, P(0), P(1), P(2), I(3), I(4))
REPLAY(exchange_sum, P(0), P(1), P(2), I(3))
REPLAY(exchange_gather, P(0), P(1), P(2), I(3), I(4))
REPLAY(rms_norm, P(0), P(1), P(2), I(3), I(4), F(5), F(6), I(7))
REPLAY(silu_and_mul, P(0), I(1), P(2), I(3), P(4), I(5), I(6), I(7))
REPLAY(gelu_and_mul, P(0), I(1), P(2), I(3), P(4), I(5), I(6), I(7))
REPLAY(activate, P(0), P(1), I(2), I(3), I(4))
REPLAY(gated_delta_rule, P(0), P(1), P(2), P(3), P(4), P(5), P(6), I(7), I(8), I(9), I(10), I(11), I(12),
       I(13), I(14))
REPLAY(selective_scan, P(0), P(1), P(2), P(3), P(4), P(5), P(6), I(7), I(8), I(9), I(10), I(11), I(12),
       I(13))
REPLAY(causal_conv, P(0), I(1), P(2), P(3), P(4), I(5), I(6), I(7), I(8), I(9), I(10))
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
