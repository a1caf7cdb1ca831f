// Decode attention over pages on tensor cores (SM 8.0 and newer): any pair of formats, all pages or the listed ones.
//
// A warp owns a ring of stages in shared memory. One page is one stage; it loads while earlier ones are in use, by a bulk copy
// that an elected lane starts (SM 9.0) or a group of cp.async, and no other warp waits for it. A stage
// holds MMA operands without conversion (pages.cuh): a word of int4 codes becomes four operands by masks and one shift, because
// a nibble is an fp16 number by itself (n 2^-24 or, four bits higher, n 2^-20). Scales of K are folded into the query, high and
// low part; scales of V into the probabilities. Before a block merges its results of a KV head, it starts the loads of the
// next.
//
// FIXED: equally many blocks attend to each KV head, for batches whose heads all read equally much. A warp's first pages then
// follow from the capacity alone, and their loads start before the length is known. Otherwise blocks divide the work by the
// lengths in device memory. BLOCK_TABLES: pages and recent tokens are in blocks of a serving engine (common.cuh).
//
// Macros in addition to those of pages.cuh: TILES of 8 query heads that one pass holds, KEYS_AS_ROWS (1: a KV head has at most
// 4 query heads; format_codecs.cuh), STAGES, FIXED, SHARED_BYTES; the macros with a default below can be overridden.
#pragma once
#include "split_kv_buffer.cuh"
#include "page_attend.cuh"
#include "page_ring.cuh"

// Pages that a warp starts to load while previous kernels run: few, because those kernels' loads queue behind them.
#ifndef PAGES_EARLY
#define PAGES_EARLY 1
#endif

// A part of a problem that one block attends to. Each block has the same share of the exact units as of the pages: exact loads
// are slow behind everyone's page loads, so one block must not have them all.
struct Task {
    Span s;
    Problem p;
    int cold_begin, cold_end, exact_begin, exact_end;  // units
    int stride;                                        // between units of a block
};

__device__ __forceinline__ void assign_units(Task& task, u32 begin, u32 end) {
    task.stride = 1;
    const u32 exact = task.s.exact ? task.s.units - task.s.cold_units : 0;
    task.exact_begin = (u64)begin * exact / task.s.units;
    task.exact_end = (u64)end * exact / task.s.units;
    task.cold_begin = min((int)begin - task.exact_begin, task.s.cold_units);
    task.cold_end = min((int)end - task.exact_end, task.s.cold_units);
}

__device__ __forceinline__ Problem problem_of(const Args& a, u32 problem) {
    Problem p;
    p.head = problem / a.passes;
    p.first_query = problem % a.passes * QUERIES;
    p.queries = min(QUERIES, a.group - p.first_query);
    p.problem = problem;
    return p;
}

__device__ __forceinline__ Task task_of(const Args& a, const Work& w) {
    Task task;
    task.p = problem_of(a, w.problem);
    task.s = span_at(a, task.p.head);
    assign_units(task, w.offset, w.offset + min(w.left, (u32)task.s.units - w.offset));
    task.p.first_block = w.base / w.per;
    task.p.last_block = (w.base + task.s.units - 1) / w.per;
    return task;
}

#if !FIXED
// Where the exact rows of a (sequence, KV head) are.
struct ExactRows {
    const char *keys, *values;
    int first_unit, end;
};

__device__ __forceinline__ ExactRows exact_rows_of(const Args& a, const Span& s, size_t head) {
#if BLOCK_TABLES
    return {a.exact_k, a.exact_v, s.first_exact / EXACT_UNIT, s.end};
#else
    const size_t first = head * a.exact_rows * EXACT_ROW;
    return {a.exact_k + first, a.exact_v + first, 0, s.exact};
#endif
}
#endif

#if BLOCK_TABLES
// Excludes the tokens of a page from number `tokens` on.
__device__ __forceinline__ void hide_tokens(float (&score)[TILES][PAGE_SCORES], int tokens) {
    const int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int e = 0; e < PAGE_SCORES; e++)
            if ((KEYS_AS_ROWS ? 8 * e + g : 8 * (e >> 1) + 2 * t + (e & 1)) >= tokens) score[tile][e] = -INFINITY;
}
#endif

