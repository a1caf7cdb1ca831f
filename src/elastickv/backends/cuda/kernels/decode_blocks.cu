// Decode attention over the blocks of a serving engine, on tensor cores; see blocks.cuh and page_decode.cuh.
//
// A row of the batch is one query token. Its newest `exact_tokens` tokens are exact; all others are read from pages, and so are
// tokens before window_first[request], whose window blocks are gone. The tokens of this step are read from `keys` and `values`:
// the kernel that stores them may still be running, and this one waits for it only when it ends. Where a row may read what
// another request stores in this step, it must not be launched before that kernel has ended.
//
// SELECT: rows read the pages that `listings` says, which `select_blocks` has written.
#define BLOCK_TABLES 1
#define START_UNITS 40  // starting a problem and merging its results take as long as 40 pages of int4 on an H200
#include "page_decode.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    decode_blocks(const char* query, long long query_stride, STEP_ROWS_SIGNATURE, BLOCKS_SIGNATURE, char* output, float* lse,
                  BLOCK_ROWS_SIGNATURE, float* partial, float2* partial_ml, u32* counters, int passes, float scale_log2,
                  const Listing* listings, const u16* page_lists, int list_capacity) {
    Args a = args_of(BLOCKS_VALUE, BLOCK_ROWS_VALUE);
    a.query = reinterpret_cast<const float*>(query);
    a.output = output;
    a.lse = lse;
    a.cold_pages = pages;
    a.exact_k = window;
    a.exact_v = window + EXACT_ROW;
    a.partial = partial;
    a.partial_ml = partial_ml;
    a.counters = counters;
    a.passes = passes;
    a.scale_log2 = scale_log2;
    a.output_type = EXACT_TYPE;
    a.keys = keys;
    a.values = values;
    a.query_stride = query_stride;
    a.key_stride = key_stride * EXACT_BYTES;
    a.value_stride = value_stride * EXACT_BYTES;
    a.listings = listings;
    a.page_lists = page_lists;
    a.page_capacity = list_capacity;
    decode_pages(a);
}
