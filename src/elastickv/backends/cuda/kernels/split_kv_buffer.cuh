// Partial results that concurrently running blocks exchange through global memory.
//
// A word that is not EMPTY has arrived: the data are their own flag, without fences or counters. Each block merges a share of
// the items, always in the same order, and resets what it has read to EMPTY for the next kernel.
#pragma once
#include "common.cuh"

#define EMPTY 0xffff1e77u  // a NaN that no arithmetic produces: the host fills the buffer with it

__device__ __forceinline__ u32 filled(float x) {
    const u32 word = __float_as_uint(x);
    return word == EMPTY ? 0x7fffffffu : word;
}

__device__ __forceinline__ void send(float4* o, float2* ml, const Merged& sum) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(o), "r"(filled(sum.o.x)), "r"(filled(sum.o.y)),
                 "r"(filled(sum.o.z)), "r"(filled(sum.o.w))
                 : "memory");
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(ml), "r"(filled(sum.m)), "r"(filled(sum.l)) : "memory");
}

// Waits for a partial result and resets its words to EMPTY.
__device__ __forceinline__ Merged receive(float4* o, float2* ml) {
    uint4 x;
    uint2 y;
    do {
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                     : "l"(o)
                     : "memory");
        asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(y.x), "=r"(y.y) : "l"(ml) : "memory");
    } while (x.x == EMPTY || x.y == EMPTY || x.z == EMPTY || x.w == EMPTY || y.x == EMPTY || y.y == EMPTY);
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%1,%1,%1};" ::"l"(o), "r"(EMPTY) : "memory");
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%1};" ::"l"(ml), "r"(EMPTY) : "memory");
    return {make_float4(__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)),
            __uint_as_float(y.x), __uint_as_float(y.y)};
}

__device__ __forceinline__ Merged of_lane(const Merged& x, u32 apart) {
    return {make_float4(__shfl_xor_sync(FULL, x.o.x, apart), __shfl_xor_sync(FULL, x.o.y, apart),
                        __shfl_xor_sync(FULL, x.o.z, apart), __shfl_xor_sync(FULL, x.o.w, apart)),
            __shfl_xor_sync(FULL, x.m, apart), __shfl_xor_sync(FULL, x.l, apart)};
}

// Merges the `split`th share of a problem's items, of which each of `splits` blocks has sent a partial result, those of block b
// from `b * items` on. One thread calls `write(item, result)`. Every lane receives one partial, and lanes merge in pairs.
template <class Write>
__device__ __forceinline__ void merge_share(float4* o, float2* ml, u32 items, u32 split, u32 splits, Write write) {
    const u32 share = (items + splits - 1) / splits, begin = split * share, end = min(begin + share, items);
    const u32 lanes = splits > 16 ? 32 : 1u << (32 - __clz(splits - 1)), lane = threadIdx.x & (lanes - 1);
#pragma unroll 1
    for (u32 first = begin; first < end; first += THREADS / lanes) {
        const u32 item = first + threadIdx.x / lanes;
        Merged sum = {{0.f, 0.f, 0.f, 0.f}, NOTHING, 0.f};
        if (item < end) {
#pragma unroll 1
            for (u32 from = lane; from < splits; from += lanes) {
                const Merged other = receive(o + from * items + item, ml + from * items + item);
                combine(sum, other.o, other.m, other.l);
            }
        }
        __syncwarp();
#pragma unroll 1
        for (u32 apart = 1; apart < lanes; apart *= 2) {
            const Merged other = of_lane(sum, apart);
            combine(sum, other.o, other.m, other.l);
        }
        if (lane == 0 && item < end) write(item, sum);
    }
}
