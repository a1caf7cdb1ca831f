// Shared by all kernels that store, read back or move tokens: where tokens are stored, and how they are read.
#pragma once
#include "rotation.cuh"
#if COLD_TYPE == COLD_PAGES
#include "format_codecs.cuh"
#endif

struct Store {
    char *exact_k, *exact_v, *cold_k, *cold_v;
    u16 *k_scale, *v_scale;
    char* cold_pages;
    u32* bad;  // per (sequence, KV head): the least position of a value that is not finite, or TOO_LARGE | position of one too
               // large to store
    int sinks, window, ring, stride, exact_rows, cold_rows;
};

__device__ __forceinline__ int store_cold_tokens(const Store& s, int length) {
    int beyond = length - s.sinks - s.window;
    return COLD_TYPE != COLD_NONE && beyond > 0 ? beyond / PAGE * PAGE : 0;
}

__device__ __forceinline__ float round_exact(float x) {
#if EXACT_TYPE == BF16
    return __bfloat162float(__float2bfloat16_rn(x));
#elif EXACT_TYPE == FP16
    return __half2float(__float2half_rn(x));
#else
    return x;
#endif
}

// Limits a dequantized number to the range of exact rows, which codes can slightly exceed.
__device__ __forceinline__ float limit_exact(float x) {
#if EXACT_TYPE == BF16
    const float most = 3.3895313892515355e38f;
#elif EXACT_TYPE == FP16
    const float most = 65504.f;
#else
    const float most = 3.4028234663852886e38f;
#endif
    return isfinite(x) ? fminf(fmaxf(x, -most), most) : x;
}

__device__ __forceinline__ void put_exact(char* row, int dim, float x) {
#if EXACT_TYPE == BF16
    reinterpret_cast<__nv_bfloat16*>(row)[dim] = __float2bfloat16_rn(x);
#elif EXACT_TYPE == FP16
    reinterpret_cast<__half*>(row)[dim] = __float2half_rn(x);
#else
    reinterpret_cast<float*>(row)[dim] = x;
#endif
}

__device__ __forceinline__ float get_exact(const char* row, int dim) {
#if EXACT_TYPE == BF16
    return __uint_as_float((u32)__ldcg(reinterpret_cast<const u16*>(row) + dim) << 16);
#elif EXACT_TYPE == FP16
    return __half2float(__ushort_as_half(__ldcg(reinterpret_cast<const u16*>(row) + dim)));
#else
    return __ldcg(reinterpret_cast<const float*>(row) + dim);
#endif
}

__device__ __forceinline__ char* exact_at(const Store& s, bool value, size_t head, int position) {
    int row = COLD_TYPE == COLD_NONE || position < s.sinks ? position : s.sinks + (position - s.sinks) % s.ring;
    return (value ? s.exact_v : s.exact_k) + (head * s.exact_rows + row) * EXACT_ROW;
}

// One warp stores one exact row; `x` is rounded already.
__device__ __forceinline__ void store_exact(const Store& s, bool value, size_t head, int position, const float (&x)[ELEMENTS]) {
    char* row = exact_at(s, value, head, position);
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        int dim = (threadIdx.x & 31) + 32 * i;
        if (dim < D) put_exact(row, dim, x[i]);
    }
}

// One warp stores cold row `index`. The int8 codes and scales are those of kvcache/quantize.py, bit for bit; V codes are stored
// with 128 added, which saves decode one operation per word.
__device__ __forceinline__ void store_cold(const Store& s, bool value, size_t head, int index, const float (&x)[ELEMENTS]) {
    const int lane = threadIdx.x & 31;
    char* row = (value ? s.cold_v : s.cold_k) + (head * s.cold_rows + index) * COLD_ROW;
#if COLD_TYPE == COLD_INT8
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) most = fmaxf(most, fabsf(x[i]));
    for (int i = 16; i; i >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
    const u32 scale = (__float_as_uint(__fdiv_rn(most, (float)INT8_LARGEST)) + 0xffffu) >> 16;
    const float divisor = __uint_as_float(scale << 16);
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        int dim = lane + 32 * i;
        int code = divisor > 0.f ? __float2int_rn(__fdiv_rn(x[i], divisor)) : 0;
        if (dim < D) row[dim] = (char)(value ? code + 128 : code);
    }
    if (lane == 0) (value ? s.v_scale : s.k_scale)[head * s.cold_rows + index] = (u16)scale;
#elif COLD_TYPE == COLD_SAME
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++)
        if (lane + 32 * i < D) put_exact(row, lane + 32 * i, x[i]);
#endif
}

__device__ __forceinline__ void note_bad(const Store& s, size_t head, int position, const float (&x)[ELEMENTS]) {
    bool bad = false;
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) bad |= !(fabsf(x[i]) <= 3.402823466e38f);
    if (__any_sync(FULL, bad) && (threadIdx.x & 31) == 0) atomicMin(s.bad + head, (u32)position);
}

#if COLD_TYPE == COLD_PAGES
#define TOO_LARGE 0x80000000u

