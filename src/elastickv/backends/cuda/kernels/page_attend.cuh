// Attention of one warp to the page in a stage, on tensor cores: scores, softmax, values, and the results that it leaves to its
// block. Twice, because lanes have other scores: with at most 4 queries of a KV head (KEYS_AS_ROWS) and with more;
// format_codecs.cuh says which.
#pragma once
#include "page_shared.cuh"

#if KEYS_AS_ROWS
__device__ __forceinline__ void scale_sums(Sums& r, float alpha) {
#pragma unroll
    for (int m = 0; m < VALUE_TILES; m++)
#pragma unroll
        for (int e = 0; e < (ZEROS ? 2 : 4); e++) r.acc[m][e] *= alpha;
}

// The maximum and the sum over the lanes that have tokens of the same query.
__device__ __forceinline__ float most_of_tokens(float x) {
#pragma unroll
    for (int i = 4; i < 32; i *= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, i));
    return x;
}

__device__ __forceinline__ float sum_of_tokens(float x) {
#pragma unroll
    for (int i = 4; i < 32; i *= 2) x += __shfl_xor_sync(FULL, x, i);
    return x;
}

// Scores of a page's tokens 8 i + g with query t in score[0][i], in log2.
__device__ __forceinline__ void score_page(float (&score)[1][4], const char* stage, const Shared& shared) {
    KeySums sums = {};
#pragma unroll
    for (int k = 0; k < KEY_STEPS; k += 2) multiply_keys(sums, shared.page_query, stage, k);
    const float step = shared.steps[threadIdx.x & 3] * key_page_scale(stage);
#pragma unroll
    for (int i = 0; i < 4; i++) score[0][i] = key_score(sums, stage, i, step);
}

__device__ __forceinline__ void raise_maxima(Sums& r, const float (&score)[1][4]) {
    float most = fmaxf(fmaxf(score[0][0], score[0][1]), fmaxf(score[0][2], score[0][3]));
    if (!__any_sync(FULL, most > r.m[0] + RESCALE)) return;
    most = fmaxf(most_of_tokens(most), r.m[0]);
    const float alpha = exp2_fast(r.m[0] - most);
    r.m[0] = most;
    r.l[0] *= alpha;
#pragma unroll
    for (int z = 0; z < ZEROS; z++) r.zero[0][z] *= alpha;
    scale_sums(r, alpha);
}

__device__ __forceinline__ void add_values(Sums& r, const float (&score)[1][4], const char* stage) {
    float weight[4];
    u32 p[4];
#if VALUE_SCALES
    float largest = largest_scale(stage);
    if (__any_sync(FULL, largest * r.normal > (float)(1 << V_SHIFT))) {
        largest = most_of_tokens(largest);
        const float exponent = fmaxf(r.exponent, (float)((int)(__float_as_uint(largest) >> 23) - 126));
        const float factor = exp2_fast(r.exponent - exponent);
        scale_sums(r, factor);
        if (CODE_ZEROS) r.zero[0][0] *= factor;
        r.exponent = exponent;
        r.normal = exp2_fast((float)V_SHIFT - exponent);
    }
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
        weight[i] = exp2_fast(score[0][i] - r.m[0]);
        if (VALUE_SCALES) r.l[0] += weight[i];
    }
#pragma unroll
    for (int m = 0; m < VALUE_TILES; m++) {
        const int group = m / GROUP_TILES;
        if (m % GROUP_TILES == 0 && group < GROUPS) weigh_group(p, r, weight, stage, group, r.normal);
        u32 a[2][4];
        value_operands(a, stage + VALUES_AT, m);
#if ZEROS
        float sum[4] = {};  // of this page only; see below
#else
        float (&sum)[4] = r.acc[m];
#endif
#pragma unroll
        for (int k = 0; k < 2; k++) multiply_values(sum, a[k], p[2 * k], p[2 * k + 1]);
#if ZEROS
#pragma unroll
        for (int half = 0; half < 2; half++) r.acc[m][half] += sum[2 * half] + sum[2 * half + 1];
#endif
    }
}

