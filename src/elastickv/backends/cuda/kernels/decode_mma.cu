// Decode attention on tensor cores (SM 8.0 and newer), 16-bit and int8 rows.
//
// Warps are independent and keep everything in registers: a 16-byte load of K or V is an MMA operand as it stands. For q.k the
// order of the head's dimensions is free, so a lane's 8 (int8: 16) consecutive dims feed two MMAs; the query sits in shared
// memory in the same order, split into a high part (rows 0-7 of A) and a low part (rows 8-15) so that its rounding costs
// nothing. For P.V the transposed product is taken: rows of A are dims, and pairs of tokens are interleaved byte by byte.
#include "common.cuh"

#define HEADS 8  // query heads of one tile
#define K16 ((D + 31) / 32)
#define K8 ((D + 63) / 64)
#define V8 ((D + 127) / 128)
#define SETS (COLD_TYPE == COLD_INT8 ? 2 * V8 : (D + 63) / 64)
// Whether K of the next unit is loaded while V is in use; else V of a unit takes the registers of its K.
#define PIPELINED (D <= 192)
#define RESCALE 8.f  // log2 by which a score may exceed the running maximum before everything is rescaled
#define V_SHIFT 7    // P x V scale reaches 2^(8 + 7) in fp16: its whole range is used
#define ROWS (HEADS * QTILES)
// A warp with more than EARLY_FROM units fetches EARLY of them into L2 while the query is on its way; with fewer units
// that costs more than it hides.
#ifndef EARLY
#define EARLY 2
#endif
#ifndef EARLY_FROM
#define EARLY_FROM 3
#endif

struct Running {
    float acc[SETS][4][4];  // [set][pair of dims][dim 0: q 2t, 2t+1; dim 1: q 2t, 2t+1]
    float m, l;             // of query g; l over this lane's tokens only
};

// Dims that lane group g holds of a set of V: 8 from here.
__device__ __forceinline__ int set_dim(int set, int g) {
    return COLD_TYPE == COLD_INT8 ? (set >> 1) * 128 + g * 16 + (set & 1) * 8 : set * 64 + g * 8;
}

__device__ __forceinline__ u32 pack16(float lo, float hi) {
    u32 r;
#if EXACT_TYPE == BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#endif
    return r;
}

__device__ __forceinline__ u32 pack_half(float lo, float hi) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

__device__ __forceinline__ float2 unpack16(u32 v) {
#if EXACT_TYPE == BF16
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
#else
    return __half22float2(*reinterpret_cast<__half2*>(&v));
#endif
}

#define MMA16(type)                                                                                             \
    asm LOAD_ORDER("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "   \
        "{%0,%1,%2,%3};"                                                                                        \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                        \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))

__device__ __forceinline__ void mma_exact(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if EXACT_TYPE == BF16
    MMA16("bf16");
#else
    MMA16("f16");
#endif
}

__device__ __forceinline__ void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { MMA16("f16"); }

__device__ __forceinline__ void mma_int8(int (&c)[4], uint4 a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Volatile: hoisted out of the loop, the query would take the registers that loads in flight need.
__device__ __forceinline__ uint4 load_query(const uint4* p) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"((u32)__cvta_generic_to_shared(p)));
    return v;
}

__device__ __forceinline__ void scale_queries(Running& r, float alpha, int t) {
    float a0 = __shfl_sync(FULL, alpha, 8 * t), a1 = __shfl_sync(FULL, alpha, 8 * t + 4);
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            r.acc[s][j][0] *= a0;
            r.acc[s][j][1] *= a1;
            r.acc[s][j][2] *= a0;
            r.acc[s][j][3] *= a1;
        }
}

__device__ __forceinline__ void raise_maximum(Running& r, float top, int t) {
    top = fmaxf(top, __shfl_xor_sync(FULL, top, 1));
    top = fmaxf(top, __shfl_xor_sync(FULL, top, 2));
    top = fmaxf(top, r.m);
    float alpha = exp2_fast(r.m - top);
    r.m = top;
    r.l *= alpha;
    scale_queries(r, alpha, t);
}

