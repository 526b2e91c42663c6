/* Truncating distributions.
 *
 * The scores that a row keeps are those in a window, so only its edges are searched for. The maxima
 * of groups of GROUP scores bound the search: at least k scores are as large as the k-th largest
 * maximum.
 */

#define GROUP 64   /* scores that share a precomputed maximum, to find the largest ones */
#define FEW 32     /* scores that hold most of the mass of nearly any distribution */

typedef struct {
    float *x;     /* scores */
    float *tops;  /* the maximum of each group of scores */
    float *found; /* scratch for n + groups numbers, or NULL */
    int64_t n, groups;
    float top; /* the maximum */
} Row;

typedef struct {
    float low, high; /* scores in [low, high) */
} Window;

typedef struct {
    Window all, sure; /* scores outside of `all` are dropped, those inside of `sure` are kept; */
    double left;      /* of the scores in between the first ones are kept, up to this mass */
} Cut;

/* Divides by a temperature and finds the maxima. Returns 0 for rows without a finite one. */
static int prepare_row(Row *row, float temperature) {
    int64_t vectors = GROUP / W;
    float top = -INFINITY;
    int has_nan = 0;
    for (int64_t g = 0; g < row->groups; g++) {
        float *x = row->x + g * GROUP;
        int64_t n = min64(GROUP, row->n - g * GROUP), i = 0;
        vf tops = splat(-INFINITY);
        vi nans = (vi){};
        for (; i < vectors && (i + 1) * W <= n; i++) {
            vf score = load(x + i * W);
            if (temperature != 1.0f) store(x + i * W, score /= temperature);
            tops = larger(score, tops);
            nans |= score != score;
        }
        float most = horizontal_max(tops)[0];
        for (int j = 0; j < W; j++) has_nan |= nans[j];
        for (i *= W; i < n; i++) {
            x[i] /= temperature;
            if (x[i] > most) most = x[i];
            has_nan |= isnan(x[i]);
        }
        row->tops[g] = most;
        if (most > top) top = most;
    }
    row->top = top;
    return !has_nan && isfinite(top);
}

/* The k-th largest of n numbers, which are reordered: Hoare's selection. */
static float kth_largest(float *x, int64_t n, int64_t k) {
    int64_t from = 0, to = n - 1, at = k - 1;
    while (from < to) {
        float pivot = x[(from + to) / 2];
        int64_t i = from, j = to;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) {
                float swapped = x[i];
                x[i++] = x[j];
                x[j--] = swapped;
            }
        }
        if (at <= j) to = j;
        else if (at >= i) from = i;
        else break;
    }
    return x[at];
}

/* Copies the scores in a window to `found`; returns how many they are. */
static int64_t find(const Row *row, Window window) {
    int64_t count = 0;
    for (int64_t g = 0; g < row->groups; g++) {
        if (row->tops[g] < window.low) continue;
        const float *x = row->x + g * GROUP;
        int64_t n = min64(GROUP, row->n - g * GROUP);
        for (int64_t i = 0; i < n; i++) {
            row->found[count] = x[i]; /* without a branch, which would be hard to predict */
            count += (x[i] >= window.low) & (x[i] < window.high);
        }
    }
    return count;
}

/* Copies the largest k scores, and some more, to `found`; returns how many they are. */
static int64_t find_largest(const Row *row, int64_t k) {
    Window window = {-INFINITY, INFINITY};
    if (k < row->groups) {
        memcpy(row->found, row->tops, (size_t)row->groups * sizeof(float));
        window.low = kth_largest(row->found, row->groups, k);
    }
    return find(row, window);
}

static float cut_at_k(const Row *row, int64_t k) {
    return kth_largest(row->found, find_largest(row, k), k);
}

typedef struct {
    double mass; /* the sum of exp(score - top) */
    int64_t count;
} Weight;

static Weight weigh(const Row *row, Window window) {
    double mass = 0.0;
    vi counts = (vi){};
    for (int64_t from = 0; from < row->groups; from += SLICE / GROUP) {
        int64_t to = min64(from + SLICE / GROUP, row->groups);
        vf sums = splat(0.0f); /* of a slice's terms only, which limits the error of rounding */
        for (int64_t g = from; g < to; g++) {
            if (row->tops[g] < window.low) continue;
            Slice group = {row->x + g * GROUP, min64(GROUP, row->n - g * GROUP)};
            for (int64_t i = 0; i < ceil_div(group.n, W); i++) {
                vf score = load_scores(group.scores, group.n, i);
                vi is_in = (score >= window.low) & (score < window.high); /* -1 where true */
                sums += pick(is_in, weight_v(score - row->top), splat(0.0f));
                counts -= is_in;
            }
        }
        mass += (double)horizontal_sum(sums)[0];
    }
    Weight weight = {mass, 0};
    UNROLL for (int j = 0; j < W; j++) weight.count += counts[j];
    return weight;
}

/* The scores in a window, as a row without `found`. */
static Row narrow(const Row *row, Window window) {
    int64_t n = find(row, window);
    Row part = {row->found, row->found + n, NULL, n, ceil_div(n, GROUP), row->top};
    for (int64_t g = 0; g < part.groups; g++) part.tops[g] = window.high;
    return part;
}

/* All scores with any mass. */
INLINE Window whole_window(const Row *row) {
    return (Window){row->top - 87.0f, nextafterf(row->top, INFINITY)};
}

/* Keeps the fewest of the largest scores that hold a share of the mass of all scores >= `least`.
 * The window `edge` holds the smallest score that is kept, and shrinks until it holds no other. */
