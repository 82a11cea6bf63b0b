/* Packed deltas as they lie in memory, and their rows decoded: groups of eight entries, each a column
 * and a float. blocked.py and compressed_rows.py say what the tensors hold. */

#ifndef DARE_PACKED_ROWS_H
#define DARE_PACKED_ROWS_H

#include "_floats.h"

enum { NO_DELTA, BLOCKED, COMPRESSED_ROWS };

typedef struct {
    int64_t kind, rows, columns, bits;
    int64_t value_dtype;                /* of floats */
    int64_t block, slots, phase;        /* blocked */
    int64_t survivors, index_bytes;     /* compressed rows */
    const uint8_t *offsets;
    const int64_t *row_starts;
    const void *column_index;
    const void *values;
    const float *scales;
} delta;

/* Entries of one row, decoded, in groups of eight. */
typedef struct {
    int32_t *column;
    float *value;
} decoded;

/* The part of each row that is asked for: columns low … high - 1. */
typedef struct {
    int64_t low, high;
    int64_t width;                      /* the most entries that a row has */
    int64_t offset_bits, first, groups; /* of a blocked delta's slots, in groups of eight */
    int64_t inside, outside;            /* which groups lie within */
    int32_t *start;                     /* first column of each block, perhaps negative */
} part;

/* Vectors of floats at any address. */
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(8), aligned(1), may_alias));
typedef uint16_t halves __attribute__((vector_size(16), aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* The first `count` bytes, the first one lowest. */
INLINE uint64_t little_endian(const uint8_t *from, const size_t count) {
    uint64_t word = 0;
    memcpy(&word, from, count);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

/* Eight numbers of `bits` bits, the first one lowest. */
INLINE ints small_numbers(uint32_t packed, const uint32_t bits) {
    words shift = {0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits};
    return (ints)((((words){0} + packed) >> shift) & ((1u << bits) - 1));
}

/* What eight codes mean: those of fewer than 8 bits packed, those of 8 in bytes. */
INLINE eight floats_of(ints number, const int64_t bits, float scale) {
    ints meant = bits == 1 ? number * 2 - 1 : number - (1 << (bits - 1));
    return __builtin_convertvector(meant, eight) * scale;
}

/* The part of the rows of one delta that lies in columns low … high - 1; `start` has room for as many
 * as a row of it has slots. */
static part part_of(const delta *d, int64_t low, int64_t high, int64_t width, int32_t *start) {
    part p = {.low = low, .high = high, .width = width, .start = start};
    if (d->kind != BLOCKED) return p;
    int64_t eights = 8 * d->block;
    p.offset_bits = d->block == 1 ? 0 : d->block <= 16 ? 4 : d->block <= 256 ? 8 : 16;
    p.first = (low + d->phase) / eights;
    p.groups = smaller((high + d->phase + eights - 1) / eights, d->slots / 8) - p.first;
    p.inside = (low + d->phase + eights - 1) / eights - p.first;
    p.outside = (high + d->phase) / eights - p.first;
    int64_t first = p.first * eights - d->phase;
    for (int64_t j = 0; j < 8 * p.groups; j++) start[j] = (int32_t)(first + j * d->block);
    return p;
}

/* Columns of 8 * groups blocks that begin at columns `start`, and whose offsets begin at `from`; each
 * within its block, whatever the tensors hold. */
INLINE void decode_offsets(int64_t block, const uint8_t *from, int64_t groups,
                           const int32_t *restrict start, int32_t *restrict column) {
    int32_t most = (int32_t)block - 1;
    if (block == 1) memcpy(column, start, (size_t)(8 * groups) * sizeof(int32_t));
    else if (block <= 16)
        for (int64_t g = 0; g < groups; g++) {
            ints number = small_numbers((uint32_t)little_endian(from + 4 * g, 4), 4);
            ints over = number > most, first = *(const ints *)(start + 8 * g);
            *(ints *)(column + 8 * g) = first + ((number & ~over) | (most & over));
        }
    else if (block <= 256)
        for (int64_t i = 0; i < 8 * groups; i++) column[i] = start[i] + (from[i] < most ? from[i] : most);
    else
        for (int64_t i = 0; i < 8 * groups; i++) {
            int32_t number = ((const uint16_t *)from)[i];
            column[i] = start[i] + (number < most ? number : most);
        }
}

/* 8 * groups values that begin at `from`. */
INLINE void decode_values(int64_t bits, int64_t dtype, float scale, const uint8_t *from,
                          int64_t groups, float *restrict value) {
#define SMALL_CODES(BITS)                                                                      \
    for (int64_t g = 0; g < groups; g++)                                                       \
        *(eight *)(value + 8 * g) = floats_of(                                                 \
            small_numbers((uint32_t)little_endian(from + BITS * g, BITS), BITS), BITS, scale)
    if (bits == 8)
        for (int64_t i = 0; i < 8 * groups; i++) value[i] = (float)(from[i] - 128) * scale;
    else if (bits == 4) SMALL_CODES(4);
    else if (bits == 2) SMALL_CODES(2);
    else if (bits == 1) SMALL_CODES(1);
    else if (dtype == FLOAT32) memcpy(value, from, (size_t)(8 * groups) * sizeof(float));
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < 8 * groups; i++)
            value[i] = from_bfloat16(((const uint16_t *)from)[i]);
    else
        for (int64_t i = 0; i < 8 * groups; i++) value[i] = from_half(((const uint16_t *)from)[i]);
#undef SMALL_CODES
}

/* The entries of a row of a blocked delta, and perhaps some zeros in column `low`; how many groups. */
INLINE int64_t blocked_row(const delta *d, int64_t row, const part *p, const decoded *out) {
    int64_t groups = p->groups;
    if (groups <= 0) return 0;
    int64_t at = row * (d->slots / 8) + p->first;
    decode_offsets(d->block, d->offsets + at * p->offset_bits, groups, p->start, out->column);
    decode_values(d->bits, d->value_dtype, d->bits < 16 ? d->scales[row] : 1.0f,
                  (const uint8_t *)d->values + at * d->bits, groups, out->value);
    for (int64_t g = 0; g < groups; g++) {
        if (g >= p->inside && g < p->outside) g = p->outside;
        if (g >= groups) break;
        ints *column = (ints *)(out->column + 8 * g), *value = (ints *)(out->value + 8 * g);
        ints within = (*column >= (int32_t)p->low) & (*column < (int32_t)p->high);
        *column = (*column & within) | ((int32_t)p->low & ~within);
        *value &= within;
    }
    return groups;
}

/* Values i … i + 7 of compressed rows; `all` of them, and 56 more, exist. */
INLINE eight values_from(const delta *d, int64_t i, float scale, const int all) {
    const uint8_t *values = d->values;
    if (d->bits >= 16) {
        if (all && d->value_dtype == FLOAT32) return *(const eight *)(values + 4 * i);
        if (all && d->value_dtype == BFLOAT16)
            return (eight)(__builtin_convertvector(*(const halves *)(values + 2 * i), words) << 16);
        eight made = {0};
        for (int64_t k = 0; k < (all ? 8 : smaller(d->survivors - i, 8)); k++)
            made[k] = read_float(values, i + k, (int)d->value_dtype);
        return made;
    }
    int64_t bit = i * d->bits, first = bit >> 3; /* a row may begin within a byte */
    uint8_t end[8] = {0};
    const uint8_t *from = values + first;
    if (!all) {
        int64_t there = (d->survivors * d->bits + 7) / 8 - first;
        from = memcpy(end, from, (size_t)smaller(there, 8));
    }
    uint64_t packed = little_endian(from, 8) >> (bit & 7);
    uint32_t low = (uint32_t)packed, high = (uint32_t)(packed >> 32);
    words in_bytes = {low, low, low, low, high, high, high, high};
    words shift = {0, 8, 16, 24, 0, 8, 16, 24};
    return d->bits == 4   ? floats_of(small_numbers(low, 4), 4, scale)
           : d->bits == 2 ? floats_of(small_numbers(low, 2), 2, scale)
           : d->bits == 1 ? floats_of(small_numbers(low, 1), 1, scale)
                          : floats_of((ints)(in_bytes >> shift & 255), 8, scale);
}

/* Columns i … i + 7 of compressed rows, likewise. */
INLINE ints columns_from(const delta *d, int64_t i, const int all) {
    const uint16_t *narrow = (const uint16_t *)d->column_index + i;
    const int32_t *wide = (const int32_t *)d->column_index + i;
    if (all)
        return d->index_bytes == 2 ? __builtin_convertvector(*(const halves *)narrow, ints)
                                   : *(const ints *)wide;
    ints made = {0};
    for (int64_t k = 0; k < smaller(d->survivors - i, 8); k++)
        made[k] = d->index_bytes == 2 ? narrow[k] : wide[k];
    return made;
}

/* The same of compressed rows. */
INLINE int64_t compressed_row(const delta *d, int64_t row, const part *p, const decoded *out) {
    int64_t first = larger(d->row_starts[row], 0);
    int64_t last = smaller(smaller(d->row_starts[row + 1], d->survivors), first + p->width);
    float scale = d->bits >= 16 ? 1.0f : d->scales[row];
    int64_t g = 0;
    for (int64_t i = first; i < last; i += 8, g++) {
        int all = i + 64 <= d->survivors;
        ints column = all ? columns_from(d, i, 1) : columns_from(d, i, 0);
        ints value = (ints)(all ? values_from(d, i, scale, 1) : values_from(d, i, scale, 0));
        ints within = (column >= (int32_t)p->low) & (column < (int32_t)p->high);
        if (i + 8 > last) within &= (ints){0, 1, 2, 3, 4, 5, 6, 7} < (int32_t)(last - i);
        *(ints *)(out->column + 8 * g) = (column & within) | ((int32_t)p->low & ~within);
        *(ints *)(out->value + 8 * g) = value & within;
    }
    return g;
}

/* Rows row … row + count - 1, `stride` entries apart; and how many groups each has. */
VECTORS static void decode_rows(const delta *d, int64_t row, int64_t count, const part *p,
                                const decoded *out, int64_t stride, int64_t *groups) {
    for (int64_t r = 0; r < count; r++) {
        decoded to = {out->column + r * stride, out->value + r * stride};
        groups[r] = d->kind == BLOCKED ? blocked_row(d, row + r, p, &to)
                                       : compressed_row(d, row + r, p, &to);
    }
}

#endif