// Keys of a unit in flight.
struct Keys {
#if COLD_TYPE == COLD_INT8
    uint4 k8[4][K8], scale;
#endif
    uint4 k16[2][K16];
};

template <bool RING>
__device__ __forceinline__ size_t row16(const Args& a, const Span& s, int token, int n) {
    token = min(token, n - 1);
    return (size_t)(u32)(RING ? exact_row(a, s, token) : token) * EXACT_ROW;
}

template <bool RING>
__device__ __forceinline__ void load_keys16(Keys& k, const Args& a, const Span& s, const char* keys, int n, int unit) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const char* p = keys + row16<RING>(a, s, 16 * unit + 8 * i + g, n) + 16 * t;
#pragma unroll
        for (int c = 0; c < K16; c++) k.k16[i][c] = 32 * c + 8 * t < D ? load16(p + 64 * c) : make_uint4(0, 0, 0, 0);
    }
}

// 16-bit rows, 16 tokens a unit. RING: the rows are a span's exact tokens.
template <bool RING>
__device__ __forceinline__ void attend16(Running& r, const Args& a, const Span& s, const char* keys,
                                         const char* values, int n, int unit, int end, const uint4* query, float bias) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    Keys k;
    uint4 v[4][SETS];
    auto load_v = [&](int u) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const char* p = values + row16<RING>(a, s, 16 * u + 8 * (e >> 1) + 2 * t + (e & 1), n);
#pragma unroll
            for (int c = 0; c < SETS; c++)
                v[e][c] = set_dim(c, g) < D ? load16(p + 2 * set_dim(c, g)) : make_uint4(0, 0, 0, 0);
        }
    };
    if (unit >= end) return;
    if (PIPELINED) load_keys16<RING>(k, a, s, keys, n, unit);
#pragma unroll 1
    for (; unit < end; unit += WARPS_PER_TILE) {
        if (PIPELINED)
            load_v(unit);
        else
            load_keys16<RING>(k, a, s, keys, n, unit);
        float x[2][4] = {};
#pragma unroll
        for (int c = 0; c < K16; c++) {
            uint4 q0 = load_query(query + (2 * c) * 32 + lane), q1 = load_query(query + (2 * c + 1) * 32 + lane);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                mma_exact(x[i], q0.x, q0.y, q0.z, q0.w, k.k16[i][c].x, k.k16[i][c].y);
                mma_exact(x[i], q1.x, q1.y, q1.z, q1.w, k.k16[i][c].z, k.k16[i][c].w);
            }
        }
        if (!PIPELINED)
            load_v(unit);
        else if (unit + WARPS_PER_TILE < end)
            load_keys16<RING>(k, a, s, keys, n, unit + WARPS_PER_TILE);
        float score[4];
#pragma unroll
        for (int i = 0; i < 4; i++) score[i] = x[i >> 1][i & 1] + x[i >> 1][2 + (i & 1)] + bias;
        if (16 * unit + 16 > n)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (16 * unit + 8 * (i >> 1) + 2 * t + (i & 1) >= n) score[i] = -INFINITY;
        float top = fmaxf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3]));
        if (__any_sync(FULL, top > r.m + RESCALE)) raise_maximum(r, top, t);
        u32 p[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            p[i] = pack16(exp2_fast(score[2 * i] - r.m), exp2_fast(score[2 * i + 1] - r.m));
            float2 rounded = unpack16(p[i]);
            r.l += rounded.x + rounded.y;
        }
#pragma unroll
        for (int c = 0; c < SETS; c++) {
            const u32 *v0 = &v[0][c].x, *v1 = &v[1][c].x, *v2 = &v[2][c].x, *v3 = &v[3][c].x;
#pragma unroll
            for (int j = 0; j < 4; j++)
                mma_exact(r.acc[c][j], __byte_perm(v0[j], v1[j], 0x5410), __byte_perm(v0[j], v1[j], 0x7632),
                          __byte_perm(v2[j], v3[j], 0x5410), __byte_perm(v2[j], v3[j], 0x7632), p[0], p[1]);
        }
    }
}