static Cut cut_at_mass(const Row *whole, float least, float share) {
    Row row = *whole;
    Window edge = whole_window(whole);
    if (least > edge.low) edge.low = least;
    Weight between = weigh(&row, edge);
    double left = between.mass * (double)share; /* of the goal, below the window's end */
    memcpy(row.found, row.tops, (size_t)row.groups * sizeof(float));
    float middle = kth_largest(row.found, row.groups, min64(FEW, row.groups)); /* may hold most */
    while (between.count > 1) {
        if (middle <= edge.low || middle >= edge.high)
            middle = edge.low + (edge.high - edge.low) / 2;
        if (middle <= edge.low || middle >= edge.high) break; /* all of them are equal */
        Weight upper = weigh(&row, (Window){middle, edge.high});
        if (upper.mass >= left) {
            edge.low = middle;
            between = upper;
        } else {
            edge.high = middle;
            left -= upper.mass;
            between.count -= upper.count;
        }
        if (row.found && between.count < row.n / 8) row = narrow(&row, edge);
        middle = edge.low;
    }
    return (Cut){{edge.low, INFINITY}, {edge.high, INFINITY}, left};
}

/* The mean of the scores under their own distribution. A token with this score is as surprising as
 * tokens are on average. */
static float mean_score(const Row *row) {
    double mass = 0.0, moment = 0.0;
    for (int64_t from = 0; from < row->n; from += SLICE) {
        Slice slice = {row->x + from, min64(SLICE, row->n - from)};
        vf sums = splat(0.0f), moments = splat(0.0f);
        for (int64_t i = 0; i < ceil_div(slice.n, W); i++) {
            vf difference = load_scores(slice.scores, slice.n, i) - row->top;
            vf weights = weight_v(difference);
            sums += weights;
            moments += weights * pick(weights > 0.0f, difference, splat(0.0f));
        }
        mass += (double)horizontal_sum(sums)[0];
        moment += (double)horizontal_sum(moments)[0];
    }
    return row->top + (float)(moment / mass);
}

/* Keeps the fewest of the scores nearest to the mean that hold a share of the mass. */
static Cut cut_around_mean(const Row *row, float share) {
    float centre = mean_score(row), near = 0.0f, far = 88.0f;
    Cut cut = {whole_window(row), {INFINITY, -INFINITY}, 0.0};
    Weight all = weigh(row, cut.all), sure = {0.0, 0};
    double goal = all.mass * (double)share;
    while (all.count - sure.count > 1) {
        float middle = near + (far - near) / 2;
        if (middle <= near || middle >= far) break; /* all at the edges are equally far */
        Window window = {centre - middle, nextafterf(centre + middle, INFINITY)};
        int is_all = window.low == cut.all.low && window.high == cut.all.high;
        int is_sure = window.low == cut.sure.low && window.high == cut.sure.high;
        Weight weight = is_all ? all : is_sure ? sure : weigh(row, window);
        if (weight.mass >= goal) {
            far = middle;
            cut.all = window;
            all = weight;
        } else {
            near = middle;
            cut.sure = window;
            sure = weight;
        }
    }
    cut.left = goal - sure.mass;
    return cut;
}

/* Sets dropped scores to -inf. */
static void apply_cut(const Row *row, Cut cut) {
    double left = cut.left;
    for (int64_t g = 0; g < row->groups; g++) {
        float *x = row->x + g * GROUP;
        int64_t n = min64(GROUP, row->n - g * GROUP);
        if (row->tops[g] < cut.all.low) {
            for (int64_t i = 0; i < n; i++) x[i] = -INFINITY;
            continue;
        }
        for (int64_t i = 0; i < n; i++) {
            int stays = x[i] >= cut.all.low && x[i] < cut.all.high;
            if (stays && !(x[i] >= cut.sure.low && x[i] < cut.sure.high)) {
                stays = left > 0.0;
                left -= (double)exp_1(x[i] - row->top);
            }
            x[i] = stays ? x[i] : -INFINITY;
        }
    }
}

/* Scores [rows, n] are divided by a temperature. Then all but these are set to -inf: the top_k
 * largest; of these the fewest of the largest that hold the share top_p; of these the fewest of
 * those nearest to the mean that hold the share typical_p. Scores that equal the k-th largest are
 * kept; at the edge of a share the first of equal ones are. Rows with a NaN or without a finite
 * maximum keep all scores. A top_k of at least n and shares of at least 1 drop nothing. Returns 0,
 * or -1 if out of memory. */
EXPORT int tw_truncate(float *scores, int64_t row_stride, int64_t rows, int64_t n,
                       const float *temperature, const float *top_k, const float *top_p,
                       const float *typical_p, int num_threads) {
    int64_t groups = ceil_div(n, GROUP), room = n + 2 * groups;
    if (rows * n < SERIAL_WORK) num_threads = 1;
    float *memory = scratch((size_t)(room * num_threads) * sizeof(float));
    if (!memory) return -1;
    atomic_int_fast64_t next = 0;
    PARALLEL {
        float *own = memory + room * thread_id();
        int64_t r;
        while ((r = atomic_fetch_add_explicit(&next, 1, memory_order_relaxed)) < rows) {
            Row row = {scores + r * row_stride, own, own + groups, n, groups, 0.0f};
            if (!prepare_row(&row, temperature[r])) continue;
            Cut cut = {{-INFINITY, INFINITY}, {-INFINITY, INFINITY}, 0.0};
            if (top_k[r] < (float)n)
                cut.all.low = cut.sure.low = cut_at_k(&row, max64(1, (int64_t)top_k[r]));
            if (top_p[r] < 1.0f) cut = cut_at_mass(&row, cut.all.low, top_p[r]);
            if (cut.all.low > -INFINITY) apply_cut(&row, cut);
            if (typical_p[r] < 1.0f) apply_cut(&row, cut_around_mean(&row, typical_p[r]));
        }
    }
    return 0;
}
