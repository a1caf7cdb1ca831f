// The rotation of heads of kvcache/hadamard.py, bit for bit, by one warp that holds a row.
#pragma once
#include "common.cuh"

#define ELEMENTS ((D + 31) / 32)  // elements of a row per lane: dim = lane + 32 i
#define ROTATED_BLOCK (D & -D)    // channels that are rotated together
#ifndef ROTATED                   // which tensors are stored rotated: 1 for K, 2 for V, 3 for both
#define ROTATED 0
#endif

__device__ __forceinline__ constexpr float rotation_scale() {
    return ROTATED_BLOCK == 16    ? 0.25f
           : ROTATED_BLOCK == 32  ? 0.17677669529663687f
           : ROTATED_BLOCK == 64  ? 0.125f
           : ROTATED_BLOCK == 128 ? 0.08838834764831845f
                                  : 0.0625f;
}
static_assert(ROTATED_BLOCK >= 16 && ROTATED_BLOCK <= 256, "rotation_scale() is 1 / sqrt(ROTATED_BLOCK)");

// Rotates a row in place: a fast Walsh-Hadamard transform, which is its own inverse. All lanes of the warp take part; those
// without an element at the end of the row hold zeros, and no block reaches across that end.
__device__ __forceinline__ void rotate_row(float (&x)[ELEMENTS]) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int step = 1; step < ROTATED_BLOCK && step < 32; step *= 2) {
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++) {
            const float other = __shfl_xor_sync(FULL, x[i], step);
            x[i] = lane & step ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
        }
    }
#pragma unroll
    for (int step = 1; 32 * step < ROTATED_BLOCK; step *= 2) {
#pragma unroll
        for (int i = 0; i + step < ELEMENTS; i++) {
            if (i & step) continue;
            const float first = x[i], second = x[i + step];
            x[i] = __fadd_rn(first, second);
            x[i + step] = __fsub_rn(first, second);
        }
    }
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) x[i] = __fmul_rn(x[i], rotation_scale());
}

__device__ __forceinline__ void rotate_query(float (&x)[ELEMENTS]) {
    if (ROTATED & 1) rotate_row(x);
}

// Rotates a key or value that is stored so.
__device__ __forceinline__ void rotate_token(bool value, float (&x)[ELEMENTS]) {
    if (ROTATED == 3 || (ROTATED && value == (ROTATED == 2))) rotate_row(x);
}