#if COLD_TYPE == COLD_INT8
__device__ __forceinline__ float scale_of(const uint4& v, int e) {
    u32 w = (&v.x)[e >> 1];
    return __uint_as_float(e & 1 ? w & 0xffff0000u : w << 16);
}

// Two bytes code + 128 as a pair of fp16 numbers: 0x64nn is 1024 + nn.
__device__ __forceinline__ u32 codes_to_half(u32 bytes, u32 selector) {
    u32 w = __byte_perm(bytes, 0x64646464u, selector);
    __half2 x = __hsub2(*reinterpret_cast<__half2*>(&w), __floats2half2_rn(1152.f, 1152.f));
    return *reinterpret_cast<u32*>(&x);
}

__device__ __forceinline__ size_t row8(int token, int n) { return (size_t)(u32)min(token, n - 1) * D; }

__device__ __forceinline__ void load_keys8(Keys& k, const char* keys, const u16* scales, int n, int unit) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    k.scale = load16(reinterpret_cast<const char*>(scales + 32 * unit + 8 * t));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const char* p = keys + row8(32 * unit + 8 * (g >> 1) + 2 * i + (g & 1), n) + 16 * t;
#pragma unroll
        for (int c = 0; c < K8; c++) k.k8[i][c] = 64 * c + 16 * t < D ? load16(p + 64 * c) : make_uint4(0, 0, 0, 0);
    }
}

// int8 rows, 32 tokens a unit; a lane's 8 tokens are 8t..8t+7, so that its scales are one load.
__device__ __forceinline__ void attend8(Running& r, const char* keys, const char* values,
                                        const u16* key_scales, const u16* value_scales, int n, int unit, int end,
                                        const uint4* query, float query_step, float bias) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    Keys k;
    uint4 v[8][V8], vs;
    if (unit >= end) return;
    load_keys8(k, keys, key_scales, n, unit);
    float value_exponent = -100.f;  // 2^this bounds the V scales seen
    for (; unit < end; unit += WARPS_PER_TILE) {
        vs = load16(reinterpret_cast<const char*>(value_scales + 32 * unit + 8 * t));
#pragma unroll
        for (int e = 0; e < 8; e++) {
            const char* p = values + row8(32 * unit + 8 * t + e, n) + 16 * g;
#pragma unroll
            for (int c = 0; c < V8; c++)
                v[e][c] = 128 * c + 16 * g < D ? load16(p + 128 * c) : make_uint4(0x80808080u, 0x80808080u, 0x80808080u, 0x80808080u);
        }
        int x[4][4] = {};
#pragma unroll
        for (int c = 0; c < K8; c++) {
            uint4 q0 = load_query(query + (2 * c) * 32 + lane), q1 = load_query(query + (2 * c + 1) * 32 + lane);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mma_int8(x[i], q0, k.k8[i][c].x, k.k8[i][c].y);
                mma_int8(x[i], q1, k.k8[i][c].z, k.k8[i][c].w);
            }
        }
        float score[8], top = -INFINITY, largest = 0.f;
        const bool tail = 32 * unit + 32 > n;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float key_scale = scale_of(k.scale, e);
            score[e] = (float)(x[e >> 1][e & 1] * 128 + x[e >> 1][2 + (e & 1)]) * (query_step * key_scale) + bias;
            if (tail && 32 * unit + 8 * t + e >= n) {
                score[e] = -INFINITY;
                (&vs.x)[e >> 1] &= e & 1 ? 0xffffu : 0xffff0000u;
            }
            top = fmaxf(top, score[e]);
            largest = fmaxf(largest, scale_of(vs, e));
        }
        if (unit + WARPS_PER_TILE < end) load_keys8(k, keys, key_scales, n, unit + WARPS_PER_TILE);
        if (__any_sync(FULL, top > r.m + RESCALE)) raise_maximum(r, top, t);
        if (__any_sync(FULL, largest > exp2_fast(value_exponent))) {
            for (int i = 1; i < 4; i <<= 1) largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, i));
            float exponent = fmaxf(value_exponent, (float)((int)(__float_as_uint(largest) >> 23) - 126));
            scale_queries(r, exp2_fast(value_exponent - exponent), t);
            value_exponent = exponent;
        }
        const float normal = exp2_fast((float)V_SHIFT - value_exponent);
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float weight = exp2_fast(score[e] - r.m);
            r.l += weight;
            score[e] = weight * (scale_of(vs, e) * normal);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 p0 = pack_half(score[4 * half], score[4 * half + 1]), p1 = pack_half(score[4 * half + 2], score[4 * half + 3]);