// Writes a warp's results of its pages to shared memory, as floats in the order of dims; adds to what is there if `more`.
__device__ __forceinline__ void leave_pages(Sums& r, float* sums, float2* sums_ml, bool more) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const float unit = VALUE_SCALES ? exp2_fast(r.exponent - (float)V_SHIFT) : 1.f;
    const float l = sum_of_tokens(r.l[0]);
    const float2 exact = more ? sums_ml[t] : make_float2(NOTHING, 0.f);
    const float top = fmaxf(exact.x, r.m[0]), theirs = exp2_fast(exact.x - top), mine = exp2_fast(r.m[0] - top);
    __syncwarp();
    if (g == 0) sums_ml[t] = make_float2(top, exact.y * theirs + l * mine);
    float zero[ZEROS ? ZEROS : 1] = {};
#pragma unroll
    for (int z = 0; z < ZEROS; z++) zero[z] = sum_of_tokens(r.zero[0][z]) * (CODE_ZEROS ? -VALUE_OFFSET * unit : 1.f);
#pragma unroll
    for (int m = 0; m < VALUE_TILES; m++) {
        const int z = min(m / GROUP_TILES, GROUPS - 1);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int dim = value_dim(16 * m + g + 8 * half);
            if (dim >= D) continue;
            float* to = &sums[(t >> 1) * PAIR + (t & 1) * D + dim];
#if ZEROS
            const float codes = r.acc[m][half];
#else
            const float codes = r.acc[m][2 * half] + r.acc[m][2 * half + 1];
#endif
            // Not unit * VALUE_ONE first: where values exceed 2^103 that is infinite although the result is not.
            const float sum = (codes * (half ? VALUE_ONE_HIGH : VALUE_ONE) * unit + zero[ZEROS ? z : 0]) * mine;
            *to = more ? *to * theirs + sum : sum;
        }
    }
}
#else
__device__ __forceinline__ void scale_tile(Sums& r, int tile, float alpha) {
    const int t = threadIdx.x & 3;
    const float a0 = __shfl_sync(FULL, alpha, 8 * t), a1 = __shfl_sync(FULL, alpha, 8 * t + 4);
#pragma unroll
    for (int m = 0; m < VALUE_TILES; m++) {
        r.acc[tile][m][0] *= a0;
        r.acc[tile][m][1] *= a1;
        r.acc[tile][m][2] *= a0;
        r.acc[tile][m][3] *= a1;
    }
}

// Scores of a page's tokens 8 i + 2 t + b in score[tile][2 i + b], in log2.
__device__ __forceinline__ void score_page(float (&score)[TILES][8], const char* stage, const Shared& shared) {
    const int lane = threadIdx.x & 31, g = lane >> 2;
    KeySums sums[TILES] = {};
#pragma unroll
    for (int k = 0; k < KEY_STEPS; k++) {
        const KeyOperands keys = key_operands(stage, k);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            multiply_keys(sums[tile], load_query(shared.page_query + (tile * KEY_STEPS + k) * 32 + lane), keys);
    }
    const float scale = key_page_scale(stage);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const float step = shared.steps[tile * HEADS + g] * scale;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 pair = key_scores(sums[tile], stage, i, step);
            score[tile][2 * i] = pair.x;
            score[tile][2 * i + 1] = pair.y;
        }
    }
}

__device__ __forceinline__ void raise_maxima(Sums& r, const float (&score)[TILES][8]) {
    float top[TILES];
    bool above = false;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        top[tile] = score[tile][0];
#pragma unroll
        for (int e = 1; e < 8; e++) top[tile] = fmaxf(top[tile], score[tile][e]);
        above |= top[tile] > r.m[tile] + RESCALE;
    }
    if (!__any_sync(FULL, above)) return;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float most = fmaxf(top[tile], __shfl_xor_sync(FULL, top[tile], 1));
        most = fmaxf(fmaxf(most, __shfl_xor_sync(FULL, most, 2)), r.m[tile]);
        const float alpha = exp2_fast(r.m[tile] - most);
        r.m[tile] = most;
        r.l[tile] *= alpha;
#pragma unroll
        for (int z = 0; z < ZEROS; z++) r.zero[tile][z] *= alpha;
        scale_tile(r, tile, alpha);
    }
}

__device__ __forceinline__ void add_values(Sums& r, const float (&score)[TILES][8], const char* stage) {
    float weight[TILES][8];
    u32 p[TILES][4];
    float normal = 1.f;
#if VALUE_SCALES
    float largest = largest_scale(stage);
    if (__any_sync(FULL, largest > exp2_fast(r.exponent))) {
        largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 2));
        const float exponent = fmaxf(r.exponent, (float)((int)(__float_as_uint(largest) >> 23) - 126));
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) scale_tile(r, tile, exp2_fast(r.exponent - exponent));
        r.exponent = exponent;
    }
    normal = exp2_fast((float)V_SHIFT - r.exponent);