// One warp writes row `token` of a page to the tile.
__device__ __forceinline__ void put_row(const Store& s, PageTile& tile, bool value, size_t head, int page, int token,
                                        const float (&x)[ELEMENTS]) {
    bool large = false;
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        const int dim = (threadIdx.x & 31) + 32 * i;
        if (dim < D) tile.x[token][dim] = x[i];
        large |= fabsf(x[i]) > (float)LARGEST_KEY;
    }
    if (LARGEST_KEY && !value && __any_sync(FULL, large) && (threadIdx.x & 31) == 0)
        atomicMin(s.bad + head, TOO_LARGE | (u32)(s.sinks + page * PAGE + token));
}

// One block quantizes the page of K in the tile, after all its rows are there.
__device__ __forceinline__ void quantize_keys(PageTile& tile, u32* codes, u16* scales) {
    store_key_scales(tile, scales);
    __syncthreads();
    for (int i = threadIdx.x; i < KEY_PAGE / 4; i += STORE_THREADS) {
        u32 word = 0;
#pragma unroll
        for (int e = 0; e < 32 / K_BITS; e++) {
            const Element at = key_element(i >> 7, (i >> 2) & 31, i & 3, e);
            if (at.dim >= D) continue;
            word |= key_code(tile, at) << (K_BITS * e);
        }
        codes[i] = word;
    }
}

__device__ __forceinline__ void quantize_values(PageTile& tile, u32* codes, u16* scales) {
    store_value_scales(tile, scales);
    __syncthreads();
    for (int i = threadIdx.x; i < VALUE_PAGE / 4; i += STORE_THREADS) {
        u32 word = 0;
#pragma unroll
        for (int e = 0; e < 32 / V_BITS; e++) {
            const Element at = value_element(i >> 7, (i >> 2) & 31, i & 3, e);
            if (at.dim >= D) continue;
            word |= value_code(tile, at) << (V_BITS * e);
        }
        codes[i] = word;
    }
}

__device__ __forceinline__ void quantize_to(PageTile& tile, bool value, char* page) {
    if (value)
        quantize_values(tile, reinterpret_cast<u32*>(page + VALUES_AT), reinterpret_cast<u16*>(page + VALUE_SCALES_AT));
    else
        quantize_keys(tile, reinterpret_cast<u32*>(page), reinterpret_cast<u16*>(page + KEY_SCALES_AT));
}

__device__ __forceinline__ char* page_of(const Store& s, size_t head, int page) {
    return s.cold_pages + (head * (s.cold_rows / PAGE) + page) * PAGE_STRIDE;
}

// One block quantizes the page in the tile and stores it.
__device__ __forceinline__ void store_page(const Store& s, PageTile& tile, bool value, size_t head, int page) {
    __syncthreads();
    quantize_to(tile, value, page_of(s, head, page));
    __syncthreads();
}
#endif

#define STORE_SIGNATURE                                                                                                        \
    char *exact_k, char *exact_v, char *cold_k, char *cold_v, u16 *k_scale, u16 *v_scale, char *cold_pages, u32 *bad,          \
        int sinks, int window, int ring, int stride, int exact_rows, int cold_rows
#define STORE_VALUE                                                                                                            \
    Store {                                                                                                                    \
        exact_k, exact_v, cold_k, cold_v, k_scale, v_scale, cold_pages, bad, sinks, window, ring, stride, exact_rows,          \
            cold_rows                                                                                                          \
    }

// Keys and values by address and strides, (sequence, KV head, token) each, of one of three types. The first `dim` channels are
// present, the rest are zeros.
struct TokenRows {
    const char *keys, *values;
    long long key_batch_stride, key_head_stride, key_token_stride, value_batch_stride, value_head_stride,
        value_token_stride;  // in elements
    int type, dim;
};

#define TOKEN_ROWS_SIGNATURE                                                                                                   \
    const char *keys, const char *values, long long key_batch_stride, long long key_head_stride, long long key_token_stride,   \
        long long value_batch_stride, long long value_head_stride, long long value_token_stride, int type, int dim
#define TOKEN_ROWS_VALUE                                                                                                       \
    TokenRows {                                                                                                                \
        keys, values, key_batch_stride, key_head_stride, key_token_stride, value_batch_stride, value_head_stride,              \
            value_token_stride, type, dim                                                                                      \
    }

__device__ __forceinline__ void load_row(float (&x)[ELEMENTS], const char* from, size_t row, int type, int dim) {
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        const int d = (threadIdx.x & 31) + 32 * i;
        x[i] = 0.f;
        if (d >= dim) continue;
        if (type == FP32)
            x[i] = reinterpret_cast<const float*>(from)[row + d];
        else if (type == BF16)
            x[i] = __uint_as_float((u32) reinterpret_cast<const u16*>(from)[row + d] << 16);
        else
            x[i] = __half2float(reinterpret_cast<const __half*>(from)[row + d]);
    }
}

// Loads a token as it is to be stored but for its rounding: rotated where the recipe says so.
__device__ __forceinline__ void load_token(float (&x)[ELEMENTS], const TokenRows& g, bool value, int batch, int kv_head,
                                           int token) {
    const size_t row = value ? batch * g.value_batch_stride + kv_head * g.value_head_stride + token * g.value_token_stride
                             : batch * g.key_batch_stride + kv_head * g.key_head_stride + token * g.key_token_stride;
    load_row(x, value ? g.values : g.keys, row, g.type, g.dim);
    rotate_token(value, x);
}
