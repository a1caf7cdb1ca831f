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
#include "pages.cuh"
#include "simt.cuh"

#define KEY_ROWS (KEY_PAGE / 512)  // vectors of a lane
#define VALUE_ROWS (VALUE_PAGE / 512)
#define KEY_ZEROS (K_FORMAT == INT4 ? (PADDED + 127) / 128 : 1)
#define VALUE_ZEROS (V_FORMAT == INT4 ? GROUPS : 1)

// Vectors of a lane that are in flight together: the largest number up to 8 that divides a page's.
__device__ constexpr int batch_of(int rows) {
    int n = 8;
    while (rows % n) n--;
    return n;
}
#define KEY_BATCH batch_of(KEY_ROWS)
#define VALUE_BATCH batch_of(VALUE_ROWS)

struct Staged {
    float4 query[ROWS][PADDED / 4];  // in units of log2
#if K_FORMAT == INT8
    int2 codes[ROWS][D / 4];  // four channels' high parts and low parts
    float step[ROWS];
#elif K_FORMAT == INT4
    float4 scaled[WARPS][TILE][PADDED / 4];
#endif
};

// A warp's results of its pages: a lane's dims over its tokens, and sums over the tokens that it weighs.
struct Paged {
    float acc[TILE][VALUE_TILES][2];
    float m[TILE], l[TILE], zero[TILE][VALUE_ZEROS];  // m is the warp's
};

struct KeyScales {
#if K_FORMAT == INT4
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

__device__ __forceinline__ KeyScales key_scales(const char* scales, size_t page) {
    KeyScales s = {};
    scales += page * KEY_SCALES;
#if K_FORMAT == INT4
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

__device__ __forceinline__ ValueScales value_scales(const char* scales, size_t page) {
    ValueScales s = {};
    scales += page * VALUE_SCALES;
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

template <int COUNT>
__device__ __forceinline__ void load_rows(uint4 (&to)[COUNT], const char* page, int first) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) to[i] = load16(page + (first + i) * 512 + (threadIdx.x & 31) * 16);
}

// 16 + element e of a word of int4 codes.
__device__ __forceinline__ float nibble(u32 word, int e) {
    const u32 moved = e < 5 ? word << (19 - 4 * e) : word >> (4 * e - 19);
    return __uint_as_float((moved & 0x780000u) | 0x41800000u);
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

// Adds q.k over the channels of `COUNT` vectors of K, for tokens 8 i + g.
template <int COUNT>
__device__ __forceinline__ void multiply_keys(Dot (&dots)[TILE][4][PARTS], const uint4 (&k)[COUNT], int first,
                                              const float4 (*query)[PADDED / 4], const int2* codes) {
    const int t = threadIdx.x & 3;
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
        const int TILES = K_FORMAT == INT4 ? 2 : 1;  // of 16 channels
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            float x[4][4];  // [token][channel]
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int c = 0; c < 4; c++)
                    x[i][c] = K_FORMAT == INT4 ? nibble(words[2 * tile + (c >> 1)], 4 * (c & 1) + i) : e4m3(words[i], c);
#pragma unroll
            for (int h = 0; h < TILE; h++) {
                const float4 q = query[h][4 * (TILES * (first + r) + tile) + t];
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

// Collects the weights of tokens 8 i + 2 t + j from the lanes, which have one token each.
__device__ __forceinline__ void share_weights(float (&weights)[8], float mine) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < 8; n++) weights[n] = __shfl_sync(FULL, mine, 4 * (2 * t + (n & 1)) + (n >> 1));
}

// Adds the weighted values of `COUNT` vectors of V; `weights` are those of the int4 group of the previous vectors.
template <int COUNT>
__device__ __forceinline__ void multiply_values(Paged& r, float (&weights)[TILE][8], const uint4 (&v)[COUNT], int first,
                                                const float (&p)[TILE], const ValueScales& scales) {
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
                r.acc[h][tile][d] = fmaf(weights[h][2 * w], x.x, fmaf(weights[h][2 * w + 1], x.y, r.acc[h][tile][d]));
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
                    for (int h = 0; h < TILE; h++) r.acc[h][tile][d] = fmaf(weights[h][n], x, r.acc[h][tile][d]);
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
                for (int h = 0; h < TILE; h++) r.acc[h][first + row][d] = fmaf(weights[h][n], x, r.acc[h][first + row][d]);
            }
#endif
    }
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
    const size_t base = head * a.page_capacity;
    const char *keys = a.cold_k + base * KEY_PAGE, *values = a.cold_v + base * VALUE_PAGE;
    const char* k_scales = reinterpret_cast<const char*>(a.k_scale) + base * KEY_SCALES;
    const char* v_scales = reinterpret_cast<const char*>(a.v_scale) + base * VALUE_SCALES;
    if (unit >= end) return;
    size_t page = page_at(a, s, head, unit);
    uint4 k[KEY_BATCH], v[VALUE_BATCH];
    load_rows(k, keys + page * KEY_PAGE, 0);
    KeyScales key_scale = key_scales(k_scales, page);
    for (;;) {
        const bool more = unit + WARPS_PER_TILE < end;
        const size_t next = more ? page_at(a, s, head, unit + WARPS_PER_TILE) : page;
        load_rows(v, values + page * VALUE_PAGE, 0);
        const ValueScales value_scale = value_scales(v_scales, page);

        Dot dots[TILE][4][PARTS] = {};
        const float4(*query)[PADDED / 4] = staged.query + row;
        const int2* codes = nullptr;
#if K_FORMAT == INT4
        query = staged.scaled[warp];
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
                sum = fmaf(q.x, fmaf(-16.f, a0.x, z0.x), fmaf(q.y, fmaf(-16.f, a0.y, z0.y), sum));
                sum = fmaf(q.z, fmaf(-16.f, a1.x, z1.x), fmaf(q.w, fmaf(-16.f, a1.y, z1.y), sum));
            }
            // The four lanes of a group add up the starting values.
            for (int i = 4; i < 32; i <<= 1) sum += __shfl_xor_sync(FULL, sum, i);
