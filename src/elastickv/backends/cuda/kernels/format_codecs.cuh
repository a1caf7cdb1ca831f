// The storage formats of cold pages: all code that depends on K_FORMAT or V_FORMAT. A new format is added in this header only.
//
// A kernel compiles one of three parts: decode on tensor cores (page_decode.cuh, with the macro TILES), decode on CUDA
// cores (decode_pages_simt.cu, which has TILE), or storing and reading back (append.cu, edit.cu and store_blocks.cu). Codes and
// scales are those of kvcache/quantize.py, bit for bit; numbers of formats, largest codes and sizes come as macros from
// recipe/formats.py.
//
// Scales of a page: int8 bf16 [token]; fp8 a bf16 power of two; int4 K and int8 per channel fp16 [scale, zero][channel]; int4 V
// bf16 [group][token][scale, zero].
#pragma once
#include "pages.cuh"
#include <cuda_fp8.h>

#define VALUE_OFFSET 128  // codes of int8 V are stored with this added

// Element `e` of word `w` (0..3) of vector `lane` of row `row` of a page of K.
__device__ __forceinline__ Element key_element(int row, int lane, int w, int e) {
    const int g = lane >> 2, t = lane & 3;
#if K_BITS == 4
    return {8 * (e & 3) + g, 16 * (2 * row + (w >> 1)) + 4 * t + 2 * (w & 1) + (e >> 2)};
#elif K_BITS == 16
    return {8 * (2 * (row & 1) + (w >> 1)) + g, 16 * (row >> 1) + 4 * t + 2 * (w & 1) + e};
#else
    return {8 * w + g, 16 * row + 4 * t + e};
#endif
}

// Element `e` of word `w` of vector `lane` of row `row` of a page of V.
__device__ __forceinline__ Element value_element(int row, int lane, int w, int e) {
    const int g = lane >> 2, t = lane & 3;
#if V_BITS == 4
    const int tile = 2 * row + (w >> 1), half = e & 3;
    return {8 * (2 * (w & 1) + (half >> 1)) + 2 * t + (e >> 2), value_dim(16 * tile + g + 8 * (half & 1))};
#elif V_BITS == 16
    return {8 * w + 2 * t + e, 16 * (row >> 1) + g + 8 * (row & 1)};
#else
    return {8 * (2 * (w & 1) + (e >> 1)) + 2 * t + (e & 1), 16 * row + g + 8 * (w >> 1)};
#endif
}

#if defined(TILES)  // Decode on tensor cores.
#include "attend.cuh"

#define QUERIES (HEADS * TILES)
#define CODE_ONE 16777216.f  // 2^24: the inverse of a code's bit 0 as an fp16 number
#define VALUE_ONE (V_FORMAT == INT4 || V_FORMAT == INT8 ? CODE_ONE : 1.f)  // the factor on sums of dims g
#define VALUE_ONE_HIGH (V_FORMAT == INT4 ? CODE_ONE / 16.f : VALUE_ONE)    // of dims g + 8
#define ZEROS (V_FORMAT == INT4 ? GROUPS : V_FORMAT == INT8 ? 1 : 0)       // sums of weight x zero of a query
// A power of two on queries, so that their products with small scales stay normal fp16 numbers: the largest scale of 8 bits is
// 514, and 2^6 x 514 is below 65504.
#define QUERY_LIFT (K_FORMAT == INT8_PER_CHANNEL ? 6 : 0)
#define KEY_STEPS (K_FORMAT == INT8 ? (KEY_TILES + 1) / 2 : KEY_TILES)  // products of a query with a page's keys

// A product of K has 16 rows and 8 columns, and a query has two parts, high and low. Two ways to fill it:
//
//   Queries as rows: 8 queries, the high parts in rows 0..7 and the low ones in rows 8..15; 8 tokens are the columns. A lane
//   has scores of query g, of tokens 8 i + 2 t + 0..1. The weights of the values then have a column for each query.
//   KEYS_AS_ROWS (at most 4 queries): 16 tokens are the rows; columns 2 q and 2 q + 1 are the high and the low part of query q.
//   Half as many products, and no row is empty. A lane has scores of query t, of tokens 8 i + g. The weights have two columns a
//   query: of tokens 16 j + 0..7 and of tokens 16 j + 8..15; the other eight tokens of a column are 0.
//
// Both read the same pages: a left and a right operand have the same elements in a lane.
#if KEYS_AS_ROWS
static_assert(TILES == 1, "one tile of queries");
#define PAGE_QUERIES 4
#define PAGE_SCORES 4  // of a lane
#define PAIRED_STEPS ((KEY_STEPS + 1) / 2)
#define QUERY_VECTORS (CHANNEL_LEVELS ? 2 * PAIRED_STEPS : PAIRED_STEPS)  // of a lane, for all steps; see stage_query
#define CODE_ZEROS (V_FORMAT == INT8)  // sums of zeros are of weights that include scales, for the zero of codes VALUE_OFFSET
#else
#define PAGE_QUERIES QUERIES
#define PAGE_SCORES 8
#define QUERY_VECTORS KEY_STEPS
#endif

// Running results of one warp.
struct Sums {
#if KEYS_AS_ROWS
    // Of query t, [tile of dims]: dims g and g + 8; or, without zeros, of each the sums of both columns.
    float acc[VALUE_TILES][ZEROS ? 2 : 4];
#else
    float acc[TILES][VALUE_TILES][4];  // [tile of queries][tile of dims][dim g: q 2t, 2t+1; dim g + 8: the same]
#endif
    float m[TILES], l[TILES];  // of query g, KEYS_AS_ROWS: query t; l over this lane's tokens only
    float zero[TILES][ZEROS ? ZEROS : 1];
    float exponent;  // 2^this bounds the V scales seen
#if KEYS_AS_ROWS
    float normal;  // 2^(V_SHIFT - exponent)
#endif
};

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

