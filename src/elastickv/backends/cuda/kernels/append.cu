// Storing tokens: prefill, random fill, and the append that is fused with the inference cycle's recurrence.
#include "common.cuh"
#if COLD_TYPE == COLD_PAGES
#include "quantise.cuh"
#endif

#define ELEMENTS ((D + 31) / 32)  // of a row, a lane: dim = lane + 32 i

struct Store {
    char *exact_k, *exact_v, *cold_k, *cold_v;
    u16 *k_scale, *v_scale;
    u64* bad;  // least (sequence * KV heads + head) << 32 | TOO_LARGE? | position of a value that is not finite or not to be stored
    int sinks, window, ring, stride, exact_rows, cold_rows;
};

__device__ __forceinline__ int store_cold_tokens(const Store& s, int length) {
    int beyond = length - s.sinks - s.window;
    return COLD_TYPE != COLD_NONE && beyond > 0 ? beyond / PAGE * PAGE : 0;
}

__device__ __forceinline__ float round_exact(float x) {
#if EXACT_TYPE == BF16
    return __bfloat162float(__float2bfloat16_rn(x));
#elif EXACT_TYPE == FP16
    return __half2float(__float2half_rn(x));
#else
    return x;
#endif
}

__device__ __forceinline__ void put_exact(char* row, int dim, float x) {
#if EXACT_TYPE == BF16
    reinterpret_cast<__nv_bfloat16*>(row)[dim] = __float2bfloat16_rn(x);
#elif EXACT_TYPE == FP16
    reinterpret_cast<__half*>(row)[dim] = __float2half_rn(x);
#else
    reinterpret_cast<float*>(row)[dim] = x;
#endif
}

__device__ __forceinline__ float get_exact(const char* row, int dim) {
#if EXACT_TYPE == BF16
    return __uint_as_float((u32)__ldcg(reinterpret_cast<const u16*>(row) + dim) << 16);
#elif EXACT_TYPE == FP16
    return __half2float(__ushort_as_half(__ldcg(reinterpret_cast<const u16*>(row) + dim)));
#else
    return __ldcg(reinterpret_cast<const float*>(row) + dim);
#endif
}

__device__ __forceinline__ char* exact_at(const Store& s, bool value, size_t head, int position) {
    int row = COLD_TYPE == COLD_NONE || position < s.sinks ? position : s.sinks + (position - s.sinks) % s.ring;
    return (value ? s.exact_v : s.exact_k) + (head * s.exact_rows + row) * EXACT_ROW;
}

// One warp stores one exact row; `x` is rounded already.
__device__ __forceinline__ void store_exact(const Store& s, bool value, size_t head, int position, const float (&x)[ELEMENTS]) {
    char* row = exact_at(s, value, head, position);
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        int dim = (threadIdx.x & 31) + 32 * i;
        if (dim < D) put_exact(row, dim, x[i]);
    }
}

// One warp stores cold row `index`. The int8 codes and scales are those of cache/quantise.py, bit for bit; V codes are kept
// with 128 added, which saves decode an operation a word.
__device__ __forceinline__ void store_cold(const Store& s, bool value, size_t head, int index, const float (&x)[ELEMENTS]) {
    const int lane = threadIdx.x & 31;
    char* row = (value ? s.cold_v : s.cold_k) + (head * s.cold_rows + index) * COLD_ROW;
#if COLD_TYPE == COLD_INT8
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) most = fmaxf(most, fabsf(x[i]));
    for (int i = 16; i; i >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
    const u32 scale = (__float_as_uint(__fdiv_rn(most, 127.f)) + 0xffffu) >> 16;
    const float divisor = __uint_as_float(scale << 16);
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        int dim = lane + 32 * i;
        int code = divisor > 0.f ? __float2int_rn(__fdiv_rn(x[i], divisor)) : 0;
        if (dim < D) row[dim] = (char)(value ? code + 128 : code);
    }
    if (lane == 0) (value ? s.v_scale : s.k_scale)[head * s.cold_rows + index] = (u16)scale;
#elif COLD_TYPE == COLD_SAME
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++)
        if (lane + 32 * i < D) put_exact(row, lane + 32 * i, x[i]);
#endif
}

__device__ __forceinline__ void note_bad(const Store& s, size_t head, int position, const float (&x)[ELEMENTS]) {
    bool bad = false;
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) bad |= !(fabsf(x[i]) <= 3.402823466e38f);
    if (__any_sync(FULL, bad) && (threadIdx.x & 31) == 0) atomicMin(s.bad, (u64)head << 32 | (u32)position);
}

#if COLD_TYPE == COLD_PAGES
#define TOO_LARGE 0x80000000u
#define LARGEST_HALF 65504.f

