/* The sign election and disjoint merge of combine/consensus.py, of up to STRIP entries. */

#ifndef DARE_ELECT_H
#define DARE_ELECT_H

#include "_floats.h"
#include "_strip.h"

enum { COUNT, WEIGHTS, NONE };

typedef struct {
    int frequency, weighted, divisor;
    float factor;
} election;

/* Values (lists, room), of which `count` columns are used, to `merged` (count,). */
VECTORS static void elect(int64_t lists, const float *restrict values, int64_t room, int64_t count,
                          const float *restrict weights, election how, float *restrict merged) {
    float votes[STRIP], sums[STRIP], shares[STRIP];
    for (int64_t j = 0; j < count; j++) votes[j] = sums[j] = shares[j] = 0;
    for (int64_t k = 0; k < lists; k++) {
        const float *row = values + k * room;
        float weight = weights[k];
        for (int64_t j = 0; j < count; j++) {
            float ballot = how.weighted ? row[j] * weight : row[j];
            float sign = (float)((ballot > 0) - (ballot < 0));
            votes[j] += how.frequency ? sign : ballot;
        }
    }
    for (int64_t k = 0; k < lists; k++) {
        const float *row = values + k * room;
        float weight = weights[k], share = how.divisor == COUNT ? 1.0f : weight;
        for (int64_t j = 0; j < count; j++) {
            float value = row[j] * weight, ballot = how.weighted ? value : row[j];
            int agrees = votes[j] >= 0 ? ballot > 0 : ballot < 0;
            sums[j] += agrees ? value : 0.0f;
            shares[j] += agrees ? share : 0.0f;
        }
    }
    for (int64_t j = 0; j < count; j++) {
        float share = shares[j];
        if (how.divisor == COUNT) share = share < 1 ? 1.0f : share;
        else if (how.divisor == WEIGHTS) share = share < 1e-8f && share > -1e-8f ? 1.0f : share;
        else share = 1.0f;
        merged[j] = sums[j] / share * how.factor;
    }
}

#endif
