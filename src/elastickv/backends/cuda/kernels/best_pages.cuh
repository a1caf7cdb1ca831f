// Scores of pages, and the pages with the best of them: shared by the kernels that select.
//
// A page's score is linear in its stored scales and zeros: score.cuh has the weights that a scorer gives them. Among equal
// pages the first win. `select_best` finds the bucket, among equal ranges of score, that holds the last selected page, then
// refines it digit by digit until few candidates are left, which are ranked one against the other.
//
// Macros: HEAD_DIM, K_FORMAT (with scales and zeros of channels), SCORER, WARPS and the others of common.cuh; the macros with a
// default below can be overridden.
#pragma once
#include "pages.cuh"
#include "score.cuh"

#ifndef MIN_BLOCKS
#define MIN_BLOCKS 1
#endif
#ifndef IN_FLIGHT
#define IN_FLIGHT 8  // 16-byte loads of a lane
#endif
// Eight lanes hold a page's scales and zeros in LOADS pieces of 16 bytes each; a warp takes 4 * ROWS pages at once.
#define LOADS (PADDED / 32)
#define ROWS (8 * LOADS <= IN_FLIGHT ? 8 : 4 * LOADS <= IN_FLIGHT ? 4 : 2)
#define STEP (4 * ROWS)
#define LEAST 32  // pages of a block
#ifndef SHARED_SCORES
#define SHARED_SCORES 8192  // scores that shared memory holds
#endif
#define BUCKETS 1024
#define DIGIT 10
#define CANDIDATES 128
#ifndef BATCH
#define BATCH 4  // scores of a lane at once: more would be idle work for heads of 1024 pages
#endif

struct Shared {
    float4 weights[2 * PADDED / 4];
    float scores[SHARED_SCORES];
    u32 counts[BUCKETS];
    u64 candidates[CANDIDATES], threshold;
    u32 owner[CANDIDATES];
    u32 high[WARPS], low[WARPS], totals[WARPS], candidate_count, digit, need, members;
};

// Computes the weights of a page's scales and zeros; `query(i)` is the i-th number of a KV head's queries, (group, head_dim).
template <class Query>
__device__ __forceinline__ void stage_weights(Shared& sh, Query query, int group) {
    float* weights = reinterpret_cast<float*>(sh.weights);
    for (int dim = threadIdx.x; dim < PADDED; dim += THREADS) {
        const auto of_head = [&](int head) { return query(head * D + dim); };
        const ChannelWeights x = dim < D ? channel_weights(of_head, group) : ChannelWeights{0.f, 0.f};
        weights[dim] = x.scale * (CHANNEL_LEVELS / 15.f);  // scorers speak of scales of 15 steps
        weights[PADDED + dim] = x.zero;
    }
}

// Loads a lane's pieces of a warp's pages; `page_at(i)` points at the scales of the i-th page of the eight lanes.
template <class PageAt>
__device__ __forceinline__ void load_pieces(uint4 (&to)[ROWS][LOADS], PageAt page_at) {
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const char* p = page_at(i) + (threadIdx.x & 7) * 16;
#pragma unroll
        for (int c = 0; c < LOADS; c++) to[i][c] = load16(p + 128 * c);
    }
}

// Score of page first + lane * ROWS / 8.
__device__ __forceinline__ float score(const Shared& sh, const uint4 (&in)[ROWS][LOADS]) {
    const int lane = threadIdx.x & 31;
    float sum[ROWS] = {};
#pragma unroll
    for (int c = 0; c < LOADS; c++) {
        const float4 a = sh.weights[(8 * c + (lane & 7)) * 2], b = sh.weights[(8 * c + (lane & 7)) * 2 + 1];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const __half2* x = reinterpret_cast<const __half2*>(&in[i][c]);
            const float2 p = __half22float2(x[0]), q = __half22float2(x[1]), r = __half22float2(x[2]), s = __half22float2(x[3]);
            sum[i] = fmaf(a.x, p.x, fmaf(a.y, p.y, fmaf(a.z, q.x, fmaf(a.w, q.y, sum[i]))));
            sum[i] = fmaf(b.x, r.x, fmaf(b.y, r.y, fmaf(b.z, s.x, fmaf(b.w, s.y, sum[i]))));
        }
    }
    // Each exchange halves the rows of a lane; once it has one row, the rest of the sum.
    int bit = 4;
#pragma unroll
    for (int n = ROWS / 2; n; n >>= 1, bit >>= 1)
#pragma unroll
        for (int i = 0; i < n; i++) {
            const float mine = lane & bit ? sum[i + n] : sum[i], theirs = lane & bit ? sum[i] : sum[i + n];
            sum[i] = mine + __shfl_xor_sync(FULL, theirs, bit);
        }
    for (; bit; bit >>= 1) sum[0] += __shfl_xor_sync(FULL, sum[0], bit);
    return sum[0];
}

// An unsigned integer that is ordered as the scores are.
__device__ __forceinline__ u32 ascending(float score) {
    const int bits = __float_as_int(score);
    return bits ^ (bits >> 31 | 0x80000000);
}

