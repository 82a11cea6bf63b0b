/* The inner loops, without the Python lock: where a blocked delta's survivors are, adding them to
 * rows of a weight, reading and choosing among the entries of fine-tune minus base, and aligning
 * sparse deltas. Each gives bit for bit what the Python beside it computes.
 * Compiled where there is a compiler (see setup.py) and called through ctypes by compiled.py. */

#include "_add.h"
#include "_codes.h"
#include "_difference.h"
#include "_elect.h"
#include "_support.h"

/* Flat positions of rows start … stop - 1, (n, slots); an unused last slot repeats the one before
 * it (0 where there is none) and valid[row] is 0. */
EXPORT void dare_positions(uint64_t seed, uint64_t key, int64_t columns, int64_t block,
                           int64_t start, int64_t stop, int64_t *index, uint8_t *valid) {
    support s = {seed, key, columns, block};
    int64_t slots = slots_of(&s);
    for (int64_t row = start; row < stop; row++, index += slots) {
        row_columns(&s, row, slots, index);
        for (int64_t j = 0; j + 1 < slots; j++) index[j] += (row - start) * columns;
        int used = index[slots - 1] >= 0;
        valid[row - start] = (uint8_t)used;
        if (used) index[slots - 1] += (row - start) * columns;
        else index[slots - 1] = slots > 1 ? index[slots - 2] : 0;
    }
}

VECTORS static void add_bfloat16(const uint16_t *restrict old, const float *restrict change,
                                 int64_t slots, uint16_t *restrict sum) {
    for (int64_t j = 0; j < slots; j++)
        sum[j] = to_bfloat16(change[j] + as_float((uint32_t)old[j] << 16));
}

static void add_float16(const uint16_t *restrict old, const float *restrict change, int64_t slots,
                        uint16_t *restrict sum) {
    for (int64_t j = 0; j < slots; j++) sum[j] = to_half(change[j] + from_half(old[j]));
}

VECTORS static void add_float32(const float *restrict old, const float *restrict change,
                                int64_t slots, float *restrict sum) {
    for (int64_t j = 0; j < slots; j++) sum[j] = change[j] + old[j];
}

/* Gather, add and scatter apart: what is gathered may be loaded while what is scattered is not yet
 * stored. An unused last slot repeats the one before it. */
#define ROW(TYPE, ADD)                                                                   \
    do {                                                                                 \
        TYPE *weights = (TYPE *)target + row * row_stride;                               \
        TYPE *kept = (TYPE *)originals + (row - start) * slots, *sum = (TYPE *)sums;     \
        for (int64_t j = 0; j < used; j++) kept[j] = weights[column[j]];                 \
        ADD(kept, change, used, sum);                                                    \
        for (int64_t j = 0; j < used; j++) weights[column[j]] = sum[j];                  \
        if (used < slots) kept[used] = kept[used - 1];                                   \
    } while (0)

/* Add a delta to rows start … stop - 1 of a weight, and keep what was there, (n, slots).
 * `packed` and `scales` begin with row 0 of the parameter, `target` with its first entry;
 * `column`, `change` and `sums` are room for one row's slots and eight more. A row has at least
 * two slots, or no short last block. */
EXPORT void dare_apply(uint64_t seed, uint64_t key, int64_t columns, int64_t block, int64_t start,
                       int64_t stop, int bits, const uint8_t *packed, const float *scales,
                       float weight, int dtype, void *target, int64_t row_stride, void *originals,
                       int64_t *column, float *change, float *sums) {
    support s = {seed, key, columns, block};
    int64_t slots = slots_of(&s), row_size = (slots * bits + 7) / 8;
    for (int64_t row = start; row < stop; row++) {
        row_columns(&s, row, slots, column);
        int64_t used = column[slots - 1] < 0 ? slots - 1 : slots;
        decode(packed + row * row_size, slots, bits, scales[row], weight, change);
        if (dtype == BFLOAT16) ROW(uint16_t, add_bfloat16);
        else if (dtype == FLOAT16) ROW(uint16_t, add_float16);
        else ROW(float, add_float32);
    }
}

/* dare_positions, and (fine-tune - base) * factor at each of them, (n, slots); 0 where unused.
 * `base` and `finetuned` begin with the parameter's first entry and are contiguous. */
