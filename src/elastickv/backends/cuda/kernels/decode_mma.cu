// Decode attention on tensor cores (SM 8.0 and newer): blocks divide the work by the lengths in device memory.
#include "attend.cuh"

// A warp with more than EARLY_FROM units prefetches EARLY of them into L2 while the query loads; with fewer units that costs
// more than it hides.
#ifndef EARLY
#define EARLY 2
#endif
#ifndef EARLY_FROM
#define EARLY_FROM 3
#endif

#define TREE_BYTES (WARPS / 2 * 32 * 16 * (SETS * 4))
#define MERGE_BYTES (THREADS * 32)
#define SCRATCH_BYTES (TREE_BYTES > MERGE_BYTES ? TREE_BYTES : MERGE_BYTES)

// Merges the warps of a tile into its first warps.
__device__ __forceinline__ void reduce_warps(Running& r, float4* scratch, float2* scratch_ml) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = lane & 3;
    r.l += __shfl_xor_sync(FULL, r.l, 1);
    r.l += __shfl_xor_sync(FULL, r.l, 2);
#pragma unroll
    for (int have = WARPS, half; have > QTILES; have = half) {
        half = (have / QTILES + 1) / 2 * QTILES;
        __syncthreads();
        if (warp >= half && warp < have) {
#pragma unroll
            for (int i = 0; i < SETS * 4; i++)
                scratch[((warp - half) * SETS * 4 + i) * 32 + lane] = make_float4(
                    r.acc[i >> 2][i & 3][0], r.acc[i >> 2][i & 3][1], r.acc[i >> 2][i & 3][2], r.acc[i >> 2][i & 3][3]);
            scratch_ml[(warp - half) * 32 + lane] = make_float2(r.m, r.l);
        }
        __syncthreads();
        if (warp < have - half) {
            float2 other = scratch_ml[warp * 32 + lane];
            float top = fmaxf(r.m, other.x), mine = exp2_fast(r.m - top), theirs = exp2_fast(other.x - top);
            r.m = top;
            r.l = r.l * mine + other.y * theirs;
            float m0 = __shfl_sync(FULL, mine, 8 * t), m1 = __shfl_sync(FULL, mine, 8 * t + 4);
            float t0 = __shfl_sync(FULL, theirs, 8 * t), t1 = __shfl_sync(FULL, theirs, 8 * t + 4);
#pragma unroll
            for (int i = 0; i < SETS * 4; i++) {
                float4 o = scratch[(warp * SETS * 4 + i) * 32 + lane];
                float (&c)[4] = r.acc[i >> 2][i & 3];
                c[0] = c[0] * m0 + o.x * t0;
                c[1] = c[1] * m1 + o.y * t1;
                c[2] = c[2] * m0 + o.z * t0;
                c[3] = c[3] * m1 + o.w * t1;
            }
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void write_partial(const Args& a, const Problem& p, int segment, const Running& r) {
    const int tile = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    if (tile >= QTILES) return;
    if (t == 0 && tile * HEADS + g < p.queries)
        __stcg(a.partial_ml + partial_row(p, blockIdx.x, segment, tile * HEADS + g, ROWS), make_float2(r.m, r.l));
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int q = tile * HEADS + 2 * t + i;
        if (q >= p.queries) continue;
        float* row = a.partial + partial_row(p, blockIdx.x, segment, q, ROWS) * D;
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            if (set_dim(s, g) >= D) continue;
            float4* to = reinterpret_cast<float4*>(row + set_dim(s, g));
            __stcg(to, make_float4(r.acc[s][0][i], r.acc[s][0][2 + i], r.acc[s][1][i], r.acc[s][1][2 + i]));
            __stcg(to + 1, make_float4(r.acc[s][2][i], r.acc[s][2][2 + i], r.acc[s][3][i], r.acc[s][3][2 + i]));
        }
    }
}

__device__ __forceinline__ void fetch_early(const char* keys, const char* values, int unit, int end, u32 unit_bytes,
                                            size_t limit) {
    if (unit + EARLY_FROM * WARPS_PER_TILE >= end) return;
#pragma unroll 1
    for (int i = 0; i < EARLY; i++) prefetch(keys, values, unit + i * WARPS_PER_TILE, end, unit_bytes, limit);
}

