// Kernels that store tokens: random fill, and the append of a decode step, from the model's rows or from the previous layer's
// outputs.
#include "store.cuh"

// Stores a token where it belongs in a sequence of `length` tokens.
__device__ __forceinline__ void store_token(const Store& s, bool value, size_t head, int position, int length,
                                            float (&x)[ELEMENTS]) {
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) x[i] = round_exact(x[i]);
    note_bad(s, head, position, x);
    const int cold = store_cold_tokens(s, length), number = position - s.sinks;
    if (number >= 0 && number < cold) {
        if (number % s.stride == 0) store_cold(s, value, head, number / s.stride, x);
    } else {
        store_exact(s, value, head, position, x);
    }
}

__device__ __forceinline__ u64 mix(u64 z) {  // SplitMix64 (Steele, Lea, Flood 2014)
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// One row of normal numbers (Box-Muller) from a counter, as it is to be stored: element = f(seed, plane, head, position, dim).
__device__ __forceinline__ void random_row(u64 seed, bool value, size_t head, int position, float (&x)[ELEMENTS]) {
    const int lane = threadIdx.x & 31;
    const u64 row = mix(seed * 2 + value) + ((u64)head << 32 | (u32)position) * 256;
#pragma unroll
    for (int e = 0; e < ELEMENTS; e += 2) {
        u64 bits = mix(row + lane + 32 * e);
        float radius = sqrtf(-2.f * logf(((u32)(bits >> 40) + 1) * 0x1p-24f)), angle = ((u32)bits >> 8) * 0x1p-23f;
        x[e] = lane + 32 * e < D ? radius * cospif(angle) : 0.f;
        if (e + 1 < ELEMENTS) x[e + 1 < ELEMENTS ? e + 1 : e] = lane + 32 * (e + 1) < D ? radius * sinpif(angle) : 0.f;
    }
    rotate_token(value, x);
}

// grid.y: keys, values.
extern "C" __global__ void fill_random(STORE_SIGNATURE, const int2* state, int heads, u64 seed) {
    const Store s = STORE_VALUE;
    const bool value = blockIdx.y;
    const int warps = blockDim.x >> 5;
    for (int head = blockIdx.z; head < heads; head += gridDim.z) {
        const int length = state[head].x;
        for (int i = blockIdx.x * warps + (threadIdx.x >> 5); i < length; i += gridDim.x * warps) {
            float x[ELEMENTS];
            random_row(seed, value, head, i, x);
            store_token(s, value, head, i, length, x);
        }
    }
}

#if COLD_TYPE == COLD_PAGES
// Pages of random rows.
extern "C" __global__ void __launch_bounds__(STORE_THREADS)
    fill_pages(STORE_SIGNATURE, const int2* state, int heads, u64 seed) {
    const Store s = STORE_VALUE;
    __shared__ PageTile tile;
    const bool value = blockIdx.y;
    for (int head = blockIdx.z; head < heads; head += gridDim.z) {
        const int pages = store_cold_tokens(s, state[head].x) / PAGE;
        for (int page = blockIdx.x; page < pages; page += gridDim.x) {
            for (int token = threadIdx.x >> 5; token < PAGE; token += STORE_THREADS / 32) {
                float x[ELEMENTS];
                random_row(seed, value, head, s.sinks + page * PAGE + token, x);
#pragma unroll
                for (int e = 0; e < ELEMENTS; e++) x[e] = round_exact(x[e]);
                put_row(s, tile, value, head, page, token, x);
            }
            store_page(s, tile, value, head, page);
        }
    }
}
#endif

// Sets every sequence's length and step. Clears the record of values that were not finite: all of it, or beyond the lengths.
extern "C" __global__ void set_state(int2* state, const int* lengths, int kv_heads, int heads, int step, u32* bad,
                                     int all_finite) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < heads) {
        state[i] = state[heads + i] = make_int2(lengths[i / kv_heads], step);
        state[2 * heads + i] = make_int2(lengths[i / kv_heads] + 1, step + 1);
        if (all_finite || (int)(bad[i] & 0x7fffffff) >= lengths[i / kv_heads]) bad[i] = ~0u;
    }
}

// One lane's part of a map of the recurrence.
struct Map {
    float reflector[ELEMENTS], sign[ELEMENTS];
    int permutation[ELEMENTS];
};

