// Dequantizes a cold page or a cold row.
#pragma once
#include "store.cuh"

__device__ __forceinline__ float bf16_value(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ float half_value(u32 bits) { return __half2float(__ushort_as_half((u16)bits)); }

#if COLD_TYPE == COLD_PAGES
__device__ __forceinline__ float number16(u32 code) { return EXACT_TYPE == BF16 ? bf16_value(code) : half_value(code); }

__device__ __forceinline__ float number_fp8(u32 code) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, __NV_E4M3)));
}

// The number that code `code` of K at `at` represents.
__device__ __forceinline__ float key_number(u32 code, Element at, const u16* scales) {
#if K_FORMAT == INT4
    return fmaf((float)code, half_value(scales[at.dim]), half_value(scales[PADDED + at.dim]));
#elif K_FORMAT == INT8
    return (float)(signed char)code * bf16_value(scales[at.token]);
#elif K_FORMAT == FP8
    return number_fp8(code) * bf16_value(scales[0]);
#else
    return number16(code);
#endif
}

__device__ __forceinline__ float value_number(u32 code, Element at, const u16* scales) {
#if V_FORMAT == INT4
    const u32 pair = reinterpret_cast<const u32*>(scales)[at.dim / V_GROUP * PAGE + at.token];
    return fmaf((float)code, bf16_value(pair & 0xffff), bf16_value(pair >> 16));
#elif V_FORMAT == INT8
    return (float)((int)code - VALUE_OFFSET) * bf16_value(scales[at.token]);
#elif V_FORMAT == FP8
    return number_fp8(code) * bf16_value(scales[0]);
#else
    return number16(code);
#endif
}

// One block writes the numbers of a page to the tile.
__device__ __forceinline__ void unpack_page(const Store& s, PageTile& tile, bool value, size_t head, int page) {
    const size_t at = head * (s.cold_rows / PAGE) + page;
    const u32* codes = reinterpret_cast<const u32*>(value ? s.cold_v + at * VALUE_PAGE : s.cold_k + at * KEY_PAGE);
    const char* plane = reinterpret_cast<const char*>(value ? s.v_scale : s.k_scale);
    const u16* scales = reinterpret_cast<const u16*>(plane + at * (value ? VALUE_SCALES : KEY_SCALES));
    const int words = (value ? VALUE_PAGE : KEY_PAGE) / 4;
    __syncthreads();
    for (int i = threadIdx.x; i < words; i += STORE_THREADS) {
        const u32 word = codes[i];
        if (value) {
#pragma unroll
            for (int e = 0; e < ELEMENTS_OF(V_FORMAT); e++) {
                const int bits = 32 / ELEMENTS_OF(V_FORMAT);
                const Element to = value_element(i >> 7, (i >> 2) & 31, i & 3, e);
                if (to.dim < D) tile.x[to.token][to.dim] = value_number(word >> (bits * e) & ((1u << bits) - 1), to, scales);
            }
        } else {
#pragma unroll
            for (int e = 0; e < ELEMENTS_OF(K_FORMAT); e++) {
                const int bits = 32 / ELEMENTS_OF(K_FORMAT);
                const Element to = key_element(i >> 7, (i >> 2) & 31, i & 3, e);
                if (to.dim < D) tile.x[to.token][to.dim] = key_number(word >> (bits * e) & ((1u << bits) - 1), to, scales);
            }
        }
    }
    __syncthreads();
}
#endif

// One warp loads cold row `index`.
__device__ __forceinline__ void load_cold(float (&x)[ELEMENTS], const Store& s, bool value, size_t head, int index) {
    const char* row = (value ? s.cold_v : s.cold_k) + (head * s.cold_rows + index) * COLD_ROW;
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        const int dim = (threadIdx.x & 31) + 32 * i;
        x[i] = 0.f;
        if (dim >= D) continue;
#if COLD_TYPE == COLD_INT8
        const int code = value ? (int)(unsigned char)row[dim] - 128 : (int)(signed char)row[dim];
        x[i] = code * bf16_value((value ? s.v_scale : s.k_scale)[head * s.cold_rows + index]);
#elif COLD_TYPE == COLD_SAME
        x[i] = get_exact(row, dim);
#endif
    }
}
