// Shared by all decode variants: the work split, partial results and their merge.
//
// Work is cut into units of equal bytes. A problem is one (sequence, KV head, pass over query heads). The units of all
// problems, end to end, are cut into equal ranges, one per block, using the lengths in device memory: one captured grid serves
// every step, and ragged batches balance themselves. START_UNITS units are added behind a problem's own, for the time that
// starting it and merging its results take, so that blocks of many small problems take no longer than those of one large one.
// Block j's partial result of problem p has index j + p, which is unique: along the staircase of (block, problem) pairs the sum
// grows by one at every step.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Macros: HEAD_DIM, EXACT_TYPE (0 fp32, 1 fp16, 2 bf16), COLD_TYPE (0 none, 1 as exact, 2 int8, 3 pages), REUSE, SELECT (pages
// are listed), QTILES, WARPS, MIN_BLOCKS; OLD_PART, if defined, builds the code for devices before SM 7.0.
#define COLD_NONE 0
#define COLD_PAGES 3
// format_macros.py adds the numbers that the table of formats gives to types and formats: FP32, COLD_INT8, INT8 and so on.
#ifndef SELECT
#define SELECT 0
#endif
#ifndef BLOCK_TABLES  // whether tokens are in blocks of a serving engine
#define BLOCK_TABLES 0
#endif

#ifndef START_UNITS
#define START_UNITS 0
#endif

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define D HEAD_DIM
#define THREADS (WARPS * 32)
#define WARPS_PER_TILE (WARPS / QTILES)
#define EXACT_BYTES (EXACT_TYPE == FP32 ? 4 : 2)
#define EXACT_ROW (D * EXACT_BYTES)
#define COLD_ROW (COLD_TYPE == COLD_INT8 ? D : EXACT_ROW)
#define EXACT_UNIT 16
#define PAGE 32
#define COLD_UNIT (COLD_TYPE == COLD_INT8 || COLD_TYPE == COLD_PAGES ? PAGE : 16)
#define FULL 0xffffffffu
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#define NOTHING (-1e30f)  // a running maximum over no scores: finite, so that differences are never NaN
#define SEGMENTS (REUSE ? 2 : 1)

#if BLOCK_TABLES
#include "blocks.cuh"
#endif

struct Args {
    const float* query;
    char* output;
    float* lse;
    const char *exact_k, *exact_v, *cold_k, *cold_v;
    const u16 *k_scale, *v_scale;
    const char* cold_pages;
    int2* state;
    float* partial;
    float2* partial_ml;
    u32* counters;
    float* cached_output;
    float* cached_lse;
    const int* listed_pages;  // numbers of the listed pages, page_capacity a head
    const int2* listed;       // their count, and the first page that is read in addition
    int batch, kv_heads, group, passes, sinks, window, ring, stride, anchor_every, anchor_offset, exact_rows, cold_rows,
        page_capacity;
    float log2_decay, scale_log2;
    int output_type;
#if BLOCK_TABLES
    Blocks blocks;
    BlockRows rows;
    const char *keys, *values;  // of this step
    long long query_stride, key_stride, value_stride;
    const Listing* listings;  // of each (row, KV head)
    const u16* page_lists;    // page_capacity page numbers each
#endif
};

#define ARGS_SIGNATURE                                                                                                         \
    const float *query, char *output, float *lse, const char *exact_k, const char *exact_v, const char *cold_k,                \
        const char *cold_v, const u16 *k_scale, const u16 *v_scale, const char *cold_pages, int2 *state, float *partial,       \
        float2 *partial_ml, u32 *counters, float *cached_output, float *cached_lse, const int *listed_pages,                   \
        const int2 *listed, int batch, int kv_heads, int group, int passes, int sinks, int window, int ring, int stride,       \
        int anchor_every, int anchor_offset, int exact_rows, int cold_rows, int page_capacity, float log2_decay,               \
        float scale_log2, int output_type
#define ARGS_VALUE                                                                                                             \
    Args {                                                                                                                     \
        query, output, lse, exact_k, exact_v, cold_k, cold_v, k_scale, v_scale, cold_pages, state, partial, partial_ml,        \
            counters, cached_output, cached_lse, listed_pages, listed, batch, kv_heads, group, passes, sinks, window, ring,    \
            stride, anchor_every, anchor_offset, exact_rows, cold_rows, page_capacity, log2_decay, scale_log2, output_type     \
    }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Programmatic dependent launch, from SM 9.0 on. Nothing that the previous kernel wrote may be read before `wait_for_previous`.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Large heads leave no registers for loads that the compiler hoists.