__device__ __forceinline__ void load_map(Map& map, const float* table) {
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        const int dim = (threadIdx.x & 31) + 32 * i;
        map.reflector[i] = dim < D ? table[dim] : 0.f;
        map.sign[i] = dim < D ? table[D + dim] : 0.f;
        map.permutation[i] = dim < D ? reinterpret_cast<const int*>(table + 2 * D)[dim] : 0;
    }
}

// Normalizes x to an RMS of 1 and returns rms * sign * (x - 2 u (u . x))[permutation]. `row` is shared memory of this warp.
__device__ __forceinline__ void apply_map(const float (&x)[ELEMENTS], const Map& map, float rms, float* row,
                                          float (&out)[ELEMENTS]) {
    const int lane = threadIdx.x & 31;
    float square = 0.f, dot = 0.f;
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        square = fmaf(x[i], x[i], square);
        dot = fmaf(x[i], map.reflector[i], dot);
    }
    for (int i = 16; i; i >>= 1) {
        square += __shfl_xor_sync(FULL, square, i);
        dot += __shfl_xor_sync(FULL, dot, i);
    }
    const float by = rms / sqrtf(square / D + 1e-12f);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++)
        if (lane + 32 * i < D) row[lane + 32 * i] = by * (x[i] - 2.f * map.reflector[i] * dot);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) out[i] = lane + 32 * i < D ? map.sign[i] * row[map.permutation[i]] : 0.f;
}

#if COLD_TYPE != COLD_NONE
// One block quantizes the page that ends at cold token `cold`. Other multiprocessors may have written its rows, so they are
// read past L1.
__device__ __forceinline__ void quantize_page(const Store& s, bool value, size_t head, int cold) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#if COLD_TYPE == COLD_PAGES
    __shared__ PageTile tile;
#endif
    float page[PAGE / 8][ELEMENTS];
#pragma unroll
    for (int j = 0; j < PAGE / 8; j++) {
        const char* row = exact_at(s, value, head, s.sinks + cold - PAGE + warp + 8 * j);
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++) page[j][e] = lane + 32 * e < D ? get_exact(row, lane + 32 * e) : 0.f;
    }
#pragma unroll
    for (int j = 0; j < PAGE / 8; j++) {
        const int token = warp + 8 * j;
#if COLD_TYPE == COLD_PAGES
        put_row(s, tile, value, head, cold / PAGE - 1, token, page[j]);
#else
        const int number = cold - PAGE + token;
        if (number % s.stride == 0) store_cold(s, value, head, number / s.stride, page[j]);
#endif
    }
#if COLD_TYPE == COLD_PAGES
    store_page(s, tile, value, head, cold / PAGE - 1);
#endif
}
#endif

// Source of the next queries, key and value: the (sequence, query head) rows of the previous layer's outputs, each through a
// map in `tables`. There are three maps (queries, keys, values) of reflector, sign and permutation, head_dim each.
struct FeedbackInput {
    const float* outputs;
    float* queries;
    const float* tables;
    int group;
    float query_rms, key_rms, value_rms;
};

// Rounds a token to the dtype of exact rows and stores it.
__device__ __forceinline__ void store_exact_token(const Store& s, bool value, size_t head, int position, float (&x)[ELEMENTS]) {
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) x[i] = round_exact(x[i]);
    note_bad(s, head, position, x);
    store_exact(s, value, head, position, x);
}

// One block stores K or V of the token at `position` and writes half of the next queries. `map`: the first map that this warp
// needs, already loaded.
__device__ __forceinline__ void append_feedback_token(const Store& s, const FeedbackInput& from, Map& map, int mapped,
                                                      bool value, size_t head, int position) {
    __shared__ float rows[8][D];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float x[ELEMENTS], y[ELEMENTS];
    // Jobs: this block's token, then every other query of the group.
    const int jobs = (from.group + 1 - value) / 2 + 1;
    for (int job = warp; job < jobs; job += 8) {
        const int query = 2 * (job - 1) + value;
        const float* row = from.outputs + (head * from.group + (job ? query : 0)) * D;
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++) x[i] = lane + 32 * i < D ? row[lane + 32 * i] : 0.f;
        if (job && mapped) load_map(map, from.tables + (mapped = 0));
        apply_map(x, map, job ? from.query_rms : value ? from.value_rms : from.key_rms, rows[warp], y);
        if (!job) {
            rotate_token(value, y);
            store_exact_token(s, value, head, position, y);
            continue;
        }
        rotate_query(y);
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++)
            if (lane + 32 * i < D) from.queries[(head * from.group + query) * D + lane + 32 * i] = y[i];
    }
}

