// Rotates the outputs of a decode back, where V is stored rotated.
#include "rotation.cuh"

// One warp rotates a float32 row of `source` and writes it to `output` as `output_type`; they may be the same memory. It is
// launched without an early start, and the next kernel starts after its end: neither of the waits of common.cuh is needed.
extern "C" __global__ void __launch_bounds__(256) rotate_rows(const float* source, char* output, int rows, int output_type) {
    const int lane = threadIdx.x & 31;
    const size_t row = (size_t)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    if (row >= (size_t)rows) return;
    float x[ELEMENTS];
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) x[i] = lane + 32 * i < D ? source[row * D + lane + 32 * i] : 0.f;
    rotate_row(x);
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) {
        const int dim = lane + 32 * i;
        if (dim >= D) continue;
        if (output_type == FP32)
            reinterpret_cast<float*>(output)[row * D + dim] = x[i];
        else if (output_type == BF16)
            reinterpret_cast<__nv_bfloat16*>(output)[row * D + dim] = __float2bfloat16_rn(x[i]);
        else
            reinterpret_cast<__half*>(output)[row * D + dim] = __float2half_rn(x[i]);
    }
}