__device__ __forceinline__ void decode_pages(const Args& a) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    __shared__ Task saved;  // while the loops need the registers
#if !FIXED
    __shared__ Work saved_work;
#endif
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u32 stages = shared_address(shared.stages[warp]), arrived = shared_address(shared.arrived[warp]);
#if BULK
    if (lane < STAGES) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(arrived + 8 * lane) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
#endif
    u32 used = 0;    // pages that this warp has gone through
    int issued = 0;  // of those in flight before the first of a problem was used
    Walk walk;
    Unit16 exact;
    Words words;
    Task task = {};
    // Starts pages from number `from` on, up to `most` of the ring's stages.
    auto start = [&](int from, int end, int most = STAGES) {
#pragma unroll 1
        for (int i = from; i < most; i++) {
            const u32 stage = (used + i) % STAGES;
            const int page = __shfl_sync(FULL, walk.numbers, i);
            if (walk.first + i * walk.step < end) {
                start_page(stages + stage * PAGE_STRIDE, arrived + 8 * stage, a, page);
                issued = i + 1;
            }
            end_group();
        }
    };
    auto drain = [&] {
#pragma unroll 1
        for (; issued > 0; issued--, used++) wait_for_page(arrived + 8 * (used % STAGES), used / STAGES & 1);
    };
    // Exact units go to the first warps, pages to the last.
    auto first_page = [&] { return task.cold_begin + (WARPS - 1 - warp) * task.stride; };
    auto first_exact = [&](const Task& task) { return task.exact_begin + warp * task.stride; };
#if FIXED
    const u32 problems = a.batch * a.kv_heads * a.passes, splits = gridDim.x / problems, split = blockIdx.x % splits;
    task.p = problem_of(a, blockIdx.x / splits);
    task.p.first_block = blockIdx.x - split;
    task.p.last_block = task.p.first_block + splits - 1;
    task.stride = splits;
    task.cold_begin = split;
    task.exact_begin = splits - 1 - split;
    task.exact_end = (a.exact_rows + EXACT_UNIT - 1) / EXACT_UNIT;
    const size_t head = task.p.head;
    walk.first = first_page();
    walk.step = splits * WARPS;
    // Append and, at an anchor, select may still be running. Whatever they do not write is loaded before they end: all pages
    // but the one that append quantizes, or the listed pages if the list is reused; all exact rows but the newest.
    const char *keys = a.exact_k + head * a.exact_rows * EXACT_ROW, *values = a.exact_v + head * a.exact_rows * EXACT_ROW;
    auto load_exact = [&] {
        load_keys16<false>(exact, a, task.s, keys, a.exact_rows, first_exact(task));
        load_values16<false>(exact, a, task.s, values, a.exact_rows, first_exact(task));
    };
    const bool has_first = EARLY && first_exact(task) < task.exact_end;
#if BULK  // older devices have waited
#if SELECT
    __shared__ HeadState expected;
    if (threadIdx.x == 0) expected = head_state(a, a.state + 2 * a.batch * a.kv_heads, head);
    __syncthreads();
    const bool again = steps_since_refresh(expected.state.y, a.anchor_every, a.anchor_offset);
    if (again) {
        restrict_pages(task.s, expected.listed.x, expected.listed.y);
        load_page_numbers(walk, a, task.s, head, 0);
        start(0, expected.listed.x, PAGES_EARLY);
    }
#else
    load_page_numbers(walk, a, task.s, head, 0);
    start(0, a.page_capacity, PAGES_EARLY);
#endif
    if (has_first) load_exact();
#endif
    wait_for_previous();
    // One thread reads for its block: where every warp asks for the same line, requests queue.
    __shared__ HeadState current;
    if (threadIdx.x == 0) current = head_state(a, a.state, head);
    if (EARLY) load_queries(words, a, task.p);
    __syncthreads();
    const int2 now = current.state;
#if SELECT
    if (threadIdx.x == 0 && split == 0 && task.p.first_query == 0) publish_next_state(a, head, now);
#endif
    let_next_start();
    task.s = span_with(a, current);
    walk.end = task.cold_end = task.s.cold_units;
