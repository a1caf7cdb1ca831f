// The blocks in which a serving engine stores tokens; kernels find them through tables of (request, block).
//
// A block of pages holds one page of 32 tokens for every KV head, in slabs that follow each other: codes of K, scales of K,
// codes of V, scales of V. A block of the window holds 2^window_shift recent tokens in 16 bit: (KV head, token, K before V).
// Block 0 is the engine's null block, which no step reads.
#pragma once

// Strides: bytes between blocks, and elements between tokens of the tensors.
struct Blocks {
    char *pages, *window;
    const int *page_table, *window_table;
    long long page_stride, window_stride;
    int kv_heads, slab_bytes, page_columns, window_columns, window_shift;
};

#define BLOCKS_SIGNATURE                                                                                                       \
    char *pages, char *window, const int *page_table, const int *window_table, long long page_stride, long long window_stride, \
        int kv_heads, int slab_bytes, int page_columns, int window_columns, int window_shift
#define BLOCKS_VALUE                                                                                                           \
    Blocks {                                                                                                                   \
        pages, window, page_table, window_table, page_stride, window_stride, kv_heads, slab_bytes, page_columns,               \
            window_columns, window_shift                                                                                       \
    }

// The rows of queries of a step, one query token each: the newest tokens of every request, in their order. Row r is one of
// `queries_per_request` rows of request r / queries_per_request; where that is 0, `starts` and `row_requests` say whose it is.
struct BlockRows {
    const int *lengths, *window_first, *starts, *row_requests;
    int rows, queries_per_request, group, exact_tokens;
};

#define BLOCK_ROWS_SIGNATURE                                                                                                   \
    const int *lengths, const int *window_first, const int *starts, const int *row_requests, int rows,                         \
        int queries_per_request, int group, int exact_tokens
#define BLOCK_ROWS_VALUE                                                                                                       \
    BlockRows { lengths, window_first, starts, row_requests, rows, queries_per_request, group, exact_tokens }

// Which pages a (row, KV head) reads: those of a list, and those from number `fresh` on; (0, 0) reads every page.
struct __align__(16) Listing {
    int count, fresh, list, units;  // `list`: its number; `units`: units of work with those of exact rows
};

__device__ __forceinline__ Listing listing_at(const Listing* from) {
    const int4 x = __ldcg(reinterpret_cast<const int4*>(from));
    return {x.x, x.y, x.z, x.w};
}

// The keys and values of a step's tokens, (tokens, KV heads, head_dim); strides in elements between tokens.
#define STEP_ROWS_SIGNATURE const char *keys, const char *values, long long key_stride, long long value_stride
