// Stores a step's tokens in the blocks of a serving engine, and gathers tokens from there; see blocks.cuh.
//
// Every token goes to its request's window, and every page that the step completes is quantized: from the step's own keys and
// values where they are its tokens, and from the window before them. Tokens whose window block is 0 are in no later window.
#include "store.cuh"
#include "blocks.cuh"

#define STORE_WARPS (STORE_THREADS / 32)
#define REPORTED_STEPS 4  // more than are ever computed before the host has looked
#define ROWS_PER_WARP (PAGE / STORE_WARPS)
#define ROW_WORDS ((D / 2 + 31) / 32)  // of a row per lane, two dims each: dim = 2 (lane + 32 i)
#define ROW_VECTORS (D / 8)            // of 16 bytes
// Where no lanes that write numbers at once meet in a bank.
#define KEY_PITCH (D % 32 ? D : D + 16)
#define VALUE_PITCH (D + 8)

static_assert(EXACT_BYTES == 2, "rows are of 16 bit");

__device__ __forceinline__ char* window_row(const Blocks& b, bool value, int block, int token, int head) {
    const int within = token & ((1 << b.window_shift) - 1);
    return b.window + block * b.window_stride + ((size_t)(head << b.window_shift) + within) * 2 * EXACT_ROW +
           (value ? EXACT_ROW : 0);
}

__device__ __forceinline__ int window_block(const Blocks& b, int request, int token) {
    return b.window_table[(size_t)request * b.window_columns + (token >> b.window_shift)];
}

__device__ __forceinline__ char* slab_at(const Blocks& b, int request, int page, int head) {
    return b.pages + b.page_table[(size_t)request * b.page_columns + page] * b.page_stride + (size_t)head * b.slab_bytes;
}

// The pages that a step touches have slots, numbered across requests. This is the first slot of a request, which has enough of
// them wherever in a page its tokens begin.
__device__ __forceinline__ int first_slot(const int* starts, int request) { return starts[request] / PAGE + 2 * request; }

// One warp finds the request of a slot: the last whose first slot is not beyond it.
__device__ __forceinline__ int request_at(const int* starts, int requests, int slot) {
    int begin = 0, end = requests;
    while (end - begin > 1) {
        const int step = (end - begin + 31) / 32, probe = begin + (threadIdx.x & 31) * step;
        const int before = __popc(__ballot_sync(FULL, probe < end && first_slot(starts, probe) <= slot));
        begin += (before - 1) * step;
        end = min(begin + step, end);
    }
    return begin;
}

__device__ __forceinline__ float2 numbers_of(u32 word) {
#if EXACT_TYPE == BF16
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
#else
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
#endif
}

// One warp reports a row with a value that is not finite, or a key that its format cannot hold: the least word remains.
__device__ __forceinline__ void report_row(u64* bad, bool value, int layer, int position, const u32 (&row)[ROW_WORDS]) {
    const float finite = 3.402823466e38f, most = LARGEST_KEY && !value ? (float)LARGEST_KEY : finite;
    auto beyond = [&](float limit) {
        bool any = false;
#pragma unroll
        for (int i = 0; i < ROW_WORDS; i++) {
            const float2 x = numbers_of(row[i]);
            any |= !(fabsf(x.x) <= limit) | !(fabsf(x.y) <= limit);
        }
        return __any_sync(FULL, any);
    };
    if (!beyond(most)) return;
    const u64 kind = beyond(finite) ? 0 : 1;
    if ((threadIdx.x & 31) == 0) atomicMin(bad, (u64)(u32)position << 31 | (u64)layer << 1 | kind);
}

