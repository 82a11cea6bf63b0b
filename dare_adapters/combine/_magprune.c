/* Entries that survive with a probability by the rank of their magnitude in their row (DELLA),
 * without a sort of whole rows: what combine/della.py computes, bit for bit. */

#include "_floats.h"
#include "_support.h"

typedef struct {
    uint64_t *ranked;  /* (columns,) magnitude's bits << 32 | place in the row, in order of rank */
    uint64_t *spare;   /* (columns,) */
    uint32_t *lanes;   /* (8 * ceil(columns / 8),) random bits of each entry */
    uint32_t *heads;   /* (columns + 2 * MOST_BUCKETS + 2,) */
    int32_t *rank;     /* (columns,) of an entry that survives, -1 of one that does not */
} row_room;

enum { LEAST_BUCKETS = 64, MOST_BUCKETS = 4096, FEW = 24 };

/* The 32-bit lanes of a row's entries: of all, or of those at `column`, ascending. */
static void row_lanes(uint64_t seed, uint64_t key, int64_t row, int64_t columns,
                      const int64_t *column, int64_t count, uint32_t *restrict lanes) {
    uint64_t words[4], first = (uint64_t)(row * ((columns + 7) / 8));
    if (!column) {
        for (int64_t t = 0; t < (columns + 7) / 8; t++) {
            philox(seed, key, first + (uint64_t)t, words);
            for (int lane = 0; lane < 8; lane++)
                lanes[8 * t + lane] = (uint32_t)(words[lane >> 1] >> (32 * (lane & 1)));
        }
        return;
    }
    int64_t drawn = -1;
    for (int64_t j = 0; j < count; j++) {
        if (column[j] >> 3 != drawn) {
            drawn = column[j] >> 3;
            philox(seed, key, first + (uint64_t)drawn, words);
        }
        lanes[j] = (uint32_t)(words[(column[j] & 7) >> 1] >> (32 * (column[j] & 1)));
    }
}

/* Sort by the upper half, equal ones left in their order: eight bits of it at a time, of those that
 * differ at all. */
static void sort_by_magnitude(uint64_t *items, int64_t count, uint64_t *spare) {
    uint64_t *from = items, *to = spare, differ = 0;
    for (int64_t j = 1; j < count; j++) differ |= items[j] ^ items[0];
    for (int shift = 32; shift < 64; shift += 8) {
        if (!(differ >> shift & 255)) continue;
        int64_t heads[257] = {0};
        for (int64_t j = 0; j < count; j++) heads[(from[j] >> shift & 255) + 1]++;
        for (int b = 0; b < 256; b++) heads[b + 1] += heads[b];
        for (int64_t j = 0; j < count; j++) to[heads[from[j] >> shift & 255]++] = from[j];
        uint64_t *other = from;
        from = to;
        to = other;
    }
    if (from != items) memcpy(items, from, (size_t)count * sizeof *items);
}

/* The entries of a row in order of magnitude, of equal ones the first first. */
static void rank_row(const float *values, int64_t count, row_room *room) {
    uint32_t largest = 0;
    for (int64_t j = 0; j < count; j++) {
        uint32_t size = as_bits(values[j]) & 0x7FFFFFFF;
        largest = size > largest ? size : largest;
    }
    /* Buckets of equal width in the bits of the upper octaves, and one for all that is smaller. */
    int64_t buckets = LEAST_BUCKETS;
    int shift = 23 - 2; /* 64 buckets over 16 octaves: four to each */
    while (buckets < count && buckets < MOST_BUCKETS) {
        buckets *= 2;
        shift--;
    }
    uint32_t window = (uint32_t)(buckets - 1) << shift;
    uint32_t low = largest > window ? ((largest - window) >> shift << shift) : 0;
    uint32_t *heads = room->heads, *bucket = heads + MOST_BUCKETS + 2;
    memset(heads, 0, (size_t)(buckets + 2) * sizeof *heads);
    for (int64_t j = 0; j < count; j++) {
        uint32_t size = as_bits(values[j]) & 0x7FFFFFFF;
        bucket[j] = size > low ? (size - low) >> shift : 0;
    }
    for (int64_t j = 0; j < count; j++) heads[bucket[j] + 1]++;
    for (int64_t b = 0; b <= buckets; b++) heads[b + 1] += heads[b];
    uint64_t *ranked = room->ranked;
    for (int64_t j = 0; j < count; j++)
        ranked[heads[bucket[j]]++] = (uint64_t)(as_bits(values[j]) & 0x7FFFFFFF) << 32 | (uint64_t)j;
    /* heads[b] is now where bucket b ends. */
    for (int64_t b = 0, start = 0; b <= buckets; start = heads[b++]) {
        if (heads[b] - start <= FEW) continue;
        uint64_t *own = ranked + start;
        int64_t held = heads[b] - start, j = 1;
        while (j < held && own[j] >> 32 == own[0] >> 32) j++;
        if (j < held) sort_by_magnitude(own, held, room->spare);
    }
    /* What is left is out of order by a few places only, inside small buckets. */
    for (int64_t j = 1; j < count; j++) {
        uint64_t own = ranked[j];
        int64_t place = j;
        for (; place > 0 && ranked[place - 1] > own; place--) ranked[place] = ranked[place - 1];
        ranked[place] = own;
    }
}

/* Of rows start … stop - 1 the entries whose lane is below the limit of their rank; their number.
 * `values` are all entries, or those at `index`, ascending, of which one that comes twice counts
 * once; what is not there ranks lowest. `limits` (columns,) and `probabilities` (columns,), by
 * which survivors are divided where it is not NULL, are by rank. */
EXPORT int64_t dare_magprune(uint64_t seed, uint64_t key, int64_t columns, int64_t start,
                             int64_t stop, const int64_t *index, const float *values,
                             int64_t count, const uint64_t *limits, const float *probabilities,
                             uint64_t *ranked, uint64_t *spare, uint32_t *lanes, uint32_t *heads,
                             int32_t *rank, int64_t *column, float *own, int64_t *kept_index,
                             float *kept_values) {
    row_room room = {ranked, spare, lanes, heads, rank};
    int64_t kept = 0, next = 0;
    for (int64_t row = start; row < stop; row++) {
        int64_t top = (row - start) * columns, held = columns;
        const float *entries = values + top;
        if (index) {
            held = 0;
            for (; next < count && index[next] < top + columns; next++) {
                if (next && index[next] == index[next - 1]) continue;
                column[held] = index[next] - top;
                own[held++] = values[next];
            }
            entries = own;
        }
        if (!held) continue;
        row_lanes(seed, key, row, columns, index ? column : NULL, held, lanes);
        rank_row(entries, held, &room);
        const uint64_t *limit = limits + (columns - held);
        for (int64_t r = 0; r < held; r++) {
            uint32_t place = (uint32_t)ranked[r];
            rank[place] = lanes[place] < limit[r] ? (int32_t)r : -1;
        }
        const float *probability = probabilities ? probabilities + (columns - held) : NULL;
        for (int64_t j = 0; j < held; j++) {
            kept_index[kept] = top + (index ? column[j] : j);
            kept_values[kept] = entries[j];
            if (probability && rank[j] >= 0) kept_values[kept] /= probability[rank[j]];
            kept += rank[j] >= 0;
        }
    }
    return kept;
}