// One warp puts row `token` of a page into the tile.
__device__ __forceinline__ void put_row(const Store& s, PageTile& tile, bool value, size_t head, int page, int token,
                                        const float (&x)[ELEMENTS]) {
    bool large = false;
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        const int dim = (threadIdx.x & 31) + 32 * i;
        if (dim < D) tile.x[token][dim] = x[i];
        large |= fabsf(x[i]) > LARGEST_HALF;
    }
    if (K_FORMAT == INT4 && !value && __any_sync(FULL, large) && (threadIdx.x & 31) == 0)
        atomicMin(s.bad, (u64)head << 32 | TOO_LARGE | (u32)(s.sinks + page * PAGE + token));
}

// One block quantises the page in the tile and stores it.
__device__ __forceinline__ void store_page(const Store& s, PageTile& tile, bool value, size_t head, int page) {
    const size_t at = head * (s.cold_rows / PAGE) + page;
    __syncthreads();
    if (value)
        quantise_values(tile, reinterpret_cast<u32*>(s.cold_v + at * VALUE_PAGE),
                        reinterpret_cast<u16*>(reinterpret_cast<char*>(s.v_scale) + at * VALUE_SCALES));
    else
        quantise_keys(tile, reinterpret_cast<u32*>(s.cold_k + at * KEY_PAGE),
                      reinterpret_cast<u16*>(reinterpret_cast<char*>(s.k_scale) + at * KEY_SCALES));
    __syncthreads();
}
#endif

// Stores a token of a sequence that will hold `length` tokens, wherever it belongs then.
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

#define STORE_SIGNATURE                                                                                              \
    char *exact_k, char *exact_v, char *cold_k, char *cold_v, u16 *k_scale, u16 *v_scale, u64 *bad, int sinks,      \
        int window, int ring, int stride, int exact_rows, int cold_rows
#define STORE_VALUE \
    Store { exact_k, exact_v, cold_k, cold_v, k_scale, v_scale, bad, sinks, window, ring, stride, exact_rows, cold_rows }

// Tokens first .. first + count - 1 of one head; keys and values are (count, head_dim). grid.y: keys, values.
extern "C" __global__ void store_rows(STORE_SIGNATURE, const float* keys, const float* values, long long head, int first,
                                      int count, int length) {
    const Store s = STORE_VALUE;
    const bool value = blockIdx.y;
    for (int i = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); i < count; i += gridDim.x * (blockDim.x >> 5)) {
        const float* from = (value ? values : keys) + (size_t)i * D;
        float x[ELEMENTS];
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++) x[e] = (threadIdx.x & 31) + 32 * e < D ? from[(threadIdx.x & 31) + 32 * e] : 0.f;
        store_token(s, value, head, first + i, length, x);
    }
}

__device__ __forceinline__ u64 mix(u64 z) {  // SplitMix64 (Steele, Lea, Flood 2014)
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// One row of normal numbers (Box-Muller) from a counter: element = f(seed, plane, head, position, dim).
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
// Cold pages of one head, of which tokens `first` to `first` + `count` are given; others as `store_rows`.
extern "C" __global__ void __launch_bounds__(STORE_THREADS) store_pages(STORE_SIGNATURE, const float* keys, const float* values,
                                                                        long long head, int first, int count, int length) {
    const Store s = STORE_VALUE;
    __shared__ PageTile tile;
    const bool value = blockIdx.y;
    const int lane = threadIdx.x & 31, pages = store_cold_tokens(s, length) / PAGE;
    for (int page = max(first - s.sinks, 0) / PAGE + blockIdx.x; page < pages; page += gridDim.x) {
        const int start = s.sinks + page * PAGE - first;
        if (start + PAGE > count) break;
        for (int token = threadIdx.x >> 5; token < PAGE; token += STORE_THREADS / 32) {
            const float* from = (value ? values : keys) + (size_t)(start + token) * D;
            float x[ELEMENTS];
#pragma unroll
            for (int e = 0; e < ELEMENTS; e++) x[e] = lane + 32 * e < D ? round_exact(from[lane + 32 * e]) : 0.f;
            put_row(s, tile, value, head, page, token, x);
        }
        store_page(s, tile, value, head, page);
    }
}

// The same of random rows.
extern "C" __global__ void __launch_bounds__(STORE_THREADS) fill_pages(STORE_SIGNATURE, const int2* state, int heads, u64 seed) {
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

extern "C" __global__ void set_state(int2* state, const int* lengths, int kv_heads, int heads, int step, u64* bad) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < heads) {
        state[i] = state[heads + i] = make_int2(lengths[i / kv_heads], step);
        state[2 * heads + i] = make_int2(lengths[i / kv_heads] + 1, step + 1);
    }
    if (i == 0) *bad = ~0ull;
}

