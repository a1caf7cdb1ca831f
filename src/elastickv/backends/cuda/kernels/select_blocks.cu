// Which pages each row of queries of a serving engine reads, and at anchors the list of the best; see best_pages.cuh.
//
// A row that is one of its request's own tokens, the ones that it generated, reads a list of pages, and the pages that have
// left the window since the token that chose it, its anchor: the first own token, and every one for which (number +
// anchor_offset) is a multiple of anchor_every. The anchor is a row of this step, or an earlier one has left its list: in
// `page_lists`, at (request's index, anchor modulo ring, KV head). `headers` says whose list that is: its anchor's position,
// the block of pages that holds it, and how many pages it has. Where another's list is there, and for tokens of prompts, every
// page is read. The first page is always listed: queries attend to its tokens whatever they look for (Xiao et al. 2024).
//
// Grid: `parts` blocks for each (row, KV head). The first writes `listings`; at an anchor all of them score pages, and the last
// to arrive lists the best. Nothing that the previous kernel stores is read here: decode_blocks.cu says where that does not
// hold.
//   request_indices, prompts, ratio_numbers: of each request, where its lists are, the tokens of its prompt, and its row of
//   `fractions`
//   fractions: [ratio number][KV head] share of the pages to list
//   headers: [request index][ring][KV head]; page_lists: the same, list_capacity page numbers each; `listings`: (rows, KV
//   heads) scores: list_capacity floats for each (row, KV head), read if there are several parts or many pages counters: one
//   for each (row, KV head), zero before and after
#define BLOCK_TABLES 1
#include "best_pages.cuh"

// What a row's queries of one KV head may read.
struct Anchor {
    int position, first_new;  // of the anchor's token; first token of this step
    int pages, count;         // complete pages that have left its window, and how many of them are read
    int number;               // of the anchor, counted from the request's first
    bool lists;               // whether some of the pages are not read
    bool own;                 // whether the row is the anchor itself
};

__device__ __forceinline__ Anchor anchor_of(const Span& s, int prompt, double fraction, int window, int every, int offset) {
    Anchor x;
    const int position = s.end - 1, own = position - prompt, since = own < 0 ? 0 : steps_since_refresh(own, every, offset);
    x.position = position - since;
    x.first_new = s.first_new;
    x.pages = max(x.position + 1 - window, 0) / PAGE;
    x.count = min(max((int)(fraction * x.pages), 1), x.pages);
    x.number = (own - since + offset) / every;
    x.lists = own >= 0 && x.count < x.pages;
    x.own = since == 0;
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    select_blocks(const char* query, long long query_stride, BLOCKS_SIGNATURE, BLOCK_ROWS_SIGNATURE, const int* request_indices,
                  const int* prompts, const int* ratio_numbers, const double* fractions, int4* headers, u16* page_lists,
                  int anchor_every, int anchor_offset, int ring, int list_capacity, Listing* listings, float* scores,
                  u32* counters, int parts) {
    __shared__ Shared sh;
    const Args a = args_of(BLOCKS_VALUE, BLOCK_ROWS_VALUE);
    const u32 problem = blockIdx.x / parts, part = blockIdx.x % parts;
    const int row = problem / kv_heads, head = problem % kv_heads, request = request_of(a, row);
    let_next_start();
    Span s = whole_span(a, problem);
    const double fraction = __ldg(fractions + __ldg(ratio_numbers + request) * kv_heads + head);
    const Anchor at = anchor_of(s, __ldg(prompts + request), fraction, exact_tokens, anchor_every, anchor_offset);
    const int* table = page_table + (size_t)request * page_columns;
    const int list = at.lists ? (__ldg(request_indices + request) * ring + at.number % ring) * kv_heads + head : 0;
    const int block = at.lists ? __ldg(table + at.position / PAGE) : 0;
    if (part == 0 && threadIdx.x == 0) {
        bool listed = at.lists;
        if (listed && at.position < at.first_new) {  // an earlier step's
            const int4 header = __ldcg(headers + list);
            listed = header.x == at.position && header.y == block && header.z == at.count;
        }
        if (listed) restrict_pages(s, at.count, at.pages);
        const Listing listing = {s.listed, s.fresh, list, s.units};
        __stcg(reinterpret_cast<int4*>(listings + problem),
               make_int4(listing.count, listing.fresh, listing.list, listing.units));
    }
    const bool selects = at.lists && at.own;
    // All but the first page compete.
    const int candidates = at.pages - 1, need = at.count - 1;
    const Share share(max(candidates, 1), part, parts);
    if (!selects || share.begin >= share.end) {
        wait_for_previous();
        return;
    }
    u16* listed_pages = page_lists + (size_t)list * list_capacity;
    const bool alone = share.blocks == 1 && candidates <= SHARED_SCORES;
    scores += (size_t)problem * list_capacity;
    if (need > 0) {
        const int lane = threadIdx.x & 31, end = share.end;
        // Eight lanes hold a page; candidate i is page i + 1.
        auto load_pages = [&](uint4(&to)[ROWS][LOADS], int first) {
            load_pieces(to, [&](int i) {
                const int candidate = min(first + (lane >> 3) * ROWS + i, end - 1);
                return pages + __ldg(table + candidate + 1) * page_stride + (size_t)head * slab_bytes + KEY_SCALES_AT;
            });
        };
        uint4 in[ROWS][LOADS];
        int candidate = share.begin + (threadIdx.x >> 5) * STEP;
        if (candidate < end) load_pages(in, candidate);
        const char* queries = query + ((size_t)row * query_stride + (size_t)head * group * D) * EXACT_BYTES;
        stage_weights(sh, [&](int i) { return unpack16((u32)__ldg(reinterpret_cast<const u16*>(queries) + i)).x; }, group);
        __syncthreads();
        for (; candidate < end; candidate += WARPS * STEP) {
            const float x = score(sh, in) + 0.f;  // makes -0 a +0
            if (candidate + WARPS * STEP < end) load_pages(in, candidate + WARPS * STEP);
            const int mine = candidate + lane * ROWS / 8;
            if (lane % (8 / ROWS) || mine >= end) continue;
            if (alone)
                sh.scores[mine] = x;
            else
                __stcg(scores + mine, x);
        }
    }
    if (alone) __syncthreads();
    if (alone || arrive(counters + problem, share.blocks)) {
        if (need > 0) {
            if (alone)
                select_best<SHARED>(sh, scores, candidates, need, listed_pages + 1, 1);
            else if (candidates <= SHARED_SCORES)
                select_best<COPIED>(sh, scores, candidates, need, listed_pages + 1, 1);
            else
                select_best<GLOBAL>(sh, scores, candidates, need, listed_pages + 1, 1);
        }
        if (threadIdx.x == 0) {
            listed_pages[0] = 0;
            headers[list] = make_int4(at.position, block, at.count, at.pages);
        }
    }
    wait_for_previous();
}
