// Kernels that serve a model in addition to decode steps: they store chunks, read tokens back, crop sequences and move rows.
#include "unpack.cuh"

// A sequence that grows or shrinks from one length to another.
struct Change {
    int from, to;            // lengths
    int cold_from, cold_to;  // cold tokens

    __device__ __forceinline__ Change(const Store& s, int from, int to)
        : from(from), to(to), cold_from(store_cold_tokens(s, from)), cold_to(store_cold_tokens(s, to)) {}
};

__device__ __forceinline__ void load_exact(float (&x)[ELEMENTS], const Store& s, bool value, size_t head, int position) {
    const char* row = exact_at(s, value, head, position);
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        const int dim = (threadIdx.x & 31) + 32 * i;
        x[i] = dim < D ? get_exact(row, dim) : 0.f;
    }
}

// Loads the token at `position`, stored or new, rounded to the dtype of exact rows.
__device__ __forceinline__ void load_either(float (&x)[ELEMENTS], const Store& s, const TokenRows& g, const Change& c,
                                            bool value, size_t head, int kv_heads, int position) {
    if (position < c.from) return load_exact(x, s, value, head, position);
    load_token(x, g, value, head / kv_heads, head % kv_heads, position - c.from);
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) x[i] = round_exact(x[i]);
    note_bad(s, head, position, x);
}

// Stores what becomes cold when sequence b grows by its first added[b] tokens. grid.y: keys, values; grid.z: heads.
extern "C" __global__ void __launch_bounds__(256, 1)
    extend_cold(STORE_SIGNATURE, const int2* state, const int* added, int kv_heads, int heads, TOKEN_ROWS_SIGNATURE) {
    const Store s = STORE_VALUE;
    const TokenRows tokens = TOKEN_ROWS_VALUE;
    const bool value = blockIdx.y;
    const int warp = threadIdx.x >> 5;
    float x[ELEMENTS];
#if COLD_TYPE == COLD_PAGES
    __shared__ PageTile tile;
#endif
    for (int head = blockIdx.z; head < heads; head += gridDim.z) {
        const int length = state[head].x;
        const Change c(s, length, length + added[head / kv_heads]);
        for (int page = c.cold_from / PAGE + blockIdx.x; page < c.cold_to / PAGE; page += gridDim.x) {
            for (int token = warp; token < PAGE; token += 8) {
                const int number = page * PAGE + token;
                load_either(x, s, tokens, c, value, head, kv_heads, s.sinks + number);
#if COLD_TYPE == COLD_PAGES
                put_row(s, tile, value, head, page, token, x);
#else
                if (number % s.stride == 0) store_cold(s, value, head, number / s.stride, x);
#endif
            }
#if COLD_TYPE == COLD_PAGES
            store_page(s, tile, value, head, page);
#endif
        }
    }
}

// Stores the tokens that stay exact. A separate kernel, because it overwrites rows that `extend_cold` reads.
extern "C" __global__ void __launch_bounds__(256, 1)
    extend_exact(STORE_SIGNATURE, const int2* state, const int* added, int kv_heads, int heads, TOKEN_ROWS_SIGNATURE) {
    const Store s = STORE_VALUE;
    const TokenRows tokens = TOKEN_ROWS_VALUE;
    const bool value = blockIdx.y;
    for (int head = blockIdx.z; head < heads; head += gridDim.z) {
        const int length = state[head].x;
        const Change c(s, length, length + added[head / kv_heads]);
        // Sinks, then what follows the cold ones.
        const int lead = max((c.cold_to ? min(s.sinks, c.to) : c.to) - length, 0);
        const int first = max(s.sinks + c.cold_to, length), rest = c.cold_to ? max(c.to - first, 0) : 0;
        for (int i = blockIdx.x * 8 + (threadIdx.x >> 5); i < lead + rest; i += gridDim.x * 8) {
            const int position = i < lead ? length + i : first + i - lead;
            float x[ELEMENTS];
            load_either(x, s, tokens, c, value, head, kv_heads, position);
            store_exact(s, value, head, position, x);
        }
    }
}

