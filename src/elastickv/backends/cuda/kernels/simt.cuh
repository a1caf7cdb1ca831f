// Attention on CUDA cores over rows of 16 or 32 bit, and the merge of a block's warps.
//
// Eight lanes hold a row in 16-byte pieces, so a warp loads four tokens at once. Each of these four lane groups has its own
// softmax; they are merged at the end. All query heads of a tile share the rows that were read.
#pragma once
#include "common.cuh"

// Macros: TILE query heads of a tile.
#define ROWS (TILE * QTILES)
#define CHUNK (COLD_TYPE == COLD_INT8 ? 16 : 16 / EXACT_BYTES)  // dims that a lane holds together
#define CHUNKS ((D + 8 * CHUNK - 1) / (8 * CHUNK))
#define PIECES (CHUNK * EXACT_BYTES / 16)  // loads of an exact row per chunk
#define WORDS (CHUNKS * CHUNK)
#define DEPTH (WORDS > 16 ? 2 : 4)  // tokens of a lane group in flight
#define INT_WORDS (COLD_TYPE == COLD_INT8 ? CHUNKS * 4 : 1)

struct Running {
    float acc[TILE][WORDS];
    float m[TILE], l[TILE];
};

struct Query {
    float x[TILE][WORDS];
#if COLD_TYPE == COLD_INT8
    int high[TILE][INT_WORDS], low[TILE][INT_WORDS];
    float step[TILE];
#endif
};

__device__ __forceinline__ int chunk_dim(int chunk, int part) { return (chunk * 8 + part) * CHUNK; }

__device__ __forceinline__ void expand(const uint4& v, float* out) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 w = (&v.x)[i];
#if EXACT_TYPE == FP32
        out[i] = __uint_as_float(w);
#elif EXACT_TYPE == BF16
        out[2 * i] = __uint_as_float(w << 16);
        out[2 * i + 1] = __uint_as_float(w & 0xffff0000u);
#else
        float2 f = __half22float2(*reinterpret_cast<__half2*>(&w));
        out[2 * i] = f.x;
        out[2 * i + 1] = f.y;
#endif
    }
}

__device__ __forceinline__ float sum8(float v) {
    v += __shfl_xor_sync(FULL, v, 1);
    v += __shfl_xor_sync(FULL, v, 2);
    return v + __shfl_xor_sync(FULL, v, 4);
}

// Adds DEPTH tokens with scores `score`; `value(d, out)` writes the value row of token d to `out`.
template <typename Value>
__device__ __forceinline__ void accumulate(Running& r, const float (&score)[DEPTH][TILE], Value value) {
    float weight[DEPTH][TILE];
#pragma unroll
    for (int h = 0; h < TILE; h++) {
        float top = r.m[h];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) top = fmaxf(top, score[d][h]);
        if (top > r.m[h]) {
            float alpha = exp2_fast(r.m[h] - top);
            r.m[h] = top;
            r.l[h] *= alpha;
#pragma unroll
            for (int i = 0; i < WORDS; i++) r.acc[h][i] *= alpha;
        }
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            weight[d][h] = exp2_fast(score[d][h] - top);
            r.l[h] += weight[d][h];
        }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
        float v[WORDS];
        value(d, v);
#pragma unroll
        for (int h = 0; h < TILE; h++)
#pragma unroll
            for (int i = 0; i < WORDS; i++) r.acc[h][i] = fmaf(weight[d][h], v[i], r.acc[h][i]);
    }
}

template <bool RING>
__device__ __forceinline__ void attend_exact(Running& r, const Args& a, const Span& s, const Query& query, const char* keys,
                                             const char* values, int n, int unit, int end, float bias) {
    const int lane = threadIdx.x & 31, rank = lane >> 3, part = lane & 7;
    const int steps = EXACT_UNIT / (4 * DEPTH);
    auto load = [&](uint4(&to)[DEPTH][CHUNKS* PIECES], const char* plane, int step) {
        const int first = ((step / steps) * WARPS_PER_TILE + unit) * EXACT_UNIT + step % steps * 4 * DEPTH;
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            int token = min(first + 4 * d + rank, n - 1);
            const char* p = plane + (size_t)(u32)(RING ? exact_row(a, s, token) : token) * EXACT_ROW;
#pragma unroll
            for (int c = 0; c < CHUNKS * PIECES; c++) {
                int dim = chunk_dim(c / PIECES, part) + c % PIECES * (16 / EXACT_BYTES);
                to[d][c] = dim < D ? load16(p + dim * EXACT_BYTES) : make_uint4(0, 0, 0, 0);
            }
        }
    };
    if (unit >= end) return;
    const int count = (end - unit + WARPS_PER_TILE - 1) / WARPS_PER_TILE * steps;
    uint4 k[DEPTH][CHUNKS * PIECES], v[DEPTH][CHUNKS * PIECES];
    load(k, keys, 0);
    for (int step = 0; step < count; step++) {
        load(v, values, step);
        const int first = ((step / steps) * WARPS_PER_TILE + unit) * EXACT_UNIT + step % steps * 4 * DEPTH;
        float score[DEPTH][TILE];
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            float x[WORDS];
#pragma unroll
            for (int c = 0; c < CHUNKS * PIECES; c++) expand(k[d][c], x + c * (16 / EXACT_BYTES));
#pragma unroll
            for (int h = 0; h < TILE; h++) {
                float sum = 0.f;
#pragma unroll
                for (int i = 0; i < WORDS; i++) sum = fmaf(query.x[h][i], x[i], sum);
                sum = sum8(sum) + bias;
                score[d][h] = first + 4 * d + rank < n ? sum : -INFINITY;
            }
        }
        if (step + 1 < count) load(k, keys, step + 1);
        accumulate(r, score, [&](int d, float* out) {
#pragma unroll
            for (int c = 0; c < CHUNKS * PIECES; c++) expand(v[d][c], out + c * (16 / EXACT_BYTES));
        });
    }
}

