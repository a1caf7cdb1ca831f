// Decode attention on CUDA cores, every architecture from SM 6.1: rows of 16 or 32 bit or int8.
//
// int8 rows are laid out as the others are (simt.cuh). Their keys are multiplied by dp4a with the query in two int8 parts,
// which is exact to 15 bits.
#include "simt.cuh"

#if COLD_TYPE == COLD_INT8
__device__ __forceinline__ void attend_int8(Running& r, const Query& query, const char* keys, const char* values,
                                            const u16* key_scales, const u16* value_scales, int n, int unit, int end,
                                            float bias) {
    const int lane = threadIdx.x & 31, rank = lane >> 3, part = lane & 7;
    const int steps = COLD_UNIT / (4 * DEPTH);
    auto load = [&](uint4(&to)[DEPTH][CHUNKS], float (&scale)[DEPTH], const char* plane, const u16* scales, int step) {
        const int first = ((step / steps) * WARPS_PER_TILE + unit) * COLD_UNIT + step % steps * 4 * DEPTH;
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            size_t token = min(first + 4 * d + rank, n - 1);
            scale[d] = bf16_at(scales + token);
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                to[d][c] = chunk_dim(c, part) < D ? load16(plane + token * D + chunk_dim(c, part)) : make_uint4(0, 0, 0, 0);
        }
    };
    if (unit >= end) return;
    const int count = (end - unit + WARPS_PER_TILE - 1) / WARPS_PER_TILE * steps;
    uint4 k[DEPTH][CHUNKS], v[DEPTH][CHUNKS];
    float key_scale[DEPTH], value_scale[DEPTH];
    load(k, key_scale, keys, key_scales, 0);
    for (int step = 0; step < count; step++) {
        load(v, value_scale, values, value_scales, step);
        const int first = ((step / steps) * WARPS_PER_TILE + unit) * COLD_UNIT + step % steps * 4 * DEPTH;
        float score[DEPTH][TILE];
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int h = 0; h < TILE; h++) {
                int high = 0, low = 0;
#pragma unroll
                for (int i = 0; i < INT_WORDS; i++) {
                    int word = (int)(&k[d][i / 4].x)[i % 4];
                    high = __dp4a(word, query.high[h][i], high);
                    low = __dp4a(word, query.low[h][i], low);
                }
                int sum = high * 128 + low;
                sum += __shfl_xor_sync(FULL, sum, 1);
                sum += __shfl_xor_sync(FULL, sum, 2);
                sum += __shfl_xor_sync(FULL, sum, 4);
                float x = (float)sum * (query.step[h] * key_scale[d]) + bias;
                score[d][h] = first + 4 * d + rank < n ? x : -INFINITY;
            }
        if (step + 1 < count) load(k, key_scale, keys, key_scales, step + 1);
        accumulate(r, score, [&](int d, float* out) {
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                // 0x4B0000nn is 8388608 + nn; codes of V are stored as code + 128.
                u32 w = (&v[d][i / 16].x)[i / 4 % 4];
                out[i] = (__uint_as_float(__byte_perm(w, 0x4b000000u, 0x7440 + i % 4)) - 8388736.f) * value_scale[d];
            }
        });
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode(ARGS_SIGNATURE) {
    const Args a = ARGS_VALUE;
    __shared__ float4 scratch[SCRATCH_BYTES / 16];
    __shared__ float2 scratch_ml[WARPS / 2 * TILE];
    const int stream = (threadIdx.x >> 5) / QTILES;
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
        __syncthreads();
        Running r = {};
#pragma unroll
        for (int h = 0; h < TILE; h++) r.m[h] = NOTHING;
        {
            Query query;
            load_queries(a, p, query);
            const char *ek = a.exact_k + p.head * a.exact_rows * EXACT_ROW, *ev = a.exact_v + p.head * a.exact_rows * EXACT_ROW;
#if COLD_TYPE != COLD_NONE
            const size_t first = p.head * a.cold_rows + s.cold_first;
            const char *ck = a.cold_k + first * COLD_ROW, *cv = a.cold_v + first * COLD_ROW;
            const int cold_end = min(end, (u32)s.cold_units);
#if COLD_TYPE == COLD_INT8
            attend_int8(r, query, ck, cv, a.k_scale + first, a.v_scale + first, s.cold, w.offset + stream, cold_end, s.bias);
#else
            attend_exact<false>(r, a, s, query, ck, cv, s.cold, w.offset + stream, cold_end, s.bias);
#endif
#if REUSE
            reduce_warps(r, reinterpret_cast<float*>(scratch), scratch_ml);
            write_partial(a, saved_problem, 0, r);
            r = Running{};
#pragma unroll
            for (int h = 0; h < TILE; h++) r.m[h] = NOTHING;
#endif
#endif
            const int begin = max((int)w.offset - s.cold_units, 0) + stream;
            attend_exact<true>(r, a, s, query, ek, ev, s.exact, begin, s.exact ? (int)end - s.cold_units : 0, 0.f);
        }
        reduce_warps(r, reinterpret_cast<float*>(scratch), scratch_ml);
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