#if BULK
    if (has_first && first_exact(task) == exact_row(a, task.s, task.s.exact - 1) / EXACT_UNIT) load_exact();
#if SELECT
    if (again && steps_since_refresh(now.y, a.anchor_every, a.anchor_offset)) {
        start(issued, walk.end);
    } else {
        drain();
        __syncwarp();
        load_page_numbers(walk, a, task.s, head, 0);
        start(0, walk.end);
    }
#else
    const int newest = walk.end - 1 - walk.first;
    if (cold_tokens(a, now.x) > cold_tokens(a, now.x - 1) && newest >= 0 && newest % walk.step == 0 &&
        newest / walk.step < PAGES_EARLY) {
        // This warp may have loaded the newest page as it was before append: load it again.
        drain();
        __syncwarp();
    }
    start(issued, walk.end);
#endif
#else
    if (has_first) load_exact();
    load_page_numbers(walk, a, task.s, head, 0);
    start(0, walk.end);
#endif
#else
    auto begin = [&] {
        const int exact_unit = first_exact(task);
        if (EARLY && exact_unit < task.exact_end) {
            const ExactRows rows = exact_rows_of(a, task.s, task.p.head);
            load_keys16<true>(exact, a, task.s, rows.keys, rows.end, rows.first_unit + exact_unit);
            load_values16<true>(exact, a, task.s, rows.values, rows.end, rows.first_unit + exact_unit);
        }
        walk.first = first_page();
        walk.end = task.cold_end;
        walk.step = WARPS;
        load_page_numbers(walk, a, task.s, task.p.head, 0);
        start(0, walk.end);
        if (EARLY) load_queries(words, a, task.p);
    };
    // Blocks of a serving engine: nothing that the previous kernel stores is read here, only what `select_blocks` lists. To be
    // in order with later kernels, a block waits for it when it ends.
    if (!BLOCK_TABLES || SELECT) wait_for_previous();
    let_next_start();
    Work w = find_work(a);
    if (!w.left || w.problem >= w.problems) {
        if (BLOCK_TABLES) wait_for_previous();
        return;
    }
    task = task_of(a, w);
    begin();
#endif
    while (true) {
        if (!FIXED) __syncthreads();
        if (threadIdx.x == 0) {
            saved = task;
#if !FIXED
            saved_work = w;
#endif
        }
        if (!EARLY) load_queries(words, a, task.p);
        stage_queries(words, a, shared);
        __syncthreads();
        // Exact rows first, while the first pages arrive.
        const int exact_unit = first_exact(saved), exact_step = WARPS * saved.stride;
        const bool has_exact = exact_unit < saved.exact_end;
        if (has_exact) {
            const Span s = saved.s;
#if FIXED
            const size_t first = saved.p.head * a.exact_rows * EXACT_ROW;
            const char *keys = a.exact_k + first, *values = a.exact_v + first;
            const InRing tokens = {a.sinks, a.ring, s.ring_start, s.exact};
            const int rows = a.exact_rows, first_unit = 0;
#else
            const ExactRows of = exact_rows_of(a, s, saved.p.head);
            const char *keys = of.keys, *values = of.values;
            const int rows = of.end, first_unit = of.first_unit;
#if BLOCK_TABLES
            const Between tokens = {s.first_exact, s.end};
#else
            const First tokens = {s.exact};
#endif
#endif
            Running r = {};
            r.m = NOTHING;
            attend16<!FIXED, EARLY>(r, exact, a, s, keys, values, rows, tokens, first_unit + exact_unit,
                                    first_unit + saved.exact_end, exact_step, shared.exact_query, 0.f);
            leave_exact(r, shared.sums[warp], shared.sums_ml[warp]);
#if TILES > 1
            r = Running{};
            r.m = NOTHING;
            attend16<!FIXED, false>(r, exact, a, s, keys, values, rows, tokens, first_unit + exact_unit,
                                    first_unit + saved.exact_end, exact_step, shared.exact_query + K16 * 2 * 32, 0.f);
            leave_exact(r, shared.sums[warp] + 4 * PAIR, shared.sums_ml[warp] + HEADS);
#endif
            __syncwarp();
        }
        {
            Sums r = {};
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) r.m[tile] = NOTHING;
            r.exponent = -100.f;
#if KEYS_AS_ROWS
            r.normal = exp2_fast((float)V_SHIFT - r.exponent);
#endif
#pragma unroll 1
            for (int i = 0; walk.first + i * walk.step < walk.end; i++) {
                const u32 stage = used % STAGES;
                wait_for_page(arrived + 8 * stage, used / STAGES & 1);
                const char* at = memory + (warp * STAGES + stage) * PAGE_STRIDE;
                float score[TILES][PAGE_SCORES];
                score_page(score, at, shared);
#if BLOCK_TABLES
                int unit = walk.first + i * walk.step;
#if SELECT
                unit += saved.s.fresh - saved.s.listed;  // the last page is not a listed one
#endif
                if ((unit + 1) * PAGE > saved.s.cold) hide_tokens(score, saved.s.cold - unit * PAGE);
#endif
                raise_maxima(r, score);
                add_values(r, score, at);
                __syncwarp();
                const int upcoming = i + STAGES;
                if ((upcoming & 31) == 0) load_page_numbers(walk, a, saved.s, saved.p.head, upcoming);
                const int next = __shfl_sync(FULL, walk.numbers, upcoming & 31);
                if (walk.first + upcoming * walk.step < walk.end)
                    start_page(stages + stage * PAGE_STRIDE, arrived + 8 * stage, a, next);
                end_group();
                used++;
                issued--;
            }
            drain();
            leave_pages(r, shared.sums[warp], shared.sums_ml[warp], has_exact);
        }
        const Problem p = saved.p;