__device__ __forceinline__ float bf16_at(const u16* p) { return __uint_as_float((u32)__ldg(p) << 16); }

#define TREE_BYTES (WARPS / 2 * 8 * 4 * TILE * WORDS)
#define MERGE_BYTES (THREADS * 32)
#define SCRATCH_BYTES (TREE_BYTES > MERGE_BYTES ? TREE_BYTES : MERGE_BYTES)

__device__ __forceinline__ void reduce_warps(Running& r, float* scratch, float2* scratch_ml) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, part = lane & 7;
    // The four lane groups of a warp first.
#pragma unroll
    for (int h = 0; h < TILE; h++)
#pragma unroll
        for (int x = 8; x < 32; x <<= 1) {
            float m = __shfl_xor_sync(FULL, r.m[h], x), l = __shfl_xor_sync(FULL, r.l[h], x), top = fmaxf(r.m[h], m);
            float mine = exp2_fast(r.m[h] - top), theirs = exp2_fast(m - top);
            // Both lanes of an exchange must form the same sum in the same order.
            bool swap = lane & x;
            r.l[h] = swap ? l * theirs + r.l[h] * mine : r.l[h] * mine + l * theirs;
            r.m[h] = top;
#pragma unroll
            for (int i = 0; i < WORDS; i++) r.acc[h][i] = r.acc[h][i] * mine + __shfl_xor_sync(FULL, r.acc[h][i], x) * theirs;
        }
#pragma unroll
    for (int have = WARPS, half; have > QTILES; have = half) {
        half = (have / QTILES + 1) / 2 * QTILES;
        __syncthreads();
        if (warp >= half && warp < have && lane < 8) {
#pragma unroll
            for (int h = 0; h < TILE; h++) {
#pragma unroll
                for (int i = 0; i < WORDS; i++) scratch[(((warp - half) * TILE + h) * WORDS + i) * 8 + part] = r.acc[h][i];
                if (lane == 0) scratch_ml[(warp - half) * TILE + h] = make_float2(r.m[h], r.l[h]);
            }
        }
        __syncthreads();
        if (warp < have - half) {
#pragma unroll
            for (int h = 0; h < TILE; h++) {
                float2 other = scratch_ml[warp * TILE + h];
                float top = fmaxf(r.m[h], other.x), mine = exp2_fast(r.m[h] - top), theirs = exp2_fast(other.x - top);
                r.m[h] = top;
                r.l[h] = r.l[h] * mine + other.y * theirs;
#pragma unroll
                for (int i = 0; i < WORDS; i++)
                    r.acc[h][i] = r.acc[h][i] * mine + scratch[((warp * TILE + h) * WORDS + i) * 8 + part] * theirs;
            }
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void write_partial(const Args& a, const Problem& p, int segment, const Running& r) {
    const int tile = threadIdx.x >> 5, lane = threadIdx.x & 31;
    if (tile >= QTILES || lane >= 8) return;
#pragma unroll
    for (int h = 0; h < TILE; h++) {
        const int q = tile * TILE + h;
        if (q >= p.queries) continue;
        const size_t row = partial_row(p, blockIdx.x, segment, q, ROWS);
        if (lane == 0) __stcg(a.partial_ml + row, make_float2(r.m[h], r.l[h]));
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            const int dim = chunk_dim(i / CHUNK, lane) + i % CHUNK;
            if (dim < D)
                __stcg(reinterpret_cast<float4*>(a.partial + row * D + dim),
                       make_float4(r.acc[h][i], r.acc[h][i + 1], r.acc[h][i + 2], r.acc[h][i + 3]));
        }
    }
}

__device__ __forceinline__ void load_queries(const Args& a, const Problem& p, Query& query) {
    const int tile = (threadIdx.x >> 5) % QTILES, part = threadIdx.x & 7;
#pragma unroll
    for (int h = 0; h < TILE; h++) {
        const int q = tile * TILE + h;
        const float* from = a.query + (p.head * a.group + p.first_query + q) * D;
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            const int dim = chunk_dim(i / CHUNK, part) + i % CHUNK;
            query.x[h][i] = q < p.queries && dim < D ? __ldg(from + dim) * a.scale_log2 : 0.f;
            most = fmaxf(most, fabsf(query.x[h][i]));
        }
#if COLD_TYPE == COLD_INT8
        for (int x = 1; x < 8; x <<= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, x));
        const float inverse = most > 0.f ? 16256.f / most : 0.f;
        query.step[h] = most / 16256.f;
#pragma unroll
        for (int i = 0; i < INT_WORDS; i++) {
            u32 high = 0, low = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int code = __float2int_rn(query.x[h][4 * i + j] * inverse), top = (code + 64) >> 7;
                high |= (u32)(top & 255) << (8 * j);
                low |= (u32)((code - top * 128) & 255) << (8 * j);
            }
            query.high[h][i] = (int)high;
            query.low[h][i] = (int)low;
        }
#endif
    }
}