__device__ __forceinline__ u32 negated(u32 x) {
    u32 r;
    asm("neg.f16x2 %0, %1;" : "=r"(r) : "r"(x));
    return r;
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

// Stores channel `dim` of query `q`, in units of its step, in both parts as operands for the products with keys.
//
// Queries as rows: a vector is the operand of one step; lane 4 (q % 8) + dim / 4 % 4 has both parts.
// KEYS_AS_ROWS: a vector is the right operands of steps k and k + 1; lane 8 q + dim / 4 % 4 has the high part, the lane 4
// further the low one. Where keys have scales of channels, a pair of steps has a second vector with what `scaled_part` needs.
__device__ __forceinline__ void stage_query(char* operands, int q, int dim, float x) {
    const int step = dim / (K_FORMAT == INT8 ? 32 : 16), quad = dim >> 2 & 3;
#if KEYS_AS_ROWS
    const int odd = step & 1;
    if (step / 2 >= PAIRED_STEPS) return;
    char* to = operands + (step / 2 * (QUERY_VECTORS / PAIRED_STEPS) * 32 + 8 * q + quad) * 16;
#else
    if (step >= KEY_STEPS) return;
    char* to = operands + ((q / HEADS * KEY_STEPS + step) * 32 + q % HEADS * 4 + quad) * 16;
#endif
#if K_FORMAT == INT8
    const int code = __float2int_rn(x), high = (code + 64) >> 7, low = code - high * 128, second = dim >> 4 & 1;
#if KEYS_AS_ROWS
    to += odd * 8 + second * 4 + (dim & 3);
    to[0] = (char)high;
    to[4 * 16] = (char)low;
#else
    to += second * 8 + (dim & 3);
    to[0] = (char)high;
    to[4] = (char)low;
#endif
#else
#if K_FORMAT == SIXTEEN_BIT
    const u16 high = (u16)pack16(x, 0.f), low = (u16)pack16(x - unpack16(high).x, 0.f);
#else
    const u16 high = (u16)pack_half(x, 0.f), low = (u16)pack_half(x - __half2float(__ushort_as_half(high)), 0.f);
#endif
    const int second = dim >> 1 & 1;  // pair of channels
#if !KEYS_AS_ROWS
    u16* part = reinterpret_cast<u16*>(to + second * 8) + (dim & 1);
    part[0] = high;
    part[2] = low;
#else
    // Scales of channels: first all pairs 4 t + 0..1, then 4 t + 2..3, which is how zeros meet them.
    u16* part = reinterpret_cast<u16*>(to + (CHANNEL_LEVELS ? second * 8 + odd * 4 : odd * 8 + second * 4)) + (dim & 1);
    part[0] = high;
    part[4 * 8] = low;
#if CHANNEL_LEVELS
    part[32 * 8] = 0;
    part[36 * 8] = high;
#endif
#endif
#endif
}

// Stores a block's queries in shared memory as operands, for exact rows and for pages.
template <class Words, class Shared>
__device__ __forceinline__ void stage_queries(Words& words, const Args& a, Shared& shared) {
#pragma unroll
    for (int j = 0; j * THREADS < TILES * K16 * 2 * 32; j++)
        if (const int i = threadIdx.x + j * THREADS; i < TILES * K16 * 2 * 32)
            shared.exact_query[i] = query_operand(words.exact[j], a.scale_log2);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j * WARPS < QUERIES; j++) {
        const int q = warp + j * WARPS;
        if (q >= PAGE_QUERIES) continue;
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < PADDED / 32; i++) {
            words.page[j][i] *= a.scale_log2;
            most = fmaxf(most, fabsf(words.page[j][i]));
        }
        for (int i = 16; i; i >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
#if K_FORMAT == INT8
        const float step = most / 16256.f, inverse = most > 0.f ? 16256.f / most : 0.f;
#elif K_FORMAT == SIXTEEN_BIT
        const float step = 1.f, inverse = 1.f;
#else
        // A power of two above all of them: fp16 has no range to spare.
        const u32 lift = QUERY_LIFT << 23, least = lift + 0x00800000u;
        const u32 power = min(max((__float_as_uint(most) & 0x7f800000u) + 0x00800000u, least), 0x7e800000u) - lift;
        const float step = __uint_as_float(power), inverse = __uint_as_float(0x7f000000u - power);
#endif
        if (lane == 0) shared.steps[q] = step;
#pragma unroll
        for (int i = 0; i < PADDED / 32; i++)
            stage_query(reinterpret_cast<char*>(shared.page_query), q, lane + 32 * i, words.page[j][i] * inverse);
    }
}

// Products of a tile of queries with the tokens of a page, of the queries' high and low parts.
struct KeySums {
#if KEYS_AS_ROWS  // [tokens 16 j and on][token g: high, low part; token g + 8: the same]
#if K_FORMAT == INT8
    int x[2][4];
#else
    float x[2][4], zero[2][4];  // zeros of channels: see multiply_keys
#endif
#elif K_FORMAT == INT8
    int x[4][4];
#else
    float x[4][4], zero[4];
#endif
};

// The keys of step `k` as operands.
struct KeyOperands {
#if K_FORMAT == INT8
    uint4 first, second;
#else
    u32 low[4], high[4];
    uint2 scale, base;
#endif
};

__device__ __forceinline__ KeyOperands key_operands(const char* stage, int k) {
    KeyOperands keys;
#if K_FORMAT == INT8
    keys.first = vector_of(stage, 2 * k);
    keys.second = 2 * k + 1 < KEY_TILES ? vector_of(stage, 2 * k + 1) : make_uint4(0, 0, 0, 0);
#elif K_FORMAT == INT4
    const uint4 codes = vector_of(stage, k >> 1);
    const u32 w0 = k & 1 ? codes.z : codes.x, w1 = k & 1 ? codes.w : codes.y;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 mask = i & 1 ? 0x00f000f0u : 0x000f000fu;
        keys.low[i] = w0 >> (i & 2 ? 8 : 0) & mask;
        keys.high[i] = w1 >> (i & 2 ? 8 : 0) & mask;
    }
    const char* scales = stage + KEY_SCALES_AT + (16 * k + 4 * (threadIdx.x & 3)) * 2;
    keys.scale = *reinterpret_cast<const uint2*>(scales);
    keys.base = *reinterpret_cast<const uint2*>(scales + 2 * PADDED);
