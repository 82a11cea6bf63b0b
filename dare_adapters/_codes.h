/* Packed codes to numbers: codec.py. */

#ifndef DARE_CODES_H
#define DARE_CODES_H

#include "_floats.h"

/* The codes of one row times its scale and the weight; writes up to seven entries too many. */
VECTORS static void decode(const uint8_t *restrict codes, int64_t slots, int bits, float scale,
                           float weight, float *restrict change) {
    int64_t bytes = (slots * bits + 7) / 8;
    if (bits == 8)
        for (int64_t i = 0; i < bytes; i++) change[i] = (float)(codes[i] - 128) * scale * weight;
    else if (bits == 4)
        for (int64_t i = 0; i < bytes; i++)
            for (int k = 0; k < 2; k++)
                change[2 * i + k] = (float)(((codes[i] >> (4 * k)) & 15) - 8) * scale * weight;
    else if (bits == 2)
        for (int64_t i = 0; i < bytes; i++)
            for (int k = 0; k < 4; k++)
                change[4 * i + k] = (float)(((codes[i] >> (2 * k)) & 3) - 2) * scale * weight;
    else
        for (int64_t i = 0; i < bytes; i++)
            for (int k = 0; k < 8; k++)
                change[8 * i + k] = (float)(2 * ((codes[i] >> k) & 1) - 1) * scale * weight;
}

#endif
