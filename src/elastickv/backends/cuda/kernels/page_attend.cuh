// Attention of one warp to the page in a stage, on tensor cores: scores, softmax, values, and the results that it leaves to its
// block.
#pragma once
#include "page_shared.cuh"

// Running results of one warp.
struct Sums {
    float acc[TILES][VALUE_TILES][4];  // [tile of queries][tile of dims][dim g: q 2t, 2t+1; dim g + 8: the same]
    float m[TILES], l[TILES];          // of query g; l over this lane's tokens only
    float zero[TILES][ZEROS ? ZEROS : 1];
    float exponent;  // 2^this bounds the V scales seen
};

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

__device__ __forceinline__ uint4 vector_of(const char* part, int row) {
    return *reinterpret_cast<const uint4*>(part + (row * 32 + (threadIdx.x & 31)) * 16);
}

__device__ __forceinline__ u32 multiply(u32 a, u32 b) {
    const __half2 r = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<const u32*>(&r);
}

__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {
    const __half2 r =
        __hfma2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b), *reinterpret_cast<__half2*>(&c));
    return *reinterpret_cast<const u32*>(&r);
}

// Two e4m3 numbers, in the low half of `bytes`, as fp16.
__device__ __forceinline__ u32 fp8_to_half(u32 bytes) {
#if __CUDA_ARCH__ >= 890
    u32 r;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low;}" : "=r"(r) : "r"(bytes));
    return r;
#else
    const u32 w = __byte_perm(bytes, 0, 0x1404);                               // each byte on top of its half
    return multiply((w & 0x80008000u) | (w >> 1 & 0x3f803f80u), 0x5c005c00u);  // exponents are 8 apart: times 256
#endif
}

// Scores of a page's tokens 8 i + 2 t + b in score[tile][2 i + b], in log2.
__device__ __forceinline__ void score_page(float (&score)[TILES][8], const char* stage, const Shared& shared, int page) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#if K_FORMAT == INT8
    int x[TILES][4][4] = {};
#else
    float x[TILES][4][4] = {}, zero[TILES][4] = {};
#endif
#pragma unroll
    for (int k = 0; k < KEY_STEPS; k++) {
#if K_FORMAT == INT8
        const uint4 k0 = vector_of(stage, 2 * k),
                    k1 = 2 * k + 1 < KEY_TILES ? vector_of(stage, 2 * k + 1) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const uint4 q = load_query(shared.page_query + (tile * KEY_STEPS + k) * 32 + lane);
#pragma unroll
            for (int i = 0; i < 4; i++) mma_int8(x[tile][i], q, (&k0.x)[i], (&k1.x)[i]);
        }
#else
        u32 low[4], high[4];
#if K_FORMAT == INT4
        const uint4 codes = vector_of(stage, k >> 1);
        const u32 w0 = k & 1 ? codes.z : codes.x, w1 = k & 1 ? codes.w : codes.y;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 mask = i & 1 ? 0x00f000f0u : 0x000f000fu;
            low[i] = w0 >> (i & 2 ? 8 : 0) & mask;
            high[i] = w1 >> (i & 2 ? 8 : 0) & mask;
        }
        const char* scales = stage + KEY_SCALES_AT + (16 * k + 4 * t) * 2;
        const uint2 scale = *reinterpret_cast<const uint2*>(scales),
                    base = *reinterpret_cast<const uint2*>(scales + 2 * PADDED);
#elif K_FORMAT == FP8
        const uint4 codes = vector_of(stage, k);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            low[i] = fp8_to_half((&codes.x)[i]);
            high[i] = fp8_to_half((&codes.x)[i] >> 16);
        }
#else
        const uint4 first = vector_of(stage, 2 * k), second = vector_of(stage, 2 * k + 1);
        low[0] = first.x, high[0] = first.y, low[1] = first.z, high[1] = first.w;
        low[2] = second.x, high[2] = second.y, low[3] = second.z, high[3] = second.w;
#endif
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            uint4 q = load_query(shared.page_query + (tile * KEY_STEPS + k) * 32 + lane);
#if K_FORMAT == INT4
            mma_half(zero[tile], q.x, q.y, q.z, q.w, base.x, base.y);
            // The rounding error of the product goes into the low part, together with the query's own.
            const u32 a = multiply(q.x, scale.x), b = multiply(q.z, scale.y);
            q.y = multiply_add(q.y, scale.x, multiply_add(q.x, scale.x, a ^ 0x80008000u));
            q.w = multiply_add(q.w, scale.y, multiply_add(q.z, scale.y, b ^ 0x80008000u));
            q.x = a;
            q.z = b;
