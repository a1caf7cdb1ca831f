// The shared memory of a block of decode_pages.cu, and how queries are stored there as operands, for exact rows and for pages.
#pragma once
#include "attend.cuh"
#include "pages.cuh"

#define BULK (__CUDA_ARCH__ >= 900)

#define QUERIES (HEADS * TILES)
#define KEY_SCALES_AT KEY_PAGE
#define VALUES_AT (KEY_SCALES_AT + (K_FORMAT == FP8 ? 16 : KEY_SCALES))
#define VALUE_SCALES_AT (VALUES_AT + VALUE_PAGE)
#define PAGE_BYTES (VALUE_SCALES_AT + (V_FORMAT == FP8 ? 16 : VALUE_SCALES))
#define STAGE ((PAGE_BYTES + 127) / 128 * 128)
#define ZEROS (V_FORMAT == INT4 ? GROUPS : V_FORMAT == INT8 ? 1 : 0)
#define CODE_ONE 16777216.f  // 2^24: the inverse of a code's bit 0 as an fp16 number
#define PAIR (2 * D + 8)     // floats of two queries, apart so that lanes meet different banks

#define EARLY (WARPS >= 8 && D <= 128)  // otherwise there are no registers for queries and exact rows in flight
#define KEY_STEPS (K_FORMAT == INT8 ? (KEY_TILES + 1) / 2 : KEY_TILES)

struct Shared {
    char stages[WARPS][STAGES][STAGE];
    float sums[WARPS][QUERIES / 2 * PAIR];
    float2 sums_ml[WARPS][QUERIES];
    uint4 exact_query[TILES * K16 * 2 * 32], page_query[TILES * KEY_STEPS * 32];
    float steps[QUERIES];
    u64 arrived[WARPS][STAGES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host allocates another size");

// Queries on their way to shared memory: for exact rows and for pages.
struct Words {
    float4 exact[(TILES * K16 * 2 * 32 + THREADS - 1) / THREADS];
    float page[(QUERIES + WARPS - 1) / WARPS][PADDED / 32];
};

__device__ __forceinline__ void load_queries(Words& words, const Args& a, const Problem& p) {
    const float* from = a.query + (p.head * a.group + p.first_query) * D;
#pragma unroll
    for (int j = 0; j * THREADS < TILES * K16 * 2 * 32; j++) {
        const int i = threadIdx.x + j * THREADS, item = i % (K16 * 2 * 32), dim = operand_dim(item);
        const int q = i / (K16 * 2 * 32) * HEADS + ((i & 31) >> 2);
        words.exact[j] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (q < p.queries && dim < D) words.exact[j] = *reinterpret_cast<const float4*>(from + (size_t)q * D + dim);
    }
#pragma unroll
    for (int j = 0; j * WARPS < QUERIES; j++)
#pragma unroll
        for (int i = 0; i < PADDED / 32; i++) {
            const int q = (threadIdx.x >> 5) + j * WARPS, dim = (threadIdx.x & 31) + 32 * i;
            words.page[j][i] = q < p.queries && dim < D ? from[(size_t)q * D + dim] : 0.f;
        }
}

// Stores them there as operands.
__device__ __forceinline__ void stage_queries(Words& words, const Args& a, Shared& shared) {
#pragma unroll
    for (int j = 0; j * THREADS < TILES * K16 * 2 * 32; j++)
        if (const int i = threadIdx.x + j * THREADS; i < TILES * K16 * 2 * 32)
            shared.exact_query[i] = query_operand(words.exact[j], a.scale_log2);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j * WARPS < QUERIES; j++) {
        const int q = warp + j * WARPS;
        if (q >= QUERIES) continue;
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < PADDED / 32; i++) {
            words.page[j][i] *= a.scale_log2;
            most = fmaxf(most, fabsf(words.page[j][i]));
        }
        for (int i = 16; i; i >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
        char* tile = reinterpret_cast<char*>(shared.page_query + q / HEADS * KEY_STEPS * 32);
#if K_FORMAT == INT8
        const float step = most / 16256.f, inverse = most > 0.f ? 16256.f / most : 0.f;
#elif K_FORMAT == SIXTEEN_BIT
        const float step = 1.f, inverse = 1.f;
#else
        // A power of two above all of them: fp16 has no range to spare.
        const u32 power = min((__float_as_uint(most) & 0x7f800000u) + 0x00800000u, 0x7e800000u);
        const float step = __uint_as_float(power), inverse = __uint_as_float(0x7f000000u - power);
#endif
        if (lane == 0) shared.steps[q] = step;
#pragma unroll
        for (int i = 0; i < PADDED / 32; i++) {
            const int dim = lane + 32 * i, lanes = q % HEADS * 4 + (dim >> 2 & 3);
#if K_FORMAT == INT8
            const int code = __float2int_rn(words.page[j][i] * inverse), high = (code + 64) >> 7;
            char* to = tile + ((dim >> 5) * 32 + lanes) * 16 + (dim >> 4 & 1) * 8 + (dim & 3);
            to[0] = (char)high;
            to[4] = (char)(code - high * 128);
#else
            if ((dim >> 4) >= KEY_STEPS) continue;
            u16* to = reinterpret_cast<u16*>(tile + ((dim >> 4) * 32 + lanes) * 16 + (dim >> 1 & 1) * 8 + (dim & 1) * 2);
            const float scaled = words.page[j][i] * inverse;
#if K_FORMAT == SIXTEEN_BIT
            const u32 high = pack16(scaled, 0.f), low = pack16(scaled - unpack16(high).x, 0.f);
#else
            const u32 high = pack_half(scaled, 0.f), low = pack_half(scaled - __half2float(__ushort_as_half((u16)high)), 0.f);
#endif
            to[0] = (u16)high;
            to[2] = (u16)low;
#endif
        }
    }
}