#pragma unroll
            for (int i = 0; i < 4; i++) dots[h][i][0] = sum;
        }
        __syncwarp();
#elif K_FORMAT == INT8
        codes = staged.codes[row];
#endif
#pragma unroll
        for (int first = 0; first < KEY_ROWS; first += KEY_BATCH) {
            multiply_keys(dots, k, first, query, codes);
            if (first + KEY_BATCH < KEY_ROWS) load_rows(k, keys + page * KEY_PAGE, first + KEY_BATCH);
        }
        float p[TILE];
#pragma unroll
        for (int h = 0; h < TILE; h++) {
#if K_FORMAT == INT8
            Dot sums[4];
#pragma unroll
            for (int i = 0; i < 4; i++) sums[i] = dots[h][i][0] * 128 + dots[h][i][1];
            p[h] = (float)meet(sums[0], sums[1], sums[2], sums[3]) * (staged.step[row + h] * key_scale.scale);
#else
            p[h] = meet(dots[h][0][0], dots[h][1][0], dots[h][2][0], dots[h][3][0]);
#if K_FORMAT == FP8
            p[h] = p[h] * E4M3_ONE * key_scale.scale;
#endif
#endif
        }
        if (more) {
            load_rows(k, keys + next * KEY_PAGE, 0);
            key_scale = key_scales(k_scales, next);
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
#if V_FORMAT == INT4
#pragma unroll
            for (int i = 0; i < GROUPS; i++) {
                const u32 pair = value_scale.pair[i];
                const float scale = __uint_as_float(pair << 16), zero = __uint_as_float(pair & 0xffff0000u);
                r.zero[h][i] = fmaf(p[h], fmaf(-16.f, scale, zero), r.zero[h][i]);
            }
#else
            share_weights(weights[h], p[h] * value_scale.scale);
#endif
        }
#pragma unroll
        for (int first = 0; first < VALUE_ROWS; first += VALUE_BATCH) {
            multiply_values(r, weights, v, first, p, value_scale);
            if (first + VALUE_BATCH < VALUE_ROWS) load_rows(v, values + page * VALUE_PAGE, first + VALUE_BATCH);
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
#if V_FORMAT == INT4
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
        const u32 size = w.pad ? w.pad : s.units;
        w.left -= min(w.left, size - w.offset);
        w.base += size;
        w.offset = 0;
        w.problem++;
    }
}
