// Decode attention with a fixed number of blocks per KV head, on tensor cores (SM 8.0 and newer): for short contexts, which are
// bound by latency rather than bandwidth, and for single int8 sequences.
//
// SPLITS blocks, a cluster if CLUSTER, attend to one KV head. A warp's first units depend on the capacity alone, so their loads
// start before the length and the query have arrived; rows that turn out not to be tokens are masked. The exact plane is read
// in memory order. Blocks exchange partial results through each other's shared memory or, without clusters, through scratch
// memory.
//
// Macros: SPLITS, CLUSTER, and PREFETCH, the units of a warp after its first that are prefetched into L2 at the start.
#include "attend.cuh"

#define STEP (SPLITS * WARPS)                  // units that the blocks of a head attend to at once
#define ITEMS (HEADS * D / 4)                  // (query, 4 dims) of a head
#define SHARE ((ITEMS + SPLITS - 1) / SPLITS)  // the most of these that one block of a cluster merges
#define PAIR (2 * D + 4)                       // floats of two queries, apart so that lanes meet different banks
#define OPERANDS (K16 * 2 * 32)
#if CLUSTER
#define CLUSTER_OF __cluster_dims__(SPLITS, 1, 1)
#else
#define CLUSTER_OF
#endif

#if CLUSTER
// Partial results that the blocks of a cluster send each other; data and the signal of their arrival travel together, so no
// fence is needed.
struct Inbox {
    float4 o[SPLITS][SHARE];
    float2 ml[SPLITS][SHARE];
    u64 arrived;
};

// Prepares for `bytes` to arrive. Every thread of a cluster's blocks calls this, and `wait_for_blocks` before it sends.
__device__ __forceinline__ void open_inbox(Inbox& inbox, u32 bytes) {
    if (threadIdx.x == 0) {
        const u32 arrived = shared_address(&inbox.arrived);
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(arrived) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrived), "r"(bytes) : "memory");
    }
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

__device__ __forceinline__ void wait_for_blocks() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ u32 address_in(u32 shared, u32 block) {
    u32 r;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(shared), "r"(block));
    return r;
}

// Sends a partial from block `from` of the cluster to block `to`.
__device__ __forceinline__ void send(const Inbox& inbox, u32 from, u32 to, u32 index, const Merged& sum) {
    const u32 arrived = address_in(shared_address(&inbox.arrived), to);
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
                     address_in(shared_address(&inbox.o[from][index]), to)),
                 "f"(sum.o.x), "f"(sum.o.y), "f"(sum.o.z), "f"(sum.o.w), "r"(arrived)
                 : "memory");
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::"r"(
                     address_in(shared_address(&inbox.ml[from][index]), to)),
                 "f"(sum.m), "f"(sum.l), "r"(arrived)
                 : "memory");
}

__device__ __forceinline__ void wait_for_partials(const Inbox& inbox) {
    u32 done = 0;
    while (!done)
        asm volatile(
            "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(shared_address(&inbox.arrived))
            : "memory");
}
#endif