// `starts`: where each request's tokens begin, and the end of the last; `slot_mapping`: the window's slot of each token, or -1;
// `bad`: of each request the least of position << 31 | layer << 1 | kind; kind 1: finite, but too large for the format of K.
// grid: 1 and requests, or slots and 1, in x and z; (KV head, keys or values) in y.
extern "C" __global__ void __launch_bounds__(STORE_THREADS, D > 128 ? 3 : 5)
    store_blocks(STEP_ROWS_SIGNATURE, BLOCKS_SIGNATURE, const int* lengths, const int* starts, const long long* slot_mapping,
                 u64* bad, int requests, int layer) {
    __shared__ PageTile tile;
    const Blocks b = BLOCKS_VALUE;
    const int head = blockIdx.y >> 1, warp = threadIdx.x >> 5;
    const bool value = blockIdx.y & 1, one_request = gridDim.x == 1;
    const char* rows = value ? values : keys;
    const long long stride = value ? value_stride : key_stride;
    wait_for_previous();
    let_next_start();
    const int slots = one_request ? 0x7fffffff : first_slot(starts, requests);
    for (int slot = blockIdx.x; slot < slots; slot += gridDim.x) {
        const int request = one_request ? blockIdx.z : request_at(starts, requests, slot);
        const int start = starts[request], length = lengths[request], first = length - (starts[request + 1] - start);
        const int page = max(first, 0) / PAGE + slot - (one_request ? 0 : first_slot(starts, request));
        if (page * PAGE >= length) {
            if (one_request) return;
            continue;
        }
        const bool complete = (page + 1) * PAGE <= length;
        u32 row[ROWS_PER_WARP][ROW_WORDS];
        long long to = -1;  // lane r: the slot of the warp's row r, if that is a token of this step
        const int lane = threadIdx.x & 31, mine = page * PAGE + lane * STORE_WARPS + warp;
        if (lane < ROWS_PER_WARP && mine >= first && mine < length) to = slot_mapping[start + mine - first];
#pragma unroll
        for (int r = 0; r < ROWS_PER_WARP; r++) {
            const int position = page * PAGE + r * STORE_WARPS + warp;
            const char* from = nullptr;
            if (position >= first && position < length)
                from = rows + ((start + position - first) * stride + head * D) * EXACT_BYTES;
            else if (complete)
                from = window_row(b, value, window_block(b, request, position), position, head);
#pragma unroll
            for (int i = 0; i < ROW_WORDS; i++) {
                const int word = lane + 32 * i;
                row[r][i] = from && word < D / 2 ? reinterpret_cast<const u32*>(from)[word] : 0;
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS_PER_WARP; r++) {
            const int in_page = r * STORE_WARPS + warp, position = page * PAGE + in_page;
            const long long slot = __shfl_sync(FULL, to, r);
            if (slot >= 0) report_row(bad + request, value, layer, position, row[r]);
            const int block = slot < 0 ? 0 : (int)(slot >> b.window_shift);
            u32* target = reinterpret_cast<u32*>(window_row(b, value, block, position, head));
#pragma unroll
            for (int i = 0; i < ROW_WORDS; i++) {
                const int word = lane + 32 * i;
                if (word >= D / 2) continue;
                if (block) target[word] = row[r][i];
                if (!complete) continue;
                const float2 x = numbers_of(row[r][i]);
                tile.x[in_page][2 * word] = x.x;
                tile.x[in_page][2 * word + 1] = x.y;
            }
        }
        if (!complete) continue;
        __syncthreads();
        quantize_to(tile, value, slab_at(b, request, page, head));
        __syncthreads();
    }
}

// A page of one KV head, dequantized.
struct __align__(16) RowTile {
    u16 keys[PAGE][KEY_PITCH], values[PAGE][VALUE_PITCH];
};

// Two numbers as 16-bit numbers. Codes can slightly exceed the range of the rows that they were made of.
__device__ __forceinline__ u32 limited_pair(float low, float high) {
#if EXACT_TYPE == BF16
    const __nv_bfloat162 most = __floats2bfloat162_rn(3.3895313892515355e38f, 3.3895313892515355e38f);
    const __nv_bfloat162 pair = __hmax2_nan(__hmin2_nan(__floats2bfloat162_rn(low, high), most), __hneg2(most));
#else
    const __half2 most = __floats2half2_rn(65504.f, 65504.f);
    const __half2 pair = __hmax2_nan(__hmin2_nan(__floats2half2_rn(low, high), most), __hneg2(most));
#endif
    return *reinterpret_cast<const u32*>(&pair);
}

// One block dequantizes a page. A thread has whole vectors of codes: 16 bytes of K, in fours of a token's channels, or of V.
__device__ __forceinline__ void unpack_slab(RowTile& tile, const char* slab) {
    const int KEY_VECTORS = KEY_PAGE / 16, VECTORS = KEY_VECTORS + VALUE_PAGE / 16;
    const u16* key_scales = reinterpret_cast<const u16*>(slab + KEY_SCALES_AT);
    const u16* value_scales = reinterpret_cast<const u16*>(slab + VALUE_SCALES_AT);
#pragma unroll
    for (int from = 0; from < VECTORS; from += STORE_THREADS) {
        const int i = from + threadIdx.x;
        if (from < KEY_VECTORS && i < KEY_VECTORS) {
            const uint4 codes = load16(slab + 16 * i);
#pragma unroll
            for (int four = 0; four < 32 / K_BITS; four++) {
                float x[4];
                Element at;
#pragma unroll
                for (int j = 3; j >= 0; j--) {
                    const CodeIndex code = key_code_index(four, j);
                    at = key_element(i >> 5, i & 31, code.word, code.element);
                    x[j] = key_number(code_of<K_BITS>(codes, code), at, key_scales);
                }
                if (at.dim < D)
                    *reinterpret_cast<uint2*>(&tile.keys[at.token][at.dim]) =
                        make_uint2(limited_pair(x[0], x[1]), limited_pair(x[2], x[3]));
            }
        } else if (from + STORE_THREADS > KEY_VECTORS && i < VECTORS) {
            const int vector = i - KEY_VECTORS;
            const uint4 codes = load16(slab + VALUES_AT + 16 * vector);
#pragma unroll
            for (int word = 0; word < 4; word++)
#pragma unroll
                for (int e = 0; e < 32 / V_BITS; e += 2) {
                    float x[2];
                    Element at[2];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        at[j] = value_element(vector >> 5, vector & 31, word, e + j);
                        const Element scaled = {at[j].token, value_group(vector >> 5, word) * V_GROUP};
                        x[j] = value_number(code_of<V_BITS>(codes, {word, e + j}), scaled, value_scales);
                    }
                    const u32 pair = limited_pair(x[0], x[1]);
#pragma unroll
                    for (int j = 0; j < 2; j++)
                        if (at[j].dim < D) tile.values[at[j].token][at[j].dim] = (u16)(pair >> 16 * j);
                }
        }
    }
}