EXPORT void dare_survivors(uint64_t seed, uint64_t key, int64_t columns, int64_t block,
                           int64_t start, int64_t stop, int base_dtype, const void *base,
                           int finetuned_dtype, const void *finetuned, float factor,
                           int64_t *index, uint8_t *valid, float *values) {
    support s = {seed, key, columns, block};
    int64_t slots = slots_of(&s);
    dare_positions(seed, key, columns, block, start, stop, index, valid);
    int64_t first = start * columns;
    if (base_dtype == BFLOAT16 && finetuned_dtype == BFLOAT16) {
        const uint16_t *from = (const uint16_t *)base + first;
        const uint16_t *to = (const uint16_t *)finetuned + first;
        for (int64_t j = 0; j < (stop - start) * slots; j++)
            values[j] = (as_float((uint32_t)to[index[j]] << 16) -
                         as_float((uint32_t)from[index[j]] << 16)) * factor;
    } else {
        for (int64_t j = 0; j < (stop - start) * slots; j++)
            values[j] = (read_float(finetuned, first + index[j], finetuned_dtype) -
                         read_float(base, first + index[j], base_dtype)) * factor;
    }
    for (int64_t row = 0; row < stop - start; row++)
        if (!valid[row]) values[row * slots + slots - 1] = 0;
}

/* Put the kept entries back. */
EXPORT void dare_restore(uint64_t seed, uint64_t key, int64_t columns, int64_t block, int64_t start,
                         int64_t stop, int item_size, void *target, int64_t row_stride,
                         const void *originals, int64_t *column) {
    support s = {seed, key, columns, block};
    int64_t slots = slots_of(&s);
    for (int64_t row = start; row < stop; row++) {
        row_columns(&s, row, slots, column);
        int64_t used = column[slots - 1] < 0 ? slots - 1 : slots;
        if (item_size == 2) {
            uint16_t *weights = (uint16_t *)target + row * row_stride;
            const uint16_t *kept = (const uint16_t *)originals + (row - start) * slots;
            for (int64_t j = 0; j < used; j++) weights[column[j]] = kept[j];
        } else {
            uint32_t *weights = (uint32_t *)target + row * row_stride;
            const uint32_t *kept = (const uint32_t *)originals + (row - start) * slots;
            for (int64_t j = 0; j < used; j++) weights[column[j]] = kept[j];
        }
    }
}

/* dare_positions, and the values there, float32 (n, slots); a repeated position has its value. */
EXPORT void dare_read(uint64_t seed, uint64_t key, int64_t columns, int64_t block, int64_t start,
                      int64_t stop, int bits, const uint8_t *packed, const float *scales,
                      int64_t *index, float *values, float *change) {
    support s = {seed, key, columns, block};
    int64_t slots = slots_of(&s), row_size = (slots * bits + 7) / 8;
    for (int64_t row = start; row < stop; row++, index += slots, values += slots) {
        row_columns(&s, row, slots, index);
        int64_t used = index[slots - 1] < 0 ? slots - 1 : slots;
        for (int64_t j = 0; j < used; j++) index[j] += (row - start) * columns;
        decode(packed + row * row_size, slots, bits, scales[row], 1.0f, change);
        memcpy(values, change, (size_t)used * sizeof(float));
        if (used < slots) {
            index[used] = used ? index[used - 1] : 0;
            values[used] = used ? values[used - 1] : 0;
        }
    }
}

/* How many of `count` differences are above `high` in magnitude; those from `low` to `high` go to
 * `inside`, which has room for all of them and one more, their number to `found`. */
VECTORS EXPORT int64_t dare_between(int base_dtype, const void *base, int finetuned_dtype,
                                    const void *finetuned, int64_t count, float low, float high,
                                    float *inside, int64_t *found) {
    float delta[STRIP];
    int64_t above = 0, kept = 0;
    for (int64_t first = 0; first < count; first += STRIP) {
        int64_t n = count - first < STRIP ? count - first : STRIP;
        difference(base_dtype, base, finetuned_dtype, finetuned, first, n, delta);
        for (int64_t j = n; j < (n + 15) / 16 * 16; j++) delta[j] = 0;
        for (int64_t group = 0; group < n; group += 16) {
            int32_t over = 0, reach = 0; /* few groups hold any, so most are only counted */
            for (int k = 0; k < 16; k++) {
                float size = magnitude(delta[group + k]);
                over += size > high;
                reach += size >= low;
            }
            above += over;
            if (reach == over) continue;
            for (int64_t j = group; j < group + 16 && j < n; j++) {
                float size = magnitude(delta[j]);
                inside[kept] = size;
                kept += (size >= low) & (size <= high);
            }
        }
    }
    *found = kept;
    return above;
}

