// Attention of one warp on tensor cores (SM 8.0 and newer), 16-bit and int8 rows.
//
// Warps are independent and keep everything in registers: a 16-byte load of K or V is an MMA operand without conversion. For
// q.k the order of the head's dimensions is free, so a lane's 8 (int8: 16) consecutive dims feed two MMAs. The query is in
// shared memory in the same order, split into a high part (rows 0-7 of A) and a low part (rows 8-15), so that rounding it loses
// nothing. P.V is computed transposed: rows of A are dims, and pairs of tokens are interleaved byte by byte.
#pragma once
#include "common.cuh"

#define HEADS 8  // query heads of one tile
#define K16 ((D + 31) / 32)
#define K8 ((D + 63) / 64)
#define V8 ((D + 127) / 128)
#define SETS (COLD_TYPE == COLD_INT8 ? 2 * V8 : (D + 63) / 64)
// Whether K of the next unit is loaded while V is in use; otherwise V of a unit reuses the registers of its K.
#define PIPELINED (D <= 192)
#define RESCALE 8.f  // log2 by which a score may exceed the running maximum before results are rescaled
#define V_SHIFT 7    // P x V scale reaches 2^(8 + 7), which uses the range of fp16
#define ROWS (HEADS * QTILES)
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

#define MMA16(type)                                                                                                            \
    asm LOAD_ORDER("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "       \
                   "{%0,%1,%2,%3};"                                                                                            \
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                            \
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

// Volatile, so that the query is not hoisted out of the loop: it would take the registers that loads in flight need.
__device__ __forceinline__ uint4 load_query(const uint4* p) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared_address(p)));
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

// A unit of 16 tokens in flight: 16-bit rows.
struct Unit16 {
    uint4 k[2][K16], v[4][SETS];
};

template <bool RING, bool VALUE>
__device__ __forceinline__ const char* row16(const Args& a, const Span& s, const char* rows_of_head, int token, int rows) {
    token = min(token, rows - 1);
#if BLOCK_TABLES
    if (token >= s.first_new)
        return VALUE ? s.values + (token - s.first_new) * a.value_stride : s.keys + (token - s.first_new) * a.key_stride;
    const int within = token & ((1 << a.blocks.window_shift) - 1);
    return rows_of_head + __ldg(s.window + (token >> a.blocks.window_shift)) * a.blocks.window_stride + s.window_head +
           (size_t)within * 2 * EXACT_ROW;
#else
    return rows_of_head + (size_t)(u32)(RING ? exact_row(a, s, token) : token) * EXACT_ROW;
#endif
}

template <bool RING>
__device__ __forceinline__ void load_keys16(Unit16& in, const Args& a, const Span& s, const char* keys, int rows, int unit) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const char* p = row16<RING, false>(a, s, keys, 16 * unit + 8 * i + g, rows) + 16 * t;
#pragma unroll
        for (int c = 0; c < K16; c++) in.k[i][c] = 32 * c + 8 * t < D ? load16(p + 64 * c) : make_uint4(0, 0, 0, 0);
    }
}

template <bool RING>
__device__ __forceinline__ void load_values16(Unit16& in, const Args& a, const Span& s, const char* values, int rows,
                                              int unit) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const char* p = row16<RING, true>(a, s, values, 16 * unit + 8 * (e >> 1) + 2 * t + (e & 1), rows);
#pragma unroll
        for (int c = 0; c < SETS; c++) in.v[e][c] = set_dim(c, g) < D ? load16(p + 2 * set_dim(c, g)) : make_uint4(0, 0, 0, 0);
    }
}

// The first n rows are tokens.
struct First {
    static constexpr bool others = false;  // whether rows that are not tokens are loaded; they may hold anything
    int n;
    __device__ __forceinline__ bool all(int row, int rows) const { return row + rows <= n; }
    __device__ __forceinline__ bool holds(int row) const { return row < n; }
};