__device__ __forceinline__ float score_of(u32 ascending) {
    return __uint_as_float(ascending & 0x80000000 ? ascending ^ 0x80000000 : ~ascending);
}

// Ascending order of this is the order of pages from best to worst; among equals the first page comes first.
__device__ __forceinline__ u64 order(float score, u32 page) { return (u64)~ascending(score) << 32 | page; }

__device__ __forceinline__ u32 warp_max(u32 x) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(FULL, x);
#else
    for (int i = 16; i; i >>= 1) x = max(x, __shfl_xor_sync(FULL, x, i));
    return x;
#endif
}

// The pages that may be the last of the selection: those of one bucket of scores whose order begins with `prefix`.
struct Boundary {
    float high, per_score;
    u32 bucket;
    int shift;
    u64 prefix;

    __device__ __forceinline__ u32 bucket_of(float score) const {
        return min(__float2uint_rz((high - score) * per_score), (u32)BUCKETS - 1);
    }
    // Less than 0: selected; 0: among these.
    __device__ __forceinline__ int compare(float score, u32 page) const {
        const int beyond = bucket_of(score) - bucket;
        if (beyond || shift > 63) return beyond;
        const u64 begin = order(score, page) >> shift;
        return begin < prefix ? -1 : begin > prefix;
    }
};

__device__ __forceinline__ void clear_counts(Shared& sh) {
    for (int i = threadIdx.x; i < BUCKETS; i += THREADS) sh.counts[i] = 0;
}

__device__ __forceinline__ u32 totals_before(const Shared& sh) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u32 mine = lane < warp ? sh.totals[lane] : 0;
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(FULL, mine);
#else
    return warp_sum(mine);
#endif
}

// Finds the digit at which the running sum of the counts reaches `need`, how many of its pages are needed, and how many have
// it.
__device__ __forceinline__ void find_digit(Shared& sh, u32 need) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, each = BUCKETS / THREADS;
    u32 mine[each], sum = 0;
#pragma unroll
    for (int i = 0; i < each; i++) sum += mine[i] = sh.counts[threadIdx.x * each + i];
    u32 seen = sum;
    for (int i = 1; i < 32; i <<= 1) {
        const u32 other = __shfl_up_sync(FULL, seen, i);
        if (lane >= i) seen += other;
    }
    if (lane == 31) sh.totals[warp] = seen;
    __syncthreads();
    seen += totals_before(sh) - sum;
    if (seen < need && need <= seen + sum) {
#pragma unroll
        for (int i = 0; i < each; i++) {
            if (seen < need && need <= seen + mine[i]) {
                sh.digit = threadIdx.x * each + i;
                sh.need = need - seen;
                sh.members = mine[i];
            }
            seen += mine[i];
        }
    }
    __syncthreads();
}

// Narrows the boundary by one more digit.
__device__ __forceinline__ void narrow(Shared& sh, Boundary& at, const float* cached, int begin, int end) {
    const int lane = threadIdx.x & 31, bits = min(at.shift, DIGIT), shift = at.shift - bits;
    const u32 need = sh.need;
    clear_counts(sh);
    __syncthreads();
#pragma unroll 1
    for (int page = begin + lane; page - lane < end; page += 32) {
        const float x = page < end ? cached[page] : 0.f;
        const bool in = page < end && at.compare(x, page) == 0;
        const u32 present = __ballot_sync(FULL, in), digit = (u32)(order(x, page) >> shift) & ((1u << bits) - 1);
        if (!present) continue;
        // Atomic additions to the same count would be serialized.
        const int leader = __ffs(present) - 1;
        const u32 common = __shfl_sync(FULL, digit, leader);
        if (__all_sync(FULL, !in || digit == common)) {
            if (lane == leader) atomicAdd(sh.counts + common, __popc(present));
        } else if (in) {
            atomicAdd(sh.counts + digit, 1);
        }
    }
    __syncthreads();
    find_digit(sh, need);
    at.prefix = at.prefix << bits | sh.digit;
    at.shift = shift;
}

// Scores of pages first, first + 32, ... before `end`. Without branches, so that all loads are in flight together.
__device__ __forceinline__ void read_batch(float (&x)[BATCH], const float* cached, int first, int end) {
#pragma unroll
    for (int u = 0; u < BATCH; u++) x[u] = cached[min(first + 32 * u, end - 1)];
#pragma unroll
    for (int u = 0; u < BATCH; u++) x[u] = first + 32 * u < end ? x[u] : -INFINITY;
}

// Where the scores are that a block selects by.
enum ScoresIn {
    GLOBAL,  // in global memory, of which shared memory has no copy
    COPIED,  // in global memory, and shared memory has room for all
    SHARED,  // in shared memory
};

