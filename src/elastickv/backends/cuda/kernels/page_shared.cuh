// The shared memory of a block of page_decode.cuh, and how queries are stored there as operands, for exact rows and for pages.
#pragma once
#include "format_codecs.cuh"

#define BULK (__CUDA_ARCH__ >= 900)

#define RESULTS (KEYS_AS_ROWS ? 4 : QUERIES)  // queries of which a warp leaves results
#define PAIR (2 * D + 8)                      // floats of two queries, apart so that lanes meet different banks

#define EARLY (WARPS >= 8 && D <= 128)  // otherwise there are no registers for queries and exact rows in flight

struct Shared {
    char stages[WARPS][STAGES][PAGE_STRIDE];
    float sums[WARPS][RESULTS / 2 * PAIR];
    float2 sums_ml[WARPS][RESULTS];
    uint4 exact_query[TILES * K16 * 2 * 32], page_query[TILES * QUERY_VECTORS * 32];
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
#if BLOCK_TABLES
    const char* from =
        reinterpret_cast<const char*>(a.query) +
        ((p.head / a.kv_heads) * a.query_stride + (p.head % a.kv_heads * a.group + p.first_query) * D) * EXACT_BYTES;
    auto four = [&](size_t at) {
        const uint2 raw = __ldg(reinterpret_cast<const uint2*>(from + at * EXACT_BYTES));
        const float2 low = unpack16(raw.x), high = unpack16(raw.y);
        return make_float4(low.x, low.y, high.x, high.y);
    };
    auto one = [&](size_t at) { return unpack16((u32)__ldg(reinterpret_cast<const u16*>(from) + at)).x; };
#else
    const float* from = a.query + (p.head * a.group + p.first_query) * D;
    auto four = [&](size_t at) { return *reinterpret_cast<const float4*>(from + at); };
    auto one = [&](size_t at) { return from[at]; };
#endif
#pragma unroll
    for (int j = 0; j * THREADS < TILES * K16 * 2 * 32; j++) {
        const int i = threadIdx.x + j * THREADS, item = i % (K16 * 2 * 32), dim = operand_dim(item);
        const int q = i / (K16 * 2 * 32) * HEADS + ((i & 31) >> 2);
        words.exact[j] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (q < p.queries && dim < D) words.exact[j] = four((size_t)q * D + dim);
    }
#pragma unroll
    for (int j = 0; j * WARPS < QUERIES; j++)
#pragma unroll
        for (int i = 0; i < PADDED / 32; i++) {
            const int q = (threadIdx.x >> 5) + j * WARPS, dim = (threadIdx.x & 31) + 32 * i;
            words.page[j][i] = q < p.queries && dim < D ? one((size_t)q * D + dim) : 0.f;
        }
}