#elif K_FORMAT == INT8_PER_CHANNEL
    const uint4 codes = vector_of(stage, k);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        keys.low[i] = __byte_perm((&codes.x)[i], 0, 0x4140);
        keys.high[i] = __byte_perm((&codes.x)[i], 0, 0x4342);
    }
    const char* scales = stage + KEY_SCALES_AT + (16 * k + 4 * (threadIdx.x & 3)) * 2;
    keys.scale = *reinterpret_cast<const uint2*>(scales);
    keys.base = *reinterpret_cast<const uint2*>(scales + 2 * PADDED);
#elif K_FORMAT == FP8
    const uint4 codes = vector_of(stage, k);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        keys.low[i] = fp8_to_half((&codes.x)[i]);
        keys.high[i] = fp8_to_half((&codes.x)[i] >> 16);
    }
#else
    const uint4 first = vector_of(stage, 2 * k), second = vector_of(stage, 2 * k + 1);
    keys.low[0] = first.x, keys.high[0] = first.y, keys.low[1] = first.z, keys.high[1] = first.w;
    keys.low[2] = second.x, keys.high[2] = second.y, keys.low[3] = second.z, keys.high[3] = second.w;
#endif
    return keys;
}

#if KEYS_AS_ROWS
// Products of all queries, whose parts are an operand of two registers, with the keys of a step.
__device__ __forceinline__ void multiply_step(KeySums& sums, u32 q0, u32 q1, const KeyOperands& keys) {
#pragma unroll
    for (int j = 0; j < 2; j++) {
#if K_FORMAT == INT8
        const uint4 codes = make_uint4((&keys.first.x)[2 * j], (&keys.first.x)[2 * j + 1], (&keys.second.x)[2 * j],
                                       (&keys.second.x)[2 * j + 1]);
        mma_int8(sums.x[j], codes, q0, q1);
#elif K_FORMAT == SIXTEEN_BIT
        mma_exact(sums.x[j], keys.low[2 * j], keys.low[2 * j + 1], keys.high[2 * j], keys.high[2 * j + 1], q0, q1);
#else
        mma_half(sums.x[j], keys.low[2 * j], keys.low[2 * j + 1], keys.high[2 * j], keys.high[2 * j + 1], q0, q1);
#endif
    }
}

#if CHANNEL_LEVELS
// A query's part times the scales of two channels. The high part's `error` is 0; the low part's is the high part, whose
// product's rounding error it carries.
__device__ __forceinline__ u32 scaled_part(u32 part, u32 error, u32 scale) {
    return multiply_add(part, scale, multiply_add(error, scale, negated(multiply(error, scale))));
}
#endif

// Products of all queries with the keys of steps k and k + 1.
__device__ __forceinline__ void multiply_keys(KeySums& sums, const uint4* operands, const char* stage, int k) {
    const uint4* vectors = operands + k / 2 * (QUERY_VECTORS / PAIRED_STEPS) * 32 + (threadIdx.x & 31);
    const uint4 q = load_query(vectors);
    KeyOperands first = key_operands(stage, k), second = {};
    if (k + 1 < KEY_STEPS) second = key_operands(stage, k + 1);
#if CHANNEL_LEVELS
    const uint4 error = load_query(vectors + 32);
    // Zeros of channels are the same for every token. As they are loaded, those of channels 4 t + 0..1 of both steps are rows
    // 0..7 of a left operand, and those of 4 t + 2..3 are rows 8..15. Of the product with the query's channels 4 t + 0..1 rows
    // 0..7 are needed, of that with 4 t + 2..3 rows 8..15.
    mma_half(sums.zero[0], first.base.x, first.base.y, second.base.x, second.base.y, q.x, q.y);
    mma_half(sums.zero[1], first.base.x, first.base.y, second.base.x, second.base.y, q.z, q.w);
    multiply_step(sums, scaled_part(q.x, error.x, first.scale.x), scaled_part(q.z, error.z, first.scale.y), first);
    if (k + 1 < KEY_STEPS)
        multiply_step(sums, scaled_part(q.y, error.y, second.scale.x), scaled_part(q.w, error.w, second.scale.y), second);
#else
    multiply_step(sums, q.x, q.y, first);
    if (k + 1 < KEY_STEPS) multiply_step(sums, q.z, q.w, second);
#endif
}
#else
// Products of a tile of queries, whose operand is `q`, with the keys of a step.
__device__ __forceinline__ void multiply_keys(KeySums& sums, uint4 q, const KeyOperands& keys) {
#if K_FORMAT == INT8
#pragma unroll
    for (int i = 0; i < 4; i++) mma_int8(sums.x[i], q, (&keys.first.x)[i], (&keys.second.x)[i]);
#else
#if CHANNEL_LEVELS
    mma_half(sums.zero, q.x, q.y, q.z, q.w, keys.base.x, keys.base.y);
    // The rounding error of the product goes into the low part, together with the query's own.
    const u32 a = multiply(q.x, keys.scale.x), b = multiply(q.z, keys.scale.y);
    q.y = multiply_add(q.y, keys.scale.x, multiply_add(q.x, keys.scale.x, negated(a)));
    q.w = multiply_add(q.w, keys.scale.y, multiply_add(q.z, keys.scale.y, negated(b)));
    q.x = a;
    q.z = b;
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if K_FORMAT == SIXTEEN_BIT
        mma_exact(sums.x[i], q.x, q.y, q.z, q.w, keys.low[i], keys.high[i]);
#else
        mma_half(sums.x[i], q.x, q.y, q.z, q.w, keys.low[i], keys.high[i]);
#endif
    }
