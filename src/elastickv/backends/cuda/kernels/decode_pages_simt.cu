// Decode attention over pages on CUDA cores, every architecture from SM 6.1: any pair of formats, all pages or the listed ones.
//
// A warp reads pages in memory order (pages.cuh): lane 4 g + t has tokens 8 i + g of K, four channels of every 16, and tokens 8
// i + 2 t + 0..1 of V, dims g and g + 8 of every 16. After q.k the four lanes of a group have one token each. Scales of K are
// folded into the query or the scores, scales of V into the probabilities, so codes are multiplied without scaling. A nibble n
// becomes the float 16 + n by its position in the mantissa; the 16 is subtracted with the zeros. int8 keys are multiplied by
// dp4a with the query in two int8 parts, which is exact to 15 bits. A warp's results of its pages join its exact rows
// (simt.cuh) as those of one lane group.
//
// Macros in addition to those of pages.cuh: TILE.
#include "format_codecs.cuh"

#define KEY_ROWS (KEY_PAGE / 512)  // vectors of a lane
#define VALUE_ROWS (VALUE_PAGE / 512)

// Vectors of a lane that are in flight together: the largest number up to 8 that divides a page's.
__device__ constexpr int batch_of(int rows) {
    int n = 8;
    while (rows % n) n--;
    return n;
}
#define KEY_BATCH batch_of(KEY_ROWS)
#define VALUE_BATCH batch_of(VALUE_ROWS)

// A warp's results of its pages: a lane's dims over its tokens, and sums over the tokens that it weighs.
struct Paged {
    float acc[TILE][VALUE_TILES][2];
    float m[TILE], l[TILE], zero[TILE][VALUE_ZEROS ? VALUE_ZEROS : 1];  // m is the warp's
};

template <int COUNT>
__device__ __forceinline__ void load_rows(uint4 (&to)[COUNT], const char* page, int first) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = load16(page + (first + i) * 512 + (threadIdx.x & 31) * 16);
}

// Raises the running maximum to `top`, the same in the whole warp.
__device__ __forceinline__ void raise_maximum(Paged& r, int h, float top) {
    const float alpha = exp2_fast(r.m[h] - top);
    r.m[h] = top;
    r.l[h] *= alpha;
#pragma unroll
    for (int i = 0; i < VALUE_ZEROS; i++) r.zero[h][i] *= alpha;
#pragma unroll
    for (int i = 0; i < VALUE_TILES; i++) {
        r.acc[h][i][0] *= alpha;
        r.acc[h][i][1] *= alpha;
    }
}

__device__ __forceinline__ float warp_sum(float v) {
    for (int i = 16; i; i >>= 1) v += __shfl_xor_sync(FULL, v, i);
    return v;
}

// Attends to every WARPS_PER_TILEth of pages `unit`..`end` - 1 of those to read.
__device__ __forceinline__ void attend_pages(Paged& r, const Args& a, const Span& s, size_t head, Staged& staged, int unit,
                                             int end) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = warp % QTILES * TILE;
    if (unit >= end) return;
    auto address_of = [&](int unit) {
        return a.cold_pages + (head * a.page_capacity + page_at(a, s, head, unit)) * PAGE_STRIDE;
    };
    const char* page = address_of(unit);
    uint4 k[KEY_BATCH], v[VALUE_BATCH];
    load_rows(k, page, 0);
    KeyScales key_scale = key_scales(page);
    for (;;) {
        const bool more = unit + WARPS_PER_TILE < end;
        const char* next = more ? address_of(unit + WARPS_PER_TILE) : page;
        load_rows(v, page + VALUES_AT, 0);
        const ValueScales value_scale = value_scales(page);

        Dot dots[TILE][4][PARTS] = {};
        start_keys(dots, staged, row, key_scale);
#pragma unroll
        for (int first = 0; first < KEY_ROWS; first += KEY_BATCH) {
            multiply_keys(dots, k, first, staged, row);
            if (first + KEY_BATCH < KEY_ROWS) load_rows(k, page, first + KEY_BATCH);
        }
        float p[TILE];
#pragma unroll
        for (int h = 0; h < TILE; h++) p[h] = token_score(dots[h], staged, row + h, key_scale);
        if (more) {
            load_rows(k, next, 0);
            key_scale = key_scales(next);
        }
        float weights[TILE][8];
#pragma unroll
        for (int h = 0; h < TILE; h++) {
            if (__any_sync(FULL, p[h] > r.m[h])) {
                float top = fmaxf(p[h], r.m[h]);
                for (int i = 16; i; i >>= 1) top = fmaxf(top, __shfl_xor_sync(FULL, top, i));
                raise_maximum(r, h, top);
            }
            p[h] = exp2_fast(p[h] - r.m[h]);
            r.l[h] += p[h];
            start_values(weights[h], r.zero[h], p[h], value_scale);
        }
#pragma unroll
        for (int first = 0; first < VALUE_ROWS; first += VALUE_BATCH) {
            multiply_values(r.acc, weights, v, first, p, value_scale);
            if (first + VALUE_BATCH < VALUE_ROWS) load_rows(v, page + VALUES_AT, first + VALUE_BATCH);
        }
        if (!more) return;
        unit += WARPS_PER_TILE;
        page = next;
    }
}

