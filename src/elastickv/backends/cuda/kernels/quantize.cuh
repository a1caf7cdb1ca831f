// Quantizes a page of 32 rows in shared memory to the codes and scales of kvcache/quantize.py, bit for bit. One block of 256
// threads.
#pragma once
#include "pages.cuh"

#define STORE_THREADS 256
#define TILE_ROW (D + 1)

struct PageTile {
    float x[PAGE][TILE_ROW];
    float scale[PAGE * GROUPS > PADDED ? PAGE * GROUPS : PADDED], zero[PAGE * GROUPS > PADDED ? PAGE * GROUPS : PADDED];
    float most[STORE_THREADS / 32];
};

__device__ __forceinline__ float bf16_up(float x, u32& bits) {  // x not negative
    bits = (__float_as_uint(x) + 0xffffu) >> 16;
    return __uint_as_float(bits << 16);
}

__device__ __forceinline__ float bf16_down(float x, u32& bits) {
    bits = (__float_as_uint(x) + (x < 0.f || __float_as_uint(x) == 0x80000000u ? 0xffffu : 0u)) >> 16;
    return __uint_as_float(bits << 16);
}

__device__ __forceinline__ u32 code4(float x, float zero, float scale) {
    const float code = fminf(fmaxf(rintf(__fdiv_rn(x - zero, scale)), 0.f), 15.f);
    return scale > 0.f ? (u32)code : 0u;
}

// Scales of int8 rows: eight threads a token.
__device__ __forceinline__ void scales_int8(PageTile& tile, u16* scales) {
    const int token = threadIdx.x >> 3, part = threadIdx.x & 7;
    float most = 0.f;
    for (int d = part; d < D; d += 8) most = fmaxf(most, fabsf(tile.x[token][d]));
    for (int i = 4; i; i >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
    u32 bits;
    const float scale = bf16_up(__fdiv_rn(most, 127.f), bits);
    if (part == 0) {
        tile.scale[token] = scale;
        scales[token] = (u16)bits;
    }
}

__device__ __forceinline__ void scale_fp8(PageTile& tile, u16* scales) {
    float most = 0.f;
    for (int i = threadIdx.x; i < PAGE * D; i += STORE_THREADS) most = fmaxf(most, fabsf(tile.x[i / D][i % D]));
    for (int i = 16; i; i >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
    if ((threadIdx.x & 31) == 0) tile.most[threadIdx.x >> 5] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < STORE_THREADS / 32; i++) most = fmaxf(most, tile.most[i]);
        const u32 power = (__float_as_uint(__fdiv_rn(most, 448.f)) + 0x7fffffu) & 0x7f800000u;
        tile.scale[0] = __uint_as_float(power);
        *scales = (u16)(power >> 16);
    }
}

__device__ __forceinline__ u32 code8(const PageTile& tile, int format, Element at, int offset) {
    const float x = tile.x[at.token][at.dim], scale = tile.scale[format == INT8 ? at.token : 0];
    const float scaled = scale > 0.f ? __fdiv_rn(x, scale) : 0.f;
    if (format == FP8) return (u32)__nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3);
    return (u32)(__float2int_rn(scaled) + offset) & 255u;
}

__device__ __forceinline__ u32 code16(const PageTile& tile, Element at) {
#if EXACT_TYPE == BF16
    return __bfloat16_as_ushort(__float2bfloat16_rn(tile.x[at.token][at.dim]));
#else
    return __half_as_ushort(__float2half_rn(tile.x[at.token][at.dim]));
#endif
}

__device__ __forceinline__ void quantize_keys(PageTile& tile, u32* codes, u16* scales) {
#if K_FORMAT == INT4
    for (int c = threadIdx.x; c < PADDED; c += STORE_THREADS) {
        float low = c < D ? tile.x[0][c] : 0.f, high = low;
        for (int i = 1; i < PAGE; i++) {
            const float x = c < D ? tile.x[i][c] : 0.f;
            low = fminf(low, x);
            high = fmaxf(high, x);
        }
        const __half zero = __float2half_rd(low);
        const __half scale = __float2half_ru(__fdiv_rn(high - __half2float(zero), 15.f));
        tile.scale[c] = __half2float(scale);
        tile.zero[c] = __half2float(zero);
        scales[c] = __half_as_ushort(scale);
        scales[PADDED + c] = __half_as_ushort(zero);
    }
#elif K_FORMAT == INT8
    scales_int8(tile, scales);
#elif K_FORMAT == FP8
    scale_fp8(tile, scales);
#endif
    __syncthreads();
    for (int i = threadIdx.x; i < KEY_PAGE / 4; i += STORE_THREADS) {
        u32 word = 0;
#pragma unroll
        for (int e = 0; e < ELEMENTS_OF(K_FORMAT); e++) {
            const Element at = key_element(i >> 7, (i >> 2) & 31, i & 3, e);
            if (at.dim >= D) continue;
#if K_FORMAT == INT4
            word |= code4(tile.x[at.token][at.dim], tile.zero[at.dim], tile.scale[at.dim]) << (4 * e);
#elif K_FORMAT == SIXTEEN_BIT
            word |= code16(tile, at) << (16 * e);
#else
            word |= code8(tile, K_FORMAT, at, 0) << (8 * e);
#endif
        }
        codes[i] = word;
    }
}

__device__ __forceinline__ void quantize_values(PageTile& tile, u32* codes, u16* scales) {
#if V_FORMAT == INT4
    const int token = threadIdx.x >> 3, part = threadIdx.x & 7;
    for (int group = 0; group < GROUPS; group++) {
        float low = INFINITY, high = -INFINITY;
        for (int d = part; d < V_GROUP; d += 8) {
            low = fminf(low, tile.x[token][group * V_GROUP + d]);
            high = fmaxf(high, tile.x[token][group * V_GROUP + d]);
        }
        for (int i = 4; i; i >>= 1) {
            low = fminf(low, __shfl_xor_sync(FULL, low, i));
            high = fmaxf(high, __shfl_xor_sync(FULL, high, i));
        }
        if (part) continue;
        u32 zero_bits, scale_bits;
        const float zero = bf16_down(low, zero_bits), scale = bf16_up(__fdiv_rn(high - zero, 15.f), scale_bits);
        tile.scale[group * PAGE + token] = scale;
        tile.zero[group * PAGE + token] = zero;
        reinterpret_cast<u32*>(scales)[group * PAGE + token] = scale_bits | zero_bits << 16;
    }
#elif V_FORMAT == INT8
    scales_int8(tile, scales);
#elif V_FORMAT == FP8
    scale_fp8(tile, scales);
#endif
    __syncthreads();
    for (int i = threadIdx.x; i < VALUE_PAGE / 4; i += STORE_THREADS) {
        u32 word = 0;
#pragma unroll
        for (int e = 0; e < ELEMENTS_OF(V_FORMAT); e++) {
            const Element at = value_element(i >> 7, (i >> 2) & 31, i & 3, e);
            if (at.dim >= D) continue;
#if V_FORMAT == INT4
            const int of = at.dim / V_GROUP * PAGE + at.token;
            word |= code4(tile.x[at.token][at.dim], tile.zero[of], tile.scale[of]) << (4 * e);
#elif V_FORMAT == SIXTEEN_BIT
            word |= code16(tile, at) << (16 * e);
#else
            word |= code8(tile, V_FORMAT, at, V_FORMAT == INT8 ? VALUE_OFFSET : 0) << (8 * e);
#endif
        }
        codes[i] = word;
    }
}