#endif
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            weight[tile][e] = exp2_fast(score[tile][e] - r.m[tile]);
            if (VALUE_SCALES) r.l[tile] += weight[tile][e];
        }
#pragma unroll
    for (int m = 0; m < VALUE_TILES; m++) {
        const int group = m / GROUP_TILES;
        if (m % GROUP_TILES == 0 && group < GROUPS) weigh_group(p, r, weight, stage, group, normal);
        u32 a[2][4];
        value_operands(a, stage + VALUES_AT, m);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#if ZEROS
            // Tensor cores truncate sums. Codes are not negative, so their sums grow far beyond the result without the zeros,
            // and so does the truncation error. Therefore every page's sums start at 0, and pages are added as floats.
            float sum[4] = {};
#else
            float (&sum)[4] = r.acc[tile][m];
#endif
#pragma unroll
            for (int k = 0; k < 2; k++) multiply_values(sum, a[k], p[tile][2 * k], p[tile][2 * k + 1]);
#if ZEROS
#pragma unroll
            for (int e = 0; e < 4; e++) r.acc[tile][m][e] += sum[e];
#endif
        }
    }
}

// Writes a warp's results of its pages to shared memory, as floats in the order of dims; adds to what is there if `more`.
__device__ __forceinline__ void leave_pages(Sums& r, float* sums, float2* sums_ml, bool more) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const float unit = VALUE_SCALES ? exp2_fast(r.exponent - (float)V_SHIFT) : 1.f;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float l = r.l[tile] + __shfl_xor_sync(FULL, r.l[tile], 1);
        l += __shfl_xor_sync(FULL, l, 2);
        const float2 exact = more ? sums_ml[tile * HEADS + g] : make_float2(NOTHING, 0.f);
        const float top = fmaxf(exact.x, r.m[tile]), theirs = exp2_fast(exact.x - top), mine = exp2_fast(r.m[tile] - top);
        __syncwarp();
        if (t == 0) sums_ml[tile * HEADS + g] = make_float2(top, exact.y * theirs + l * mine);
        float x[2], y[2];
#pragma unroll
        for (int q = 0; q < 2; q++) {
            x[q] = __shfl_sync(FULL, theirs, 8 * t + 4 * q);
            y[q] = __shfl_sync(FULL, mine, 8 * t + 4 * q);
        }
        float zero[ZEROS ? ZEROS : 1][2] = {};
#pragma unroll
        for (int z = 0; z < ZEROS; z++) {
            float sum = r.zero[tile][z] + __shfl_xor_sync(FULL, r.zero[tile][z], 1);
            sum += __shfl_xor_sync(FULL, sum, 2);
            zero[z][0] = __shfl_sync(FULL, sum, 8 * t);
            zero[z][1] = __shfl_sync(FULL, sum, 8 * t + 4);
        }
#pragma unroll
        for (int m = 0; m < VALUE_TILES; m++) {
            const int z = min(m / GROUP_TILES, GROUPS - 1);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int dim = value_dim(16 * m + g + 8 * half);
                if (dim >= D) continue;
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    float* to = &sums[(tile * 4 + t) * PAIR + q * D + dim];
                    // Not unit * VALUE_ONE first: where values exceed 2^103 that is infinite although the result is not.
                    const float sum =
                        (r.acc[tile][m][2 * half + q] * (half ? VALUE_ONE_HIGH : VALUE_ONE) * unit + zero[z][q]) * y[q];
                    *to = more ? *to * x[q] + sum : sum;
                }
            }
        }
    }
}
#endif

// Writes a warp's results of exact rows to shared memory, one tile of queries.
__device__ __forceinline__ void leave_exact(Running& r, float* sums, float2* sums_ml) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    r.l += __shfl_xor_sync(FULL, r.l, 1);
    r.l += __shfl_xor_sync(FULL, r.l, 2);
    if (t == 0 && g < RESULTS) sums_ml[g] = make_float2(r.m, r.l);
    if (2 * t >= RESULTS) return;
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            if (set_dim(s, g) >= D) continue;
            float* to = sums + t * PAIR + q * D + set_dim(s, g);
#pragma unroll
            for (int i = 0; i < 8; i++) to[i] = r.acc[s][i >> 1][2 * (i & 1) + q];
        }
}