// Makes a warp's results of its pages the starting values of the first lane group of its rows. `row`: D floats of this warp.
__device__ __forceinline__ void join(Running& r, const Paged& from, float* row) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, part = lane & 7;
#pragma unroll
    for (int h = 0; h < TILE; h++) {
        const float l = warp_sum(from.l[h]);
        r.m[h] = lane < 8 ? from.m[h] : NOTHING;
        r.l[h] = lane < 8 ? l : 0.f;
        __syncwarp();
#pragma unroll
        for (int tile = 0; tile < VALUE_TILES; tile++) {
            float zero = 0.f;
#if VALUE_ZEROS
            if (tile / GROUP_TILES >= GROUPS) continue;
            zero = from.zero[h][tile / GROUP_TILES];
            for (int i = 16; i; i >>= 1) zero += __shfl_xor_sync(FULL, zero, i);
#endif
#pragma unroll
            for (int d = 0; d < 2; d++) {
                float x = from.acc[h][tile][d];
                x += __shfl_xor_sync(FULL, x, 1);
                x += __shfl_xor_sync(FULL, x, 2);
                const int dim = value_dim(16 * tile + g + 8 * d);
                if (t == 0 && dim < D) row[dim] = x + zero;
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            const int dim = chunk_dim(i / CHUNK, part) + i % CHUNK;
            r.acc[h][i] = lane < 8 && dim < D ? row[dim] : 0.f;
        }
    }
}

static_assert(SCRATCH_BYTES >= WARPS * D * 4, "a row of every warp fits the scratch of the merge");
static_assert(!REUSE, "pages have no reuse of outputs");

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode(ARGS_SIGNATURE) {
    const Args a = ARGS_VALUE;
    __shared__ Staged staged;
    __shared__ float4 scratch[SCRATCH_BYTES / 16];
    __shared__ float2 scratch_ml[WARPS / 2 * TILE];
    const int warp = threadIdx.x >> 5, stream = warp / QTILES;
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
        stage_queries(staged, a, p);
        __syncthreads();
        Running r;
        {
            Paged paged = {};
#pragma unroll
            for (int h = 0; h < TILE; h++) paged.m[h] = NOTHING;
            attend_pages(paged, a, s, p.head, staged, w.offset + stream, min(end, (u32)s.cold_units));
            join(r, paged, reinterpret_cast<float*>(scratch) + warp * D);
        }
        {
            Query query;
            load_queries(a, p, query);
            const char *ek = a.exact_k + p.head * a.exact_rows * EXACT_ROW, *ev = a.exact_v + p.head * a.exact_rows * EXACT_ROW;
            const int begin = max((int)w.offset - s.cold_units, 0) + stream;
            attend_exact<true>(r, a, s, query, ek, ev, s.exact, begin, s.exact ? (int)end - s.cold_units : 0, 0.f);
        }
        reduce_warps(r, reinterpret_cast<float*>(scratch), scratch_ml);
        w = saved_work;
        p = saved_problem;
        s = saved_span;
#if SELECT
        if (threadIdx.x == 0 && w.offset == 0 && p.first_query == 0) publish_next_state(a, p.head, __ldcg(a.state + p.head));
#endif
        write_partial(a, p, SEGMENTS - 1, r);
        arrive_and_merge(a, p, s, w, ROWS, reinterpret_cast<float*>(scratch));
        const u32 size = s.units + w.extra;
        w.left -= min(w.left, size - w.offset);
        w.base += size;
        w.offset = 0;
        w.problem++;
    }
}
