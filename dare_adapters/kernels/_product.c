/* y += x Δᵀ on a processor: the survivors of a row are decoded once, and each is multiplied with up
 * to 32 tokens that lie side by side. Sums are float32, rounded once.
 * Compiled where there is a compiler (see setup.py) and called through ctypes by
 * compiled_product.py. */

#include <stdlib.h>

#include "_floats.h"

enum { NO_DELTA, BLOCKED, COMPRESSED_ROWS };

/* A packed delta, as blocked.py and compressed_rows.py describe it. */
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

/* Some entries of one row, decoded; there is room for ROOM more than a row's slots. */
typedef struct {
    int32_t *column;
    float *value;
    int32_t *block_start;               /* first column of each block, perhaps negative */
} decoded;

enum { ROOM = 16, TOKENS = 32, ROWS = 16 };

/* Vectors of floats at any address. */
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- the entries of a row ---- */

/* `count` codes from a byte on, times the scale; up to seven more are written. */
INLINE void decode_codes(const uint8_t *restrict codes, int64_t count, int bits, float scale,
                         float *restrict value) {
    int64_t bytes = (count * bits + 7) / 8;
    if (bits == 8)
        for (int64_t i = 0; i < bytes; i++) value[i] = (float)(codes[i] - 128) * scale;
    else if (bits == 4)
        for (int64_t i = 0; i < bytes; i++)
            for (int k = 0; k < 2; k++)
                value[2 * i + k] = (float)(((codes[i] >> (4 * k)) & 15) - 8) * scale;
    else if (bits == 2)
        for (int64_t i = 0; i < bytes; i++)
            for (int k = 0; k < 4; k++)
                value[4 * i + k] = (float)(((codes[i] >> (2 * k)) & 3) - 2) * scale;
    else
        for (int64_t i = 0; i < bytes; i++)
            for (int k = 0; k < 8; k++)
                value[8 * i + k] = (float)(2 * ((codes[i] >> k) & 1) - 1) * scale;
}

INLINE void decode_floats(const void *values, int64_t first, int64_t count, int64_t dtype,
                          float *restrict value) {
    if (dtype == FLOAT32) {
        memcpy(value, (const float *)values + first, (size_t)count * sizeof(float));
    } else if (dtype == BFLOAT16) {
        const uint16_t *from = (const uint16_t *)values + first;
        for (int64_t i = 0; i < count; i++) value[i] = from_bfloat16(from[i]);
    } else {
        const uint16_t *from = (const uint16_t *)values + first;
        for (int64_t i = 0; i < count; i++) value[i] = from_half(from[i]);
    }
}

INLINE void decode_offsets(const delta *d, int64_t row, int64_t first, int64_t count,
                           const int32_t *restrict start, int32_t *restrict column) {
    if (d->block == 1) {
        for (int64_t i = 0; i < count; i++) column[i] = start[i];
    } else if (d->block <= 16) {
        const uint8_t *offset = d->offsets + row * ((d->slots + 1) / 2) + first / 2;
        for (int64_t i = 0; i < (count + 1) / 2; i++)
            for (int k = 0; k < 2; k++)
                column[2 * i + k] = start[2 * i + k] + ((offset[i] >> (4 * k)) & 15);
    } else if (d->block <= 256) {
        const uint8_t *offset = d->offsets + row * d->slots + first;
        for (int64_t i = 0; i < count; i++) column[i] = start[i] + offset[i];
    } else {
        const uint16_t *offset = (const uint16_t *)d->offsets + row * d->slots + first;
        for (int64_t i = 0; i < count; i++) column[i] = start[i] + offset[i];
    }
}

/* The entries of a row in columns low … high - 1: `*begin` is where they begin; where they end.
 * No column outside is ever given, whatever the tensors hold. */
