/* Whether floats are finite: every IEEE format has a field of ones where one is not. */

#include "_floats.h"

/* `field`: the exponent's bits of a format of two bytes. */
VECTORS EXPORT int dare_all_finite_2(const uint16_t *values, int64_t count, uint16_t field) {
    uint16_t strange = 0;
    for (int64_t j = 0; j < count; j++) strange |= (uint16_t)((values[j] & field) == field);
    return !strange;
}

/* Of a format of four. */
VECTORS EXPORT int dare_all_finite_4(const uint32_t *values, int64_t count, uint32_t field) {
    uint32_t strange = 0;
    for (int64_t j = 0; j < count; j++) strange |= (values[j] & field) == field;
    return !strange;
}
