/* Rows to packed codes and a scale each: codec.py, bit for bit. Every sum is made in sixteen lanes,
 * entry j in lane j mod 16, which are then added in halves: one order on every machine. */

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "_support.h"

enum { LANES = 16 };

static inline float folded(float *lanes) {
    for (int k = 0; k < 8; k++) lanes[k] += lanes[k + 8];
    for (int k = 0; k < 4; k++) lanes[k] += lanes[k + 4];
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

/* Σv² and the largest |v| of `groups` times sixteen numbers. */
VECTORS static float squares_of(const float *restrict values, int64_t groups, float *largest) {
    float squares[LANES] = {0};
    uint32_t most[LANES] = {0}, all = 0; /* magnitudes are in the order of their bits */
    for (int64_t i = 0; i < groups; i++)
        for (int k = 0; k < LANES; k++) {
            float value = values[LANES * i + k];
            uint32_t size = as_bits(value) & 0x7FFFFFFF;
            squares[k] += value * value;
            most[k] = size > most[k] ? size : most[k];
        }
    for (int k = 0; k < LANES; k++) all = most[k] > all ? most[k] : all;
    *largest = as_float(all);
    return folded(squares);
}

/* Codes ±1, and Σ|v|. A zero has no sign: they alternate. */
VECTORS static float sign_row(const float *restrict values, int64_t groups,
                              float *restrict codes) {
    float sizes[LANES] = {0};
    for (int64_t i = 0; i < groups; i++)
        for (int k = 0; k < LANES; k++) {
            float value = values[LANES * i + k];
            int minus = (value < 0) | ((k % 2) & (value == 0));
            sizes[k] += as_float(as_bits(value) & 0x7FFFFFFF);
            codes[LANES * i + k] = minus ? -1.0f : 1.0f;
        }
    return folded(sizes);
}

/* Σ(v - scale * q)². */
VECTORS static float squared_error(const float *restrict values, const float *restrict codes,
                                   int64_t groups, float scale) {
    float errors[LANES] = {0};
    for (int64_t i = 0; i < groups; i++)
        for (int k = 0; k < LANES; k++) {
            float error = values[LANES * i + k] - scale * codes[LANES * i + k];
            errors[k] += error * error;
        }
    return folded(errors);
}

/* Codes q = round(v * inverse) within ±limit, <v,q> and <q,q>. */
VECTORS static void round_row(const float *restrict values, int64_t groups, float inverse,
                              float limit, float *restrict codes, float *overlap, float *energy) {
    const float whole = 12582912.0f; /* 1.5 * 2^23: a sum with it has no digits after the point */
    float overlaps[LANES] = {0}, energies[LANES] = {0};
    for (int64_t i = 0; i < groups; i++)
        for (int k = 0; k < LANES; k++) {
            float value = values[LANES * i + k], code = value * inverse;
            code = code < -limit ? -limit : code;
            code = code > limit ? limit : code;
            code = (code + whole) - whole;
            codes[LANES * i + k] = code;
            overlaps[k] += value * code;
            energies[k] += code * code;
        }
    *overlap = folded(overlaps);
    *energy = folded(energies);
}

static float inverse_of(float scale) {
    float inverse = scale > 0 ? 1 / scale : 0;
    return inverse > FLT_MAX ? FLT_MAX : inverse;
}

/* scales.round_scales. */
static float stored_scale(float scale, int bits) {
    static const float steps[8] = {2048, 1878, 1722, 1579, 1448, 1328, 1218, 1117};
    static const float between[8] = {0.5221368912137069f, 0.5693943173783458f, 0.620928906036742f,
                                     0.6771277734684463f, 0.7384130729697497f, 0.8052451659746271f,
                                     0.8781260801866497f, 0.9576032806985737f}; /* 2^-(i + 1/2)/8 */
    int exponent;
    if (!(scale > 0) || scale > FLT_MAX) return scale;
    float mantissa = frexpf(scale, &exponent), rounded;
    if (bits == 8 || bits == 1) {
        rounded = rintf(mantissa * 2048) / 2048;
    } else {
        int step = 8;
        for (int k = 0; k < 8; k++) step -= between[k] <= mantissa;
        rounded = steps[step % 8] / 2048;
        exponent -= step / 8;
    }
    return exponent > 127 ? rounded * INFINITY : ldexpf(rounded, exponent);
}

/* One row of `slots` numbers, of which `used` count; `values` and `codes` have room for a multiple
 * of sixteen, and values beyond the row are 0. */
static void quantise(const float *values, int64_t slots, int64_t used, int bits, float *codes,
                     float *scale, float *signal, float *rounding) {
    int64_t groups = (slots + LANES - 1) / LANES;
    float largest, overlap, energy;
    *signal = squares_of(values, groups, &largest);
    if (bits == 1) {
        float magnitude = sign_row(values, groups, codes);
        float divisor = magnitude > 1e-38f ? magnitude : 1e-38f;
        *scale = stored_scale(magnitude > 0 ? *signal / divisor : magnitude, 1);
        *rounding = *signal - *scale * (2 * magnitude - *scale * (float)used);
        return;
    }
    const float of_rms[2] = {bits == 4 ? 0.36f : 1.2f, bits == 4 ? 0.5f : 1.6f};
    float limit = (float)((1 << (bits - 1)) - 1), best = 0, left = 0;
    float rms = sqrtf(*signal / (float)(slots > 1 ? slots : 1));
    largest /= limit;
    for (int attempt = 0; attempt < (bits == 8 ? 1 : 3); attempt++) {
        float tried = largest;
        if (attempt) {
            tried = rms * of_rms[attempt - 1];
            tried = tried > largest ? largest : tried;
        }
        round_row(values, groups, inverse_of(tried), limit, codes, &overlap, &energy);
        energy = energy < 1 ? 1 : energy;
        float explained = overlap * overlap / energy;
        if (attempt && !(explained > left)) continue;
        left = explained;
        best = overlap / energy;
    }
    *scale = stored_scale(best, bits);
    round_row(values, groups, inverse_of(*scale), limit, codes, &overlap, &energy);
    *rounding = squared_error(values, codes, groups, *scale);
}

/* Rows of float32 (n, slots) to int8 codes (n, slots), and scale, Σv² and rounding error of each;
 * `used` has each row's count, NULL where every slot counts. 0, or -1 without memory. */
EXPORT int dare_quantise(const float *values, int64_t rows, int64_t slots, const int64_t *used,
                         int bits, int8_t *codes, float *scales, float *signal, float *rounding) {
    int64_t room = (slots + LANES - 1) / LANES * LANES;
    float *row_values = calloc(2 * (size_t)room + 1, sizeof(float)), *row_codes = row_values + room;
    if (!row_values) return -1;
    for (int64_t row = 0; row < rows; row++) {
        memcpy(row_values, values + row * slots, (size_t)slots * sizeof(float));
        quantise(row_values, slots, used ? used[row] : slots, bits, row_codes, scales + row,
                 signal + row, rounding + row);
        for (int64_t j = 0; j < slots; j++) codes[row * slots + j] = (int8_t)row_codes[j];
    }
    free(row_values);
    return 0;
}

/* codec.pack of one row; `codes` has room for a multiple of sixteen. */
VECTORS static void pack(float *restrict codes, int64_t slots, int bits, uint8_t *restrict packed) {
    int64_t bytes = (slots * bits + 7) / 8;
    float unused = bits == 1 ? -1.0f : -(float)(1 << (bits - 1)); /* what packs to 0 */
    for (int64_t j = slots; j < (slots + LANES - 1) / LANES * LANES; j++) codes[j] = unused;
    if (bits == 8)
        for (int64_t i = 0; i < bytes; i++) packed[i] = (uint8_t)((int32_t)codes[i] + 128);
    else if (bits == 4)
        for (int64_t i = 0; i < bytes; i++)
            packed[i] = (uint8_t)(((int32_t)codes[2 * i] + 8) | ((int32_t)codes[2 * i + 1] + 8) << 4);
    else if (bits == 2)
        for (int64_t i = 0; i < bytes; i++) {
            uint32_t byte = 0;
            for (int k = 0; k < 4; k++) byte |= (uint32_t)((int32_t)codes[4 * i + k] + 2) << (2 * k);
            packed[i] = (uint8_t)byte;
        }
    else
        for (int64_t i = 0; i < bytes; i++) {
            uint32_t byte = 0;
            for (int k = 0; k < 8; k++) byte |= (uint32_t)(codes[8 * i + k] > 0) << k;
            packed[i] = (uint8_t)byte;
        }
}

VECTORS static int finite_row(const void *values, int dtype, int64_t first, int64_t count) {
    if (dtype == FLOAT32) {
        const uint32_t *bits = (const uint32_t *)values + first;
        uint32_t strange = 0;
        for (int64_t j = 0; j < count; j++) strange |= (bits[j] & 0x7F800000) == 0x7F800000;
        return !strange;
    }
    const uint16_t *bits = (const uint16_t *)values + first;
    uint16_t field = dtype == BFLOAT16 ? 0x7F80 : 0x7C00, strange = 0;
    for (int64_t j = 0; j < count; j++) strange |= (uint16_t)((bits[j] & field) == field);
    return !strange;
}

/* Rows start … stop - 1 of `factor` * (fine-tune - base) at the survivors of a blocked support, to
 * packed codes, scales, Σv² and rounding error; every entry of both is read once and must be
 * finite. `base` and `finetuned` begin with the parameter's first entry and are contiguous;
 * `used_slots` is how many survivors there are. 0; 1 where one is not finite; -1 without memory. */
EXPORT int dare_encode(uint64_t seed, uint64_t key, int64_t columns, int64_t block, int64_t start,
                       int64_t stop, int base_dtype, const void *base, int finetuned_dtype,
                       const void *finetuned, float factor, int bits, uint8_t *packed,
                       float *scales, float *signal, float *rounding, int64_t *used_slots) {
    support s = {seed, key, columns, block};
    int64_t slots = slots_of(&s), room = (slots + LANES - 1) / LANES * LANES;
    int64_t row_size = (slots * bits + 7) / 8;
    float *values = calloc(2 * (size_t)room + 1, sizeof(float)), *codes = values + room;
    int64_t *column = malloc(((size_t)slots + 1) * sizeof(int64_t));
    int outcome = values && column ? 0 : -1;
    *used_slots = 0;
    for (int64_t row = start; row < stop && !outcome; row++, packed += row_size) {
        int64_t first = row * columns, n = row - start;
        outcome = !finite_row(base, base_dtype, first, columns) |
                  !finite_row(finetuned, finetuned_dtype, first, columns);
        row_columns(&s, row, slots, column);
        int64_t used = slots && column[slots - 1] < 0 ? slots - 1 : slots;
        if (base_dtype == BFLOAT16 && finetuned_dtype == BFLOAT16) {
            const uint16_t *from = (const uint16_t *)base + first;
            const uint16_t *to = (const uint16_t *)finetuned + first;
            for (int64_t j = 0; j < used; j++)
                values[j] = (from_bfloat16(to[column[j]]) - from_bfloat16(from[column[j]])) * factor;
        } else {
            for (int64_t j = 0; j < used; j++)
                values[j] = (read_float(finetuned, first + column[j], finetuned_dtype) -
                             read_float(base, first + column[j], base_dtype)) * factor;
        }
        if (used < slots) values[used] = 0;
        *used_slots += used;
        quantise(values, slots, used, bits, codes, scales + n, signal + n, rounding + n);
        pack(codes, slots, bits, packed);
    }
    free(column);
    free(values);
    return outcome;
}