#pragma unroll
            for (int c = 0; c < V8; c++)
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    const u32 va = (&v[4 * half][c].x)[w], vb = (&v[4 * half + 1][c].x)[w];
                    const u32 vc = (&v[4 * half + 2][c].x)[w], vd = (&v[4 * half + 3][c].x)[w];
#pragma unroll
                    for (int pair = 0; pair < 2; pair++) {
                        u32 ab = __byte_perm(va, vb, pair ? 0x7362 : 0x5140), cd = __byte_perm(vc, vd, pair ? 0x7362 : 0x5140);
                        mma_half(r.acc[2 * c + (w >> 1)][2 * (w & 1) + pair], codes_to_half(ab, 0x4140), codes_to_half(ab, 0x4342),
                                 codes_to_half(cd, 0x4140), codes_to_half(cd, 0x4342), p0, p1);
                    }
                }
        }
    }
    const float back = exp2_fast(value_exponent - (float)V_SHIFT);
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
        for (int j = 0; j < 16; j++) r.acc[s][j >> 2][j & 3] *= back;
}
#endif

#define TREE_BYTES (WARPS / 2 * 32 * 16 * (SETS * 4))
#define MERGE_BYTES (THREADS * 32)
#define SCRATCH_BYTES (TREE_BYTES > MERGE_BYTES ? TREE_BYTES : MERGE_BYTES)

// Adds up the warps of a tile; the sum is in the warps that come first.
__device__ __forceinline__ void reduce_warps(Running& r, float4* scratch, float2* scratch_ml) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = lane & 3;
    r.l += __shfl_xor_sync(FULL, r.l, 1);
    r.l += __shfl_xor_sync(FULL, r.l, 2);
#pragma unroll
    for (int have = WARPS, half; have > QTILES; have = half) {
        half = (have / QTILES + 1) / 2 * QTILES;
        __syncthreads();
        if (warp >= half && warp < have) {
#pragma unroll
            for (int i = 0; i < SETS * 4; i++)
                scratch[((warp - half) * SETS * 4 + i) * 32 + lane] =
                    make_float4(r.acc[i >> 2][i & 3][0], r.acc[i >> 2][i & 3][1], r.acc[i >> 2][i & 3][2], r.acc[i >> 2][i & 3][3]);
            scratch_ml[(warp - half) * 32 + lane] = make_float2(r.m, r.l);
        }
        __syncthreads();
        if (warp < have - half) {
            float2 other = scratch_ml[warp * 32 + lane];
            float top = fmaxf(r.m, other.x), mine = exp2_fast(r.m - top), theirs = exp2_fast(other.x - top);
            r.m = top;
            r.l = r.l * mine + other.y * theirs;
            float m0 = __shfl_sync(FULL, mine, 8 * t), m1 = __shfl_sync(FULL, mine, 8 * t + 4);
            float t0 = __shfl_sync(FULL, theirs, 8 * t), t1 = __shfl_sync(FULL, theirs, 8 * t + 4);
#pragma unroll
            for (int i = 0; i < SETS * 4; i++) {
                float4 o = scratch[(warp * SETS * 4 + i) * 32 + lane];
                float(&c)[4] = r.acc[i >> 2][i & 3];
                c[0] = c[0] * m0 + o.x * t0;
                c[1] = c[1] * m1 + o.y * t1;
                c[2] = c[2] * m0 + o.z * t0;
                c[3] = c[3] * m1 + o.w * t1;
            }
        }
    }
    __syncthreads();
}

