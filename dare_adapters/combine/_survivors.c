/* Survivors of a parameter kept in little room, and dense changes of which most are none. */

#include "_floats.h"

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