#endif
#pragma unroll
            for (int i = 0; i < 4; i++) {
#if K_FORMAT == SIXTEEN_BIT
                mma_exact(x[tile][i], q.x, q.y, q.z, q.w, low[i], high[i]);
#else
                mma_half(x[tile][i], q.x, q.y, q.z, q.w, low[i], high[i]);
#endif
            }
        }
#endif
    }
#if K_FORMAT == FP8
    const float scale = __uint_as_float((u32) reinterpret_cast<const u16*>(stage + KEY_SCALES_AT)[page & 7] << 16);
#else
    const float scale = 1.f;
#endif
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const float step = shared.steps[tile * HEADS + g] * scale;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#if K_FORMAT == INT8
            const u32 pair = *reinterpret_cast<const u32*>(stage + KEY_SCALES_AT + (8 * i + 2 * t) * 2);
#endif
#pragma unroll
            for (int b = 0; b < 2; b++) {
#if K_FORMAT == INT8
                const float of = __uint_as_float(b ? pair & 0xffff0000u : pair << 16);
                score[tile][2 * i + b] = (float)(x[tile][i][b] * 128 + x[tile][i][2 + b]) * (step * of);
#elif K_FORMAT == INT4
                const float codes = x[tile][i][b] + x[tile][i][2 + b];
                score[tile][2 * i + b] =
                    (codes * (i & 1 ? CODE_ONE / 16.f : CODE_ONE) + (zero[tile][0] + zero[tile][2])) * step;
#else
                score[tile][2 * i + b] = (x[tile][i][b] + x[tile][i][2 + b]) * step;
#endif
            }
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

#if V_FORMAT == INT4
__device__ __forceinline__ uint2 value_scales(const char* stage, int group, int i) {
    return *reinterpret_cast<const uint2*>(stage + VALUE_SCALES_AT + (group * PAGE + 8 * i + 2 * (threadIdx.x & 3)) * 4);
}
#endif

// The largest scale of V that this lane multiplies by.
__device__ __forceinline__ float largest_scale(const char* stage, int page) {
    float largest = 0.f;
#if V_FORMAT == INT4
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint2 of = value_scales(stage, group, i);
            largest = fmaxf(largest, fmaxf(__uint_as_float(of.x << 16), __uint_as_float(of.y << 16)));
        }
#elif V_FORMAT == INT8
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 pair = *reinterpret_cast<const u32*>(stage + VALUE_SCALES_AT + (8 * i + 2 * (threadIdx.x & 3)) * 2);
        largest = fmaxf(largest, fmaxf(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)));
    }
#elif V_FORMAT == FP8
    largest = __uint_as_float((u32) reinterpret_cast<const u16*>(stage + VALUE_SCALES_AT)[page & 7] << 16);
#endif
    return largest;
}

__device__ __forceinline__ void add_values(Sums& r, const float (&score)[TILES][8], const char* stage, int page) {
    [[maybe_unused]] const int t = threadIdx.x & 3;
    float weight[TILES][8];
    u32 p[TILES][4];
#if V_FORMAT != SIXTEEN_BIT
    float largest = largest_scale(stage, page);
    if (__any_sync(FULL, largest > exp2_fast(r.exponent))) {
        largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 2));
        const float exponent = fmaxf(r.exponent, (float)((int)(__float_as_uint(largest) >> 23) - 126));
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) scale_tile(r, tile, exp2_fast(r.exponent - exponent));
        r.exponent = exponent;
    }
    const float normal = exp2_fast((float)V_SHIFT - r.exponent);
#endif
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            weight[tile][e] = exp2_fast(score[tile][e] - r.m[tile]);
            if (V_FORMAT != SIXTEEN_BIT) r.l[tile] += weight[tile][e];
        }
#if V_FORMAT != INT4
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if V_FORMAT == INT8
        const u32 pair = *reinterpret_cast<const u32*>(stage + VALUE_SCALES_AT + (8 * i + 2 * t) * 2);
        const float s0 = __uint_as_float(pair << 16) * normal, s1 = __uint_as_float(pair & 0xffff0000u) * normal;
#elif V_FORMAT == FP8
        const float s0 = largest_scale(stage, page) * normal, s1 = s0;
#endif
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#if V_FORMAT == SIXTEEN_BIT
            p[tile][i] = pack16(weight[tile][2 * i], weight[tile][2 * i + 1]);
            const float2 rounded = unpack16(p[tile][i]);
            r.l[tile] += rounded.x + rounded.y;
#else
            p[tile][i] = pack_half(weight[tile][2 * i] * s0, weight[tile][2 * i + 1] * s1);