__device__ __forceinline__ int2 load_state(const int2* p) {
    int2 v;
    asm volatile("ld.global.v2.s32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

// Rows from `first` on, to `end`.
struct Between {
    static constexpr bool others = true;
    int first, end;
    __device__ __forceinline__ bool all(int row, int rows) const { return row >= first && row + rows <= end; }
    __device__ __forceinline__ bool holds(int row) const { return row >= first && row < end; }
};

// Tokens of the exact plane: the sinks, then the ring.
struct InRing {
    static constexpr bool others = true;
    int sinks, ring, start, exact;
    __device__ __forceinline__ bool all(int, int) const { return false; }
    __device__ __forceinline__ bool holds(int row) const {
        int at = row - sinks - start;
        at = at < 0 ? at + ring : at;
        return row < sinks ? row < exact : row < sinks + ring && sinks + at < exact;
    }
};

// Attends to 16-bit rows in units of 16 tokens: every `step`th from `unit` to `end`. RING: the rows are a span's exact tokens.
// LOADED: the caller has loaded the first unit, and some of the `rows` rows may not be tokens; otherwise all are.
template <bool RING, bool LOADED, class Tokens>
__device__ __forceinline__ void attend16(Running& r, Unit16& in, const Args& a, const Span& s, const char* keys,
                                         const char* values, int rows, const Tokens& tokens, int unit, int end, int step,
                                         const uint4* query, float bias) {
    const int lane = threadIdx.x & 31, t = lane & 3;
    if (unit >= end) return;
    if (PIPELINED && !LOADED) load_keys16<RING>(in, a, s, keys, rows, unit);
#pragma unroll 1
    for (; unit < end; unit += step) {
        if (!PIPELINED)
            load_keys16<RING>(in, a, s, keys, rows, unit);
        else if (!LOADED)
            load_values16<RING>(in, a, s, values, rows, unit);
        float x[2][4] = {};
#pragma unroll
        for (int c = 0; c < K16; c++) {
            uint4 q0 = load_query(query + (2 * c) * 32 + lane), q1 = load_query(query + (2 * c + 1) * 32 + lane);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                mma_exact(x[i], q0.x, q0.y, q0.z, q0.w, in.k[i][c].x, in.k[i][c].y);
                mma_exact(x[i], q1.x, q1.y, q1.z, q1.w, in.k[i][c].z, in.k[i][c].w);
            }
        }
        if (!PIPELINED)
            load_values16<RING>(in, a, s, values, rows, unit);
        else if (unit + step < end)
            load_keys16<RING>(in, a, s, keys, rows, unit + step);
        float score[4];
#pragma unroll
        for (int i = 0; i < 4; i++) score[i] = x[i >> 1][i & 1] + x[i >> 1][2 + (i & 1)] + bias;
        if (!tokens.all(16 * unit, 16)) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (!tokens.holds(16 * unit + 8 * (i >> 1) + 2 * t + (i & 1))) {
                    score[i] = -INFINITY;
#pragma unroll
                    for (int c = 0; (LOADED || Tokens::others) && c < SETS; c++) in.v[i][c] = make_uint4(0, 0, 0, 0);
                }
        }
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
            const u32 *v0 = &in.v[0][c].x, *v1 = &in.v[1][c].x, *v2 = &in.v[2][c].x, *v3 = &in.v[3][c].x;
#pragma unroll
            for (int j = 0; j < 4; j++)
                mma_exact(r.acc[c][j], __byte_perm(v0[j], v1[j], 0x5410), __byte_perm(v0[j], v1[j], 0x7632),
                          __byte_perm(v2[j], v3[j], 0x5410), __byte_perm(v2[j], v3[j], 0x7632), p[0], p[1]);
        }
        if (LOADED && unit + step < end) load_values16<RING>(in, a, s, values, rows, unit + step);
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

// A unit of 32 tokens in flight: int8 rows and their scales.
struct Unit8 {
    uint4 k[4][K8], k_scale, v[8][V8], v_scale;
};

// The int8 rows of one KV head.
struct Rows8 {
    const char *keys, *values;
    const u16 *key_scales, *value_scales;
    int rows;
};

__device__ __forceinline__ size_t row8(const Rows8& of, int token) { return (size_t)(u32)min(token, of.rows - 1) * D; }

__device__ __forceinline__ void load_keys8(Unit8& in, const Rows8& of, int unit) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    in.k_scale = load16(reinterpret_cast<const char*>(of.key_scales + 32 * unit + 8 * t));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const char* p = of.keys + row8(of, 32 * unit + 8 * (g >> 1) + 2 * i + (g & 1)) + 16 * t;
#pragma unroll
        for (int c = 0; c < K8; c++) in.k[i][c] = 64 * c + 16 * t < D ? load16(p + 64 * c) : make_uint4(0, 0, 0, 0);
    }
}

__device__ __forceinline__ void load_values8(Unit8& in, const Rows8& of, int unit) {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
    in.v_scale = load16(reinterpret_cast<const char*>(of.value_scales + 32 * unit + 8 * t));
#pragma unroll
    for (int e = 0; e < 8; e++) {
        const char* p = of.values + row8(of, 32 * unit + 8 * t + e) + 16 * g;
#pragma unroll
        for (int c = 0; c < V8; c++)
            in.v[e][c] =
                128 * c + 16 * g < D ? load16(p + 128 * c) : make_uint4(0x80808080u, 0x80808080u, 0x80808080u, 0x80808080u);
    }
}

