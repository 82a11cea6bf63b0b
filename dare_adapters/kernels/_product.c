/* y += x Δᵀ on a processor: the survivors of a row are decoded once, and each is multiplied with up
 * to 64 tokens that lie side by side. Sums are float32, rounded once.
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
} decoded;

/* The part of each row that is asked for: columns low … high - 1. */
typedef struct {
    int64_t low, high;
    int64_t width;                      /* the most entries that a row has */
    int64_t offset_bits, first, groups; /* of a blocked delta's slots, in groups of eight */
    int64_t inside, outside;            /* which groups lie within */
    int32_t *block_start;               /* first column of each block, perhaps negative */
} part;

/* A panel is the part of x that rows of a strip are multiplied with before the next. */
enum { ROOM = 16, TOKENS = 64, ROWS = 16, STRIP = 64, PANEL_BYTES = 24 << 10 };

/* Vectors of floats at any address. */
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))
#if defined(__GNUC__) && !defined(__clang__)
#define SCALAR VECTORS __attribute__((optimize("no-tree-vectorize")))
#else
#define SCALAR
#endif

static inline uint32_t little_endian(uint32_t word) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return __builtin_bswap32(word);
#else
    return word;
#endif
}

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- the entries of a row ---- */

/* `groups` times eight numbers of `bits` bits from a byte on. */
#define SMALL_NUMBERS(FROM, BITS, STATEMENT)                                             \
    for (int64_t g = 0; g < groups; g++) {                                               \
        uint32_t packed = 0;                                                             \
        memcpy(&packed, (FROM) + g * (BITS), BITS);                                      \
        words shift = {0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS}; \
        ints number = (ints)((((words){0} + little_endian(packed)) >> shift) & ((1u << BITS) - 1)); \
        STATEMENT;                                                                       \
    }

/* Columns of 8 * groups blocks, whose offsets begin at `from`; each within its block, whatever the
 * tensors hold. */
INLINE void decode_offsets(int64_t block, const uint8_t *from, int64_t groups,
                           const int32_t *restrict start, int32_t *restrict column) {
    int32_t most = (int32_t)block - 1;
#define COLUMN                                                                           \
    ints over = number > most;                                                           \
    *(ints *)(column + 8 * g) = *(const ints *)(start + 8 * g) + ((number & ~over) | (most & over))
    if (block == 1) memcpy(column, start, (size_t)(8 * groups) * sizeof(int32_t));
    else if (block <= 16) SMALL_NUMBERS(from, 4, COLUMN)
    else if (block <= 256)
        for (int64_t i = 0; i < 8 * groups; i++) column[i] = start[i] + (from[i] < most ? from[i] : most);
    else
        for (int64_t i = 0; i < 8 * groups; i++) {
            int32_t number = ((const uint16_t *)from)[i];
            column[i] = start[i] + (number < most ? number : most);
        }
#undef COLUMN
}

/* 8 * groups values that begin at `from`. */
INLINE void decode_values(int64_t bits, int64_t dtype, float scale, const uint8_t *from,
                          int64_t groups, float *restrict value) {
#define VALUE(NUMBER) *(eight *)(value + 8 * g) = __builtin_convertvector(NUMBER, eight) * scale
    if (bits == 8)
        for (int64_t i = 0; i < 8 * groups; i++) value[i] = (float)(from[i] - 128) * scale;
    else if (bits == 4) SMALL_NUMBERS(from, 4, VALUE(number - 8))
    else if (bits == 2) SMALL_NUMBERS(from, 2, VALUE(number - 2))
    else if (bits == 1) SMALL_NUMBERS(from, 1, VALUE(number * 2 - 1))
    else if (dtype == FLOAT32) memcpy(value, from, (size_t)(8 * groups) * sizeof(float));
    else if (dtype == BFLOAT16)
        for (int64_t i = 0; i < 8 * groups; i++)
            value[i] = from_bfloat16(((const uint16_t *)from)[i]);
    else
        for (int64_t i = 0; i < 8 * groups; i++) value[i] = from_half(((const uint16_t *)from)[i]);
#undef VALUE
}