#if V_FORMAT == INT8
            // Codes are VALUE_OFFSET too large.
            const float2 rounded = __half22float2(*reinterpret_cast<__half2*>(&p[tile][i]));
            r.zero[tile][0] -= (rounded.x + rounded.y) * (VALUE_OFFSET / normal);
#endif
#endif
        }
    }
#endif
#pragma unroll
    for (int m = 0; m < VALUE_TILES; m++) {
        u32 a[2][4];  // [tokens 0-15, 16-31][operand]
#if V_FORMAT == INT4
        const int group = m / GROUP_TILES;
        if (m % GROUP_TILES == 0 && group < GROUPS) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint2 of = value_scales(stage, group, i);
                const float s0 = __uint_as_float(of.x << 16) * normal, z0 = __uint_as_float(of.x & 0xffff0000u);
                const float s1 = __uint_as_float(of.y << 16) * normal, z1 = __uint_as_float(of.y & 0xffff0000u);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const float w0 = weight[tile][2 * i], w1 = weight[tile][2 * i + 1];
                    p[tile][i] = pack_half(w0 * s0, w1 * s1);
                    r.zero[tile][group] += w0 * z0 + w1 * z1;
                }
            }
        }
        const uint4 codes = vector_of(stage + VALUES_AT, m >> 1);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const u32 w = m & 1 ? (k ? codes.w : codes.z) : (k ? codes.y : codes.x);
            a[k][0] = w & 0x000f000fu;
            a[k][1] = w & 0x00f000f0u;
            a[k][2] = w >> 8 & 0x000f000fu;
            a[k][3] = w >> 8 & 0x00f000f0u;
        }
#elif V_FORMAT == SIXTEEN_BIT
        const uint4 first = vector_of(stage + VALUES_AT, 2 * m), second = vector_of(stage + VALUES_AT, 2 * m + 1);
        a[0][0] = first.x, a[0][1] = second.x, a[0][2] = first.y, a[0][3] = second.y;
        a[1][0] = first.z, a[1][1] = second.z, a[1][2] = first.w, a[1][3] = second.w;
#else
        const uint4 codes = vector_of(stage + VALUES_AT, m);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const u32 first = k ? codes.y : codes.x, second = k ? codes.w : codes.z;
#if V_FORMAT == INT8
            a[k][0] = __byte_perm(first, 0, 0x4140);
            a[k][1] = __byte_perm(second, 0, 0x4140);
            a[k][2] = __byte_perm(first, 0, 0x4342);
            a[k][3] = __byte_perm(second, 0, 0x4342);
#else
            a[k][0] = fp8_to_half(first);
            a[k][1] = fp8_to_half(second);
            a[k][2] = fp8_to_half(first >> 16);
            a[k][3] = fp8_to_half(second >> 16);
#endif
        }
#endif
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
            for (int k = 0; k < 2; k++) {
#if V_FORMAT == SIXTEEN_BIT
                mma_exact(sum, a[k][0], a[k][1], a[k][2], a[k][3], p[tile][2 * k], p[tile][2 * k + 1]);
#else
                mma_half(sum, a[k][0], a[k][1], a[k][2], a[k][3], p[tile][2 * k], p[tile][2 * k + 1]);
#endif
            }
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
    const float unit = V_FORMAT == SIXTEEN_BIT ? 1.f : exp2_fast(r.exponent - (float)V_SHIFT);
    // Not unit * CODE_ONE first: where values exceed 2^103 that is infinite although the result is not.
    const float first = V_FORMAT == INT4 || V_FORMAT == INT8 ? CODE_ONE : 1.f;
    const float second = V_FORMAT == INT4 ? first / 16.f : first;
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
            const int z = V_FORMAT == INT4 ? min(m / GROUP_TILES, GROUPS - 1) : 0;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int dim = value_dim(16 * m + g + 8 * half);
                if (dim >= D) continue;
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    float* to = &sums[(tile * 4 + t) * PAIR + q * D + dim];
                    const float sum = (r.acc[tile][m][2 * half + q] * (half ? second : first) * unit + zero[z][q]) * y[q];
                    *to = more ? *to * x[q] + sum : sum;
                }
            }
        }
    }
}

// Writes a warp's results of exact rows to shared memory, one tile of queries.
__device__ __forceinline__ void leave_exact(Running& r, float* sums, float2* sums_ml) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    r.l += __shfl_xor_sync(FULL, r.l, 1);
    r.l += __shfl_xor_sync(FULL, r.l, 2);
    if (t == 0) sums_ml[g] = make_float2(r.m, r.l);
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