// Writes tokens `first` to `last` - 1 as they are stored, a rotation undone, to (heads, last - first, dim) rows of `type`:
// zeros where a sequence has ended or a stride has dropped the token. grid.y: keys, values; grid.z: heads.
extern "C" __global__ void __launch_bounds__(256, 1)
    read_rows(STORE_SIGNATURE, const int2* state, int heads, int first, int last, char* keys, char* values, int type, int dim) {
    const Store s = STORE_VALUE;
    const bool value = blockIdx.y;
    const int lane = threadIdx.x & 31;
    // Parts of a page each: `lead` parts of sinks, then parts of the tokens after them.
    const int lead = (s.sinks + PAGE - 1) / PAGE, end = lead + (max(last - s.sinks, 0) + PAGE - 1) / PAGE;
    const int begin = first < s.sinks ? first / PAGE : lead + (first - s.sinks) / PAGE;
#if COLD_TYPE == COLD_PAGES
    __shared__ PageTile tile;
#endif
    for (int head = blockIdx.z; head < heads; head += gridDim.z) {
        const int length = state[head].x, cold = store_cold_tokens(s, length);
        for (int part = begin + blockIdx.x; part < end; part += gridDim.x) {
            const bool after = part >= lead;
            const int base = after ? s.sinks + (part - lead) * PAGE : part * PAGE;
            const bool is_cold = after && (part - lead) * PAGE < cold;
#if COLD_TYPE == COLD_PAGES
            if (is_cold) unpack_page(s, tile, value, head, part - lead);
#endif
            for (int token = threadIdx.x >> 5; token < PAGE; token += 8) {
                const int position = base + token, number = position - s.sinks;
                if (position < first || position >= (after ? last : min(last, s.sinks))) continue;
                float x[ELEMENTS] = {};
                if (position >= length) {
                } else if (!is_cold) {
                    load_exact(x, s, value, head, position);
                } else {
#if COLD_TYPE == COLD_PAGES
#pragma unroll
                    for (int i = 0; i < ELEMENTS; i++) x[i] = lane + 32 * i < D ? tile.x[token][lane + 32 * i] : 0.f;
#else
                    if (number % s.stride == 0) load_cold(x, s, value, head, number / s.stride);
#endif
                }
                rotate_token(value, x);  // back
                char* to = value ? values : keys;
                const size_t row = ((size_t)head * (last - first) + position - first) * dim;
#pragma unroll
                for (int i = 0; i < ELEMENTS; i++) {
                    const int d = lane + 32 * i;
                    if (d >= dim) continue;
                    if (type == FP32)
                        reinterpret_cast<float*>(to)[row + d] = x[i];
                    else if (type == BF16)
                        reinterpret_cast<__nv_bfloat16*>(to)[row + d] = __float2bfloat16_rn(x[i]);
                    else
                        reinterpret_cast<__half*>(to)[row + d] = __float2half_rn(x[i]);
                }
            }
        }
    }
}

// Prepares sequence b for its first lengths[b] tokens: cold tokens that are in the window again become exact rows.
extern "C" __global__ void __launch_bounds__(256, 1)
    crop_rows(STORE_SIGNATURE, const int2* state, const int* lengths, int kv_heads, int heads) {
    const Store s = STORE_VALUE;
    const bool value = blockIdx.y;
#if COLD_TYPE == COLD_PAGES
    const int lane = threadIdx.x & 31;
    __shared__ PageTile tile;
#endif
    for (int head = blockIdx.z; head < heads; head += gridDim.z) {
        const Change c(s, state[head].x, lengths[head / kv_heads]);
        for (int page = c.cold_to / PAGE + blockIdx.x; page < c.cold_from / PAGE; page += gridDim.x) {
#if COLD_TYPE == COLD_PAGES
            unpack_page(s, tile, value, head, page);
#endif
            for (int token = threadIdx.x >> 5; token < PAGE; token += 8) {
                const int number = page * PAGE + token;
                if (s.sinks + number >= c.to) continue;
                float x[ELEMENTS];
#if COLD_TYPE == COLD_PAGES
#pragma unroll
                for (int i = 0; i < ELEMENTS; i++) x[i] = lane + 32 * i < D ? tile.x[token][lane + 32 * i] : 0.f;
#else
                load_cold(x, s, value, head, number);
#endif
#pragma unroll
                for (int i = 0; i < ELEMENTS; i++) x[i] = limit_exact(x[i]);
                note_bad(s, head, s.sinks + number, x);  // it may have shared a scale with a value that was not finite
                store_exact(s, value, head, s.sinks + number, x);
            }
        }
    }
}

// A plane of one cache, and the same plane of another.
struct Plane {
    const char* from;
    char* to;
    u64 from_stride, to_stride, bytes;  // of a (sequence, KV head); `bytes` of it are copied
};

// Copies row from_rows[i] of one cache to row to_rows[i] of another. grid.y: planes; grid.z: heads.
extern "C" __global__ void __launch_bounds__(256, 1)
    copy_rows(const Plane* planes, const int* from_rows, const int* to_rows, int kv_heads, int heads) {
    const Plane p = planes[blockIdx.y];
    for (int head = blockIdx.z; head < heads; head += gridDim.z) {
        const int row = head / kv_heads, kv_head = head % kv_heads;
        const char* from = p.from + ((size_t)from_rows[row] * kv_heads + kv_head) * p.from_stride;
        char* to = p.to + ((size_t)to_rows[row] * kv_heads + kv_head) * p.to_stride;
        const size_t stride = (size_t)gridDim.x * blockDim.x, start = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
        if ((p.from_stride | p.to_stride | p.bytes) & 15) {
            for (size_t i = start; i < p.bytes / 4; i += stride)
                reinterpret_cast<u32*>(to)[i] = reinterpret_cast<const u32*>(from)[i];
        } else {
            for (size_t i = start; i < p.bytes / 16; i += stride)
                reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
        }
    }
}
