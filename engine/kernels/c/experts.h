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