VECTORS static int64_t blocked_row(const delta *d, int64_t row, int64_t low, int64_t high,
                                   decoded *out, int64_t *begin) {
    /* Eight blocks begin a byte at all bits. */
    int64_t first = (low + d->phase) / d->block / 8 * 8;
    int64_t last = smaller((high + d->phase + d->block - 1) / d->block, d->slots);
    int64_t count = last - first;
    *begin = 0;
    if (count <= 0) return 0;
    int32_t *column = out->column;
    float *value = out->value;
    decode_offsets(d, row, first, count, out->block_start + first, column);
    if (d->bits >= 16) {
        decode_floats(d->values, row * d->slots + first, count, d->value_dtype, value);
    } else {
        int64_t row_bytes = (d->slots * d->bits + 7) / 8;
        const uint8_t *codes = (const uint8_t *)d->values + row * row_bytes + first * d->bits / 8;
        decode_codes(codes, count, (int)d->bits, d->scales[row], value);
    }
    /* Only blocks that do not lie within for every offset that can be stored need a look. */
    int64_t most = d->block == 1 ? 0 : d->block <= 16 ? 15 : d->block <= 256 ? 255 : 65535;
    int64_t head = (low + d->phase + d->block - 1) / d->block - first;
    int64_t tail = larger((high - 1 - most + d->phase) / d->block + 1 - first, 0);
    if (high - 1 - most + d->phase < 0) tail = 0;
    head = smaller(head, count);
    tail = larger(smaller(tail, count), head);
    int64_t from = head, to = tail;
    for (int64_t i = head - 1; i >= 0; i--)
        if (column[i] >= low && column[i] < high) {
            from--;
            column[from] = column[i];
            value[from] = value[i];
        }
    for (int64_t i = tail; i < count; i++)
        if (column[i] >= low && column[i] < high) {
            column[to] = column[i];
            value[to] = value[i];
            to++;
        }
    *begin = from;
    return to;
}

static int64_t compressed_row(const delta *d, int64_t row, int64_t low, int64_t high,
                              decoded *out, int64_t width, int64_t *begin) {
    int64_t first = larger(d->row_starts[row], 0);
    int64_t last = smaller(smaller(d->row_starts[row + 1], d->survivors), first + width);
    int64_t kept = 0;
    float scale = d->bits >= 16 ? 1.0f : d->scales[row];
    int64_t zero = d->bits == 1 ? 0 : (int64_t)1 << (d->bits - 1), mask = ((int64_t)1 << d->bits) - 1;
    for (int64_t i = first; i < last; i++) {
        int64_t column = d->index_bytes == 2 ? ((const uint16_t *)d->column_index)[i]
                                             : ((const int32_t *)d->column_index)[i];
        float value;
        if (d->bits >= 16) {
            decode_floats(d->values, i, 1, d->value_dtype, &value);
        } else {
            int64_t bit = i * d->bits;
            int64_t code = ((const uint8_t *)d->values)[bit >> 3] >> (bit & 7) & mask;
            value = (float)(d->bits == 1 ? 2 * code - 1 : code - zero) * scale;
        }
        out->column[kept] = (int32_t)column;
        out->value[kept] = value;
        kept += (column >= low) & (column < high);
    }
    *begin = 0;
    return kept;
}

static int64_t decode_row(const delta *d, int64_t row, int64_t low, int64_t high, decoded *out,
                          int64_t width, int64_t *begin) {
    return d->kind == BLOCKED ? blocked_row(d, row, low, high, out, begin)
                              : compressed_row(d, row, low, high, out, width, begin);
}

/* ---- products; `tokens` of them lie side by side: 1, 4, 8, 16 or 32 ---- */

