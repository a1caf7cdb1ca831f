// A warp's ring of stages in shared memory: page loads by bulk copies (SM 9.0) or cp.async, and the order of pages.
#pragma once
#include "page_shared.cuh"

#if BULK
// True in one lane of a converged warp. With `threadIdx.x % 32 == 0` the compiler does not know that it is one lane: every bulk
// copy, whose operands are the same in all lanes, becomes a loop over those that may be left.
__device__ __forceinline__ bool elected() {
    u32 chosen;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(chosen));
    return chosen;
}
#endif

__device__ __forceinline__ const char* address_of(const Args& a, int page) {
#if BLOCK_TABLES
    return a.cold_pages + (size_t)(page / a.kv_heads) * a.blocks.page_stride +
           (size_t)(page % a.kv_heads) * a.blocks.slab_bytes;
#else
    return a.cold_pages + (size_t)page * PAGE_STRIDE;
#endif
}

// Starts the load of a page into a stage, for all lanes of a warp.
__device__ __forceinline__ void start_page(u32 stage, u32 arrived, const Args& a, int page) {
#if BULK
    if (!elected()) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrived), "r"(PAGE_BYTES) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(stage),
                 "l"(address_of(a, page)), "r"(PAGE_BYTES), "r"(arrived)
                 : "memory");
#else
    const char* from = address_of(a, page);
#pragma unroll
    for (int i = 0; i < PAGE_BYTES; i += 512) {
        const int at = i + (threadIdx.x & 31) * 16;
        if (at < PAGE_BYTES)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(stage + at), "l"(from + at) : "memory");
    }
#endif
}

__device__ __forceinline__ void end_group() {
#if !BULK
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_page(u32 arrived, u32 parity) {
#if BULK
    u32 done = 0;
    while (!done)
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(arrived), "r"(parity)
                     : "memory");
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
#endif
}

// The pages that a warp reads: every `step`th unit from `first` on.
struct Walk {
    int first, end, step;
    int numbers;  // lane i holds the number, among all heads' pages, of the i-th page after the last multiple of 32
};

__device__ __forceinline__ void load_page_numbers(Walk& walk, const Args& a, const Span& s, size_t head, int index) {
    const int unit = walk.first + (index + (threadIdx.x & 31)) * walk.step;
#if BLOCK_TABLES
    const int request = request_of(a, head / a.kv_heads);
    const int page = unit < s.cold_units ? page_at(a, s, head, unit) : 0;
    const int block = unit < s.cold_units ? __ldg(a.blocks.page_table + (size_t)request * a.blocks.page_columns + page) : 0;
    walk.numbers = block * a.kv_heads + head % a.kv_heads;
#else
    const int base = head * a.page_capacity;
#if SELECT
    // The list is read before its length is known.
    const int listed = unit < a.page_capacity ? __ldcg(a.listed_pages + base + unit) : 0;
    walk.numbers = base + (unit < s.listed ? listed : s.fresh + unit - s.listed);
#else
    walk.numbers = base + unit;
#endif
#endif
}