// Lists the `need` best of `pages` pages, ascending, as numbers from `first_page` on; one block.
template <ScoresIn IN, class Number>
__device__ __forceinline__ void select_best(Shared& sh, float* scores, int pages, u32 need, Number* listed_pages,
                                            int first_page = 0) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    // Each warp has a range of pages, each lane every 32nd of it, BATCH at once.
    float* cached = IN == GLOBAL ? scores : sh.scores;
    const int per_warp = ((pages + 31) / 32 + WARPS - 1) / WARPS * 32;
    const int begin = min(warp * per_warp, pages), end = min(begin + per_warp, pages);
    float x[BATCH];
    float best = -INFINITY, worst = INFINITY;
#pragma unroll 1
    for (int first = begin + lane; first < end; first += 32 * BATCH) {
#pragma unroll
        for (int u = 0; u < BATCH; u++)
            if (first + 32 * u < end) x[u] = IN == SHARED ? cached[first + 32 * u] : __ldcg(scores + first + 32 * u);
#pragma unroll
        for (int u = 0; u < BATCH; u++)
            if (first + 32 * u < end) {
                if (IN == COPIED) cached[first + 32 * u] = x[u];
                best = fmaxf(best, x[u]);
                worst = fminf(worst, x[u]);
            }
    }
    u32 high = warp_max(ascending(best)), low = warp_max(~ascending(worst));
    if (lane == 0) {
        sh.high[warp] = high;
        sh.low[warp] = low;
    }
    clear_counts(sh);
    if (threadIdx.x == 0) sh.candidate_count = 0;
    __syncthreads();
    high = warp_max(sh.high[lane % WARPS]);
    low = ~warp_max(sh.low[lane % WARPS]);
    Boundary at;
    at.high = score_of(high);
    at.per_score = high > low ? (BUCKETS - 1) / (at.high - score_of(low)) : 0.f;
    if (high > low) {
#pragma unroll 1
        for (int first = begin + lane; first < end; first += 32 * BATCH) {
            u32 bucket[BATCH];
            read_batch(x, cached, first, end);
#pragma unroll
            for (int u = 0; u < BATCH; u++) bucket[u] = at.bucket_of(x[u]);
#pragma unroll
            for (int u = 0; u < BATCH; u++)
                if (first + 32 * u < end) atomicAdd(sh.counts + bucket[u], 1);
        }
    } else if (threadIdx.x == 0) {
        sh.counts[0] = pages;
    }
    __syncthreads();
    find_digit(sh, need);
    at.bucket = sh.digit;
    at.shift = 64;
    at.prefix = 0;
    while (sh.members > CANDIDATES) narrow(sh, at, cached, begin, end);

    u32 selected = 0;
#pragma unroll 1
    for (int first = begin + lane; first < end; first += 32 * BATCH) {
        u32 open = 0;
        read_batch(x, cached, first, end);
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const int beyond = at.bucket_of(x[u]) - at.bucket;
            selected += (u32)beyond >> 31;
            open |= (beyond == 0) << u;
        }
        const int there = (end - first + 31) / 32;
        open &= there < BATCH ? (1u << there) - 1 : ~0u;
#pragma unroll 1
        for (; open; open &= open - 1) {
            const int page = first + 32 * (__ffs(open) - 1), relation = at.compare(cached[page], page);
            selected += relation < 0;
            if (relation) continue;
            const u32 index = atomicAdd(&sh.candidate_count, 1);
            sh.candidates[index] = order(cached[page], page);
            sh.owner[index] = warp;
        }
    }
    selected = warp_sum(selected);
    if (lane == 0) sh.totals[warp] = selected;
    __syncthreads();
    if (threadIdx.x < sh.candidate_count) {
        const u64 mine = sh.candidates[threadIdx.x];
        u32 better = 0;
#pragma unroll 4
        for (u32 i = 0; i < sh.candidate_count; i++) better += sh.candidates[i] < mine;
        if (better < sh.need) atomicAdd(sh.totals + sh.owner[threadIdx.x], 1);
        if (better == sh.need - 1) sh.threshold = mine;
    }
    __syncthreads();
    const u32 least = ~(u32)(sh.threshold >> 32), last = (u32)sh.threshold, below = (1u << lane) - 1;
    listed_pages += totals_before(sh);
#pragma unroll 1
    for (int first = begin + lane; first - lane < end; first += 32 * BATCH) {
        read_batch(x, cached, first, end);
#pragma unroll
        for (int u = 0; u < BATCH; u++) {
            const u32 page = first + 32 * u, score = ascending(x[u]);
            const bool in = (int)page < end && (score > least || (score == least && page <= last));
            const u32 all = __ballot_sync(FULL, in);
            if (in) listed_pages[__popc(all & below)] = first_page + page;
            listed_pages += __popc(all);
        }
    }
}

// The pages of one head that a block scores: `pages` are divided evenly among up to `most` blocks, of which this is `block`.
struct Share {
    u32 begin, end, blocks;

    __device__ __forceinline__ Share(u32 pages, u32 block, u32 most) {
        u32 per = (pages + most - 1) / most;
        per = max((per + STEP - 1) / STEP * STEP, (u32)LEAST);
        blocks = (pages + per - 1) / per;
        begin = min(block * per, pages);
        end = min(begin + per, pages);
    }
};
