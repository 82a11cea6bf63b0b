/* Fine-tune minus base, of any two float types. */

#ifndef DARE_DIFFERENCE_H
#define DARE_DIFFERENCE_H

#include "_floats.h"
#include "_strip.h"

/* Fine-tune minus base of up to STRIP consecutive entries. */
VECTORS static void difference(int base_dtype, const void *base, int finetuned_dtype,
                               const void *finetuned, int64_t first, int64_t count,
                               float *restrict delta) {
    if (base_dtype == BFLOAT16 && finetuned_dtype == BFLOAT16) {
        const uint16_t *from = (const uint16_t *)base + first;
        const uint16_t *to = (const uint16_t *)finetuned + first;
        for (int64_t j = 0; j < count; j++)
            delta[j] = as_float((uint32_t)to[j] << 16) - as_float((uint32_t)from[j] << 16);
    } else if (base_dtype == FLOAT32 && finetuned_dtype == FLOAT32) {
        const float *from = (const float *)base + first, *to = (const float *)finetuned + first;
        for (int64_t j = 0; j < count; j++) delta[j] = to[j] - from[j];
    } else {
        for (int64_t j = 0; j < count; j++)
            delta[j] = read_float(finetuned, first + j, finetuned_dtype) -
                       read_float(base, first + j, base_dtype);
    }
}

static inline float magnitude(float f) { return as_float(as_bits(f) & 0x7FFFFFFF); }

#endif
