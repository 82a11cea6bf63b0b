/* Choosing among entries without naming every position: by magnitude among the differences of two
 * checkpoints, by code and by support among packed survivors. Each gives bit for bit what the
 * Python beside its caller computes. */

#include "_codes.h"
#include "_difference.h"
#include "_support.h"

/* Fine-tune minus base of `count` entries. */
EXPORT void dare_difference(int base_dtype, const void *base, int finetuned_dtype,
                            const void *finetuned, int64_t count, float *delta) {
    difference(base_dtype, base, finetuned_dtype, finetuned, 0, count, delta);
}

VECTORS static void trim(float *restrict delta, int64_t count, float value, int64_t last) {
    int64_t equal = last + 1 < 0 ? 0 : last + 1 < count ? last + 1 : count;
    for (int64_t j = 0; j < equal; j++) delta[j] = magnitude(delta[j]) >= value ? delta[j] : -0.0f;
    for (int64_t j = equal; j < count; j++)
        delta[j] = magnitude(delta[j]) > value ? delta[j] : -0.0f;
}

/* The differences above `value` in magnitude, and those equal to it up to position `last`, each
 * where it is; -0 elsewhere. */
EXPORT void dare_trimmed(int base_dtype, const void *base, int finetuned_dtype,
                         const void *finetuned, int64_t count, float value, int64_t last,
                         float *trimmed) {
    for (int64_t first = 0; first < count; first += STRIP) {
        int64_t n = count - first < STRIP ? count - first : STRIP;
        difference(base_dtype, base, finetuned_dtype, finetuned, first, n, trimmed + first);
        trim(trimmed + first, n, value, last - first);
    }
}

VECTORS static int32_t count_equal(const float *values, int64_t count, float value) {
    int32_t equal = 0;
    for (int64_t j = 0; j < count; j++) equal += magnitude(values[j]) == value;
    return equal;
}

VECTORS static int32_t count_above(const float *values, int64_t count, float value) {
    int32_t above = 0;
    for (int64_t j = 0; j < count; j++) above += magnitude(values[j]) > value;
    return above;
}

/* How many differences are above `value` in magnitude, and, in `equal`, how many equal it. */
EXPORT int64_t dare_count(int base_dtype, const void *base, int finetuned_dtype,
                          const void *finetuned, int64_t count, float value, int64_t *equal) {
    float delta[STRIP];
    int64_t above = 0, same = 0;
    for (int64_t first = 0; first < count; first += STRIP) {
        int64_t n = count - first < STRIP ? count - first : STRIP;
        difference(base_dtype, base, finetuned_dtype, finetuned, first, n, delta);
        above += count_above(delta, n, value);
        same += count_equal(delta, n, value);
    }
    *equal = same;
    return above;
}

/* How many differences are equal to `value` in magnitude, and where the one of number `wanted`
 * is, counted from one; nothing is counted after it. */
EXPORT int64_t dare_equal(int base_dtype, const void *base, int finetuned_dtype,
                          const void *finetuned, int64_t count, float value, int64_t wanted,
                          int64_t *place) {
    float delta[STRIP];
    int64_t seen = 0;
    for (int64_t first = 0; first < count; first += STRIP) {
        int64_t n = count - first < STRIP ? count - first : STRIP;
        difference(base_dtype, base, finetuned_dtype, finetuned, first, n, delta);
        int64_t equal = count_equal(delta, n, value);
        for (int64_t j = 0; j < n && seen + equal >= wanted; j++) {
            seen += magnitude(delta[j]) == value;
            if (seen == wanted) {
                *place = first + j;
                return seen;
            }
        }
        seen += equal;
    }
    return seen;
}

