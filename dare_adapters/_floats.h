/* What the compiled loops share: half precision and back, and which processors to compile for. */

#ifndef DARE_FLOATS_H
#define DARE_FLOATS_H

#include <stdint.h>
#include <string.h>

#ifdef _MSC_VER
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* Wider vectors where the processor has them; GCC and glibc choose when the library is loaded. By
 * level and not by model: "arch=haswell" would be Intel's alone. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#if __GNUC__ >= 12
#define VECTORS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define VECTORS
#endif

/* Dtypes, as Python numbers them. */
enum { FLOAT32, BFLOAT16, FLOAT16 };

static inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
static inline uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

static inline float from_bfloat16(uint16_t bits) { return as_float((uint32_t)bits << 16); }

static inline uint16_t to_bfloat16(float f) { /* to nearest, ties to even */
    uint32_t bits = as_bits(f);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

static inline float from_half(uint16_t h) { /* all three are computed: loops become vectors */
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7FFF);
    uint32_t normal = (rest << 13) + 0x38000000;
    uint32_t special = 0x7F800000 | (rest & 0x3FF) << 13;
    uint32_t small = as_bits((float)(int32_t)rest * 5.9604644775390625e-08f); /* 2^-24, exact */
    return as_float(sign | (rest >= 0x7C00 ? special : rest >= 0x0400 ? normal : small));
}

static inline uint16_t to_half(float f) { /* to nearest, ties to even */
    uint32_t bits = as_bits(f), rest = bits & 0x7FFFFFFF;
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (rest > 0x7F800000) return sign | 0x7E00;
    if (rest >= 0x477FF000) return sign | 0x7C00;
    if (rest < 0x38800000) { /* subnormal: adding 1/2 leaves the rounded bits at the end */
        uint32_t sum = as_bits(as_float(rest) + 0.5f);
        return sign | (uint16_t)(sum - 0x3F000000);
    }
    rest += 0xFFF + ((rest >> 13) & 1);
    return sign | (uint16_t)((rest - 0x38000000) >> 13);
}

static inline float read_float(const void *values, int64_t place, int dtype) {
    if (dtype == FLOAT32) return ((const float *)values)[place];
    uint16_t bits = ((const uint16_t *)values)[place];
    return dtype == BFLOAT16 ? from_bfloat16(bits) : from_half(bits);
}

#endif
