/* Where the survivors of a blocked support are: the random stream of mask.py. */

#ifndef DARE_SUPPORT_H
#define DARE_SUPPORT_H

#include "_floats.h"

typedef unsigned __int128 wide;

/* Philox4x64-10 (Salmon et al., SC 2011), counter (c, 0, 0, 0). */
static inline void philox(uint64_t seed, uint64_t key, uint64_t counter, uint64_t out[4]) {
    uint64_t a = counter, b = 0, c = 0, d = 0;
    for (int round = 0; round < 10; round++) {
        wide one = (wide)0xD2E7470EE14C6C93u * a, two = (wide)0xCA5A826395121157u * c;
        uint64_t next_a = (uint64_t)(two >> 64) ^ b ^ seed;
        uint64_t next_c = (uint64_t)(one >> 64) ^ d ^ key;
        b = (uint64_t)two;
        d = (uint64_t)one;
        a = next_a;
        c = next_c;
        seed += 0x9E3779B97F4A7C15u;
        key += 0xBB67AE8584CAA73Bu;
    }
    out[0] = a; out[1] = b; out[2] = c; out[3] = d;
}

typedef struct {
    uint64_t seed, key;
    int64_t columns, block;
} support;

static int64_t slots_of(const support *s) { return (s->columns + s->block - 1) / s->block; }

/* Counters of one round of philox_lanes. */
enum { COUNTERS = 16 };

/* The 16-bit lanes of counters first … first + COUNTERS - 1, in order. */
static void philox_lanes(uint64_t seed, uint64_t key, uint64_t first, int64_t count,
                         uint16_t *lanes) {
    for (int64_t t = 0; t < count; t++) {
        uint64_t words[4];
        philox(seed, key, first + (uint64_t)t, words);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        memcpy(lanes + 16 * t, words, sizeof words);
#else
        for (int lane = 0; lane < 16; lane++)
            lanes[16 * t + lane] = (uint16_t)(words[lane >> 2] >> (16 * (lane & 3)));
#endif
    }
}

/* Columns of the survivors of one row; -1 where the last, shorter block keeps nothing. */
VECTORS static void row_columns(const support *s, int64_t row, int64_t slots,
                                int64_t *restrict column) {
    const int64_t block = s->block, columns = s->columns;
    if (block == 1) {
        for (int64_t j = 0; j < slots; j++) column[j] = j;
        return;
    }
    uint64_t counter = (uint64_t)(row * ((slots + 15) / 16));
    uint16_t lanes[16 * COUNTERS];
    for (int64_t first = 0; first < slots; first += 16 * COUNTERS, counter += COUNTERS) {
        int64_t count = slots - first < 16 * COUNTERS ? slots - first : 16 * COUNTERS;
        philox_lanes(s->seed, s->key, counter, (count + 15) / 16, lanes);
        int64_t start = first * block;
        for (int64_t j = 0; j < count; j++, start += block)
            column[first + j] = start + (int64_t)((lanes[j] * (uint32_t)block) >> 16);
    }
    if (column[slots - 1] >= columns) column[slots - 1] = -1;
}

#endif