extern "C" __global__ void CLUSTER_OF __launch_bounds__(THREADS, MIN_BLOCKS) decode(ARGS_SIGNATURE) {
    const Args a = ARGS_VALUE;
    __shared__ uint4 q16[OPERANDS];
    __shared__ __align__(16) float sums[WARPS][HEADS / 2 * PAIR];
    __shared__ float2 sums_ml[WARPS][HEADS];
#if COLD_TYPE == COLD_INT8
    __shared__ uint4 q8[K8 * 2 * 32];
    __shared__ float steps[HEADS];
#endif
#if CLUSTER
    __shared__ Inbox inbox;
#endif
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS, unit = warp * SPLITS + split;
    const u32 vectors = D / 4, items = a.group * vectors;
#if CLUSTER
    // This block merges every SPLITS-th item.
    const u32 mine = (items - split + SPLITS - 1) / SPLITS;
    open_inbox(inbox, SPLITS * mine * 24);
#endif
    const int exact_units = (a.exact_rows + EXACT_UNIT - 1) / EXACT_UNIT;

    // Prefetching into L2 may start before append has ended: its writes arrive in L2 too.
    const size_t first_exact = (size_t)head * a.exact_rows;
    const char *ek = a.exact_k + first_exact * EXACT_ROW, *ev = a.exact_v + first_exact * EXACT_ROW;
    prefetch(ek, ev, unit, exact_units, EXACT_UNIT * EXACT_ROW, (size_t)a.exact_rows * EXACT_ROW);
    wait_for_previous();
    let_next_start();
    const int2 now = load_state(a.state + head);
    const float* queries = a.query + (size_t)head * a.group * D;
    float4 words[(OPERANDS + THREADS - 1) / THREADS];
#pragma unroll
    for (int j = 0; j * THREADS < OPERANDS; j++) {
        const int i = threadIdx.x + j * THREADS, dim = operand_dim(i);
        words[j] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (i < OPERANDS && g < a.group && dim < D) words[j] = *reinterpret_cast<const float4*>(queries + g * D + dim);
    }
#if COLD_TYPE == COLD_INT8
    float every[HEADS / WARPS][QUERY_WORDS];
#pragma unroll
    for (int j = 0; j < HEADS / WARPS; j++)
#pragma unroll
        for (int i = 0; i < QUERY_WORDS; i++) {
            const int q = warp + j * WARPS, dim = lane + 32 * i;
            every[j][i] = q < a.group && dim < D ? queries[q * D + dim] : 0.f;
        }
#endif
    Span s = {};
    Unit16 exact;
    if (unit < exact_units) {
        load_keys16<false>(exact, a, s, ek, a.exact_rows, unit);
        load_values16<false>(exact, a, s, ev, a.exact_rows, unit);
    }
#if COLD_TYPE == COLD_NONE
    for (int i = 1; i <= PREFETCH; i++)
        prefetch(ek, ev, unit + i * STEP, exact_units, EXACT_UNIT * EXACT_ROW, (size_t)a.exact_rows * EXACT_ROW);
#else
    // Warps that have exact units start with the cold ones a round later.
    const int cold_unit = unit - exact_units + (max(exact_units - unit, 0) + STEP - 1) / STEP * STEP;
    const size_t first_cold = (size_t)head * a.cold_rows;
    const char *ck = a.cold_k + first_cold * COLD_ROW, *cv = a.cold_v + first_cold * COLD_ROW;
    const bool has_cold = cold_unit * COLD_UNIT < a.cold_rows;
#if COLD_TYPE == COLD_INT8
    Unit8 cold;
    const Rows8 rows = {ck, cv, a.k_scale + first_cold, a.v_scale + first_cold, a.cold_rows};
    if (has_cold) {
        load_keys8(cold, rows, cold_unit);
        load_values8(cold, rows, cold_unit);
    }
#else
    Unit16 cold;
    if (has_cold) {
        load_keys16<false>(cold, a, s, ck, a.cold_rows, cold_unit);
        load_values16<false>(cold, a, s, cv, a.cold_rows, cold_unit);
    }
#endif
    for (int i = 1; i <= PREFETCH; i++)
        prefetch(ck, cv, cold_unit + i * STEP, (a.cold_rows + COLD_UNIT - 1) / COLD_UNIT, COLD_UNIT * COLD_ROW,
                 (size_t)a.cold_rows * COLD_ROW);
#endif

#pragma unroll
    for (int j = 0; j * THREADS < OPERANDS; j++)
        if (int i = threadIdx.x + j * THREADS; i < OPERANDS) q16[i] = query_operand(words[j], a.scale_log2);
#if COLD_TYPE == COLD_INT8
#pragma unroll
    for (int j = 0; j < HEADS / WARPS; j++) stage_codes(every[j], warp + j * WARPS, a.scale_log2, q8, steps);
#endif
    s = span_of(a, now);
    __syncthreads();
    Running r = {};
    r.m = NOTHING;
#if COLD_TYPE == COLD_NONE
    attend16<false, true>(r, exact, a, s, ek, ev, a.exact_rows, First{s.exact}, unit, s.exact ? s.units : 0, STEP, q16, 0.f);
#else
    const InRing tokens = {a.sinks, a.ring, s.ring_start, s.exact};
#if COLD_TYPE == COLD_INT8
    // Before the exact rows, because it scales the running results by powers of two.
    attend8<true>(r, cold, rows, s.cold, cold_unit, s.cold_units, STEP, q8, steps[g], s.bias);
#else
    attend16<false, true>(r, cold, a, s, ck, cv, a.cold_rows, First{s.cold}, cold_unit, s.cold_units, STEP, q16, s.bias);
#endif
    attend16<false, true>(r, exact, a, s, ek, ev, a.exact_rows, tokens, unit, exact_units, STEP, q16, 0.f);
#endif

    r.l += __shfl_xor_sync(FULL, r.l, 1);
    r.l += __shfl_xor_sync(FULL, r.l, 2);
    if (t == 0) sums_ml[warp][g] = make_float2(r.m, r.l);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (2 * t + i >= a.group) continue;
#pragma unroll
        for (int c = 0; c < SETS; c++) {
            if (set_dim(c, g) >= D) continue;
            float4* to = reinterpret_cast<float4*>(&sums[warp][t * PAIR + i * D + set_dim(c, g)]);
            to[0] = make_float4(r.acc[c][0][i], r.acc[c][0][2 + i], r.acc[c][1][i], r.acc[c][1][2 + i]);
            to[1] = make_float4(r.acc[c][2][i], r.acc[c][2][2 + i], r.acc[c][3][i], r.acc[c][3][2 + i]);
        }
    }
    __syncthreads();

    Problem p = {(size_t)head, 0, a.group, 0, (u32)head, (u32)head * SPLITS, (u32)head * SPLITS + SPLITS - 1};
#if CLUSTER
    wait_for_blocks();
#endif
    for (u32 item = threadIdx.x; item < items; item += THREADS) {
        const u32 q = item / vectors, dim = item % vectors * 4;
        const Merged sum = add_up<WARPS>(
            [&](int i) { return sums_ml[i][q]; },
            [&](int i) { return *reinterpret_cast<const float4*>(&sums[i][(q >> 1) * PAIR + (q & 1) * D + dim]); });
#if CLUSTER
        send(inbox, split, item % SPLITS, item / SPLITS, sum);
#else
        const size_t row = partial_row(p, blockIdx.x, 0, q, HEADS);
        __stcg(reinterpret_cast<float4*>(a.partial + row * D + dim), sum.o);
        if (dim == 0) __stcg(a.partial_ml + row, make_float2(sum.m, sum.l));
#endif
    }
#if CLUSTER
    if (threadIdx.x >= mine) return;
    wait_for_partials(inbox);
    const u32 item = threadIdx.x * SPLITS + split;
    const Merged sum =
        add_up<SPLITS>([&](int i) { return inbox.ml[i][threadIdx.x]; }, [&](int i) { return inbox.o[i][threadIdx.x]; });
    write_result(a, p, item / vectors, item % vectors * 4, sum);
#else
    Work w = {};
    w.problems = a.batch * a.kv_heads;
    arrive_and_merge(a, p, s, w, HEADS, &sums[0][0]);
#endif
}