#if HEAD_DIM > 192
#define LOAD_ORDER volatile
#else
#define LOAD_ORDER
#endif

__device__ __forceinline__ uint4 load16(const char* p) {
#if __CUDA_ARCH__ >= 700 && !defined(OLD_PART)
    uint4 v;
    asm LOAD_ORDER("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(p));
    return v;
#else
    return __ldg(reinterpret_cast<const uint4*>(p));
#endif
}

// Two 16-bit numbers of the dtype of exact rows.
__device__ __forceinline__ float2 unpack16(u32 v) {
#if EXACT_TYPE == BF16
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
#else
    return __half22float2(*reinterpret_cast<__half2*>(&v));
#endif
}

// Prefetches one unit into L2.
__device__ __forceinline__ void prefetch(const char* keys, const char* values, int unit, int end, u32 unit_bytes,
                                         size_t limit) {
    if (unit >= end) return;
    for (u32 i = (threadIdx.x & 31) * 128; i < unit_bytes; i += 32 * 128) {
        const size_t at = (size_t)unit * unit_bytes + i;
        if (at >= limit) break;
        asm volatile("prefetch.global.L2 [%0];" ::"l"(keys + at));
        asm volatile("prefetch.global.L2 [%0];" ::"l"(values + at));
    }
}

// The part of one sequence that one decode step reads.
struct Span {
    int cold_first, cold;  // rows of the cold planes: first one and count
    int exact, sinks, ring_start;
    int cold_units, units, steps_since_refresh;
    float bias;         // log2 of the number of tokens that one retained token stands for
    int listed, fresh;  // pages: how many are listed, and the first that is read in addition
#if BLOCK_TABLES
    int first_exact, end, first_new;  // tokens
    const int* window;                // the request's blocks
    size_t window_head;
    const char *keys, *values;  // of token `first_new`
#if SELECT
    const u16* list;  // numbers of the listed pages
#endif
#endif
};

__device__ __forceinline__ int cold_tokens(const Args& a, int length) {
    int beyond = length - a.sinks - a.window;
    return beyond > 0 ? beyond / PAGE * PAGE : 0;
}

// Steps since the last anchor. Anchors are the first step and every step for which (step + anchor_offset) is a multiple of
// anchor_every.
__device__ __forceinline__ int steps_since_refresh(int step, int anchor_every, int anchor_offset) {
    step = max(step, 0);
    return min(step, (step + anchor_offset) % anchor_every);
}

__device__ __forceinline__ Span span_of(const Args& a, int2 state) {
    Span s;
    int length = state.x;
    s.bias = 0.f;
    s.steps_since_refresh = s.listed = s.fresh = 0;
#if COLD_TYPE == COLD_NONE
    s.cold_first = s.cold = s.sinks = s.ring_start = s.cold_units = 0;
    s.exact = length;
#else
    int cold = cold_tokens(a, length);
    s.sinks = min(length, a.sinks);
    s.exact = length - cold;
    s.ring_start = cold % a.ring;
    s.cold_first = 0;
    s.cold = (cold + a.stride - 1) / a.stride;
    if (a.stride > 1 && cold) s.bias = log2f((float)cold / (float)s.cold);
#if REUSE
    s.steps_since_refresh = steps_since_refresh(state.y, a.anchor_every, a.anchor_offset);
    if (s.steps_since_refresh) s.cold_first = cold_tokens(a, length - s.steps_since_refresh);
    s.cold -= s.cold_first;
#endif
    s.cold_units = (s.cold + COLD_UNIT - 1) / COLD_UNIT;
#endif
    s.units = max(1, s.cold_units + (s.exact + EXACT_UNIT - 1) / EXACT_UNIT);
    return s;
}

// Leaves of the pages only those of a list, and those from number `fresh` on.
__device__ __forceinline__ void restrict_pages(Span& s, int listed, int fresh) {
    s.listed = listed;
    s.fresh = fresh;
    s.cold_units += listed - fresh;
    s.units += listed - fresh;
}

// What device memory holds of one (sequence, KV head): length and step; how many pages are listed, and the first that is read
// in addition.
struct HeadState {
    int2 state, listed;
};

__device__ __forceinline__ HeadState head_state(const Args& a, const int2* states, size_t head) {
    HeadState s = {__ldcg(states + head), {0, 0}};
#if SELECT && !BLOCK_TABLES
    s.listed = __ldcg(a.listed + head);
#endif
    return s;
}

// The span of one (sequence, KV head), with its list of pages.
__device__ __forceinline__ Span span_with(const Args& a, const HeadState& head) {
    Span s = span_of(a, head.state);
#if SELECT
    restrict_pages(s, head.listed.x, head.listed.y);
#endif
    return s;
}

// Writes the length and step after one more append to the third row of states. The next select and decode use them as a
// prediction while that append is still running.
__device__ __forceinline__ void publish_next_state(const Args& a, size_t head, int2 now) {
    __stcg(a.state + 2 * a.batch * a.kv_heads + head, make_int2(now.x + 1, now.y + 1));
    __threadfence();
}

#if BLOCK_TABLES
__device__ __forceinline__ Args args_of(const Blocks& blocks, const BlockRows& rows) {
    Args a = {};
    a.blocks = blocks;
    a.rows = rows;
    a.batch = rows.rows;
    a.kv_heads = blocks.kv_heads;
    a.group = rows.group;
    a.window = rows.exact_tokens;
    return a;
}

__device__ __forceinline__ int request_of(const Args& a, int row) {
    return a.rows.queries_per_request ? row / a.rows.queries_per_request : __ldg(a.rows.row_requests + row);
}

// The span of one (row, KV head) that reads every page. The newest `window` tokens up to the row's own are exact.
__device__ __forceinline__ Span whole_span(const Args& a, size_t head) {
    const int row = head / a.kv_heads, request = request_of(a, row);
    int start = request * a.rows.queries_per_request, count = a.rows.queries_per_request;
    if (!count) {
        start = __ldg(a.rows.starts + request);
        count = __ldg(a.rows.starts + request + 1) - start;
    }
    Span s = {};
    s.first_new = a.rows.lengths[request] - count;
    s.end = max(s.first_new + 1 + row - start, 0);
    // A row of no request has no tokens, whatever window_first says.
    s.first_exact = min(max(max(s.end - a.window, 0), a.rows.window_first[request]), s.end);
    s.cold = s.first_exact;
    s.exact = s.end - s.first_exact;
    s.cold_units = (s.cold + PAGE - 1) / PAGE;
    s.units = max(1, s.cold_units + (s.end + EXACT_UNIT - 1) / EXACT_UNIT - s.first_exact / EXACT_UNIT);
    s.window = a.blocks.window_table + (size_t)request * a.blocks.window_columns;
    s.window_head = (size_t)(head % a.kv_heads << a.blocks.window_shift) * 2 * EXACT_ROW;
    s.keys = a.keys + start * a.key_stride + head % a.kv_heads * EXACT_ROW;
    s.values = a.values + start * a.value_stride + head % a.kv_heads * EXACT_ROW;
    return s;
}

__device__ __forceinline__ Span span_at(const Args& a, size_t head) {
    Span s = whole_span(a, head);
#if SELECT
    const Listing listing = listing_at(a.listings + head);
    restrict_pages(s, listing.count, listing.fresh);
    s.list = a.page_lists + (size_t)listing.list * a.page_capacity;
#endif
    return s;
}
#else
__device__ __forceinline__ Span span_at(const Args& a, size_t head) { return span_with(a, head_state(a, a.state, head)); }
#endif

// Number of the `unit`th page to read.
__device__ __forceinline__ int page_at(const Args& a, const Span& s, size_t head, int unit) {
#if SELECT && BLOCK_TABLES
    return unit < s.listed ? s.list[unit] : s.fresh + unit - s.listed;
#elif SELECT
    return unit < s.listed ? __ldcg(a.listed_pages + head * a.page_capacity + unit) : s.fresh + unit - s.listed;
#else
    return unit;
#endif
}

// Row of the exact plane that holds exact token `e` of a span.
__device__ __forceinline__ int exact_row(const Args& a, const Span& s, int e) {
#if COLD_TYPE == COLD_NONE
    return e;
#else
    int x = s.ring_start + e - s.sinks;
    x = x >= a.ring ? x - a.ring : x;
    return e < s.sinks ? e : a.sinks + x;
#endif
}

// One block's range of units.
struct Work {
    u32 per, left;          // units a block, units left to this block
    u32 problem, problems;  // current problem
    u32 base, offset;       // first unit of the current problem; this block's first unit in it
    u32 extra;              // units that are added behind a problem's own
};

__device__ __forceinline__ float bf16_value(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ u32 warp_sum(u32 v) {
    for (int i = 16; i; i >>= 1) v += __shfl_xor_sync(FULL, v, i);
    return v;
}

// Units of the problems of a row of `heads` KV heads, see `find_work`.
__device__ __forceinline__ u32 units_of(const Args& a, int row, int heads) {
#if SELECT && BLOCK_TABLES
    return listing_at(a.listings + row).units;
#else
    return span_at(a, (size_t)row * heads).units;
#endif
}

__device__ __forceinline__ Work find_work(const Args& a) {
    const int lane = threadIdx.x & 31;
    // All problems of one row have equally many units. A row is a sequence, or, where pages are listed, a KV head.
    const int rows = SELECT ? a.batch * a.kv_heads : a.batch, heads = SELECT ? 1 : a.kv_heads;
    const u32 per_row = heads * a.passes;
    u32 total = 0, most = 0, least = 0xffffffffu;
    if (rows == 1) {
        total = most = least = units_of(a, 0, heads);
    } else {
        for (int r = lane; r < rows; r += 32) {
            const u32 u = units_of(a, r, heads);
            total += u;
            most = max(most, u);
            least = min(least, u);
        }
        total = warp_sum(total);
        for (int i = 16; i; i >>= 1) {
            most = max(most, __shfl_xor_sync(FULL, most, i));
            least = min(least, __shfl_xor_sync(FULL, least, i));
        }
    }
    Work w;
    w.problems = rows * per_row;
    const u32 all = (total + rows * START_UNITS) * per_row, blocks = gridDim.x;
    w.per = max((all + blocks - 1) / blocks, (u32)WARPS_PER_TILE);
    w.extra = START_UNITS;
    if (most == least && w.problems <= blocks) {
        // A block within one problem fills and drains its loads only once: worth up to an eighth of idle blocks.
        u32 splits = blocks / w.problems, aligned = max((most + splits - 1) / splits, (u32)WARPS_PER_TILE);
        if (aligned + START_UNITS <= w.per + w.per / 8) {
            w.per = aligned;
            w.extra = (most + aligned - 1) / aligned * aligned - most;
        }
    }
    const u32 start = blockIdx.x * w.per;
    w.left = w.per;
    u32 units = most;
    if (most == least) {
        w.problem = start / (units + w.extra);
        w.base = w.problem * (units + w.extra);
    } else {
        w.problem = w.problems;
        w.base = 0;
        u32 before = 0;
        for (int first = 0; first < rows; first += 32) {
            int r = first + lane;
            u32 size = r < rows ? units_of(a, r, heads) + w.extra : 0, sum = size * per_row;
            for (int i = 1; i < 32; i <<= 1) {
                u32 other = __shfl_up_sync(FULL, sum, i);
                if (lane >= i) sum += other;
            }
            u32 hit = __ballot_sync(FULL, before + sum > start);
            if (hit) {
                int at = __ffs(hit) - 1;
                size = __shfl_sync(FULL, size, at);
                u32 from = before + __shfl_sync(FULL, sum, at) - size * per_row, index = (start - from) / size;
                units = size - w.extra;
                w.problem = (first + at) * per_row + index;
                w.base = from + index * size;
                break;
            }
            before += __shfl_sync(FULL, sum, 31);
        }
    }
    w.offset = start - w.base;
    if (START_UNITS && w.problem < w.problems && w.offset >= units) {
        const u32 size = units + w.extra;
        w.left -= min(w.left, size - w.offset);
        w.base += size;
        w.offset = 0;
        w.problem++;
    }
    return w;
}

// One problem, and the blocks that work on it. `reserved` only pads.
struct Problem {
    size_t head;      // row * kv_heads + head
    int first_query;  // of the group
    int queries;      // query heads of this pass
    u32 reserved, problem, first_block, last_block;
};

#ifndef GROUP_FROM
#define GROUP_FROM 24  // from this many partials of one problem on, they are merged in two levels
#endif

__device__ __forceinline__ size_t partial_row(const Problem& p, u32 block, int segment, int q, int rows) {
    return ((size_t)(block + p.problem) * SEGMENTS + segment) * rows + q;
}

struct Merged {
    float4 o;
    float m, l;
};

__device__ __forceinline__ void combine(Merged& r, float4 o, float m, float l) {
    float top = fmaxf(r.m, m), x = exp2_fast(r.m - top), y = exp2_fast(m - top);
    r.o.x = r.o.x * x + o.x * y;
    r.o.y = r.o.y * x + o.y * y;
    r.o.z = r.o.z * x + o.z * y;
    r.o.w = r.o.w * x + o.w * y;
    r.l = r.l * x + l * y;
    r.m = top;
}

// Merges COUNT partials of one item.
template <int COUNT, class ReadMl, class ReadO>
__device__ __forceinline__ Merged add_up(ReadMl read_ml, ReadO read_o) {
    float2 ml[COUNT];
    float top = NOTHING;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        ml[i] = read_ml(i);
        top = fmaxf(top, ml[i].x);
    }
    Merged r = {{0.f, 0.f, 0.f, 0.f}, top, 0.f};
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float weight = exp2_fast(ml[i].x - top);
        const float4 o = read_o(i);
        r.l += ml[i].y * weight;
        r.o.x += o.x * weight;
        r.o.y += o.y * weight;
        r.o.z += o.z * weight;
        r.o.w += o.w * weight;
    }
    return r;
}