__device__ __forceinline__ void write_partial(const Args& a, const Place& p, int segment, const Running& r) {
    const int tile = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    if (tile >= QTILES) return;
    if (t == 0 && tile * HEADS + g < p.queries)
        __stcg(a.partial_ml + partial_row(p, blockIdx.x, segment, tile * HEADS + g, ROWS), make_float2(r.m, r.l));
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int q = tile * HEADS + 2 * t + i;
        if (q >= p.queries) continue;
        float* row = a.partial + partial_row(p, blockIdx.x, segment, q, ROWS) * D;
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            if (set_dim(s, g) >= D) continue;
            float4* to = reinterpret_cast<float4*>(row + set_dim(s, g));
            __stcg(to, make_float4(r.acc[s][0][i], r.acc[s][0][2 + i], r.acc[s][1][i], r.acc[s][1][2 + i]));
            __stcg(to + 1, make_float4(r.acc[s][2][i], r.acc[s][2][2 + i], r.acc[s][3][i], r.acc[s][3][2 + i]));
        }
    }
}

__device__ __forceinline__ void fetch_early(const char* keys, const char* values, int unit, int end, u32 unit_bytes, size_t limit) {
    if (unit + EARLY_FROM * WARPS_PER_TILE >= end) return;
#pragma unroll 1
    for (int i = 0; i < EARLY; i++) prefetch(keys, values, unit + i * WARPS_PER_TILE, end, unit_bytes, limit);
}