/* sum[t] = Σ value[i] * x[column[i] * tokens + t] */
VECTORS static void gather(const int32_t *restrict column, const float *restrict value,
                           int64_t count, const float *restrict x, int tokens,
                           float *restrict sum) {
    int64_t i = 0;
    if (tokens == 1) {
        float sums[8] = {0}; /* apart, so that none waits for another */
        for (; i + 8 <= count; i += 8)
            for (int k = 0; k < 8; k++) sums[k] += value[i + k] * x[column[i + k]];
        for (; i < count; i++) sums[0] += value[i] * x[column[i]];
        sum[0] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                 ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    } else if (tokens == 4) {
        four sums[4] = {{0}};
        for (; i + 4 <= count; i += 4)
            for (int k = 0; k < 4; k++)
                sums[k] += value[i + k] * *(const four *)(x + (int64_t)column[i + k] * 4);
        for (; i < count; i++) sums[0] += value[i] * *(const four *)(x + (int64_t)column[i] * 4);
        *(four *)sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    } else if (tokens == 8) {
        eight sums[4] = {{0}};
        for (; i + 4 <= count; i += 4)
            for (int k = 0; k < 4; k++)
                sums[k] += value[i + k] * *(const eight *)(x + (int64_t)column[i + k] * 8);
        for (; i < count; i++) sums[0] += value[i] * *(const eight *)(x + (int64_t)column[i] * 8);
        *(eight *)sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    } else if (tokens == 16) {
        eight a = {0}, b = {0}, c = {0}, d = {0};
        for (; i + 2 <= count; i += 2) {
            const float *one = x + (int64_t)column[i] * 16, *two = x + (int64_t)column[i + 1] * 16;
            a += value[i] * *(const eight *)one;
            b += value[i] * *(const eight *)(one + 8);
            c += value[i + 1] * *(const eight *)two;
            d += value[i + 1] * *(const eight *)(two + 8);
        }
        if (i < count) {
            a += value[i] * *(const eight *)(x + (int64_t)column[i] * 16);
            b += value[i] * *(const eight *)(x + (int64_t)column[i] * 16 + 8);
        }
        *(eight *)sum = a + c;
        *(eight *)(sum + 8) = b + d;
    } else {
        eight a = {0}, b = {0}, c = {0}, d = {0};
        for (; i < count; i++) {
            const float *one = x + (int64_t)column[i] * 32;
            a += value[i] * *(const eight *)one;
            b += value[i] * *(const eight *)(one + 8);
            c += value[i] * *(const eight *)(one + 16);
            d += value[i] * *(const eight *)(one + 24);
        }
        *(eight *)sum = a;
        *(eight *)(sum + 8) = b;
        *(eight *)(sum + 16) = c;
        *(eight *)(sum + 24) = d;
    }
}

/* sum[(column[i] - low) * tokens + t] += value[i] * x[t]; no column comes twice. */
VECTORS static void scatter(const int32_t *restrict column, const float *restrict value,
                            int64_t count, const float *restrict x, int tokens, int64_t low,
                            float *restrict sum) {
    if (tokens == 1) {
        for (int64_t i = 0; i < count; i++) sum[column[i] - low] += value[i] * x[0];
    } else if (tokens == 4) {
        four own = *(const four *)x;
        for (int64_t i = 0; i < count; i++) {
            four *place = (four *)(sum + (column[i] - low) * 4);
            *place += value[i] * own;
        }
    } else {
        for (int first = 0; first < tokens; first += 8) {
            eight own = *(const eight *)(x + first);
            for (int64_t i = 0; i < count; i++) {
                eight *place = (eight *)(sum + (column[i] - low) * tokens + first);
                *place += value[i] * own;
            }
        }
    }
}

/* ---- tokens in and out ---- */

/* Rows `token` of x side by side, float32 (width, tokens); those that are missing are zero. */
VECTORS static void load_tokens(const void *x, int dtype, int64_t stride, const int64_t *token,
                                int64_t count, int tokens, int64_t width, float *restrict out) {
    if (count < tokens) memset(out, 0, (size_t)(width * tokens) * sizeof(float));
    for (int64_t first = 0; first < width; first += ROWS) {
        int64_t n = smaller(width - first, ROWS);
        for (int64_t t = 0; t < count; t++) {
            float *restrict to = out + first * tokens + t;
            int64_t from = token[t] * stride + first;
            if (dtype == FLOAT32)
                for (int64_t k = 0; k < n; k++) to[k * tokens] = ((const float *)x)[from + k];
            else if (dtype == BFLOAT16)
                for (int64_t k = 0; k < n; k++)
                    to[k * tokens] = from_bfloat16(((const uint16_t *)x)[from + k]);
            else
                for (int64_t k = 0; k < n; k++)
                    to[k * tokens] = from_half(((const uint16_t *)x)[from + k]);
        }
    }
}

/* y[token[t], first + n] += weight * sum[n * tokens + t] for n < width. */
VECTORS static void add_tokens(const float *restrict sum, int64_t width, int tokens, float weight,
                               const int64_t *token, int64_t count, void *y, int dtype,
                               int64_t stride, int64_t first) {
    for (int64_t t = 0; t < count; t++) {
        int64_t at = token[t] * stride + first;
        if (dtype == FLOAT32) {
            float *to = (float *)y + at;
            for (int64_t n = 0; n < width; n++) to[n] += weight * sum[n * tokens + t];
        } else if (dtype == BFLOAT16) {
            uint16_t *to = (uint16_t *)y + at;
            for (int64_t n = 0; n < width; n++)
                to[n] = to_bfloat16(from_bfloat16(to[n]) + weight * sum[n * tokens + t]);
        } else {
            uint16_t *to = (uint16_t *)y + at;
            for (int64_t n = 0; n < width; n++)
                to[n] = to_half(from_half(to[n]) + weight * sum[n * tokens + t]);
        }
    }
}