// Merges every `stride`th partial of blocks first..last for one (query, 4 dims) item, which `subs` threads share.
__device__ __forceinline__ Merged gather(const Args& a, const Problem& p, size_t level, int segment, u32 first, u32 last,
                                         u32 stride, int q, int dim, int sub, int subs, int rows) {
    const int UNROLL = 8;
    Merged r = {{0.f, 0.f, 0.f, 0.f}, NOTHING, 0.f};
    for (u32 b = first + sub * stride; b <= last; b += subs * UNROLL * stride) {
        float2 ml[UNROLL];
        float4 o[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            u32 at = b + i * subs * stride;
            bool in = at <= last;
            size_t row = level + partial_row(p, in ? at : first, segment, q, rows);
            ml[i] = __ldcg(a.partial_ml + row);
            o[i] = __ldcg(reinterpret_cast<const float4*>(a.partial + row * D + dim));
            if (!in) ml[i] = make_float2(NOTHING, 0.f);
        }
        float top = r.m;
#pragma unroll
        for (int i = 0; i < UNROLL; i++) top = fmaxf(top, ml[i].x);
        float x = exp2_fast(r.m - top);
        r.m = top;
        r.l *= x;
        r.o = make_float4(r.o.x * x, r.o.y * x, r.o.z * x, r.o.w * x);
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            bool in = b + i * subs * stride <= last;
            float y = in ? exp2_fast(ml[i].x - top) : 0.f;
            r.l += ml[i].y * y;
            r.o.x += o[i].x * y;
            r.o.y += o[i].y * y;
            r.o.z += o[i].z * y;
            r.o.w += o[i].w * y;
        }
    }
    return r;
}