// Leaves the queries of a problem in shared memory as A operands: high parts in rows 0-7, what they lack in rows 8-15.
__device__ __forceinline__ void stage_query(const Args& a, const Place& p, uint4* q16, uint4* q8, float* steps) {
    const float* from = a.query + (p.head * a.group + p.first_query) * D;
    for (int i = threadIdx.x; i < QTILES * K16 * 2 * 32; i += THREADS) {
        const int lane = i & 31, part = (i >> 5) % (K16 * 2), tile = i / (K16 * 2 * 32);
        const int q = tile * HEADS + (lane >> 2), dim = (part >> 1) * 32 + (lane & 3) * 8 + (part & 1) * 4;
        float4 x = {0.f, 0.f, 0.f, 0.f};
        if (q < p.queries && dim < D) x = *reinterpret_cast<const float4*>(from + (size_t)q * D + dim);
        x = make_float4(x.x * a.scale_log2, x.y * a.scale_log2, x.z * a.scale_log2, x.w * a.scale_log2);
        u32 h0 = pack16(x.x, x.y), h1 = pack16(x.z, x.w);
        float2 f0 = unpack16(h0), f1 = unpack16(h1);
        q16[i] = make_uint4(h0, pack16(x.x - f0.x, x.y - f0.y), h1, pack16(x.z - f1.x, x.w - f1.y));
    }
#if COLD_TYPE == COLD_INT8
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    for (int q = warp; q < ROWS; q += WARPS) {
        float x[(D + 31) / 32], most = 0.f;
#pragma unroll
        for (int i = 0; i < (D + 31) / 32; i++) {
            int dim = lane + 32 * i;
            x[i] = q < p.queries && dim < D ? from[(size_t)q * D + dim] * a.scale_log2 : 0.f;
            most = fmaxf(most, fabsf(x[i]));
        }
        for (int i = 16; i; i >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
        const float inverse = most > 0.f ? 16256.f / most : 0.f;
        if (lane == 0) steps[q] = most / 16256.f;
#pragma unroll
        for (int i = 0; i < K8 * 2; i++) {
            int dim = lane + 32 * i;
            int code = i < (D + 31) / 32 ? __float2int_rn(x[i < (D + 31) / 32 ? i : 0] * inverse) : 0;
            int high = (code + 64) >> 7, low = code - high * 128;
            // dim = 64c + 16t + 8 part + 4 word + byte
            int tile = q / HEADS, g = q % HEADS, t = (dim >> 4) & 3, part = (dim >> 6) * 2 + ((dim >> 3) & 1);
            char* to = reinterpret_cast<char*>(q8 + (tile * K8 * 2 + part) * 32 + g * 4 + t) + ((dim >> 2) & 1) * 8 + (dim & 3);
            to[0] = (char)high;
            to[4] = (char)low;
        }
    }
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode(ARGS_SIGNATURE) {
    const Args a = ARGS_VALUE;
    __shared__ uint4 q16[QTILES * K16 * 2 * 32];
#if COLD_TYPE == COLD_INT8
    __shared__ uint4 q8[QTILES * K8 * 2 * 32];
    __shared__ float steps[ROWS];
#else
    uint4* q8 = nullptr;
    float* steps = nullptr;
#endif
    __shared__ float4 scratch[SCRATCH_BYTES / 16];
    __shared__ float2 scratch_ml[WARPS / 2 * 32];
    const int warp = threadIdx.x >> 5, tile = warp % QTILES, stream = warp / QTILES;
    // Kept in shared memory while the loops need the registers.
    __shared__ Work kept_work;
    __shared__ Place kept_place;
    __shared__ Span kept_span;
    Work w = find_work(a);
    while (w.left && w.problem < w.problems) {
        __syncthreads();
        Span s = span_of(a, a.state[(size_t)w.row * a.kv_heads]);
        const u32 take = min(w.left, (u32)s.units - w.offset), end = w.offset + take;
        Place p;
        p.head = w.problem / a.passes;
        p.first_query = w.problem % a.passes * ROWS;
        p.queries = min(ROWS, a.group - p.first_query);
        p.problem = w.problem;
        p.first_block = w.base / w.per;
        p.last_block = (w.base + s.units - 1) / w.per;
        if (threadIdx.x == 0) {
            kept_work = w;
            kept_place = p;
            kept_span = s;
        }
        const char *ek = a.exact_k + p.head * a.exact_rows * EXACT_ROW, *ev = a.exact_v + p.head * a.exact_rows * EXACT_ROW;
        const int begin = max((int)w.offset - s.cold_units, 0) + stream, exact_end = s.exact ? (int)end - s.cold_units : 0;
#if COLD_TYPE == COLD_NONE
        fetch_early(ek, ev, begin, exact_end, EXACT_UNIT * EXACT_ROW, (size_t)s.exact * EXACT_ROW);
#else
        const size_t first = p.head * a.cold_rows + s.cold_first;
        const char *ck = a.cold_k + first * COLD_ROW, *cv = a.cold_v + first * COLD_ROW;
        const int cold_begin = w.offset + stream, cold_end = min(end, (u32)s.cold_units);
        fetch_early(ck, cv, cold_begin, cold_end, COLD_UNIT * COLD_ROW, (size_t)s.cold * COLD_ROW);
#endif
        stage_query(a, p, q16, q8, steps);
        __syncthreads();
        Running r = {};
        r.m = NOTHING;
        const uint4* query = q16 + tile * K16 * 2 * 32;
#if COLD_TYPE == COLD_INT8
        attend8(r, ck, cv, a.k_scale + first, a.v_scale + first, s.cold, cold_begin, cold_end,
                q8 + tile * K8 * 2 * 32, steps[tile * HEADS + (threadIdx.x >> 2) % HEADS], s.bias);
#elif COLD_TYPE == COLD_SAME
        attend16<false>(r, a, s, ck, cv, s.cold, cold_begin, cold_end, query, s.bias);
#endif
#if REUSE
        reduce_warps(r, scratch, scratch_ml);
        write_partial(a, kept_place, 0, r);
        r = Running{};
        r.m = NOTHING;
#endif
        attend16<true>(r, a, s, ek, ev, s.exact, begin, exact_end, query, 0.f);
        reduce_warps(r, scratch, scratch_ml);
        w = kept_work;
        p = kept_place;
        s = kept_span;
        write_partial(a, p, SEGMENTS - 1, r);
        arrive_and_merge(a, p, s, w, ROWS, reinterpret_cast<float*>(scratch));
        const u32 size = w.pad ? w.pad : s.units;
        w.left -= min(w.left, size - w.offset);
        w.base += size;
        w.offset = 0;
        w.problem++;
        w.row = w.problem / (a.kv_heads * a.passes);
    }
}