/* The differences whose magnitude is above `value`, and those equal to it up to position `last`:
 * positions and values, which have room for all of them and one more; their number. */
EXPORT int64_t dare_above(int base_dtype, const void *base, int finetuned_dtype,
                          const void *finetuned, int64_t count, float value, int64_t last,
                          int64_t *index, float *values) {
    float delta[STRIP];
    int64_t kept = 0;
    for (int64_t first = 0; first < count; first += STRIP) {
        int64_t n = count - first < STRIP ? count - first : STRIP;
        difference(base_dtype, base, finetuned_dtype, finetuned, first, n, delta);
        for (int64_t j = 0; j < n; j++) {
            float size = magnitude(delta[j]);
            index[kept] = first + j;
            values[kept] = delta[j];
            kept += (size > value) | ((size == value) & (first + j <= last));
        }
    }
    return kept;
}

/* dare_between of entries that were read: values at ascending positions (NULL: consecutive), of
 * which one that comes twice counts once. */
EXPORT int64_t dare_values_between(const int64_t *index, const float *values, int64_t count,
                                   float low, float high, float *inside, int64_t *found) {
    int64_t above = 0, kept = 0, before = -1;
    for (int64_t j = 0; j < count; j++) {
        int once = 1;
        if (index) {
            once = index[j] != before;
            before = index[j];
        }
        float size = magnitude(values[j]);
        inside[kept] = size;
        kept += once & (size >= low) & (size <= high);
        above += once & (size > high);
    }
    *found = kept;
    return above;
}

/* dare_above of entries that were read. */
EXPORT int64_t dare_values_above(const int64_t *index, const float *values, int64_t count,
                                 float value, int64_t last, int64_t *kept_index,
                                 float *kept_values) {
    int64_t kept = 0;
    for (int64_t j = 0; j < count; j++) {
        int64_t place = index ? index[j] : j;
        float size = magnitude(values[j]);
        kept_index[kept] = place;
        kept_values[kept] = values[j];
        kept += (size > value) | ((size == value) & (place <= last));
    }
    return kept;
}

/* Of values at ascending positions, relative to row `start`, those that a blocked support keeps,
 * times `factor`; their number. `column` is room for one row's slots. */
EXPORT int64_t dare_kept(uint64_t seed, uint64_t key, int64_t columns, int64_t block, int64_t start,
                         const int64_t *index, const float *values, int64_t count, float factor,
                         int64_t *column, int64_t *kept_index, float *kept_values) {
    support s = {seed, key, columns, block};
    int64_t slots = slots_of(&s), row = -1, kept = 0;
    for (int64_t j = 0; j < count; j++) {
        int64_t own = index[j] / columns, place = index[j] - own * columns;
        if (own != row) {
            row = own;
            row_columns(&s, start + row, slots, column);
        }
        kept_index[kept] = index[j];
        kept_values[kept] = values[j] * factor;
        kept += column[place / block] == place;
    }
    return kept;
}

/* The sum of the magnitudes of `count` differences. */
EXPORT double dare_abs_sum(int base_dtype, const void *base, int finetuned_dtype,
                           const void *finetuned, int64_t count) {
    float delta[STRIP];
    double total = 0;
    for (int64_t first = 0; first < count; first += STRIP) {
        int64_t n = count - first < STRIP ? count - first : STRIP;
        difference(base_dtype, base, finetuned_dtype, finetuned, first, n, delta);
        float sums[16] = {0};
        int64_t whole = n / 16 * 16;
        for (int64_t j = 0; j < whole; j += 16)
            for (int k = 0; k < 16; k++) sums[k] += magnitude(delta[j + k]);
        for (int64_t j = whole; j < n; j++) sums[0] += magnitude(delta[j]);
        for (int k = 0; k < 16; k++) total += sums[k];
    }
    return total;
}

/* `lists` ascending lists of positions, with values, to one list without repeats: positions, and
 * values (lists, room), 0 where a list lacks a position. `cursor` has room for each list. */