__device__ __forceinline__ void write_result(const Args& a, const Problem& p, int q, int dim, const Merged& r) {
    size_t head = p.head * a.group + p.first_query + q;
    float inverse = r.l > 0.f ? 1.f / r.l : (r.l == 0.f ? 0.f : r.l);
    const float4 o = make_float4(r.o.x * inverse, r.o.y * inverse, r.o.z * inverse, r.o.w * inverse);
    const size_t at = head * D + dim;
    if (a.output_type == FP32) {
        *reinterpret_cast<float4*>(a.output + 4 * at) = o;
    } else if (a.output_type == BF16) {
        __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(o.x, o.y), __floats2bfloat162_rn(o.z, o.w)};
        *reinterpret_cast<uint2*>(a.output + 2 * at) = *reinterpret_cast<const uint2*>(pairs);
    } else {
        __half2 pairs[2] = {__floats2half2_rn(o.x, o.y), __floats2half2_rn(o.z, o.w)};
        *reinterpret_cast<uint2*>(a.output + 2 * at) = *reinterpret_cast<const uint2*>(pairs);
    }
    if (dim == 0) a.lse[head] = r.l == 0.f ? -INFINITY : (r.m + log2f(r.l)) * 0.6931471805599453f;
}

// Returns true in the last of `blocks` blocks to arrive, which sees everything that the others wrote before.
__device__ __forceinline__ bool arrive(u32* counter, u32 blocks) {
    __shared__ u32 arrived;
#if __CUDA_ARCH__ >= 700 && !defined(OLD_PART)
    // One thread releases what all threads wrote before the barrier and acquires for all after it; the data are read past L1.
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = 0;
        if (blocks > 1) asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(arrived) : "l"(counter) : "memory");
        if (arrived == blocks - 1 && blocks > 1) *counter = 0;
    }
    __syncthreads();
    return arrived == blocks - 1;