// One map of the recurrence, a lane's part.
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

// x, its RMS made 1, -> sign * (x - 2 u (u . x))[permutation], times `rms`. `row` is shared memory of this warp.
__device__ __forceinline__ void apply_map(const float (&x)[ELEMENTS], const Map& map, float rms, float* row, float (&out)[ELEMENTS]) {
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
// One block quantises the page of which `cold` is the end. Its rows may have come from other multiprocessors since: past L1.
__device__ __forceinline__ void chill(const Store& s, bool value, size_t head, int cold) {
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

// Where the next queries, key and value come from: [(sequence, KV head)][head_dim] rows, or if `keys` is null the outputs of the
// layer before, through three maps (reflector, sign, permutation of head_dim each) in `tables`: of queries, keys, values.
struct Source {
    const float *keys, *values, *outputs;
    float* queries;
    const float* tables;
    int group;
    float query_rms, key_rms, value_rms;
};

// One block stores K or V of the token at `position`, and leaves half of the next queries. `map`: the first that this warp needs.
__device__ __forceinline__ void take_token(const Store& s, const Source& from, Map& map, int mapped, bool value, size_t head,
                                           int position) {
    __shared__ float rows[8][D];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float x[ELEMENTS], y[ELEMENTS];
    // Jobs: this block's token, then every other query of the group.
    const int jobs = from.keys ? 1 : (from.group + 1 - value) / 2 + 1;
    for (int job = warp; job < jobs; job += 8) {
        const int query = 2 * (job - 1) + value;
        const float* row = from.keys ? (value ? from.values : from.keys) + head * D
                                     : from.outputs + (head * from.group + (job ? query : 0)) * D;
#pragma unroll
        for (int i = 0; i < ELEMENTS; i++) x[i] = y[i] = lane + 32 * i < D ? row[lane + 32 * i] : 0.f;
        if (!from.keys) {
            if (job && mapped) load_map(map, from.tables + (mapped = 0));
            apply_map(x, map, job ? from.query_rms : value ? from.value_rms : from.key_rms, rows[warp], y);
        }
        if (job) {
#pragma unroll
            for (int i = 0; i < ELEMENTS; i++)
                if (lane + 32 * i < D) from.queries[(head * from.group + query) * D + lane + 32 * i] = y[i];
        } else {
#pragma unroll
            for (int i = 0; i < ELEMENTS; i++) y[i] = round_exact(y[i]);
            note_bad(s, head, position, y);
            store_exact(s, value, head, position, y);
        }
    }
}

// Two blocks a (sequence, KV head), one for K and one for V: quantise the page that leaves the window, store the token, count it,
// each in a state of its own, so that neither waits for the other.
//
// A decode of this cache lies between two appends to it, and lets others start only after its own wait: what the append before
// wrote can be read before the wait here. So the page is quantised while the kernel before is still at work, unless there is no
// window: then the token may be part of it. What follows is let in at once: a decode loads its pages when the one before it
// leaves a multiprocessor.
extern "C" __global__ void __launch_bounds__(256, 1) append(STORE_SIGNATURE, int2* state, int capacity, const float* keys,
                                                         const float* values, const float* outputs, float* queries, int group,
                                                         const float* tables, float query_rms, float key_rms, float value_rms) {
    const Store s = STORE_VALUE;
    const Source from = {keys, values, outputs, queries, tables, group, query_rms, key_rms, value_rms};
    const size_t head = blockIdx.x;
    const bool value = blockIdx.y;
    const int mapped = threadIdx.x >> 5 ? 0 : 1 + value;
    let_next_start();
    Map map;
    if (!keys) load_map(map, tables + mapped * 3 * D);
    int2* mine = state + (value ? gridDim.x : 0) + head;
    const int2 was = __ldcg(mine);
    const int position = was.x, length = was.x + 1;
#if COLD_TYPE == COLD_NONE
    wait_for_previous();
    if (position >= capacity) return;
    take_token(s, from, map, mapped, value, head, position);
#else
    const int cold = store_cold_tokens(s, length);
    const bool leaves = position < capacity && cold > store_cold_tokens(s, position), early = s.window;
    // One copy of the code for either order.
#pragma unroll 1
    for (int turn = 0; turn < 2; turn++) {
        if (leaves && turn != early) chill(s, value, head, cold);
        if (turn) break;
        wait_for_previous();
        if (position >= capacity) return;
        take_token(s, from, map, mapped, value, head, position);
        if (!early) __syncthreads();
    }
#endif
    if (threadIdx.x == 0) {
        *mine = make_int2(length, was.y + 1);
        if (keys && !value) state[2 * gridDim.x + head] = make_int2(length + 1, was.y + 2);  // no decode need follow
    }
}
