/* Survivors of a parameter kept in little room, and dense changes of which most are none. */

#include "_codes.h"
#include "_difference.h"
#include "_floats.h"
#include "_support.h"

/* Entries that were read, at ascending positions, put beside those of earlier rows: `places` of 32
 * or 64 bits, `offset` further on, and values. The sum of the magnitudes, of which one that comes
 * twice counts once. */
EXPORT double dare_gather(const int64_t *index, const float *values, int64_t count, int64_t offset,
                          int wide, void *places, float *kept) {
    double total = 0;
    int64_t before = -1;
    for (int64_t j = 0; j < count; j++) {
        int64_t own = index ? index[j] : j;
        float size = as_float(as_bits(values[j]) & 0x7FFFFFFF);
        total += own == before ? 0.0f : size;
        before = own;
        if (wide) ((int64_t *)places)[j] = own + offset;
        else ((int32_t *)places)[j] = (int32_t)(own + offset);
        kept[j] = values[j];
    }
    return total;
}

/* Survivors of one row of a parameter, entry number `top` on: positions to `places`, of 32 or 64
 * bits. */
static void put_places(const int64_t *restrict column, int64_t count, int64_t top, int wide,
                       void *places, int64_t kept) {
    if (wide) {
        int64_t *own = (int64_t *)places + kept;
        for (int64_t j = 0; j < count; j++) own[j] = top + column[j];
    } else {
        int32_t *own = (int32_t *)places + kept;
        for (int64_t j = 0; j < count; j++) own[j] = (int32_t)(top + column[j]);
    }
}

/* The sum of the magnitudes of up to STRIP differences, in the order of dare_abs_sum. */
VECTORS static double strip_sum(int base_dtype, const void *base, int finetuned_dtype,
                                const void *finetuned, int64_t first, int64_t n) {
    float delta[STRIP], sums[16] = {0};
    double total = 0;
    int64_t whole = n / 16 * 16;
    difference(base_dtype, base, finetuned_dtype, finetuned, first, n, delta);
    for (int64_t j = 0; j < whole; j += 16)
        for (int k = 0; k < 16; k++) sums[k] += magnitude(delta[j + k]);
    for (int64_t j = whole; j < n; j++) sums[0] += magnitude(delta[j]);
    for (int k = 0; k < 16; k++) total += sums[k];
    return total;
}

/* Of rows start … stop - 1 what a blocked support keeps of fine-tune minus base, times `factor`:
 * positions in the parameter and values; their number. `sums`: of the magnitudes of what is kept,
 * and of all differences, which are read beside them, while they are in the caches. `base` and
 * `finetuned` begin with the parameter's first entry; `column` is room for one row's slots. */
EXPORT int64_t dare_keep_differences(uint64_t seed, uint64_t key, int64_t columns, int64_t block,
                                     int64_t start, int64_t stop, int base_dtype, const void *base,
                                     int finetuned_dtype, const void *finetuned, float factor,
                                     int wide, void *places, float *values, double *sums,
                                     int64_t *column) {
    support s = {seed, key, columns, block};
    int64_t slots = slots_of(&s), kept = 0, end = stop * columns, read = start * columns;
    sums[0] = sums[1] = 0;
    for (int64_t row = start; row < stop; row++) {
        int64_t top = row * columns;
        for (; read + STRIP <= top + columns; read += STRIP)
            sums[1] += strip_sum(base_dtype, base, finetuned_dtype, finetuned, read, STRIP);
        row_columns(&s, row, slots, column);
        int64_t used = column[slots - 1] < 0 ? slots - 1 : slots;
        float *own = values + kept;
        if (base_dtype == BFLOAT16 && finetuned_dtype == BFLOAT16) {
            const uint16_t *from = (const uint16_t *)base + top;
            const uint16_t *to = (const uint16_t *)finetuned + top;
            for (int64_t j = 0; j < used; j++)
                own[j] = (from_bfloat16(to[column[j]]) - from_bfloat16(from[column[j]])) * factor;
        } else {
            for (int64_t j = 0; j < used; j++)
                own[j] = (read_float(finetuned, top + column[j], finetuned_dtype) -
                          read_float(base, top + column[j], base_dtype)) * factor;
        }
        for (int64_t j = 0; j < used; j++) sums[0] += magnitude(own[j]);
        put_places(column, used, top, wide, places, kept);
        kept += used;
    }
    if (read < end)
        sums[1] += strip_sum(base_dtype, base, finetuned_dtype, finetuned, read, end - read);
    return kept;
}

/* The same of packed survivors of one blocked support, of which another keeps some; without the
 * second sum. `column` and `other` are room for one row's slots of each, `change` for those of the
 * first and eight more; positions and values have room for all and one more. */
EXPORT int64_t dare_keep_codes(uint64_t seed, uint64_t key, int64_t columns, int64_t block,
                               int64_t start, int64_t stop, int bits, const uint8_t *packed,
                               const float *scales, uint64_t other_seed, uint64_t other_key,
                               int64_t other_block, float factor, int wide, void *places,
                               float *values, double *sum, int64_t *column, int64_t *other,
                               float *change) {
    support s = {seed, key, columns, block}, t = {other_seed, other_key, columns, other_block};
    int64_t slots = slots_of(&s), row_size = (slots * bits + 7) / 8, kept = 0;
    double inverse = 1.0 / (double)other_block, total = 0;
    for (int64_t row = start; row < stop; row++) {
        row_columns(&s, row, slots, column);
        row_columns(&t, row, slots_of(&t), other);
        decode(packed + row * row_size, slots, bits, scales[row], 1.0f, change);
        int64_t used = column[slots - 1] < 0 ? slots - 1 : slots, here = 0;
        float *own = values + kept;
        for (int64_t j = 0; j < used; j++) { /* places below j are not needed any more */
            /* half an entry is more than rounding takes away */
            int64_t slot = (int64_t)(((double)column[j] + 0.5) * inverse);
            int both = other[slot] == column[j];
            column[here] = column[j];
            own[here] = change[j] * factor;
            here += both;
        }
        for (int64_t j = 0; j < here; j++) total += magnitude(own[j]);
        put_places(column, here, row * columns, wide, places, kept);
        kept += here;
    }
    *sum = total;
    return kept;
}

/* total[places - offset] += values * factor * weight; a position that comes twice, one after the
 * other, counts once. */
#define ADD_TO(TYPE)                                                                     \
    do {                                                                                 \
        const TYPE *place = (const TYPE *)places;                                        \
        TYPE before = -1;                                                                \
        for (int64_t j = 0; j < count; j++) {                                            \
            if (place[j] != before) total[place[j] - offset] += values[j] * factor * weight; \
            before = place[j];                                                           \
        }                                                                                \
    } while (0)

EXPORT void dare_add_to(float *total, const void *places, int wide, const float *values,
                        int64_t count, int64_t offset, float factor, float weight) {
    if (wide) ADD_TO(int64_t);
    else ADD_TO(int32_t);
}

/* The sign bit where all `lists` rows of values (lists, room) are -0, else 0. */
VECTORS EXPORT void dare_untouched(int64_t lists, const uint32_t *values, int64_t room,
                                   int64_t count, uint32_t *restrict signs) {
    for (int64_t j = 0; j < count; j++) signs[j] = values[j] == 0x80000000u ? 0x80000000u : 0;
    for (int64_t k = 1; k < lists; k++)
        for (int64_t j = 0; j < count; j++)
            signs[j] = values[k * room + j] == 0x80000000u ? signs[j] : 0;
}
