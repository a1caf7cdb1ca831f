// Dequantizes a cold page or a cold row.
#pragma once
#include "store.cuh"

#if COLD_TYPE == COLD_PAGES
// One block writes the numbers of a page's codes of K or V to the tile.
__device__ __forceinline__ void unpack_codes(PageTile& tile, bool value, const char* page) {
    const u32* codes = reinterpret_cast<const u32*>(page + (value ? VALUES_AT : 0));
    const u16* scales = reinterpret_cast<const u16*>(page + (value ? VALUE_SCALES_AT : KEY_SCALES_AT));
    const int words = (value ? VALUE_PAGE : KEY_PAGE) / 4;
    for (int i = threadIdx.x; i < words; i += STORE_THREADS) {
        const u32 word = codes[i];
        if (value) {
#pragma unroll
            for (int e = 0; e < 32 / V_BITS; e++) {
                const int bits = V_BITS;
                const Element to = value_element(i >> 7, (i >> 2) & 31, i & 3, e);
                if (to.dim < D) tile.x[to.token][to.dim] = value_number(word >> (bits * e) & ((1u << bits) - 1), to, scales);
            }
        } else {
#pragma unroll
            for (int e = 0; e < 32 / K_BITS; e++) {
                const int bits = K_BITS;
                const Element to = key_element(i >> 7, (i >> 2) & 31, i & 3, e);
                if (to.dim < D) tile.x[to.token][to.dim] = key_number(word >> (bits * e) & ((1u << bits) - 1), to, scales);
            }
        }
    }
}

// One block writes the numbers of a page to the tile.
__device__ __forceinline__ void unpack_page(const Store& s, PageTile& tile, bool value, size_t head, int page) {
    __syncthreads();
    unpack_codes(tile, value, page_of(s, head, page));
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
