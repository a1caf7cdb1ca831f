// Memory layout of a cold page (32 tokens of one KV head).
//
// Planes, each contiguous per (sequence, KV head): codes of K, scales of K, codes of V, scales of V. Inside a page codes are in
// MMA fragment order: rows of 32 vectors of 16 bytes, one per lane of a warp, that are operands without conversion. With
// g = lane / 4 and t = lane % 4, the elements of a vector are
//   K, tile kt of 16 channels: channels 16 kt + 4 t + 0..3 of tokens 8 i + g, i = 0..3;
//   V, tile m of 16 positions: positions 16 m + g + 8 d, d = 0..1, of tokens 8 i + 2 t + 0..1;
// in the order that `key_element` and `value_element` give. int4 pads channels to a multiple of 32. A position is a dim; int4
// dims that share a scale start at a multiple of 16.
//
// Macros in addition to those of common.cuh: K_FORMAT, V_FORMAT, V_GROUP (dims of V that share an int4 scale).
#pragma once
#include "common.cuh"
#include <cuda_fp8.h>

#define SIXTEEN_BIT 0  // the dtype of exact rows
#define INT8 1
#define FP8 2
#define INT4 3

#define PADDED ((D + 31) / 32 * 32)
#define KEY_TILES ((K_FORMAT == INT4 ? PADDED : D) / 16)
#define VALUE_TILES ((V_FORMAT == INT4 ? PADDED : D) / 16)
#define GROUPS (D / V_GROUP)
#define GROUP_TILES ((V_GROUP + 15) / 16)
// Codes of a page are `rows` times 512 bytes; a word of codes holds this many elements.
#define ELEMENTS_OF(format) (format == INT4 ? 8 : format == SIXTEEN_BIT ? 2 : 4)
#define KEY_PAGE (KEY_TILES * 16 * PAGE / ELEMENTS_OF(K_FORMAT) * 4)
#define VALUE_PAGE (VALUE_TILES * 16 * PAGE / ELEMENTS_OF(V_FORMAT) * 4)
// Scales: int8 bf16 [token]; fp8 a bf16 power of two; int4 K fp16 [scale, zero][channel], V bf16 [group][token][scale, zero].
#define KEY_SCALES (K_FORMAT == INT4 ? 4 * PADDED : K_FORMAT == INT8 ? 2 * PAGE : K_FORMAT == FP8 ? 2 : 0)
#define VALUE_SCALES (V_FORMAT == INT4 ? 4 * PAGE * GROUPS : V_FORMAT == INT8 ? 2 * PAGE : V_FORMAT == FP8 ? 2 : 0)
#define VALUE_OFFSET 128  // codes of int8 V are stored with this added

struct Element {
    int token, dim;  // dim D or more: padding
};

// Element `e` of word `w` (0..3) of vector `lane` of row `row` of a page of K.
__device__ __forceinline__ Element key_element(int row, int lane, int w, int e) {
    const int g = lane >> 2, t = lane & 3;
#if K_FORMAT == INT4
    return {8 * (e & 3) + g, 16 * (2 * row + (w >> 1)) + 4 * t + 2 * (w & 1) + (e >> 2)};
#elif K_FORMAT == SIXTEEN_BIT
    return {8 * (2 * (row & 1) + (w >> 1)) + g, 16 * (row >> 1) + 4 * t + 2 * (w & 1) + e};
#else
    return {8 * w + g, 16 * row + 4 * t + e};
#endif
}

// Dim at a position of V.
__device__ __forceinline__ int value_dim(int position) {
#if V_FORMAT == INT4 && V_GROUP % 16
    const int group = position / (16 * GROUP_TILES), in = position % (16 * GROUP_TILES);
    return group < GROUPS && in < V_GROUP ? group * V_GROUP + in : D;
#else
    return position;
#endif
}

// Element `e` of word `w` of vector `lane` of row `row` of a page of V.
__device__ __forceinline__ Element value_element(int row, int lane, int w, int e) {
    const int g = lane >> 2, t = lane & 3;
#if V_FORMAT == INT4
    const int tile = 2 * row + (w >> 1), half = e & 3;
    return {8 * (2 * (w & 1) + (half >> 1)) + 2 * t + (e >> 2), value_dim(16 * tile + g + 8 * (half & 1))};
#elif V_FORMAT == SIXTEEN_BIT
    return {8 * w + 2 * t + e, 16 * (row >> 1) + g + 8 * (row & 1)};
#else
    return {8 * (2 * (w & 1) + (e >> 1)) + 2 * t + (e & 1), 16 * row + g + 8 * (w >> 1)};
#endif
}
