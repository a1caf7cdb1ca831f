// Decode attention over the pages of a cache on tensor cores; see page_decode.cuh.
#include "page_decode.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode(ARGS_SIGNATURE) { decode_pages(ARGS_VALUE); }
