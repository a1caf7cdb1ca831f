// Measures the device's limits: a read-only stream, a copy, and multiply-adds on the units that attention uses.

typedef unsigned int u32;

#ifndef UNROLL
#define UNROLL 4
#endif

// Each warp streams its own part in 512-byte lines, UNROLL of them in flight.
extern "C" __global__ void __launch_bounds__(256) read(const uint4* source, long long vectors, u32* sink) {
    u32 sum = 0;
    const long long stride = (long long)gridDim.x * blockDim.x;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + (UNROLL - 1) * stride < vectors; i += UNROLL * stride) {
        uint4 v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) v[u] = __ldcs(source + i + u * stride);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    for (; i < vectors; i += stride) sum ^= __ldcs(source + i).x;
    if (sum == 0x5bd1e995u) *sink = sum;
}

// The same with one contiguous chunk per block.
extern "C" __global__ void __launch_bounds__(256) read_chunks(const uint4* source, long long vectors, u32* sink) {
    u32 sum = 0;
    const long long part = (vectors + gridDim.x - 1) / gridDim.x, start = part * blockIdx.x;
    const long long end = start + part < vectors ? start + part : vectors;
    long long i = start + threadIdx.x;
    for (; i + (UNROLL - 1) * 256 < end; i += UNROLL * 256) {
        uint4 v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) v[u] = __ldcs(source + i + u * 256);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    for (; i < end; i += 256) sum ^= __ldcs(source + i).x;
    if (sum == 0x5bd1e995u) *sink = sum;
}

extern "C" __global__ void __launch_bounds__(256) copy(const uint4* source, uint4* target, long long vectors) {
    const long long stride = (long long)gridDim.x * blockDim.x;
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    for (; i + (UNROLL - 1) * stride < vectors; i += UNROLL * stride) {
        uint4 v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) v[u] = __ldcs(source + i + u * stride);
#pragma unroll
        for (int u = 0; u < UNROLL; u++) __stcs(target + i + u * stride, v[u]);
    }
    for (; i < vectors; i += stride) target[i] = source[i];
}

// 16 chains of 4096 dependent multiply-adds per thread (tensor cores: 8 chains of m16n8k16 bf16 per warp).
extern "C" __global__ void __launch_bounds__(256) multiply_add(float* sink) {
#if TENSOR
    float c[8][4] = {};
    u32 a = threadIdx.x * 0x3f803f80u, b = 0x3c003c00u + threadIdx.x;
    for (int i = 0; i < 4096; i++)
#pragma unroll
        for (int k = 0; k < 8; k++)
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5}, {%0,%1,%2,%3};"
                : "+f"(c[k][0]), "+f"(c[k][1]), "+f"(c[k][2]), "+f"(c[k][3])
                : "r"(a), "r"(b));
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < 8; k++) sum += c[k][0] + c[k][1] + c[k][2] + c[k][3];
#else
    float c[16], a = 1.f + threadIdx.x * 1e-9f, b = threadIdx.x * 1e-9f, sum = 0.f;
#pragma unroll
    for (int k = 0; k < 16; k++) c[k] = k + b;
    for (int i = 0; i < 4096; i++)
#pragma unroll
        for (int k = 0; k < 16; k++) c[k] = fmaf(c[k], a, b);
#pragma unroll
    for (int k = 0; k < 16; k++) sum += c[k];
#endif
    if (sum == 12345.678f) *sink = sum;
}
