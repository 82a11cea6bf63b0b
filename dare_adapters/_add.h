/* Adding to a weight in float32 and rounding once. */

#ifndef DARE_ADD_H
#define DARE_ADD_H

#include "_floats.h"

/* sum = base + change, rounded once; base and sum may be one. */
VECTORS static void add(int dtype, const void *base, const float *change, int64_t count,
                        void *sum) {
    if (dtype == FLOAT32) {
        for (int64_t j = 0; j < count; j++)
            ((float *)sum)[j] = change[j] + ((const float *)base)[j];
    } else if (dtype == BFLOAT16) {
        for (int64_t j = 0; j < count; j++)
            ((uint16_t *)sum)[j] =
                to_bfloat16(change[j] + from_bfloat16(((const uint16_t *)base)[j]));
    } else {
        for (int64_t j = 0; j < count; j++)
            ((uint16_t *)sum)[j] = to_half(change[j] + from_half(((const uint16_t *)base)[j]));
    }
}

#endif