static void prepare(const delta *d, part *p) {
    if (d->kind != BLOCKED) return;
    int64_t block = d->block, eight_blocks = 8 * block;
    p->offset_bits = block == 1 ? 0 : block <= 16 ? 4 : block <= 256 ? 8 : 16;
    p->first = (p->low + d->phase) / eight_blocks;
    int64_t last = (p->high + d->phase + eight_blocks - 1) / eight_blocks;
    p->groups = smaller(last, d->slots / 8) - p->first;
    p->inside = (p->low + d->phase + eight_blocks - 1) / eight_blocks - p->first;
    p->outside = (p->high + d->phase) / eight_blocks - p->first;
    for (int64_t j = 0; j < d->slots; j++) p->block_start[j] = (int32_t)(j * block - d->phase);
}

/* The entries of a row, and perhaps some zeros in column `low`; how many. */
VECTORS static int64_t blocked_row(const delta *d, int64_t row, const part *p, decoded *out) {
    int64_t groups = p->groups;
    if (groups <= 0) return 0;
    int64_t at = row * (d->slots / 8) + p->first;
    decode_offsets(d->block, d->offsets + at * p->offset_bits, groups,
                   p->block_start + 8 * p->first, out->column);
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
    return 8 * groups;
}

/* The same of compressed rows. */
static int64_t compressed_row(const delta *d, int64_t row, const part *p, decoded *out) {
    int64_t first = larger(d->row_starts[row], 0);
    int64_t last = smaller(smaller(d->row_starts[row + 1], d->survivors), first + p->width);
    int64_t kept = 0, mask = ((int64_t)1 << d->bits) - 1;
    int64_t zero = (int64_t)1 << (d->bits - 1);
    float scale = d->bits >= 16 ? 1.0f : d->scales[row];
    for (int64_t i = first; i < last; i++) {
        int64_t column = d->index_bytes == 2 ? ((const uint16_t *)d->column_index)[i]
                                             : ((const int32_t *)d->column_index)[i];
        float value;
        if (d->bits < 16) {
            int64_t bit = i * d->bits;
            int64_t code = ((const uint8_t *)d->values)[bit >> 3] >> (bit & 7) & mask;
            value = (float)(d->bits == 1 ? 2 * code - 1 : code - zero) * scale;
        } else if (d->value_dtype == FLOAT32) {
            value = ((const float *)d->values)[i];
        } else {
            uint16_t half = ((const uint16_t *)d->values)[i];
            value = d->value_dtype == BFLOAT16 ? from_bfloat16(half) : from_half(half);
        }
        out->column[kept] = (int32_t)column;
        out->value[kept] = value;
        kept += (column >= p->low) & (column < p->high);
    }
    return kept;
}

static int64_t decode_row(const delta *d, int64_t row, const part *p, decoded *out) {
    return d->kind == BLOCKED ? blocked_row(d, row, p, out) : compressed_row(d, row, p, out);
}

/* ---- products; `tokens` of them lie side by side: 1, 4, 8, 16, 32 or 64 ---- */

/* Σ value[i] * x[column[i]]; gathering into vectors takes longer than it saves. */
SCALAR static float gather_one(const int32_t *restrict column, const float *restrict value,
                               int64_t count, const float *restrict x) {
    float a = 0, b = 0, c = 0, d = 0; /* apart, so that none waits for another */
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        a += value[i] * x[column[i]];
        b += value[i + 1] * x[column[i + 1]];
        c += value[i + 2] * x[column[i + 2]];
        d += value[i + 3] * x[column[i + 3]];
    }
    for (; i < count; i++) a += value[i] * x[column[i]];
    return (a + b) + (c + d);
}

/* Rows of decoded entries, `stride` apart; row r has found[r] of them. */
typedef struct {
    const int32_t *column;
    const float *value;
    int64_t stride, rows;
    const int64_t *found;
} strip;

/* sum[r * tokens + t] += Σ value[i] * x[column[i] * tokens + t] for i in from … to - 1, all rows r;
 * tokens are 8 * `vectors`. With `entries` of them at once, eight sums are under way: as many as hide
 * how long an addition takes. */