#endif
}
#endif

// The scale that all keys of a page share.
__device__ __forceinline__ float key_page_scale(const char* stage) {
#if K_FORMAT == FP8
    return __uint_as_float((u32) reinterpret_cast<const u16*>(stage + KEY_SCALES_AT)[0] << 16);
#else
    return 1.f;
#endif
}

#if KEYS_AS_ROWS
// Score of token 8 i + g and query t.
__device__ __forceinline__ float key_score(const KeySums& sums, const char* stage, int i, float step) {
    const auto high = sums.x[i >> 1][2 * (i & 1)], low = sums.x[i >> 1][2 * (i & 1) + 1];
#if CHANNEL_LEVELS
    const float zero = (sums.zero[0][0] + sums.zero[0][1]) + (sums.zero[1][2] + sums.zero[1][3]);
#endif
#if K_FORMAT == INT8
    const u16 of = *reinterpret_cast<const u16*>(stage + KEY_SCALES_AT + (8 * i + (threadIdx.x >> 2 & 7)) * 2);
    return (float)(high * 128 + low) * (step * bf16_value(of));
#elif K_FORMAT == INT4
    return ((high + low) * (i & 1 ? CODE_ONE / 16.f : CODE_ONE) + zero) * step;
#elif K_FORMAT == INT8_PER_CHANNEL
    return ((high + low) * CODE_ONE + zero) * step;
#else
    return (high + low) * step;
#endif
}
#else
// Scores of tokens 8 i + 2 t + 0..1.
__device__ __forceinline__ float2 key_scores(const KeySums& sums, const char* stage, int i, float step) {
    float score[2];
#if K_FORMAT == INT8
    const u32 pair = *reinterpret_cast<const u32*>(stage + KEY_SCALES_AT + (8 * i + 2 * (threadIdx.x & 3)) * 2);
#endif
#pragma unroll
    for (int b = 0; b < 2; b++) {
#if K_FORMAT == INT8
        const float of = __uint_as_float(b ? pair & 0xffff0000u : pair << 16);
        score[b] = (float)(sums.x[i][b] * 128 + sums.x[i][2 + b]) * (step * of);
#elif K_FORMAT == INT4
        const float codes = sums.x[i][b] + sums.x[i][2 + b];
        score[b] = (codes * (i & 1 ? CODE_ONE / 16.f : CODE_ONE) + (sums.zero[0] + sums.zero[2])) * step;
#elif K_FORMAT == INT8_PER_CHANNEL
        score[b] = ((sums.x[i][b] + sums.x[i][2 + b]) * CODE_ONE + (sums.zero[0] + sums.zero[2])) * step;
#else
        score[b] = (sums.x[i][b] + sums.x[i][2 + b]) * step;
#endif
    }
    return make_float2(score[0], score[1]);
}
#endif

#if KEYS_AS_ROWS
// Scale and zero of V of token 8 i + g, as bf16: of one byte, the scale in the low half.
__device__ __forceinline__ u32 value_scale_of(const char* stage, int group, int i) {
    const int token = 8 * i + (threadIdx.x >> 2 & 7);
    const char* scales = stage + VALUE_SCALES_AT;
#if V_FORMAT == INT4
    return reinterpret_cast<const u32*>(scales)[group * PAGE + token];
#elif V_FORMAT == INT8
    return reinterpret_cast<const u16*>(scales)[token];
#elif V_FORMAT == FP8
    return reinterpret_cast<const u16*>(scales)[0];
#else
    return 0;
#endif
}

__device__ __forceinline__ float largest_scale(const char* stage) {
    float largest = 0.f;
#pragma unroll
    for (int group = 0; group < (V_FORMAT == INT4 ? GROUPS : 1); group++)
#pragma unroll
        for (int i = 0; i < (V_FORMAT == FP8 ? 1 : 4); i++)
            largest = fmaxf(largest, __uint_as_float(value_scale_of(stage, group, i) << 16));
    return largest;
}

__device__ __forceinline__ u32 transposed(u32 x) {
    u32 r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

// Makes the weights of tokens 8 i + g operands for one group of dims, scales of V included: of tokens 16 j + 0..7 in column 2
// q, of tokens 16 j + 8..15 in column 2 q + 1. Adds what the zeros of V contribute.
__device__ __forceinline__ void weigh_group(u32 (&p)[4], Sums& r, const float (&weight)[4], const char* stage, int group,
                                            float normal) {
    const bool odd = threadIdx.x & 4;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const float w0 = weight[2 * j], w1 = weight[2 * j + 1];
#if V_FORMAT == SIXTEEN_BIT
        const u32 both = pack16(w0, w1);
        const float2 rounded = unpack16(both);
        r.l[0] += rounded.x + rounded.y;
#else
        const u32 of0 = value_scale_of(stage, group, 2 * j), of1 = value_scale_of(stage, group, 2 * j + 1);
        const u32 both = pack_half(w0 * (__uint_as_float(of0 << 16) * normal), w1 * (__uint_as_float(of1 << 16) * normal));
#if V_FORMAT == INT4
        r.zero[0][group] += w0 * __uint_as_float(of0 & 0xffff0000u) + w1 * __uint_as_float(of1 & 0xffff0000u);
#elif V_FORMAT == INT8
        // Codes are VALUE_OFFSET too large, which `leave_pages` takes off.
        const float2 rounded = __half22float2(*reinterpret_cast<const __half2*>(&both));
        r.zero[0][0] += rounded.x + rounded.y;
#endif
#endif
        const u32 turned = transposed(both);
        p[2 * j] = odd ? 0 : turned;
        p[2 * j + 1] = odd ? turned : 0;
    }
}
#else
#if V_FORMAT == INT4
__device__ __forceinline__ uint2 value_scales(const char* stage, int group, int i) {
    return *reinterpret_cast<const uint2*>(stage + VALUE_SCALES_AT + (group * PAGE + 8 * i + 2 * (threadIdx.x & 3)) * 4);
}
#endif

