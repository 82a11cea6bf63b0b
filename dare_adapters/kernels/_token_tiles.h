/* Tokens side by side, in float32: into tiles before a product, and added to y after it. */

#ifndef DARE_TOKEN_TILES_H
#define DARE_TOKEN_TILES_H

#include "_packed_rows.h"

/* Columns of a tile that are written before the next: two cache lines of a token. */
enum { AT_ONCE = 32 };

/* Some rows of x or y, in order. */
typedef struct {
    const int64_t *token;
    int64_t count, width; /* tokens; what lies side by side, and is at least as much */
} tile;

#ifdef __clang__
#define MIX(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(16)));
#define MIX(A, B, ...) __builtin_shuffle(A, B, (places){__VA_ARGS__})
#endif

typedef uint32_t four_words __attribute__((vector_size(16)));
typedef uint16_t four_halves __attribute__((vector_size(8), aligned(1), may_alias));

/* Rows of four become columns. */
INLINE void turn(four v[4]) {
    four a = MIX(v[0], v[1], 0, 4, 1, 5), b = MIX(v[2], v[3], 0, 4, 1, 5);
    four c = MIX(v[0], v[1], 2, 6, 3, 7), d = MIX(v[2], v[3], 2, 6, 3, 7);
    v[0] = MIX(a, b, 0, 1, 4, 5);
    v[1] = MIX(a, b, 2, 3, 6, 7);
    v[2] = MIX(c, d, 0, 1, 4, 5);
    v[3] = MIX(c, d, 2, 3, 6, 7);
}

INLINE four read_four(const void *x, int64_t at, const int dtype) {
    if (dtype == FLOAT32) return *(const four *)((const float *)x + at);
    const uint16_t *from = (const uint16_t *)x + at;
    if (dtype == BFLOAT16)
        return (four)(__builtin_convertvector(*(const four_halves *)from, four_words) << 16);
    return (four){from_half(from[0]), from_half(from[1]), from_half(from[2]), from_half(from[3])};
}

INLINE void write_float(void *y, int64_t at, float value, const int dtype) {
    if (dtype == FLOAT32) ((float *)y)[at] = value;
    else ((uint16_t *)y)[at] = dtype == BFLOAT16 ? to_bfloat16(value) : to_half(value);
}

INLINE void load_as(const void *x, const int dtype, int64_t stride, const tile *of, int64_t columns,
                    float *restrict out) {
    for (int64_t first = 0; first < columns; first += AT_ONCE) {
        int64_t n = smaller(columns - first, AT_ONCE), fours = n / 4 * 4, t = 0;
        for (; t + 4 <= of->count; t += 4) {
            int64_t from[4];
            for (int i = 0; i < 4; i++) from[i] = of->token[t + i] * stride + first;
            for (int64_t k = 0; k < fours; k += 4) {
                four v[4];
                for (int i = 0; i < 4; i++) v[i] = read_four(x, from[i] + k, dtype);
                turn(v);
                for (int i = 0; i < 4; i++) *(four *)(out + (first + k + i) * of->width + t) = v[i];
            }
            for (int64_t k = fours; k < n; k++)
                for (int i = 0; i < 4; i++)
                    out[(first + k) * of->width + t + i] = read_float(x, from[i] + k, dtype);
        }
        for (; t < of->count; t++)
            for (int64_t k = 0; k < n; k++)
                out[(first + k) * of->width + t] =
                    read_float(x, of->token[t] * stride + first + k, dtype);
    }
}

/* Tokens of x side by side, float32 (columns, width); those that are missing are zero. */
VECTORS static void load_tile(const void *x, int dtype, int64_t stride, const tile *of,
                              int64_t columns, float *restrict out) {
    if (of->count < of->width) memset(out, 0, (size_t)(columns * of->width) * sizeof(float));
    if (dtype == FLOAT32) load_as(x, FLOAT32, stride, of, columns, out);
    else if (dtype == BFLOAT16) load_as(x, BFLOAT16, stride, of, columns, out);
    else load_as(x, FLOAT16, stride, of, columns, out);
}

INLINE void add_as(const float *restrict sum, int64_t columns, float weight, const tile *of, void *y,
                   const int dtype, int64_t stride, int64_t first) {
    int64_t t = 0, fours = columns / 4 * 4;
    for (; t + 4 <= of->count; t += 4) {
        int64_t to[4];
        for (int i = 0; i < 4; i++) to[i] = of->token[t + i] * stride + first;
        for (int64_t n = 0; n < fours; n += 4) {
            four v[4];
            for (int i = 0; i < 4; i++) v[i] = *(const four *)(sum + (n + i) * of->width + t);
            turn(v);
            for (int i = 0; i < 4; i++) {
                four made = read_four(y, to[i] + n, dtype) + weight * v[i];
                if (dtype == FLOAT32) *(four *)((float *)y + to[i] + n) = made;
                else
                    for (int k = 0; k < 4; k++) write_float(y, to[i] + n + k, made[k], dtype);
            }
        }
        for (int64_t n = fours; n < columns; n++)
            for (int i = 0; i < 4; i++)
                write_float(y, to[i] + n, read_float(y, to[i] + n, dtype) +
                            weight * sum[n * of->width + t + i], dtype);
    }
    for (; t < of->count; t++) {
        int64_t to = of->token[t] * stride + first;
        for (int64_t n = 0; n < columns; n++)
            write_float(y, to + n, read_float(y, to + n, dtype) + weight * sum[n * of->width + t],
                        dtype);
    }
}

/* y[token[t], first + n] += weight * sum[n, t] for n < columns, of sums (columns, width). */
VECTORS static void add_tile(const float *restrict sum, int64_t columns, float weight, const tile *of,
                             void *y, int dtype, int64_t stride, int64_t first) {
    if (dtype == FLOAT32) add_as(sum, columns, weight, of, y, FLOAT32, stride, first);
    else if (dtype == BFLOAT16) add_as(sum, columns, weight, of, y, BFLOAT16, stride, first);
    else add_as(sum, columns, weight, of, y, FLOAT16, stride, first);
}

#endif