// Stores the queries of a problem in shared memory as operands.
__device__ __forceinline__ void stage_query(const Args& a, const Problem& p, uint4* q16, uint4* q8, float* steps) {
    const float* from = a.query + (p.head * a.group + p.first_query) * D;
    for (int i = threadIdx.x; i < QTILES * K16 * 2 * 32; i += THREADS) {
        const int item = i % (K16 * 2 * 32), q = i / (K16 * 2 * 32) * HEADS + ((i & 31) >> 2), dim = operand_dim(item);
        float4 x = {0.f, 0.f, 0.f, 0.f};
        if (q < p.queries && dim < D) x = *reinterpret_cast<const float4*>(from + (size_t)q * D + dim);
        q16[i] = query_operand(x, a.scale_log2);
    }
#if COLD_TYPE == COLD_INT8
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int q = warp; q < ROWS; q += WARPS) {
        float x[QUERY_WORDS];
#pragma unroll
        for (int i = 0; i < QUERY_WORDS; i++) {
            int dim = lane + 32 * i;
            x[i] = q < p.queries && dim < D ? from[(size_t)q * D + dim] : 0.f;
        }
        stage_codes(x, q, a.scale_log2, q8, steps);
    }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode(ARGS_SIGNATURE) {
    const Args a = ARGS_VALUE;
    __shared__ uint4 q16[QTILES * K16 * 2 * 32];
#if COLD_TYPE == COLD_INT8
    __shared__ uint4 q8[QTILES * K8 * 2 * 32];
    __shared__ float steps[ROWS];
#else
    uint4* q8 = nullptr;
    float* steps = nullptr;
#endif
    __shared__ float4 scratch[SCRATCH_BYTES / 16];
    __shared__ float2 scratch_ml[WARPS / 2 * 32];
    const int warp = threadIdx.x >> 5, tile = warp % QTILES, stream = warp / QTILES;
    // In shared memory while the loops need the registers.
    __shared__ Work saved_work;
    __shared__ Problem saved_problem;
    __shared__ Span saved_span;
    wait_for_previous();
    let_next_start();
    Work w = find_work(a);
    while (w.left && w.problem < w.problems) {
        __syncthreads();
        Span s = span_at(a, w.problem / a.passes);
        const u32 count = min(w.left, (u32)s.units - w.offset), end = w.offset + count;
        Problem p;
        p.head = w.problem / a.passes;
        p.first_query = w.problem % a.passes * ROWS;
        p.queries = min(ROWS, a.group - p.first_query);
        p.problem = w.problem;
        p.first_block = w.base / w.per;
        p.last_block = (w.base + s.units - 1) / w.per;
        if (threadIdx.x == 0) {
            saved_work = w;
            saved_problem = p;
            saved_span = s;
        }
        const char *ek = a.exact_k + p.head * a.exact_rows * EXACT_ROW, *ev = a.exact_v + p.head * a.exact_rows * EXACT_ROW;
        const int begin = max((int)w.offset - s.cold_units, 0) + stream, exact_end = s.exact ? (int)end - s.cold_units : 0;
#if COLD_TYPE == COLD_NONE
        fetch_early(ek, ev, begin, exact_end, EXACT_UNIT * EXACT_ROW, (size_t)s.exact * EXACT_ROW);
#else
        const size_t first = p.head * a.cold_rows + s.cold_first;
        const char *ck = a.cold_k + first * COLD_ROW, *cv = a.cold_v + first * COLD_ROW;
        const int cold_begin = w.offset + stream, cold_end = min(end, (u32)s.cold_units);
        fetch_early(ck, cv, cold_begin, cold_end, COLD_UNIT * COLD_ROW, (size_t)s.cold * COLD_ROW);
#endif
        stage_query(a, p, q16, q8, steps);
        __syncthreads();
        Running r = {};
        r.m = NOTHING;
        const uint4* query = q16 + tile * K16 * 2 * 32;
#if COLD_TYPE == COLD_INT8
        Unit8 codes;
        const Rows8 cold_rows = {ck, cv, a.k_scale + first, a.v_scale + first, s.cold};
        attend8<false>(r, codes, cold_rows, s.cold, cold_begin, cold_end, WARPS_PER_TILE, q8 + tile * K8 * 2 * 32,
                       steps[tile * HEADS + (threadIdx.x >> 2) % HEADS], s.bias);
#elif COLD_TYPE == COLD_SAME
        Unit16 cold;
        attend16<false, false>(r, cold, a, s, ck, cv, s.cold, First{s.cold}, cold_begin, cold_end, WARPS_PER_TILE, query,
                               s.bias);
#endif
#if REUSE
        reduce_warps(r, scratch, scratch_ml);
        write_partial(a, saved_problem, 0, r);
        r = Running{};
        r.m = NOTHING;
#endif
        Unit16 exact;
        attend16<true, false>(r, exact, a, s, ek, ev, s.exact, First{s.exact}, begin, exact_end, WARPS_PER_TILE, query, 0.f);
        reduce_warps(r, scratch, scratch_ml);
        w = saved_work;
        p = saved_problem;
        s = saved_span;
        write_partial(a, p, SEGMENTS - 1, r);
        arrive_and_merge(a, p, s, w, ROWS, reinterpret_cast<float*>(scratch));
        const u32 size = s.units + w.extra;
        w.left -= min(w.left, size - w.offset);
        w.base += size;
        w.offset = 0;
        w.problem++;
    }
}
