// Decode attention over the blocks of a serving engine, on tensor cores; see blocks.cuh and page_decode.cuh.
//
// A row of the batch is one query token. Its newest `exact_tokens` tokens are exact; all others are read from pages, and so are
// tokens before window_first[request], whose window blocks are gone. The tokens of this step are read from `keys` and `values`:
// the kernel that stores them may still be running, and this one waits for it only when it ends. Where a row may read what
// another request stores in this step, it must not be launched before that kernel has ended.
#define BLOCK_TABLES 1
#include "page_decode.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    decode_blocks(const char* query, long long query_stride, STEP_ROWS_SIGNATURE, BLOCKS_SIGNATURE, char* output, float* lse,
                  const int* lengths, const int* window_first, const int* starts, const int* row_requests, float* partial,
                  float2* partial_ml, u32* counters, int rows, int queries_per_request, int group, int passes, int exact_tokens,
                  float scale_log2) {
    Args a = {};
    a.query = reinterpret_cast<const float*>(query);
    a.output = output;
    a.lse = lse;
    a.cold_k = pages;
    a.exact_k = window;
    a.exact_v = window + EXACT_ROW;
    a.partial = partial;
    a.partial_ml = partial_ml;
    a.counters = counters;
    a.batch = rows;
    a.kv_heads = kv_heads;
    a.group = group;
    a.passes = passes;
    a.window = exact_tokens;
    a.scale_log2 = scale_log2;
    a.output_type = EXACT_TYPE;
    a.blocks = BLOCKS_VALUE;
    a.lengths = lengths;
    a.window_first = window_first;
    a.starts = starts;
    a.row_requests = row_requests;
    a.keys = keys;
    a.values = values;
    a.query_stride = query_stride;
    a.key_stride = key_stride * EXACT_BYTES;
    a.value_stride = value_stride * EXACT_BYTES;
    a.queries_per_request = queries_per_request;
    decode_pages(a);
}