/* dare_equal of entries that were read. */
EXPORT int64_t dare_values_equal(const int64_t *index, const float *values, int64_t count,
                                 float value, int64_t wanted, int64_t *place) {
    int64_t seen = 0, before = -1;
    for (int64_t j = 0; j < count; j++) {
        int once = !index || index[j] != before;
        if (index) before = index[j];
        seen += once & (magnitude(values[j]) == value);
        if (seen == wanted) {
            *place = index ? index[j] : j;
            return seen;
        }
    }
    return seen;
}

/* Whether a row has an entry for its last slot. */
static int last_used(const support *s, int64_t row, int64_t slots) {
    if (s->columns % s->block == 0) return 1;
    uint64_t words[4], lane = (uint64_t)(slots - 1) & 15;
    uint64_t first = (uint64_t)(row * ((slots + 15) / 16) + (slots - 1) / 16);
    philox(s->seed, s->key, first, words);
    int64_t drawn = (int64_t)(words[lane >> 2] >> (16 * (lane & 3)) & 0xFFFF);
    return (slots - 1) * s->block + (drawn * s->block >> 16) < s->columns;
}

/* How often each |code - middle| occurs in rows start … stop - 1 of packed survivors of a blocked
 * support: `counts` (n, 2^(bits - 1) + 1). At one bit all are 1. */
EXPORT void dare_code_counts(uint64_t seed, uint64_t key, int64_t columns, int64_t block,
                             int64_t start, int64_t stop, int bits, const uint8_t *packed,
                             int32_t *counts) {
    support s = {seed, key, columns, block};
    int64_t slots = slots_of(&s), row_size = (slots * bits + 7) / 8;
    int middle = 1 << (bits - 1), mask = (1 << bits) - 1;
    for (int64_t row = start; row < stop; row++, counts += middle + 1) {
        const uint8_t *codes = packed + row * row_size;
        int64_t used = last_used(&s, row, slots) ? slots : slots - 1;
        memset(counts, 0, (size_t)(middle + 1) * sizeof *counts);
        if (bits == 1) {
            counts[1] = (int32_t)used;
            continue;
        }
        int32_t found[2][256];
        for (int half = 0; half < 2; half++)
            memset(found[half], 0, (size_t)(mask + 1) * sizeof **found);
        for (int64_t j = 0; j < used; j++) {
            int code = codes[(j * bits) >> 3] >> ((j * bits) & 7) & mask;
            found[j & 1][code]++;
        }
        for (int code = 0; code <= mask; code++)
            counts[code < middle ? middle - code : code - middle] +=
                found[0][code] + found[1][code];
    }
}

/* Of packed survivors of one blocked support, rows start … stop - 1, those that another one keeps
 * too, times `factor`: ascending positions and values, which have room for all and one more; their
 * number. `column`, `other` and `change` are room for one row's slots of each, and eight more. */
EXPORT int64_t dare_read_kept(uint64_t seed, uint64_t key, int64_t columns, int64_t block,
                              int64_t start, int64_t stop, int bits, const uint8_t *packed,
                              const float *scales, uint64_t other_seed, uint64_t other_key,
                              int64_t other_block, float factor, int64_t *column, int64_t *other,
                              float *change, int64_t *index, float *values) {
    support s = {seed, key, columns, block}, t = {other_seed, other_key, columns, other_block};
    int64_t slots = slots_of(&s), row_size = (slots * bits + 7) / 8, kept = 0;
    double inverse = 1.0 / (double)other_block;
    for (int64_t row = start; row < stop; row++) {
        row_columns(&s, row, slots, column);
        row_columns(&t, row, slots_of(&t), other);
        decode(packed + row * row_size, slots, bits, scales[row], 1.0f, change);
        int64_t used = column[slots - 1] < 0 ? slots - 1 : slots, top = (row - start) * columns;
        for (int64_t j = 0; j < used; j++) {
            /* half an entry is more than rounding takes away */
            int64_t own = (int64_t)(((double)column[j] + 0.5) * inverse);
            index[kept] = top + column[j];
            values[kept] = change[j] * factor;
            kept += other[own] == column[j];
        }
    }
    return kept;
}