// Writes tokens first[i] to first[i] + count[i] - 1 of request `first_request` + i to rows start[i] and on, (rows, KV heads,
// head_dim): from the window where they are exact_first[i] or later, otherwise from pages. A page that no token is read from is
// not read: it may be incomplete.
// grid: KV heads, pages of a request, requests.
extern "C" __global__ void __launch_bounds__(STORE_THREADS, D > 128 ? 2 : 4)
    gather_blocks(char* keys, char* values, BLOCKS_SIGNATURE, const int* first, const int* count, const int* start,
                  const int* exact_first, int first_request) {
    __shared__ RowTile tile;
    const Blocks b = BLOCKS_VALUE;
    const int head = blockIdx.x, request = first_request + blockIdx.z;
    const int begin = first[blockIdx.z], end = begin + count[blockIdx.z], exact = exact_first[blockIdx.z];
    const long long row = (long long)start[blockIdx.z] - begin;
    for (int page = begin / PAGE + blockIdx.y; page * PAGE < end; page += gridDim.y) {
        const int from = max(begin, page * PAGE), to = min(end, (page + 1) * PAGE);
        if (from < exact) {
            __syncthreads();
            unpack_slab(tile, slab_at(b, request, page, head));
            __syncthreads();
        }
#pragma unroll 2
        for (int each = 0; each < 2 * PAGE * ROW_VECTORS; each += STORE_THREADS) {
            const int i = each + threadIdx.x, token = i / ROW_VECTORS % PAGE, dim = i % ROW_VECTORS * 8;
            const bool value = i >= PAGE * ROW_VECTORS;
            const int position = page * PAGE + token;
            if (i >= 2 * PAGE * ROW_VECTORS || position < from || position >= to) continue;
            uint4 x;
            if (position < exact)
                x = *reinterpret_cast<const uint4*>(value ? &tile.values[token][dim] : &tile.keys[token][dim]);
            else
                x = load16(window_row(b, value, window_block(b, request, position), position, head) + 2 * dim);
            char* target = (value ? values : keys) + ((row + position) * kv_heads + head) * EXACT_ROW;
            *reinterpret_cast<uint4*>(target + 2 * dim) = x;
        }
    }
}