// The largest scale of V that this lane multiplies by.
__device__ __forceinline__ float largest_scale(const char* stage) {
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
    largest = __uint_as_float((u32) reinterpret_cast<const u16*>(stage + VALUE_SCALES_AT)[0] << 16);
#endif
    return largest;
}

// Makes the tokens' weights operands for one group of dims, scales of V included, and adds what the zeros of V contribute.
__device__ __forceinline__ void weigh_group(u32 (&p)[TILES][4], Sums& r, const float (&weight)[TILES][8], const char* stage,
                                            int group, float normal) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if V_FORMAT == INT4
        const uint2 of = value_scales(stage, group, i);
        const float s0 = __uint_as_float(of.x << 16) * normal, z0 = __uint_as_float(of.x & 0xffff0000u);
        const float s1 = __uint_as_float(of.y << 16) * normal, z1 = __uint_as_float(of.y & 0xffff0000u);
#elif V_FORMAT == INT8
        const u32 pair = *reinterpret_cast<const u32*>(stage + VALUE_SCALES_AT + (8 * i + 2 * (threadIdx.x & 3)) * 2);
        const float s0 = __uint_as_float(pair << 16) * normal, s1 = __uint_as_float(pair & 0xffff0000u) * normal;
#elif V_FORMAT == FP8
        const float s0 = largest_scale(stage) * normal, s1 = s0;
#endif
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const float w0 = weight[tile][2 * i], w1 = weight[tile][2 * i + 1];
#if V_FORMAT == SIXTEEN_BIT
            p[tile][i] = pack16(w0, w1);
            const float2 rounded = unpack16(p[tile][i]);
            r.l[tile] += rounded.x + rounded.y;
#else
            p[tile][i] = pack_half(w0 * s0, w1 * s1);
#endif
#if V_FORMAT == INT4
            r.zero[tile][group] += w0 * z0 + w1 * z1;
#elif V_FORMAT == INT8
            // Codes are VALUE_OFFSET too large.
            const float2 rounded = __half22float2(*reinterpret_cast<__half2*>(&p[tile][i]));
            r.zero[tile][0] -= (rounded.x + rounded.y) * (VALUE_OFFSET / normal);
#endif
        }
    }
}
#endif

// The values of tile `m` of dims as operands: [tokens 0-15, 16-31][operand].
__device__ __forceinline__ void value_operands(u32 (&a)[2][4], const char* values, int m) {
#if V_FORMAT == SIXTEEN_BIT
    const uint4 first = vector_of(values, 2 * m), second = vector_of(values, 2 * m + 1);
    a[0][0] = first.x, a[0][1] = second.x, a[0][2] = first.y, a[0][3] = second.y;
    a[1][0] = first.z, a[1][1] = second.z, a[1][2] = first.w, a[1][3] = second.w;
#else
    const uint4 codes = vector_of(values, V_FORMAT == INT4 ? m >> 1 : m);
#pragma unroll
    for (int k = 0; k < 2; k++) {
#if V_FORMAT == INT4
        const u32 w = m & 1 ? (k ? codes.w : codes.z) : (k ? codes.y : codes.x);
        a[k][0] = w & 0x000f000fu;
        a[k][1] = w & 0x00f000f0u;
        a[k][2] = w >> 8 & 0x000f000fu;
        a[k][3] = w >> 8 & 0x00f000f0u;
#else
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
#endif
    }
#endif
}

__device__ __forceinline__ void multiply_values(float (&sum)[4], const u32 (&a)[4], u32 p0, u32 p1) {
#if V_FORMAT == SIXTEEN_BIT
    mma_exact(sum, a[0], a[1], a[2], a[3], p0, p1);
#else
    mma_half(sum, a[0], a[1], a[2], a[3], p0, p1);
#endif
}

#elif defined(TILE)  // Decode on CUDA cores.
#include "simt.cuh"

#define KEY_ZEROS (CHANNEL_LEVELS ? (PADDED + 127) / 128 : 1)
#define CODE_OFFSET (CHANNEL_LEVELS + 1.f)           // what `nibble` and `octet` add
#define VALUE_ZEROS (V_FORMAT == INT4 ? GROUPS : 0)  // sums of weight x zero of a query

struct Staged {
    float4 query[ROWS][PADDED / 4];  // in units of log2
#if K_FORMAT == INT8
    int2 codes[ROWS][D / 4];  // four channels' high parts and low parts
    float step[ROWS];
#elif CHANNEL_LEVELS
    float4 scaled[WARPS][TILE][PADDED / 4];
#endif
};

struct KeyScales {
#if CHANNEL_LEVELS
    uint2 scale[KEY_ZEROS], zero[KEY_ZEROS];  // of channels 4 (lane + 32 i) and on
#else
    float scale;
#endif
};

struct ValueScales {
#if V_FORMAT == INT4
    u32 pair[GROUPS];
#else
    float scale;
#endif
};

// The token that a lane scores and weighs.
__device__ __forceinline__ int my_token() { return 8 * (threadIdx.x & 3) + ((threadIdx.x & 31) >> 2); }

__device__ __forceinline__ KeyScales key_scales(const char* page) {
    const char* scales = page + KEY_SCALES_AT;
    KeyScales s = {};
#if CHANNEL_LEVELS
#pragma unroll
    for (int i = 0; i < KEY_ZEROS; i++) {
        const int channel = 4 * ((threadIdx.x & 31) + 32 * i);
        if (channel < PADDED) {
            s.scale[i] = __ldg(reinterpret_cast<const uint2*>(scales + 2 * channel));
            s.zero[i] = __ldg(reinterpret_cast<const uint2*>(scales + 2 * (PADDED + channel)));
        }
    }
#elif K_FORMAT == INT8
    s.scale = bf16_at(reinterpret_cast<const u16*>(scales) + my_token());
#elif K_FORMAT == FP8
    s.scale = bf16_at(reinterpret_cast<const u16*>(scales));
#endif
    return s;
}