EXPORT int64_t dare_union(int64_t lists, const int64_t *const *index, const float *const *values,
                          const int64_t *counts, int64_t room, int64_t *cursor, int64_t *union_index,
                          float *union_values) {
    int64_t made = 0;
    for (int64_t k = 0; k < lists; k++) cursor[k] = 0;
    for (;;) {
        int64_t next = INT64_MAX;
        for (int64_t k = 0; k < lists; k++)
            if (cursor[k] < counts[k] && index[k][cursor[k]] < next) next = index[k][cursor[k]];
        if (next == INT64_MAX) return made;
        union_index[made] = next;
        for (int64_t k = 0; k < lists; k++) {
            float value = 0;
            while (cursor[k] < counts[k] && index[k][cursor[k]] == next)
                value = values[k][cursor[k]++];
            union_values[k * room + made] = value;
        }
        made++;
    }
}

/* Add `change` to the entries of a weight at `index`, in place; what was there goes to `originals`
 * where that is not NULL. A position that comes twice, one after the other, with one change counts
 * once. */
#define ADD_AT(TYPE, READ, ROUND)                                                        \
    do {                                                                                 \
        TYPE *weights = (TYPE *)target, *kept = (TYPE *)originals, last = 0;             \
        int64_t before = -1;                                                             \
        for (int64_t j = 0; j < count; j++) {                                            \
            TYPE old = index[j] == before ? last : weights[index[j]];                    \
            before = index[j];                                                           \
            last = old;                                                                  \
            if (kept) kept[j] = old; /* its bits, also of what is no number */           \
            weights[index[j]] = ROUND(change[j] + READ(old));                            \
        }                                                                                \
    } while (0)

EXPORT void dare_add_at(int dtype, void *target, const int64_t *index, const float *change,
                        int64_t count, void *originals) {
    if (dtype == FLOAT32) ADD_AT(uint32_t, as_float, as_bits);
    else if (dtype == BFLOAT16) ADD_AT(uint16_t, from_bfloat16, to_bfloat16);
    else ADD_AT(uint16_t, from_half, to_half);
}

/* dense[index] += values * weight; a position that comes twice, one after the other, counts once. */
EXPORT void dare_accumulate(float *dense, const int64_t *index, const float *values, float weight,
                            int64_t count) {
    int64_t before = -1;
    for (int64_t j = 0; j < count; j++) {
        if (index[j] != before) dense[index[j]] += values[j] * weight;
        before = index[j];
    }
}

/* sum = base + change, rounded once; base and sum may be one. */
EXPORT void dare_add(int dtype, const void *base, const float *change, int64_t count, void *sum) {
    add(dtype, base, change, count, sum);
}

/* Entries of rows start … stop - 1 whose 32-bit lane is below `threshold`, and the differences
 * there times `factor`; their number. `index` and `values` have room for all and one more. */
EXPORT int64_t dare_bernoulli(uint64_t seed, uint64_t key, int64_t columns, uint64_t threshold,
                              int64_t start, int64_t stop, int base_dtype, const void *base,
                              int finetuned_dtype, const void *finetuned, float factor,
                              int64_t *index, float *values) {
    int64_t kept = 0, stride = (columns + 7) / 8;
    for (int64_t row = start; row < stop; row++) {
        int64_t first = kept, top = (row - start) * columns;
        for (int64_t t = 0; t < stride; t++) {
            uint64_t words[4];
            philox(seed, key, (uint64_t)(row * stride + t), words);
            int64_t left = columns - 8 * t < 8 ? columns - 8 * t : 8;
            for (int64_t lane = 0; lane < left; lane++) {
                index[kept] = top + 8 * t + lane;
                kept += ((words[lane >> 1] >> (32 * (lane & 1))) & 0xFFFFFFFFu) < threshold;
            }
        }
        int64_t from = start * columns;
        for (int64_t j = first; j < kept; j++)
            values[j] = (read_float(finetuned, from + index[j], finetuned_dtype) -
                         read_float(base, from + index[j], base_dtype)) * factor;
    }
    return kept;
}

/* The disjoint merge of combine/consensus.py: values (lists, room), of which `count` columns are
 * used, to `merged` (count,). */
EXPORT void dare_elect(int64_t lists, const float *values, int64_t room, int64_t count,
                       const float *weights, int frequency, int weighted, int divisor,
                       float factor, float *merged) {
    election how = {frequency, weighted, divisor, factor};
    for (int64_t first = 0; first < count; first += STRIP) {
        int64_t n = count - first < STRIP ? count - first : STRIP;
        elect(lists, values + first, room, n, weights, how, merged + first);
    }
}
