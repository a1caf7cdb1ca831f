// Page scorers: what a page's zeros and scales are multiplied by in one channel. A page's score is the sum over channels of
// zero * its zero + scale * its scale (see kvcache/scorers/scorer.py). A scorer has one function here, chosen by the macro
// SCORER, its `cuda_id`.
#pragma once
#include "common.cuh"

#ifndef SCORER
#define SCORER 0
#endif

struct ChannelWeights {
    float zero, scale;
};

// `query(i)` is the channel of the i-th of `group` query heads.
template <class Query>
__device__ __forceinline__ ChannelWeights channel_weights(Query query, int group) {
#if SCORER == 0  // bounds: kvcache/scorers/bounds.py
    float total = 0.f, size = 0.f;
#pragma unroll 4
    for (int h = 0; h < group; h++) {
        const float x = query(h);
        total += x;
        size += fabsf(x);
    }
    return {total, 7.5f * fmaf(0.5f, size, total)};
#endif
}