#else
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = blocks == 1 ? 0 : atomicAdd(counter, 1);
        if (arrived == blocks - 1 && blocks > 1) *counter = 0;
    }
    __syncthreads();
    const bool last = arrived == blocks - 1;
    __threadfence();
    return last;
#endif
}

// Merges every `stride`th partial of blocks first..last into the outputs or, if not `final`, into the next level's partial of
// `first`.
__device__ __forceinline__ void merge(const Args& a, const Problem& p, const Span& s, const Work& w, bool final, size_t level,
                                      u32 first, u32 last, u32 stride, int rows, float* scratch) {
    const u32 count = (last - first) / stride + 1;
    const int vectors = D / 4, items = p.queries * vectors, subs = max(1, min((int)count, THREADS / items));
    const size_t next = (size_t)(gridDim.x + w.problems) * SEGMENTS * rows;
    Merged* shared = reinterpret_cast<Merged*>(scratch);
    for (int start = 0; start < items; start += THREADS) {
        const int item = subs == 1 ? start + threadIdx.x : threadIdx.x % items, sub = subs == 1 ? 0 : threadIdx.x / items;
        const bool in = item < items && sub < subs;
        const int q = item / vectors, dim = item % vectors * 4;
        Merged total = {{0.f, 0.f, 0.f, 0.f}, NOTHING, 0.f};
#pragma unroll
        for (int segment = 0; segment < SEGMENTS; segment++) {
            Merged r = {{0.f, 0.f, 0.f, 0.f}, NOTHING, 0.f};
            if (in) r = gather(a, p, level, segment, first, last, stride, q, dim, sub, subs, rows);
            if (subs > 1) {
                __syncthreads();
                shared[threadIdx.x] = r;
                __syncthreads();
                if (in && sub == 0)
                    for (int i = 1; i < subs; i++) {
                        Merged other = shared[threadIdx.x + i * items];
                        combine(r, other.o, other.m, other.l);
                    }
            }
            if (!in || sub) continue;
            if (!final) {
                const size_t row = next + partial_row(p, first, segment, q, rows);
                __stcg(reinterpret_cast<float4*>(a.partial + row * D + dim), r.o);
                if (dim == 0) __stcg(a.partial_ml + row, make_float2(r.m, r.l));
                continue;
            }
            combine(total, r.o, r.m, r.l);
#if REUSE
            if (segment == 0) {
                size_t head = p.head * a.group + p.first_query + q;
                float4* cached = reinterpret_cast<float4*>(a.cached_output + head * D + dim);
                float* cached_lse = a.cached_lse + head * (D / 4) + dim / 4;
                if (s.steps_since_refresh == 0) {
                    float inverse = r.l == 0.f ? 0.f : 1.f / r.l;
                    *cached = make_float4(r.o.x * inverse, r.o.y * inverse, r.o.z * inverse, r.o.w * inverse);
                    *cached_lse = r.l == 0.f ? NOTHING : r.m + log2f(r.l);
                } else {
                    float lse = *cached_lse;
                    combine(total, *cached, lse + s.steps_since_refresh * a.log2_decay, lse == NOTHING ? 0.f : 1.f);
                }
            }
#endif
        }
        if (final && in && sub == 0) write_result(a, p, q, dim, total);
    }
}