// Attends to int8 rows in units of 32 tokens. A lane's 8 tokens are 8t..8t+7, so its scales are one load. The first n rows are
// tokens. LOADED: the caller has loaded the first unit.
template <bool LOADED>
__device__ __forceinline__ void attend8(Running& r, Unit8& in, const Rows8& of, int n, int unit, int end, int step,
                                        const uint4* query, float query_step, float bias) {
    const int lane = threadIdx.x & 31, t = lane & 3;
    if (unit >= end) return;
    if (!LOADED) load_keys8(in, of, unit);
    float value_exponent = -100.f;  // 2^this bounds the V scales seen
    for (; unit < end; unit += step) {
        if (!LOADED) load_values8(in, of, unit);
        int x[4][4] = {};
#pragma unroll
        for (int c = 0; c < K8; c++) {
            uint4 q0 = load_query(query + (2 * c) * 32 + lane), q1 = load_query(query + (2 * c + 1) * 32 + lane);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                mma_int8(x[i], q0, in.k[i][c].x, in.k[i][c].y);
                mma_int8(x[i], q1, in.k[i][c].z, in.k[i][c].w);
            }
        }
        float score[8], top = -INFINITY, largest = 0.f;
        const bool tail = 32 * unit + 32 > n;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float key_scale = scale_of(in.k_scale, e);
            score[e] = (float)(x[e >> 1][e & 1] * 128 + x[e >> 1][2 + (e & 1)]) * (query_step * key_scale) + bias;
            if (tail && 32 * unit + 8 * t + e >= n) {
                score[e] = -INFINITY;
                (&in.v_scale.x)[e >> 1] &= e & 1 ? 0xffffu : 0xffff0000u;
            }
            top = fmaxf(top, score[e]);
            largest = fmaxf(largest, scale_of(in.v_scale, e));
        }
        if (unit + step < end) load_keys8(in, of, unit + step);
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
            score[e] = weight * (scale_of(in.v_scale, e) * normal);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 p0 = pack_half(score[4 * half], score[4 * half + 1]), p1 = pack_half(score[4 * half + 2], score[4 * half + 3]);
#pragma unroll
            for (int c = 0; c < V8; c++)
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    const u32 va = (&in.v[4 * half][c].x)[w], vb = (&in.v[4 * half + 1][c].x)[w];
                    const u32 vc = (&in.v[4 * half + 2][c].x)[w], vd = (&in.v[4 * half + 3][c].x)[w];
#pragma unroll
                    for (int pair = 0; pair < 2; pair++) {
                        u32 ab = __byte_perm(va, vb, pair ? 0x7362 : 0x5140), cd = __byte_perm(vc, vd, pair ? 0x7362 : 0x5140);
                        mma_half(r.acc[2 * c + (w >> 1)][2 * (w & 1) + pair], codes_to_half(ab, 0x4140),
                                 codes_to_half(ab, 0x4342), codes_to_half(cd, 0x4140), codes_to_half(cd, 0x4342), p0, p1);
                    }
                }
        }
        if (LOADED && unit + step < end) load_values8(in, of, unit + step);
    }
    const float back = exp2_fast(value_exponent - (float)V_SHIFT);
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
        for (int j = 0; j < 16; j++) r.acc[s][j >> 2][j & 3] *= back;
}
#endif

// Four dims of a query as an A operand: their 16-bit rounding in rows 0-7, the remainder in rows 8-15.
__device__ __forceinline__ uint4 query_operand(float4 x, float scale) {
    x = make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
    u32 h0 = pack16(x.x, x.y), h1 = pack16(x.z, x.w);
    float2 f0 = unpack16(h0), f1 = unpack16(h1);
    return make_uint4(h0, pack16(x.x - f0.x, x.y - f0.y), h1, pack16(x.z - f1.x, x.w - f1.y));
}

// First dim of the four that item i of a tile's operands holds, for query (i & 31) >> 2.
__device__ __forceinline__ int operand_dim(int i) { return (i >> 6) * 32 + (i & 3) * 8 + ((i >> 5) & 1) * 4; }

#if COLD_TYPE == COLD_INT8
#define QUERY_WORDS ((D + 31) / 32)

// Stores query q, of which a lane holds every 32nd dim, as two int8 parts: the operand for int8 keys.
__device__ __forceinline__ void stage_codes(float (&x)[QUERY_WORDS], int q, float scale, uint4* q8, float* steps) {
    const int lane = threadIdx.x & 31;
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < QUERY_WORDS; i++) {
        x[i] *= scale;
        most = fmaxf(most, fabsf(x[i]));
    }
    for (int i = 16; i; i >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
    const float inverse = most > 0.f ? 16256.f / most : 0.f;
    if (lane == 0) steps[q] = most / 16256.f;
#pragma unroll
    for (int i = 0; i < K8 * 2; i++) {
        int dim = lane + 32 * i;
        int code = i < QUERY_WORDS ? __float2int_rn(x[i < QUERY_WORDS ? i : 0] * inverse) : 0;
        int high = (code + 64) >> 7, low = code - high * 128;
        // dim = 64c + 16t + 8 part + 4 word + byte
        int tile = q / HEADS, g = q % HEADS, t = (dim >> 4) & 3, part = (dim >> 6) * 2 + ((dim >> 3) & 1);
        char* to = reinterpret_cast<char*>(q8 + (tile * K8 * 2 + part) * 32 + g * 4 + t) + ((dim >> 2) & 1) * 8 + (dim & 3);
        to[0] = (char)high;
        to[4] = (char)low;
    }
}
#endif