INLINE void gather_vectors(const strip *s, int64_t from, int64_t to, const float *restrict x,
                           float *restrict sum, const int vectors, const int entries) {
    for (int64_t r = 0; r < s->rows; r++, sum += 8 * vectors) {
        const int32_t *restrict column = s->column + r * s->stride;
        const float *restrict value = s->value + r * s->stride;
        int64_t end = smaller(to, s->found[r]), i = from;
        eight sums[8];
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++) sums[v] = v < vectors ? *(eight *)(sum + 8 * v) : (eight){0};
        for (; i + entries <= end; i += entries) {
#pragma GCC unroll 8
            for (int k = 0; k < entries; k++) {
                const float *own = x + (int64_t)column[i + k] * (8 * vectors);
#pragma GCC unroll 8
                for (int v = 0; v < vectors; v++)
                    sums[vectors * k + v] += value[i + k] * *(const eight *)(own + 8 * v);
            }
        }
        for (; i < end; i++) {
            const float *own = x + (int64_t)column[i] * (8 * vectors);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sums[v] += value[i] * *(const eight *)(own + 8 * v);
        }
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
#pragma GCC unroll 8
            for (int k = 1; k < entries; k++) sums[v] += sums[vectors * k + v];
            *(eight *)(sum + 8 * v) = sums[v];
        }
    }
}