__device__ __forceinline__ ValueScales value_scales(const char* page) {
    const char* scales = page + VALUE_SCALES_AT;
    ValueScales s = {};
#if V_FORMAT == INT4
#pragma unroll
    for (int i = 0; i < GROUPS; i++) s.pair[i] = __ldg(reinterpret_cast<const u32*>(scales) + i * PAGE + my_token());
#elif V_FORMAT == INT8
    s.scale = bf16_at(reinterpret_cast<const u16*>(scales) + my_token());
#elif V_FORMAT == FP8
    s.scale = bf16_at(reinterpret_cast<const u16*>(scales));
#else
    s.scale = 1.f;
#endif
    return s;
}

// 16 + element e of a word of int4 codes.
__device__ __forceinline__ float nibble(u32 word, int e) {
    const u32 moved = e < 5 ? word << (19 - 4 * e) : word >> (4 * e - 19);
    return __uint_as_float((moved & 0x780000u) | 0x41800000u);
}

// 256 + byte e of a word.
__device__ __forceinline__ float octet(u32 word, int e) {
    const u32 moved = e < 2 ? word << (15 - 8 * e) : word >> (8 * e - 15);
    return __uint_as_float((moved & 0x7f8000u) | 0x43800000u);
}

#define E4M3_ONE 0x1p120f  // the factor that `e4m3` omits
// Element e of a word of fp8 codes, without the factor E4M3_ONE; subnormal floats are exact too.
__device__ __forceinline__ float e4m3(u32 word, int e) {
    return __int_as_float(((int)(word << (24 - 8 * e)) >> 4) & 0x87f00000);
}

__device__ __forceinline__ float2 pair16(u32 word) {
#if EXACT_TYPE == BF16
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
#else
    return __half22float2(*reinterpret_cast<__half2*>(&word));
#endif
}

#if K_FORMAT == INT8
#define PARTS 2  // of the query
typedef int Dot;
#else
#define PARTS 1
typedef float Dot;
#endif

// Starting values of the products of a page's keys; scales of channels are folded into the warp's queries.
__device__ __forceinline__ void start_keys(Dot (&dots)[TILE][4][PARTS], Staged& staged, int row, const KeyScales& key_scale) {
#if CHANNEL_LEVELS
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    __syncwarp();
#pragma unroll
    for (int h = 0; h < TILE; h++) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < KEY_ZEROS; i++) {
            const int channels = lane + 32 * i;
            if (channels >= PADDED / 4) continue;
            const float4 q = staged.query[row + h][channels];
            const __half2* scale = reinterpret_cast<const __half2*>(&key_scale.scale[i]);
            const __half2* zero = reinterpret_cast<const __half2*>(&key_scale.zero[i]);
            const float2 a0 = __half22float2(scale[0]), a1 = __half22float2(scale[1]);
            const float2 z0 = __half22float2(zero[0]), z1 = __half22float2(zero[1]);
            staged.scaled[warp][h][channels] = make_float4(q.x * a0.x, q.y * a0.y, q.z * a1.x, q.w * a1.y);
            sum = fmaf(q.x, fmaf(-CODE_OFFSET, a0.x, z0.x), fmaf(q.y, fmaf(-CODE_OFFSET, a0.y, z0.y), sum));
            sum = fmaf(q.z, fmaf(-CODE_OFFSET, a1.x, z1.x), fmaf(q.w, fmaf(-CODE_OFFSET, a1.y, z1.y), sum));
        }
        // The four lanes of a group add up the starting values.
        for (int i = 4; i < 32; i <<= 1) sum += __shfl_xor_sync(FULL, sum, i);
#pragma unroll
        for (int i = 0; i < 4; i++) dots[h][i][0] = sum;
    }
    __syncwarp();
#endif
}

// Adds q.k over the channels of `COUNT` vectors of K, for tokens 8 i + g.
template <int COUNT>
__device__ __forceinline__ void multiply_keys(Dot (&dots)[TILE][4][PARTS], const uint4 (&k)[COUNT], int first,
                                              const Staged& staged, int row) {
    const int t = threadIdx.x & 3;
#if K_FORMAT == INT8
    const int2* codes = staged.codes[row];
#elif CHANNEL_LEVELS
    const float4(*query)[PADDED / 4] = staged.scaled[threadIdx.x >> 5];
#else
    const float4(*query)[PADDED / 4] = staged.query + row;
#endif
#pragma unroll
    for (int r = 0; r < COUNT; r++) {
        const u32* words = &k[r].x;
#if K_FORMAT == INT8
#pragma unroll
        for (int h = 0; h < TILE; h++) {
            const int2 q = codes[h * (D / 4) + 4 * (first + r) + t];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                dots[h][i][0] = __dp4a((int)words[i], q.x, dots[h][i][0]);
                dots[h][i][1] = __dp4a((int)words[i], q.y, dots[h][i][1]);
            }
        }
#elif K_FORMAT == SIXTEEN_BIT
        const int i = 2 * ((first + r) & 1);
#pragma unroll
        for (int h = 0; h < TILE; h++) {
            const float4 q = query[h][4 * ((first + r) >> 1) + t];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float2 a = pair16(words[2 * j]), b = pair16(words[2 * j + 1]);
                Dot& dot = dots[h][i + j][0];
                dot = fmaf(q.x, a.x, fmaf(q.y, a.y, fmaf(q.z, b.x, fmaf(q.w, b.y, dot))));
            }
        }
#else
        const int COLUMNS = K_FORMAT == INT4 ? 2 : 1;  // of 16 channels
