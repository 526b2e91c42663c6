/* Rotated queries, and keys and values written into the paged cache. */

/* Rotates one head: element i of the first `rotary` ones pairs with i + rotary / 2, as in
 * transformers' apply_rotary_pos_emb; the elements after them are copied. */
INLINE void rotate_head(const float *x, const float *cosine, const float *sine, int64_t rotary,
                        int64_t head_size, float *to) {
    int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        to[i] = a * cosine[i] - b * sine[i];
        to[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
    memcpy(to + rotary, x + rotary, (size_t)(head_size - rotary) * sizeof(float));
}

EXPORT int tw_rotate_query(const float *query, int64_t token_stride, int64_t head_stride,
                            const float *cosine, const float *sine, int64_t rotary_stride,
                            int64_t rotary, float *output, int64_t num_tokens, int64_t num_heads,
                            int64_t head_size, int num_threads) {
    if (num_tokens * num_heads * head_size < SERIAL_WORK) num_threads = 1;
    PARALLEL {
        int64_t n = num_workers(), id = thread_id();
        for (int64_t t = num_tokens * id / n; t < num_tokens * (id + 1) / n; t++)
            for (int64_t h = 0; h < num_heads; h++)
                rotate_head(query + t * token_stride + h * head_stride, cosine + t * rotary_stride,
                            sine + t * rotary_stride, rotary, head_size,
                            output + (t * num_heads + h) * head_size);
    }
    return 0;
}

/* key, value: [T, Hkv, D] with a token stride and a head stride; slots below zero are skipped.
 * cosine, sine: [T, rotary] with a token stride; a rotary of 0 stores the keys as they are. */
EXPORT int tw_rotate_write_kv(const float *key, const float *value, int64_t key_token,
                               int64_t key_head, int64_t value_token, int64_t value_head,
                               const float *cosine, const float *sine, int64_t rotary_stride,
                               int64_t rotary, float *key_cache, float *value_cache,
                               int64_t block_stride, int64_t token_stride, int64_t head_stride,
                               const int64_t *slots, int64_t num_tokens, int64_t num_kv_heads,
                               int64_t head_size, int64_t block_size, int num_threads) {
    if (num_tokens * num_kv_heads * head_size < SERIAL_WORK) num_threads = 1;
    PARALLEL {
        int64_t n = num_workers(), id = thread_id();
        for (int64_t t = num_tokens * id / n; t < num_tokens * (id + 1) / n; t++) {
            if (slots[t] < 0) continue;
            int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
            int64_t at = block * block_stride + offset * token_stride;
            for (int64_t h = 0; h < num_kv_heads; h++) {
                rotate_head(key + t * key_token + h * key_head, cosine + t * rotary_stride,
                            sine + t * rotary_stride, rotary, head_size,
                            key_cache + at + h * head_stride);
                memcpy(value_cache + at + h * head_stride, value + t * value_token + h * value_head,
                       (size_t)head_size * sizeof(float));
            }
        }
    }
    return 0;
}
