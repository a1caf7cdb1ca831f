// Stores a step's tokens in the blocks of a serving engine, and reads pages back; see blocks.cuh.
//
// Every token goes to its request's window, and every page that the step completes is quantized: from the step's own keys and
// values where they are its tokens, and from the window before them. Tokens whose window block is 0 are in no later window.
#include "unpack.cuh"
#include "blocks.cuh"

__device__ __forceinline__ char* window_row(const Blocks& b, bool value, int block, int token, int head) {
    const int within = token & ((1 << b.window_shift) - 1);
    return b.window + block * b.window_stride + ((size_t)(head << b.window_shift) + within) * 2 * EXACT_ROW +
           (value ? EXACT_ROW : 0);
}

__device__ __forceinline__ char* slab_at(const Blocks& b, int request, int page, int head) {
    return b.pages + b.page_table[(size_t)request * b.page_columns + page] * b.page_stride + (size_t)head * b.slab_bytes;
}

// `starts`: where each request's tokens begin, and the end of the last; `slot_mapping`: the window's slot of each token, or -1.
// grid: pages of a request, (KV head, keys or values), requests.
extern "C" __global__ void __launch_bounds__(STORE_THREADS)
    store_blocks(STEP_ROWS_SIGNATURE, BLOCKS_SIGNATURE, const int* lengths, const int* starts, const long long* slot_mapping) {
    __shared__ PageTile tile;
    const Blocks b = BLOCKS_VALUE;
    const int request = blockIdx.z, head = blockIdx.y >> 1, warp = threadIdx.x >> 5, warps = STORE_THREADS / 32;
    const bool value = blockIdx.y & 1;
    wait_for_previous();
    let_next_start();
    const int start = starts[request], count = starts[request + 1] - start;
    const int length = lengths[request], first = length - count;
    const char* rows = value ? values : keys;
    const long long stride = value ? value_stride : key_stride;
    for (int i = blockIdx.x * warps + warp; i < count; i += gridDim.x * warps) {
        const long long slot = slot_mapping[start + i];
        if (slot < 1ll << b.window_shift) continue;
        float x[ELEMENTS];
        load_row(x, rows, (start + i) * stride + head * D, EXACT_TYPE, D);
        char* row = window_row(b, value, (int)(slot >> b.window_shift), (int)slot, head);
#pragma unroll
        for (int e = 0; e < ELEMENTS; e++)
            if (const int dim = (threadIdx.x & 31) + 32 * e; dim < D) put_exact(row, dim, x[e]);
    }
    for (int page = max(first, 0) / PAGE + blockIdx.x; page < length / PAGE; page += gridDim.x) {
        for (int token = warp; token < PAGE; token += warps) {
            const int position = page * PAGE + token;
            float x[ELEMENTS];
            if (position >= first) {
                load_row(x, rows, (start + position - first) * stride + head * D, EXACT_TYPE, D);
            } else {
                const int block = b.window_table[(size_t)request * b.window_columns + (position >> b.window_shift)];
                load_row(x, window_row(b, value, block, position, head), 0, EXACT_TYPE, D);
            }
#pragma unroll
            for (int e = 0; e < ELEMENTS; e++)
                if (const int dim = (threadIdx.x & 31) + 32 * e; dim < D) tile.x[token][dim] = x[e];
        }
        __syncthreads();
        char* slab = slab_at(b, request, page, head);
        if (value)
            quantize_values(tile, reinterpret_cast<u32*>(slab + VALUES_AT), reinterpret_cast<u16*>(slab + VALUE_SCALES_AT));
        else
            quantize_keys(tile, reinterpret_cast<u32*>(slab), reinterpret_cast<u16*>(slab + KEY_SCALES_AT));
        __syncthreads();
    }
}

// Writes the numbers of a request's first `tokens` tokens, (tokens, KV heads, head_dim). grid: pages, (KV head, keys or
// values).
extern "C" __global__ void __launch_bounds__(STORE_THREADS)
    read_blocks(char* keys, char* values, BLOCKS_SIGNATURE, int request, int tokens) {
    __shared__ PageTile tile;
    const Blocks b = BLOCKS_VALUE;
    const int head = blockIdx.y >> 1;
    const bool value = blockIdx.y & 1;
    for (int page = blockIdx.x; page * PAGE < tokens; page += gridDim.x) {
        const char* slab = slab_at(b, request, page, head);
        __syncthreads();
        unpack_codes(tile, value, reinterpret_cast<const u32*>(slab + (value ? VALUES_AT : 0)),
                     reinterpret_cast<const u16*>(slab + (value ? VALUE_SCALES_AT : KEY_SCALES_AT)));
        __syncthreads();
        for (int token = threadIdx.x >> 5; token < PAGE && page * PAGE + token < tokens; token += STORE_THREADS / 32) {
            char* row = (value ? values : keys) + ((size_t)(page * PAGE + token) * kv_heads + head) * EXACT_ROW;
#pragma unroll
            for (int e = 0; e < ELEMENTS; e++)
                if (const int dim = (threadIdx.x & 31) + 32 * e; dim < D) put_exact(row, dim, limit_exact(tile.x[token][dim]));
        }
    }
}