#pragma unroll
        for (int tile = 0; tile < COLUMNS; tile++) {
            float x[4][4];  // [token][channel]
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    x[i][c] = K_FORMAT == INT4               ? nibble(words[2 * tile + (c >> 1)], 4 * (c & 1) + i)
                              : K_FORMAT == INT8_PER_CHANNEL ? octet(words[i], c)
                                                             : e4m3(words[i], c);
#pragma unroll
            for (int h = 0; h < TILE; h++) {
                const float4 q = query[h][4 * (COLUMNS * (first + r) + tile) + t];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    Dot& dot = dots[h][i][0];
                    dot = fmaf(q.x, x[i][0], fmaf(q.y, x[i][1], fmaf(q.z, x[i][2], fmaf(q.w, x[i][3], dot))));
                }
            }
        }
#endif
    }
}

// Sum over the four lanes of a group, of token 8 t + g.
__device__ __forceinline__ Dot meet(Dot a, Dot b, Dot c, Dot d) {
    const int t = threadIdx.x & 3;
    const Dot x = (t & 2 ? c : a) + __shfl_xor_sync(FULL, t & 2 ? a : c, 2);
    const Dot y = (t & 2 ? d : b) + __shfl_xor_sync(FULL, t & 2 ? b : d, 2);
    return (t & 1 ? y : x) + __shfl_xor_sync(FULL, t & 1 ? x : y, 1);
}

// Score of a lane's token.
__device__ __forceinline__ float token_score(const Dot (&dots)[4][PARTS], const Staged& staged, int row,
                                             const KeyScales& key_scale) {
#if K_FORMAT == INT8
    Dot sums[4];
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] = dots[i][0] * 128 + dots[i][1];
    return (float)meet(sums[0], sums[1], sums[2], sums[3]) * (staged.step[row] * key_scale.scale);
#else
    const float score = meet(dots[0][0], dots[1][0], dots[2][0], dots[3][0]);
#if K_FORMAT == FP8
    return score * E4M3_ONE * key_scale.scale;
#else
    return score;
#endif
#endif
}

// Collects the weights of tokens 8 i + 2 t + j from the lanes, which have one token each.
__device__ __forceinline__ void share_weights(float (&weights)[8], float mine) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < 8; n++) weights[n] = __shfl_sync(FULL, mine, 4 * (2 * t + (n & 1)) + (n >> 1));
}

// Shares the weights of the lanes' tokens where one scale serves all dims of a token, and adds what the zeros of V contribute.
__device__ __forceinline__ void start_values(float (&weights)[8], float (&zeros)[VALUE_ZEROS ? VALUE_ZEROS : 1], float p,
                                             const ValueScales& value_scale) {
#if V_FORMAT == INT4
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        const u32 pair = value_scale.pair[i];
        const float scale = __uint_as_float(pair << 16), zero = __uint_as_float(pair & 0xffff0000u);
        zeros[i] = fmaf(p, fmaf(-16.f, scale, zero), zeros[i]);
    }
#else
    share_weights(weights, p * value_scale.scale);
#endif
}

// Adds the weighted values of `COUNT` vectors of V; `weights` are those of the int4 group of the previous vectors.
template <int COUNT>
__device__ __forceinline__ void multiply_values(float (&acc)[TILE][VALUE_TILES][2], float (&weights)[TILE][8],
                                                const uint4 (&v)[COUNT], int first, const float (&p)[TILE],
                                                const ValueScales& scales) {
#pragma unroll
    for (int row = 0; row < COUNT; row++) {
        const u32* words = &v[row].x;
#if V_FORMAT == SIXTEEN_BIT
        const int tile = (first + row) >> 1, d = (first + row) & 1;
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const float2 x = pair16(words[w]);
#pragma unroll
            for (int h = 0; h < TILE; h++)
                acc[h][tile][d] = fmaf(weights[h][2 * w], x.x, fmaf(weights[h][2 * w + 1], x.y, acc[h][tile][d]));
        }
#elif V_FORMAT == INT4
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int tile = 2 * (first + row) + half, group = tile / GROUP_TILES;
            if (group >= GROUPS) continue;
            if (tile % GROUP_TILES == 0) {
#pragma unroll
                for (int h = 0; h < TILE; h++) share_weights(weights[h], p[h] * __uint_as_float(scales.pair[group] << 16));
            }
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int d = 0; d < 2; d++) {
                    const float x = nibble(words[2 * half + (n >> 2)], 4 * (n & 1) + (n & 2) + d);
#pragma unroll
                    for (int h = 0; h < TILE; h++) acc[h][tile][d] = fmaf(weights[h][n], x, acc[h][tile][d]);
                }
        }
#else
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int d = 0; d < 2; d++) {
                const u32 word = words[2 * d + (n >> 2)];
                const int e = n & 3;
                // 0x4B0000nn is 8388608 + nn; codes of V are stored as code + 128.
                const float x = V_FORMAT == FP8
                                    ? e4m3(word, e) * E4M3_ONE
                                    : __uint_as_float(__byte_perm(word, 0x4b000000u, 0x7440 + e)) - (8388608.f + VALUE_OFFSET);
#pragma unroll
                for (int h = 0; h < TILE; h++) acc[h][first + row][d] = fmaf(weights[h][n], x, acc[h][first + row][d]);
            }
#endif
    }
}

// Stores a block's queries in shared memory; for int8 keys also as codes.
__device__ __forceinline__ void stage_queries(Staged& staged, const Args& a, const Problem& p) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int row = warp; row < ROWS; row += WARPS) {
        const float* from = a.query + (p.head * a.group + p.first_query + row) * D;
        float4 x[(PADDED + 127) / 128];
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < (PADDED + 127) / 128; i++) {
            const int dim = 4 * (lane + 32 * i);
            x[i] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (row < p.queries && dim < D) x[i] = __ldg(reinterpret_cast<const float4*>(from + dim));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                (&x[i].x)[j] *= a.scale_log2;
                most = fmaxf(most, fabsf((&x[i].x)[j]));
            }
            if (dim < PADDED) staged.query[row][dim / 4] = x[i];
        }