#if !FIXED
        w = saved_work;
        const u32 size = saved.s.units + w.extra;
        Work next = w;
        next.left -= min(w.left, size - w.offset);
        next.base += size;
        next.offset = 0;
        next.problem++;
        const bool more = next.left && next.problem < next.problems;
        if (more) {
            task = task_of(a, next);
            begin();
        }
#endif
        __syncthreads();
        const bool alone = p.first_block == p.last_block;
        const u32 items = p.queries * (D / 4);
#if FIXED
        const size_t buffer = (size_t)p.problem * splits * (QUERIES * D / 4);
        float4* buffer_o = reinterpret_cast<float4*>(a.partial) + buffer;
        float2* buffer_ml = a.partial_ml + buffer;
#endif
        for (u32 item = threadIdx.x; item < items; item += THREADS) {
            const int q = item / (D / 4), dim = item % (D / 4) * 4;
            const Merged sum = add_up<WARPS>(
                [&](int i) { return shared.sums_ml[i][q]; },
                [&](int i) { return *reinterpret_cast<const float4*>(&shared.sums[i][(q >> 1) * PAIR + (q & 1) * D + dim]); });
            if (alone) {
                write_result(a, p, q, dim, sum);
                continue;
            }
#if FIXED
            send(buffer_o + split * items + item, buffer_ml + split * items + item, sum);
#else
            const size_t row = partial_row(p, blockIdx.x, 0, q, QUERIES);
            __stcg(reinterpret_cast<float4*>(a.partial + row * D + dim), sum.o);
            if (dim == 0) __stcg(a.partial_ml + row, make_float2(sum.m, sum.l));
#endif
        }
#if FIXED
        if (!alone)
            merge_share(buffer_o, buffer_ml, items, split, splits,
                        [&](u32 item, const Merged& sum) { write_result(a, p, item / (D / 4), item % (D / 4) * 4, sum); });
#else
        if (!alone) arrive_and_merge(a, p, saved.s, w, QUERIES, &shared.sums[0][0]);
#endif
#if SELECT && !FIXED && !BLOCK_TABLES
        if (threadIdx.x == 0 && blockIdx.x == p.first_block && p.first_query == 0)
            publish_next_state(a, p.head, __ldcg(a.state + p.head));
#endif
#if FIXED
        return;
#else
        if (!more) {
            if (BLOCK_TABLES) wait_for_previous();
            return;
        }
        w = next;
#endif
    }
}
