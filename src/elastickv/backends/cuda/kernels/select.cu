// Selection of pages in one launch: scores all cold pages by the scales of their keys and lists the best; see best_pages.cuh.
//
// Grid (blocks, heads); all blocks run at once. A head's pages, at its current length, are divided evenly among its blocks. The
// last block to arrive selects.
//
// A multiprocessor has room for a block of decode together with one of this kernel and one of append, so decode starts before
// append has ended and loads the pages that it predicts. This kernel does the same: the previous decode has written the
// predicted length and step to the third row of states, so at an anchor the first scales load early. `after_append`: the
// prediction holds, because exactly one append follows each decode.
//
// Between anchors nothing happens. At anchors listed_pages[head * page_capacity ...] receives the page numbers, ascending, and
// listed[head] their count and the number of pages; (0, 0) if all pages are read, without scoring.
//   query: (heads, group, head_dim); cold_pages: `page_stride` bytes apart; only the scales of keys are read
//   counts[kv_head * counts_stride + pages]: how many of `pages` pages to list
//   scores: heads * (page_capacity rounded up to 32) floats; counters: one per head, zero before and after
#include "best_pages.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    select(const float* query, const char* cold_pages, int page_stride, const int2* state, const int* counts, int counts_stride,
           float* scores, u32* counters, int* listed_pages, int2* listed, int kv_heads, int group, int sinks, int window,
           int anchor_every, int anchor_offset, int page_capacity, int after_append) {
    __shared__ Shared sh;
    const size_t head = blockIdx.y;
    const int lane = threadIdx.x & 31, first = (threadIdx.x >> 5) * STEP;
    const char* scales = cold_pages + head * page_capacity * page_stride + KEY_SCALES_AT;
    const auto load_pages = [&](uint4(&to)[ROWS][LOADS], int first, int end) {
        load_pieces(to, [&](int i) { return scales + (size_t)min(first + (lane >> 3) * ROWS + i, end - 1) * page_stride; });
    };
    const auto share_of = [&](int pages) { return Share(pages, blockIdx.x, gridDim.x); };
    auto pages_of = [&](int length) { return max(length - sinks - window, 0) / PAGE; };
    uint4 in[ROWS][LOADS];
    let_next_start();
    // A page that has just become cold, which append may be writing, is loaded again.
    const int2 expected = __ldcg(state + 2 * gridDim.y + head);
    int loaded = 0;
    const bool anchor = steps_since_refresh(expected.y, anchor_every, anchor_offset) == 0;
    if (anchor) {
        loaded = min(pages_of(expected.x), page_capacity);
        const Share share = share_of(loaded);
        if (share.begin + first < share.end) load_pages(in, share.begin + first, share.end);
    }
    wait_for_previous();
    if (after_append && !anchor) return;
    const int2 now = __ldcg(state + head);
    if (steps_since_refresh(now.y, anchor_every, anchor_offset)) return;
    const int pages = pages_of(now.x);
    const int need = pages ? max(counts[head % kv_heads * counts_stride + pages], 1) : 0;
    if (need >= pages) {
        if (blockIdx.x == 0 && threadIdx.x == 0) listed[head] = make_int2(0, 0);
        return;
    }
    const Share share = share_of(pages);
    if (share.begin >= share.end) return;
    const int end = share.end;
    scores += head * ((page_capacity + 31) / 32 * 32);
    int page = share.begin + first;
    const bool grown = pages_of(now.x - 1) < pages && page + STEP >= pages;
    if (page < end && (loaded != pages || grown)) load_pages(in, page, end);
    stage_weights(sh, [&](int i) { return __ldg(query + head * group * D + i); }, group);
    __syncthreads();
    for (; page < end; page += WARPS * STEP) {
        const float x = score(sh, in);
        if (page + WARPS * STEP < end) load_pages(in, page + WARPS * STEP, end);
        const int mine = page + lane * ROWS / 8;
        if (lane % (8 / ROWS) == 0 && mine < end) __stcg(scores + mine, x + 0.f);  // makes -0 a +0
    }
    if (!arrive(counters + head, share.blocks)) return;
    if (pages <= SHARED_SCORES)
        select_best<COPIED>(sh, scores, pages, need, listed_pages + head * page_capacity);
    else
        select_best<GLOBAL>(sh, scores, pages, need, listed_pages + head * page_capacity);
    if (threadIdx.x == 0) listed[head] = make_int2(need, pages);
}