// Writes of each request the first token whose window block, and all later ones before the step, are there: tokens before it
// are read from pages, so it is rounded up to a page. grid: requests; one warp each.
extern "C" __global__ void __launch_bounds__(STORE_THREADS)
    first_in_window(BLOCKS_SIGNATURE, const int* lengths, const int* starts, int exact_tokens, int* first) {
    const Blocks b = BLOCKS_VALUE;
    const int request = blockIdx.x, size = 1 << b.window_shift;
    if (threadIdx.x >= 32) return;
    const int before = max(lengths[request] - (starts[request + 1] - starts[request]), 0);
    int gone = 0;
    for (int token = max(before - exact_tokens + 1, 0) / size * size + (int)threadIdx.x * size; token < before;
         token += 32 * size)
        if (!window_block(b, request, token)) gone = token + size;
    for (int i = 16; i; i >>= 1) gone = max(gone, __shfl_xor_sync(FULL, gone, i));
    if (threadIdx.x == 0) first[request] = min((gone + PAGE - 1) / PAGE, before / PAGE) * PAGE;
}

// Takes the words that `store_blocks` lowered in the layers of a step: moves them to the step's row of `reported`, in the
// host's memory, and makes outputs NaN from the token on that each names, so that no token is chosen by them. A word that the
// host has not taken yet remains there: what follows from a bad token never hides it. One block.
// `words`: (2, requests), those of a drafter's layers second, which fail nothing; `reported`: (REPORTED_STEPS, 2, requests).
extern "C" __global__ void __launch_bounds__(STORE_THREADS)
    fail_requests(u64* words, u64* reported, const int* step, int requests, const int* lengths, const int* starts, u16* output,
                  int width) {
    __shared__ u32 failed[STORE_THREADS];
    const u64 NONE = ~0ull;
    const int most = 2 * requests;
    u64* row_of_step = reported + (size_t)(*step % REPORTED_STEPS) * most;
    for (int first = 0; first < most; first += STORE_THREADS) {
        const int i = first + threadIdx.x;
        const u64 word = i < most ? words[i] : NONE;
        if (word != NONE) {
            if (row_of_step[i] == NONE) row_of_step[i] = word;
            words[i] = NONE;
        }
        const bool fails = i < requests && word != NONE;
        failed[threadIdx.x] = fails ? (u32)(word >> 31) : (u32)NONE;
        if (!__syncthreads_or(fails)) continue;
        for (int each = 0; each < STORE_THREADS; each++) {
            if (failed[each] == (u32)NONE) continue;
            const int request = first + each, end = starts[request + 1];
            const int row = max(end - (lengths[request] - (int)failed[each]), starts[request]);
            for (long long at = (long long)row * width + threadIdx.x; at < (long long)end * width; at += STORE_THREADS)
                output[at] = 0x7fff;  // NaN in either type
        }
        __syncthreads();
    }
}