// The last block of a problem to arrive merges all partials in block order, so the result does not depend on which block it is.
// Many partials are first merged in groups, by the last block of each group.
__device__ __forceinline__ void arrive_and_merge(const Args& a, const Problem& p, const Span& s, const Work& w, int rows,
                                                 float* scratch) {
    const u32 blocks = p.last_block - p.first_block + 1;
    const u32 size = blocks > GROUP_FROM ? (u32)ceilf(sqrtf((float)blocks)) : 1;
    // One copy of the merge serves both levels: a short decode also waits for its instructions to load.
#pragma unroll 1
    for (u32 stride = size > 1 ? 1 : size;; stride = size) {
        const bool final = stride == size;
        const u32 first = final ? p.first_block : p.first_block + (blockIdx.x - p.first_block) / size * size;
        const u32 last = final ? p.last_block : min(first + size - 1, p.last_block);
        u32* counter = a.counters + (final ? p.problem : w.problems + first + p.problem);
        if (!arrive(counter, (last - first) / stride + 1)) return;
        const size_t level = final && size > 1 ? (size_t)(gridDim.x + w.problems) * SEGMENTS * rows : 0;
        merge(a, p, s, w, final, level, first, last, stride, rows, scratch);
        if (final) break;
    }
    __syncthreads();
}