#if K_FORMAT == INT8
        for (int i = 16; i; i >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
        const float inverse = most > 0.f ? 16256.f / most : 0.f;
        if (lane == 0) staged.step[row] = most / 16256.f;
#pragma unroll
        for (int i = 0; i < (PADDED + 127) / 128; i++) {
            u32 high = 0, low = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int code = __float2int_rn((&x[i].x)[j] * inverse), top = (code + 64) >> 7;
                high |= (u32)(top & 255) << (8 * j);
                low |= (u32)((code - top * 128) & 255) << (8 * j);
            }
            if (4 * (lane + 32 * i) < D) staged.codes[row][lane + 32 * i] = make_int2((int)high, (int)low);
        }
#endif
    }
}

#else  // Storing and reading back. One block of STORE_THREADS threads.

// Where a code is in a vector of 16 bytes.
struct CodeIndex {
    int word, element;
};

template <int BITS>
__device__ __forceinline__ u32 code_of(const uint4& vector, CodeIndex at) {
    return (&vector.x)[at.word] >> (BITS * at.element) & ((1u << BITS) - 1);
}

// The code of channel `j` of the `four`th four adjacent channels of one token in a vector of K.
__device__ __forceinline__ CodeIndex key_code_index(int four, int j) {
#if K_BITS == 4
    return {2 * (four >> 2) + (j >> 1), (four & 3) + 4 * (j & 1)};
#elif K_BITS == 16
    return {2 * four + (j >> 1), j & 1};
#else
    return {four, j};
#endif
}

// Group of the dims that share int4 scales, of a word of a vector of row `row` of V.
__device__ __forceinline__ int value_group(int row, int word) {
#if V_FORMAT == INT4
    return GROUPS == 1 ? 0 : min((2 * row + (word >> 1)) / GROUP_TILES, GROUPS - 1);
#else
    return 0;
#endif
}

__device__ __forceinline__ float bf16_up(float x, u32& bits) {  // x not negative
    bits = (__float_as_uint(x) + 0xffffu) >> 16;
    return __uint_as_float(bits << 16);
}

__device__ __forceinline__ float bf16_down(float x, u32& bits) {
    bits = (__float_as_uint(x) + (x < 0.f || __float_as_uint(x) == 0x80000000u ? 0xffffu : 0u)) >> 16;
    return __uint_as_float(bits << 16);
}

__device__ __forceinline__ u32 affine_code(float x, float zero, float scale, int largest) {
    const float code = fminf(fmaxf(rintf(__fdiv_rn(x - zero, scale)), 0.f), (float)largest);
    return scale > 0.f ? (u32)code : 0u;
}

// Scales of int8 rows: eight threads a token.
__device__ __forceinline__ void scales_int8(PageTile& tile, u16* scales) {
    const int token = threadIdx.x >> 3, part = threadIdx.x & 7;
    float most = 0.f;
    for (int d = part; d < D; d += 8) most = fmaxf(most, fabsf(tile.x[token][d]));
    for (int i = 4; i; i >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
    u32 bits;
    const float scale = bf16_up(__fdiv_rn(most, (float)INT8_LARGEST), bits);
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
        const u32 power = (__float_as_uint(__fdiv_rn(most, (float)FP8_LARGEST)) + 0x7fffffu) & 0x7f800000u;
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

// Scales of a page of K, to the tile and to memory.
__device__ __forceinline__ void store_key_scales(PageTile& tile, u16* scales) {
#if CHANNEL_LEVELS
    for (int c = threadIdx.x; c < PADDED; c += STORE_THREADS) {
        float low = c < D ? tile.x[0][c] : 0.f, high = low;
        for (int i = 1; i < PAGE; i++) {
            const float x = c < D ? tile.x[i][c] : 0.f;
            low = fminf(low, x);
            high = fmaxf(high, x);
        }
        const __half zero = __float2half_rd(low);
        const __half scale = __float2half_ru(__fdiv_rn(high - __half2float(zero), (float)CHANNEL_LEVELS));
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
}

__device__ __forceinline__ void store_value_scales(PageTile& tile, u16* scales) {
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
        const float zero = bf16_down(low, zero_bits), scale = bf16_up(__fdiv_rn(high - zero, (float)INT4_LARGEST), scale_bits);
        tile.scale[group * PAGE + token] = scale;
        tile.zero[group * PAGE + token] = zero;
        reinterpret_cast<u32*>(scales)[group * PAGE + token] = scale_bits | zero_bits << 16;
    }
#elif V_FORMAT == INT8
    scales_int8(tile, scales);
#elif V_FORMAT == FP8
    scale_fp8(tile, scales);
#endif
}

// The code of an element of K.
__device__ __forceinline__ u32 key_code(const PageTile& tile, Element at) {
#if CHANNEL_LEVELS
    return affine_code(tile.x[at.token][at.dim], tile.zero[at.dim], tile.scale[at.dim], CHANNEL_LEVELS);
#elif K_FORMAT == SIXTEEN_BIT
    return code16(tile, at);
#else
    return code8(tile, K_FORMAT, at, 0);
#endif
}

__device__ __forceinline__ u32 value_code(const PageTile& tile, Element at) {
#if V_FORMAT == INT4
    const int of = at.dim / V_GROUP * PAGE + at.token;
    return affine_code(tile.x[at.token][at.dim], tile.zero[of], tile.scale[of], INT4_LARGEST);
#elif V_FORMAT == SIXTEEN_BIT
    return code16(tile, at);
#else
    return code8(tile, V_FORMAT, at, V_FORMAT == INT8 ? VALUE_OFFSET : 0);
#endif
}

__device__ __forceinline__ float half_value(u32 bits) { return __half2float(__ushort_as_half((u16)bits)); }

__device__ __forceinline__ float number16(u32 code) { return EXACT_TYPE == BF16 ? bf16_value(code) : half_value(code); }

__device__ __forceinline__ float number_fp8(u32 code) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)code, __NV_E4M3)));
}

// The number that code `code` of K at `at` represents.
__device__ __forceinline__ float key_number(u32 code, Element at, const u16* scales) {
#if CHANNEL_LEVELS
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
#endif