/* The same of as many tokens as there are. */
VECTORS static void gather(const strip *s, int64_t from, int64_t to, const float *restrict x,
                           int tokens, float *restrict sum) {
    if (tokens == 64) gather_vectors(s, from, to, x, sum, 8, 1);
    else if (tokens == 32) gather_vectors(s, from, to, x, sum, 4, 2);
    else if (tokens == 16) gather_vectors(s, from, to, x, sum, 2, 4);
    else if (tokens == 8) gather_vectors(s, from, to, x, sum, 1, 8);
    else
        for (int64_t r = 0; r < s->rows; r++) {
            const int32_t *column = s->column + r * s->stride;
            const float *value = s->value + r * s->stride;
            int64_t end = smaller(to, s->found[r]), i = from;
            four sums[4] = {*(four *)(sum + 4 * r)};
            for (; i + 4 <= end; i += 4)
                for (int k = 0; k < 4; k++)
                    sums[k] += value[i + k] * *(const four *)(x + (int64_t)column[i + k] * 4);
            for (; i < end; i++) sums[0] += value[i] * *(const four *)(x + (int64_t)column[i] * 4);
            *(four *)(sum + 4 * r) = (sums[0] + sums[1]) + (sums[2] + sums[3]);
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

#ifdef __clang__
#define MIX(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(16)));
#define MIX(A, B, ...) __builtin_shuffle(A, B, (places){__VA_ARGS__})
#endif

/* Rows of four become columns. */
INLINE void turn(four v[4]) {
    four a = MIX(v[0], v[1], 0, 4, 1, 5), b = MIX(v[2], v[3], 0, 4, 1, 5);
    four c = MIX(v[0], v[1], 2, 6, 3, 7), d = MIX(v[2], v[3], 2, 6, 3, 7);
    v[0] = MIX(a, b, 0, 1, 4, 5);
    v[1] = MIX(a, b, 2, 3, 6, 7);
    v[2] = MIX(c, d, 0, 1, 4, 5);
    v[3] = MIX(c, d, 2, 3, 6, 7);
}

/* Rows `token` of x side by side, float32 (width, tokens); those that are missing are zero. */
VECTORS static void load_tokens(const void *x, int dtype, int64_t stride, const int64_t *token,
                                int64_t count, int tokens, int64_t width, float *restrict out) {
    if (count < tokens) memset(out, 0, (size_t)(width * tokens) * sizeof(float));
    for (int64_t first = 0; first < width; first += ROWS) {
        int64_t n = smaller(width - first, ROWS), t = 0;
        if (dtype == FLOAT32 && n % 4 == 0)
            for (; t + 4 <= count; t += 4)
                for (int64_t k = 0; k < n; k += 4) {
                    four part[4];
                    for (int i = 0; i < 4; i++)
                        part[i] = *(const four *)((const float *)x + token[t + i] * stride + first + k);
                    turn(part);
                    for (int i = 0; i < 4; i++) *(four *)(out + (first + k + i) * tokens + t) = part[i];
                }
        for (; t < count; t++) {
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
    int64_t t = 0;
    if (dtype == FLOAT32 && width % 4 == 0)
        for (; t + 4 <= count; t += 4)
            for (int64_t n = 0; n < width; n += 4) {
                four part[4];
                for (int i = 0; i < 4; i++) part[i] = *(const four *)(sum + (n + i) * tokens + t);
                turn(part);
                for (int i = 0; i < 4; i++) {
                    four *to = (four *)((float *)y + token[t + i] * stride + first + n);
                    *to += weight * part[i];
                }
            }
    for (; t < count; t++) {
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
    return count <= 1 ? 1 : count <= 4 ? 4 : count <= 8 ? 8 : count <= 16 ? 16 : count <= 32 ? 32 : TOKENS;
}

/* Entries of a row that one panel of x holds, where all rows have their entries in the same blocks. */
static int64_t panel_of(const delta *d, int tokens, int64_t width) {
    if (d->kind != BLOCKED) return larger(width, 1);
    int64_t bytes_of_eight = 8 * d->block * tokens * (int64_t)sizeof(float);
    int64_t eights = larger(PANEL_BYTES / bytes_of_eight, 1);
    return eights * 8;
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
    int64_t sums = transposed ? (high - low) * most : STRIP * TOKENS;
    int64_t each = width + ROOM, strips = transposed ? 1 : STRIP;
    int64_t floats = (2 * strips + 1) * each + inputs * most + sums + 5 * 16;
    char *memory = malloc((size_t)floats * sizeof(float)), *room = memory;
    if (!memory) return -1;
    decoded out;
    out.column = (int32_t *)aligned(&room, strips * each);
    out.value = aligned(&room, strips * each);
    float *own = aligned(&room, inputs * most), *sum = aligned(&room, sums);
    part p = {.low = transposed ? low : 0, .high = transposed ? high : columns, .width = width};
    p.block_start = (int32_t *)aligned(&room, each);
    int64_t found[STRIP];
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
            if (!prepared) prepare(d, &p);
            prepared = 1;
            int tokens = lanes(n);
            const float *from = own;
            if (tokens == 1 && x_dtype == FLOAT32) from = (const float *)x + token[0] * x_stride;
            else load_tokens(x, x_dtype, x_stride, token, n, tokens, inputs, own);
            if (transposed) {
                memset(sum, 0, (size_t)((high - low) * tokens) * sizeof(float));
                for (int64_t row = 0; row < rows; row++) {
                    int64_t found = decode_row(d, row, &p, &out);
                    scatter(out.column, out.value, found, from + row * tokens, tokens, low, sum);
                }
                add_tokens(sum, high - low, tokens, weight, token, n, y, y_dtype, y_stride, low);
                continue;
            }
            int64_t panel = panel_of(d, tokens, width);
            for (int64_t row = low; row < high; row += STRIP) {
                strip all = {out.column, out.value, each, smaller(high - row, STRIP), found};
                for (int64_t r = 0; r < all.rows; r++) {
                    decoded own_row = {out.column + r * each, out.value + r * each};
                    found[r] = decode_row(d, row + r, &p, &own_row);
                    if (tokens == 1) sum[r] = gather_one(own_row.column, own_row.value, found[r], from);
                }
                if (tokens > 1) {
                    memset(sum, 0, (size_t)(all.rows * tokens) * sizeof(float));
                    for (int64_t first = 0; first < width; first += panel)
                        gather(&all, first, first + panel, from, tokens, sum);
                }
                add_tokens(sum, all.rows, tokens, weight, token, n, y, y_dtype, y_stride, row);
            }
        }
    }
    free(memory);
    return 0;
}