/* ---- all of it ---- */

static float *aligned(char **room, int64_t floats) {
    uintptr_t at = ((uintptr_t)*room + 63) / 64 * 64;
    *room = (char *)at + floats * (int64_t)sizeof(float);
    return (float *)at;
}

static int lanes(int64_t count) {
    return count <= 1 ? 1 : count <= 4 ? 4 : count <= 8 ? 8 : count <= 16 ? 16 : TOKENS;
}

/* For every token t whose slot s has a delta: y[t] += weights[s] * x[t] Δᵀ, or x[t] Δ where
 * transposed, of the outputs low … high - 1 alone. All deltas are (rows, columns); `width` is the
 * most entries that a row of any has, `weights` may be NULL. -1 where there is no memory. */
EXPORT int dare_add_products(const delta *deltas, int64_t count, const float *weights,
                             const int64_t *token_slot, int64_t total, int64_t rows,
                             int64_t columns, int64_t width, const void *x, int x_dtype,
                             int64_t x_stride, void *y, int y_dtype, int64_t y_stride,
                             int transposed, int64_t low, int64_t high) {
    int64_t inputs = transposed ? rows : columns, most = lanes(smaller(total, TOKENS));
    int64_t sums = transposed ? (high - low) * most : ROWS * TOKENS;
    int64_t floats = 3 * (width + ROOM) + inputs * most + sums + 5 * 16;
    char *memory = malloc((size_t)floats * sizeof(float)), *room = memory;
    if (!memory) return -1;
    decoded out;
    out.column = (int32_t *)aligned(&room, width + ROOM);
    out.block_start = (int32_t *)aligned(&room, width + ROOM);
    out.value = aligned(&room, width + ROOM);
    float *own = aligned(&room, inputs * most), *sum = aligned(&room, sums);
    for (int64_t slot = 0; slot < count; slot++) {
        const delta *d = deltas + slot;
        if (d->kind == NO_DELTA) continue;
        int64_t next = 0;
        int prepared = 0;
        float weight = weights ? weights[slot] : 1.0f;
        for (;;) {
            int64_t token[TOKENS], n = 0;
            for (; next < total && n < TOKENS; next++)
                if (token_slot[next] == slot) token[n++] = next;
            if (!n) break;
            if (!prepared && d->kind == BLOCKED)
                for (int64_t j = 0; j < d->slots + ROOM; j++)
                    out.block_start[j] = (int32_t)(j * d->block - d->phase);
            prepared = 1;
            int tokens = lanes(n);
            const float *from = own;
            if (tokens == 1 && x_dtype == FLOAT32) from = (const float *)x + token[0] * x_stride;
            else load_tokens(x, x_dtype, x_stride, token, n, tokens, inputs, own);
            int64_t begin, end;
            if (transposed) {
                memset(sum, 0, (size_t)((high - low) * tokens) * sizeof(float));
                for (int64_t row = 0; row < rows; row++) {
                    end = decode_row(d, row, low, high, &out, width, &begin);
                    scatter(out.column + begin, out.value + begin, end - begin,
                            from + row * tokens, tokens, low, sum);
                }
                add_tokens(sum, high - low, tokens, weight, token, n, y, y_dtype, y_stride, low);
                continue;
            }
            for (int64_t row = low; row < high; row += ROWS) {
                int64_t strip = smaller(high - row, ROWS);
                for (int64_t r = 0; r < strip; r++) {
                    end = decode_row(d, row + r, 0, columns, &out, width, &begin);
                    gather(out.column + begin, out.value + begin, end - begin, from, tokens,
                           sum + r * tokens);
                }
                add_tokens(sum, strip, tokens, weight, token, n, y, y_dtype, y_stride, row);
            }
        }
    }
    free(memory);
    return 0;
}