// Two blocks per (sequence, KV head), one for K and one for V. Each quantizes the page that leaves the window, stores the token
// with `write_token` and counts it in its own state, so neither waits for the other.
//
// Between two appends to a cache there is a decode of it, which lets the next kernel start only after its own wait. So what the
// previous append wrote may be read before the wait below, and the page is quantized while the previous kernel still runs.
// Without a window the new token may be part of that page; it is then quantized after the wait. The next kernel may start at
// once: a decode loads its first pages as soon as the previous one leaves a multiprocessor.
template <class WriteToken>
__device__ __forceinline__ void append_token(const Store& s, int2* state, int capacity, bool decodes, WriteToken write_token) {
    const size_t head = blockIdx.x;
    const bool value = blockIdx.y;
    int2* mine = state + (value ? gridDim.x : 0) + head;
    const int2 was = __ldcg(mine);
    const int position = was.x, length = was.x + 1;
#if COLD_TYPE == COLD_NONE
    wait_for_previous();
    if (position >= capacity) return;
    write_token(value, head, position);
#else
    const int cold = store_cold_tokens(s, length);
    const bool leaves = position < capacity && cold > store_cold_tokens(s, position), early = s.window;
    // One copy of the code serves both orders.
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        if (leaves && turn != early) quantize_page(s, value, head, cold);
        if (turn) break;
        wait_for_previous();
        if (position >= capacity) return;
        write_token(value, head, position);
        if (!early) __syncthreads();
    }
#endif
    if (threadIdx.x == 0) {
        *mine = make_int2(length, was.y + 1);
        if (!decodes && !value) state[2 * gridDim.x + head] = make_int2(length + 1, was.y + 2);
    }
}

// Appends the token computed from the previous layer's outputs.
extern "C" __global__ void __launch_bounds__(256, 1)
    append(STORE_SIGNATURE, int2* state, int capacity, const float* outputs, float* queries, int group, const float* tables,
           float query_rms, float key_rms, float value_rms) {
    const Store s = STORE_VALUE;
    const FeedbackInput from = {outputs, queries, tables, group, query_rms, key_rms, value_rms};
    const int mapped = threadIdx.x >> 5 ? 0 : 1 + blockIdx.y;
    let_next_start();
    Map map;
    load_map(map, tables + mapped * 3 * D);
    append_token(s, state, capacity, true, [&](bool value, size_t head, int position) {
        append_feedback_token(s, from, map, mapped, value, head, position);
    });
}

// Appends the model's token. `query_rows`, if not null, holds the queries of the next decode as (sequence, query head) rows;
// they are scaled by `query_scale` and written to `queries`, where decode and select read them. If null, no decode needs to
// follow.
extern "C" __global__ void __launch_bounds__(256, 1)
    append_rows(STORE_SIGNATURE, int2* state, int capacity, TOKEN_ROWS_SIGNATURE, int kv_heads, const char* query_rows,
                long long query_batch_stride, long long query_head_stride, float* queries, int group, float query_scale) {
    const Store s = STORE_VALUE;
    const TokenRows tokens = TOKEN_ROWS_VALUE;
    let_next_start();
    append_token(s, state, capacity, query_rows, [&](bool value, size_t head, int position) {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, batch = head / kv_heads, kv_head = head % kv_heads;
        const int jobs = query_rows ? (group + 1 - value) / 2 + 1 : 1;
        float x[ELEMENTS];
        for (int job = warp; job < jobs; job += 8) {
            if (!job) {
                load_token(x, tokens, value, batch, kv_head, 0);
                store_exact_token(s, value, head, position, x);
                continue;
            }
            const int query = 2 * (job - 1) + value;
            load_row(x, query_rows, batch * query_batch_stride + (kv_head * group + query) * query_head_stride, tokens.type,
                     tokens.dim);
            rotate_query(x);
#pragma unroll
            for (int i = 0; i < ELEMENTS; i++)
                if (lane + 32 * i < D) queries[(head * group + query) * D + lane + 32 * i] = x[i] * query_scale;
        }
    });
}
