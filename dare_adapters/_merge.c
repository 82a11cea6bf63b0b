/* Rows of a base with what several deltas keep of them added, in one pass: each strip of the sum
 * stays in the first-level cache from its first change to its rounding. */

#include "_add.h"
#include "_elect.h"
#include "_strip.h"

/* Where fewer than one entry in so many changes, only those are gone through. */
enum { SCATTERED = 8 };

typedef struct {
    const void *places; /* of 4 or 8 bytes, ascending; one that comes twice counts once */
    const float *values;
    int64_t count;
    float factor, weight;
} kept_rows;

/* Entries of a strip that change, in any order, each once. */
typedef struct {
    int64_t count;
    int16_t entry[STRIP + 1];
    uint8_t seen[STRIP];
} touched_entries;

/* change[place - low] += value * factor * weight, of places from number `from` on and below `stop`;
 * the number of the next one. */
#define SCATTER(TYPE, NOTE)                                                              \
    do {                                                                                 \
        const TYPE *place = (const TYPE *)rows->places;                                  \
        TYPE before = -1;                                                                \
        for (; from < count && place[from] < stop; from++) {                             \
            int64_t at = place[from] - low;                                              \
            if (place[from] != before) change[at] += values[from] * factor * weight;     \
            before = place[from];                                                        \
            NOTE                                                                         \
        }                                                                                \
    } while (0)

#define NOTE_ENTRY                                                                       \
    entry[found] = (int16_t)at;                                                          \
    found += !seen[at];                                                                  \
    seen[at] = 1;

/* `touched` may be NULL. */
static int64_t scatter(const kept_rows *rows, int wide, int64_t from, int64_t low, int64_t stop,
                       float weight, float *restrict change, touched_entries *touched) {
    const float *values = rows->values, factor = rows->factor;
    const int64_t count = rows->count;
    if (!touched) {
        if (wide) SCATTER(int64_t, );
        else SCATTER(int32_t, );
        return from;
    }
    int16_t *restrict entry = touched->entry;
    uint8_t *restrict seen = touched->seen;
    int64_t found = touched->count;
    if (wide) SCATTER(int64_t, NOTE_ENTRY);
    else SCATTER(int32_t, NOTE_ENTRY);
    touched->count = found;
    return from;
}

static void fill(float *restrict change, int64_t count, float value) {
    for (int64_t j = 0; j < count; j++) change[j] = value;
}

/* Changes of touched entries side by side; -0 again where they were, and nothing touched in it. */
static void gather(float *restrict change, const touched_entries *touched, float *restrict found) {
    for (int64_t i = 0; i < touched->count; i++) {
        found[i] = change[touched->entry[i]];
        change[touched->entry[i]] = -0.0f;
    }
}

/* -0 in `merged` where all lists have it: no change, which leaves every bit of a base alone. */
VECTORS static void keep_unchanged(int64_t lists, const float *restrict values, int64_t count,
                                   float *restrict merged) {
    uint32_t changes[STRIP];
    for (int64_t j = 0; j < count; j++) changes[j] = 0;
    for (int64_t k = 0; k < lists; k++)
        for (int64_t j = 0; j < count; j++)
            changes[j] |= as_bits(values[k * STRIP + j]) ^ 0x80000000u;
    for (int64_t j = 0; j < count; j++)
        merged[j] = as_float(as_bits(merged[j]) | (changes[j] ? 0 : 0x80000000u));
}

/* out = base, and base + change at the touched entries, rounded once. */
#define PATCH(TYPE)                                                                      \
    do {                                                                                 \
        const TYPE *from = (const TYPE *)base;                                           \
        TYPE *to = (TYPE *)out, own[STRIP];                                              \
        memcpy(to, from, (size_t)count * sizeof(TYPE));                                  \
        for (int64_t i = 0; i < touched->count; i++) own[i] = from[touched->entry[i]];   \
        add(dtype, own, change, touched->count, own);                                    \
        for (int64_t i = 0; i < touched->count; i++) to[touched->entry[i]] = own[i];     \
    } while (0)

static void patch(int dtype, const void *base, int64_t count, const touched_entries *touched,
                  const float *change, void *out) {
    if (dtype == FLOAT32) PATCH(uint32_t);
    else PATCH(uint16_t);
}

/* out = base + Σ of what `lists` deltas keep, or + the disjoint merge of it where `elected` is set:
 * `count` entries, of which the first is number `offset` of the parameter. `room` is for two strips
 * and, of an election, two more of each list; `cursor` has a place for each. */
EXPORT void dare_merge_rows(int64_t lists, const kept_rows *rows, int wide, int64_t offset,
                            int elected, const float *weights, int frequency, int weighted,
                            int divisor, float factor, int dtype, const void *base, int64_t count,
                            float *room, int64_t *cursor, void *out) {
    election how = {frequency, weighted, divisor, factor};
    int64_t size = dtype == FLOAT32 ? 4 : 2, sums = elected ? lists : 1, kept = 0;
    float *found = room + sums * STRIP, *merged = elected ? found + sums * STRIP : found;
    touched_entries touched = {0};
    for (int64_t k = 0; k < lists; k++) {
        cursor[k] = 0;
        kept += rows[k].count;
    }
    int few = kept * SCATTERED < count || elected;
    fill(room, sums * STRIP, -0.0f);
    for (int64_t first = 0; first < count; first += STRIP) {
        int64_t n = count - first < STRIP ? count - first : STRIP, low = offset + first;
        const void *from = (const char *)base + first * size;
        void *to = (char *)out + first * size;
        touched.count = 0;
        for (int64_t k = 0; k < lists; k++)
            cursor[k] = scatter(rows + k, wide, cursor[k], low, low + n,
                                elected ? 1.0f : rows[k].weight,
                                elected ? room + k * STRIP : room, few ? &touched : NULL);
        if (!few) {
            add(dtype, from, room, n, to);
            fill(room, n, -0.0f);
            continue;
        }
        memset(touched.seen, 0, sizeof touched.seen);
        for (int64_t k = 0; k < sums; k++) gather(room + k * STRIP, &touched, found + k * STRIP);
        if (elected) {
            elect(lists, found, STRIP, touched.count, weights, how, merged);
            keep_unchanged(lists, found, touched.count, merged);
        }
        patch(dtype, from, n, &touched, merged, to);
    }
}
