// Decode attention over pages on tensor cores (SM 8.0 and newer): any pair of formats, all pages or those that are listed.
//
// A warp owns a ring of stages in shared memory; one page with its scales is one stage, on its way while the ones before it are
// in use: four bulk copies that one lane starts (SM 9.0), or a group of cp.async. Nobody else waits for it. What is in a stage
// are MMA operands as they stand (pages.cuh): a word of int4 codes becomes four operands by masks and one shift, because a
// nibble is an fp16 number by itself (n 2^-24, or, four bits higher, n 2^-20). Scales of K go into the query, high and low
// part; scales of V into the probabilities. Before a block adds up what it has of a KV head, it starts its loads of the next.
//
// FIXED: equally many blocks attend to each KV head, for when all have equally much to read. What a warp reads first then follows
// from the capacity alone and is on its way before the length is known. Else blocks share out what they find.
//
// Macros, beside those of pages.cuh: TILES of 8 query heads that one pass holds, STAGES, FIXED, SHARED_BYTES.
#include "attend.cuh"
#include "pages.cuh"

#define BULK (__CUDA_ARCH__ >= 900)

#define QUERIES (HEADS * TILES)
#define KEY_SCALES_AT KEY_PAGE
#define VALUES_AT (KEY_SCALES_AT + (K_FORMAT == FP8 ? 16 : KEY_SCALES))
#define VALUE_SCALES_AT (VALUES_AT + VALUE_PAGE)
#define PAGE_BYTES (VALUE_SCALES_AT + (V_FORMAT == FP8 ? 16 : VALUE_SCALES))
#define STAGE ((PAGE_BYTES + 127) / 128 * 128)
#define ZEROS (V_FORMAT == INT4 ? GROUPS : V_FORMAT == INT8 ? 1 : 0)
#define CODE_ONE 16777216.f  // 2^24: what a code's bit counts as an fp16 number, inverted
#define PAIR (2 * D + 8)     // floats of two queries, apart so that lanes meet different banks

#define EARLY (WARPS >= 8 && D <= 128)  // else there are no registers for queries and exact rows under way
#define KEY_STEPS (K_FORMAT == INT8 ? (KEY_TILES + 1) / 2 : KEY_TILES)

struct Shared {
    char stages[WARPS][STAGES][STAGE];
    float sums[WARPS][QUERIES / 2 * PAIR];
    float2 sums_ml[WARPS][QUERIES];
    uint4 exact_query[TILES * K16 * 2 * 32], page_query[TILES * KEY_STEPS * 32];
    float steps[QUERIES];
    u64 arrived[WARPS][STAGES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the host allocates another size");

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// The planes of one (sequence, KV head).
struct Planes {
    const char *keys, *key_scales, *values, *value_scales;
};

__device__ __forceinline__ Planes planes_of(const Args& a, size_t head) {
    const size_t first = head * a.page_capacity;
    return {a.cold_k + first * KEY_PAGE, reinterpret_cast<const char*>(a.k_scale) + first * KEY_SCALES,
            a.cold_v + first * VALUE_PAGE, reinterpret_cast<const char*>(a.v_scale) + first * VALUE_SCALES};
}

// Where the scales of a page start; fp8 has those of eight pages in the 16 bytes that a copy moves at least.
__device__ __forceinline__ const char* scales_of(const char* plane, int page, int format, int bytes) {
    return plane + (format == FP8 ? (size_t)(page * 2 & ~15) : (size_t)page * bytes);
}

template <int BYTES>
__device__ __forceinline__ void copy_part(u32 to, const char* from, u32 arrived) {
    if (!BYTES) return;
#if BULK
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(BYTES), "r"(arrived)
                 : "memory");
#else
#pragma unroll
    for (int i = 0; i < BYTES; i += 512) {
        const int at = i + (threadIdx.x & 31) * 16;
        if (at < BYTES) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(from + at) : "memory");
    }
#endif
}

// Starts a page on its way into a stage.
__device__ __forceinline__ void start_page(u32 stage, u32 arrived, const Planes& from, int page) {
#if BULK
    if (threadIdx.x & 31) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrived), "r"(PAGE_BYTES) : "memory");
#endif
    copy_part<KEY_PAGE>(stage, from.keys + (size_t)page * KEY_PAGE, arrived);
    copy_part<VALUES_AT - KEY_SCALES_AT>(stage + KEY_SCALES_AT, scales_of(from.key_scales, page, K_FORMAT, KEY_SCALES), arrived);
    copy_part<VALUE_PAGE>(stage + VALUES_AT, from.values + (size_t)page * VALUE_PAGE, arrived);
    copy_part<PAGE_BYTES - VALUE_SCALES_AT>(stage + VALUE_SCALES_AT, scales_of(from.value_scales, page, V_FORMAT, VALUE_SCALES),
                                            arrived);
}

__device__ __forceinline__ void end_group() {
#if !BULK
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_page(u32 arrived, u32 parity) {
#if BULK
    u32 done = 0;
    while (!done)
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(arrived), "r"(parity)
                     : "memory");
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
#endif
}

// The pages that a warp goes through: every `step`-th unit from `first` on.
struct Walk {
    Planes planes;
    int first, end, step;
    int numbers;  // lane i holds the number of the page that is i ahead of the last multiple of 32
};

__device__ __forceinline__ void look_ahead(Walk& walk, const Args& a, const Span& s, size_t head, int index) {
    const int unit = walk.first + (index + (threadIdx.x & 31)) * walk.step;
#if SELECT
    // The list is read before its end is known.
    const int listed = unit < a.page_capacity ? a.pages[head * a.page_capacity + unit] : 0;
    walk.numbers = unit < s.listed ? listed : s.fresh + unit - s.listed;
#else
    walk.numbers = unit;
#endif
}

// Running results of one warp.
struct Sums {
    float acc[TILES][VALUE_TILES][4];  // [tile of queries][tile of dims][dim g: q 2t, 2t+1; dim g + 8: the same]
    float m[TILES], l[TILES];          // of query g; l over this lane's tokens only
    float zero[TILES][ZEROS ? ZEROS : 1];
    float exponent;  // 2^this bounds the V scales seen
};

__device__ __forceinline__ void scale_tile(Sums& r, int tile, float alpha) {
    const int t = threadIdx.x & 3;
    const float a0 = __shfl_sync(FULL, alpha, 8 * t), a1 = __shfl_sync(FULL, alpha, 8 * t + 4);
#pragma unroll
    for (int m = 0; m < VALUE_TILES; m++) {
        r.acc[tile][m][0] *= a0;
        r.acc[tile][m][1] *= a1;
        r.acc[tile][m][2] *= a0;
        r.acc[tile][m][3] *= a1;
    }
}

__device__ __forceinline__ uint4 vector_of(const char* part, int row) {
    return *reinterpret_cast<const uint4*>(part + (row * 32 + (threadIdx.x & 31)) * 16);
}

__device__ __forceinline__ u32 multiply(u32 a, u32 b) {
    const __half2 r = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<const u32*>(&r);
}

__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {
    const __half2 r = __hfma2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b), *reinterpret_cast<__half2*>(&c));
    return *reinterpret_cast<const u32*>(&r);
}

// Two e4m3 numbers, in the low half of `bytes`, as fp16.
__device__ __forceinline__ u32 fp8_to_half(u32 bytes) {
#if __CUDA_ARCH__ >= 890
    u32 r;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low;}" : "=r"(r) : "r"(bytes));
    return r;
#else
    const u32 w = __byte_perm(bytes, 0, 0x1404);  // each byte on top of its half
    return multiply((w & 0x80008000u) | (w >> 1 & 0x3f803f80u), 0x5c005c00u);  // exponents are 8 apart: times 256
#endif
}

// Scores of a page's tokens 8 i + 2 t + b in score[tile][2 i + b], in log2.
__device__ __forceinline__ void score_page(float (&score)[TILES][8], const char* stage, const Shared& shared, int page) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#if K_FORMAT == INT8
    int x[TILES][4][4] = {};
#else
    float x[TILES][4][4] = {}, zero[TILES][4] = {};
#endif
#pragma unroll
    for (int k = 0; k < KEY_STEPS; k++) {
#if K_FORMAT == INT8
        const uint4 k0 = vector_of(stage, 2 * k), k1 = 2 * k + 1 < KEY_TILES ? vector_of(stage, 2 * k + 1) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const uint4 q = load_query(shared.page_query + (tile * KEY_STEPS + k) * 32 + lane);
#pragma unroll
            for (int i = 0; i < 4; i++) mma_int8(x[tile][i], q, (&k0.x)[i], (&k1.x)[i]);
        }
#else
        u32 low[4], high[4];
#if K_FORMAT == INT4
        const uint4 codes = vector_of(stage, k >> 1);
        const u32 w0 = k & 1 ? codes.z : codes.x, w1 = k & 1 ? codes.w : codes.y;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 mask = i & 1 ? 0x00f000f0u : 0x000f000fu;
            low[i] = w0 >> (i & 2 ? 8 : 0) & mask;
            high[i] = w1 >> (i & 2 ? 8 : 0) & mask;
        }
        const char* scales = stage + KEY_SCALES_AT + (16 * k + 4 * t) * 2;
        const uint2 scale = *reinterpret_cast<const uint2*>(scales), base = *reinterpret_cast<const uint2*>(scales + 2 * PADDED);
#elif K_FORMAT == FP8
        const uint4 codes = vector_of(stage, k);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            low[i] = fp8_to_half((&codes.x)[i]);
            high[i] = fp8_to_half((&codes.x)[i] >> 16);
        }
#else
        const uint4 first = vector_of(stage, 2 * k), second = vector_of(stage, 2 * k + 1);
        low[0] = first.x, high[0] = first.y, low[1] = first.z, high[1] = first.w;
        low[2] = second.x, high[2] = second.y, low[3] = second.z, high[3] = second.w;
#endif
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            uint4 q = load_query(shared.page_query + (tile * KEY_STEPS + k) * 32 + lane);
#if K_FORMAT == INT4
            mma_half(zero[tile], q.x, q.y, q.z, q.w, base.x, base.y);
            // What the rounded product lacks goes into the low part, with the query's own.
            const u32 a = multiply(q.x, scale.x), b = multiply(q.z, scale.y);
            q.y = multiply_add(q.y, scale.x, multiply_add(q.x, scale.x, a ^ 0x80008000u));
            q.w = multiply_add(q.w, scale.y, multiply_add(q.z, scale.y, b ^ 0x80008000u));
            q.x = a;
            q.z = b;
#endif
#pragma unroll
            for (int i = 0; i < 4; i++) {
#if K_FORMAT == SIXTEEN_BIT
                mma_exact(x[tile][i], q.x, q.y, q.z, q.w, low[i], high[i]);
#else
                mma_half(x[tile][i], q.x, q.y, q.z, q.w, low[i], high[i]);
#endif
            }
        }
#endif
    }
#if K_FORMAT == FP8
    const float scale = __uint_as_float((u32) reinterpret_cast<const u16*>(stage + KEY_SCALES_AT)[page & 7] << 16);
#else
    const float scale = 1.f;
#endif
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const float step = shared.steps[tile * HEADS + g] * scale;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#if K_FORMAT == INT8
            const u32 pair = *reinterpret_cast<const u32*>(stage + KEY_SCALES_AT + (8 * i + 2 * t) * 2);
#endif
#pragma unroll
            for (int b = 0; b < 2; b++) {
#if K_FORMAT == INT8
                const float of = __uint_as_float(b ? pair & 0xffff0000u : pair << 16);
                score[tile][2 * i + b] = (float)(x[tile][i][b] * 128 + x[tile][i][2 + b]) * (step * of);
#elif K_FORMAT == INT4
                const float codes = x[tile][i][b] + x[tile][i][2 + b];
                score[tile][2 * i + b] = (codes * (i & 1 ? CODE_ONE / 16.f : CODE_ONE) + (zero[tile][0] + zero[tile][2])) * step;
#else
                score[tile][2 * i + b] = (x[tile][i][b] + x[tile][i][2 + b]) * step;
#endif
            }
        }
    }
}

__device__ __forceinline__ void raise_maxima(Sums& r, const float (&score)[TILES][8]) {
    float top[TILES];
    bool above = false;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        top[tile] = score[tile][0];
#pragma unroll
        for (int e = 1; e < 8; e++) top[tile] = fmaxf(top[tile], score[tile][e]);
        above |= top[tile] > r.m[tile] + RESCALE;
    }
    if (!__any_sync(FULL, above)) return;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float most = fmaxf(top[tile], __shfl_xor_sync(FULL, top[tile], 1));
        most = fmaxf(fmaxf(most, __shfl_xor_sync(FULL, most, 2)), r.m[tile]);
        const float alpha = exp2_fast(r.m[tile] - most);
        r.m[tile] = most;
        r.l[tile] *= alpha;
#pragma unroll
        for (int z = 0; z < ZEROS; z++) r.zero[tile][z] *= alpha;
        scale_tile(r, tile, alpha);
    }
}

#if V_FORMAT == INT4
__device__ __forceinline__ uint2 value_scales(const char* stage, int group, int i) {
    return *reinterpret_cast<const uint2*>(stage + VALUE_SCALES_AT + (group * PAGE + 8 * i + 2 * (threadIdx.x & 3)) * 4);
}
#endif

// The largest scale of V that this lane multiplies with.
__device__ __forceinline__ float largest_scale(const char* stage, int page) {
    float largest = 0.f;
#if V_FORMAT == INT4
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint2 of = value_scales(stage, group, i);
            largest = fmaxf(largest, fmaxf(__uint_as_float(of.x << 16), __uint_as_float(of.y << 16)));
        }
#elif V_FORMAT == INT8
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 pair = *reinterpret_cast<const u32*>(stage + VALUE_SCALES_AT + (8 * i + 2 * (threadIdx.x & 3)) * 2);
        largest = fmaxf(largest, fmaxf(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)));
    }
#elif V_FORMAT == FP8
    largest = __uint_as_float((u32) reinterpret_cast<const u16*>(stage + VALUE_SCALES_AT)[page & 7] << 16);
#endif
    return largest;
}

__device__ __forceinline__ void add_values(Sums& r, const float (&score)[TILES][8], const char* stage, int page) {
    [[maybe_unused]] const int t = threadIdx.x & 3;
    float weight[TILES][8];
    u32 p[TILES][4];
#if V_FORMAT != SIXTEEN_BIT
    float largest = largest_scale(stage, page);
    if (__any_sync(FULL, largest > exp2_fast(r.exponent))) {
        largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(FULL, largest, 2));
        const float exponent = fmaxf(r.exponent, (float)((int)(__float_as_uint(largest) >> 23) - 126));
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) scale_tile(r, tile, exp2_fast(r.exponent - exponent));
        r.exponent = exponent;
    }
    const float normal = exp2_fast((float)V_SHIFT - r.exponent);
#endif
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int e = 0; e < 8; e++) {
            weight[tile][e] = exp2_fast(score[tile][e] - r.m[tile]);
            if (V_FORMAT != SIXTEEN_BIT) r.l[tile] += weight[tile][e];
        }
#if V_FORMAT != INT4
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if V_FORMAT == INT8
        const u32 pair = *reinterpret_cast<const u32*>(stage + VALUE_SCALES_AT + (8 * i + 2 * t) * 2);
        const float s0 = __uint_as_float(pair << 16) * normal, s1 = __uint_as_float(pair & 0xffff0000u) * normal;
#elif V_FORMAT == FP8
        const float s0 = largest_scale(stage, page) * normal, s1 = s0;
#endif
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#if V_FORMAT == SIXTEEN_BIT
            p[tile][i] = pack16(weight[tile][2 * i], weight[tile][2 * i + 1]);
            const float2 rounded = unpack16(p[tile][i]);
            r.l[tile] += rounded.x + rounded.y;
#else
            p[tile][i] = pack_half(weight[tile][2 * i] * s0, weight[tile][2 * i + 1] * s1);
#if V_FORMAT == INT8
            // Codes are VALUE_OFFSET too large.
            const float2 rounded = __half22float2(*reinterpret_cast<__half2*>(&p[tile][i]));
            r.zero[tile][0] -= (rounded.x + rounded.y) * (VALUE_OFFSET / normal);
#endif
#endif
        }
    }
#endif
#pragma unroll
    for (int m = 0; m < VALUE_TILES; m++) {
        u32 a[2][4];  // [tokens 0-15, 16-31][operand]
#if V_FORMAT == INT4
        const int group = m / GROUP_TILES;
        if (m % GROUP_TILES == 0 && group < GROUPS) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint2 of = value_scales(stage, group, i);
                const float s0 = __uint_as_float(of.x << 16) * normal, z0 = __uint_as_float(of.x & 0xffff0000u);
                const float s1 = __uint_as_float(of.y << 16) * normal, z1 = __uint_as_float(of.y & 0xffff0000u);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const float w0 = weight[tile][2 * i], w1 = weight[tile][2 * i + 1];
                    p[tile][i] = pack_half(w0 * s0, w1 * s1);
                    r.zero[tile][group] += w0 * z0 + w1 * z1;
                }
            }
        }
        const uint4 codes = vector_of(stage + VALUES_AT, m >> 1);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const u32 w = m & 1 ? (k ? codes.w : codes.z) : (k ? codes.y : codes.x);
            a[k][0] = w & 0x000f000fu;
            a[k][1] = w & 0x00f000f0u;
            a[k][2] = w >> 8 & 0x000f000fu;
            a[k][3] = w >> 8 & 0x00f000f0u;
        }
#elif V_FORMAT == SIXTEEN_BIT
        const uint4 first = vector_of(stage + VALUES_AT, 2 * m), second = vector_of(stage + VALUES_AT, 2 * m + 1);
        a[0][0] = first.x, a[0][1] = second.x, a[0][2] = first.y, a[0][3] = second.y;
        a[1][0] = first.z, a[1][1] = second.z, a[1][2] = first.w, a[1][3] = second.w;
#else
        const uint4 codes = vector_of(stage + VALUES_AT, m);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const u32 first = k ? codes.y : codes.x, second = k ? codes.w : codes.z;
#if V_FORMAT == INT8
            a[k][0] = __byte_perm(first, 0, 0x4140);
            a[k][1] = __byte_perm(second, 0, 0x4140);
            a[k][2] = __byte_perm(first, 0, 0x4342);
            a[k][3] = __byte_perm(second, 0, 0x4342);
#else
            a[k][0] = fp8_to_half(first);
            a[k][1] = fp8_to_half(second);
            a[k][2] = fp8_to_half(first >> 16);
            a[k][3] = fp8_to_half(second >> 16);
#endif
        }
#endif
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int k = 0; k < 2; k++) {
#if V_FORMAT == SIXTEEN_BIT
                mma_exact(r.acc[tile][m], a[k][0], a[k][1], a[k][2], a[k][3], p[tile][2 * k], p[tile][2 * k + 1]);
#else
                mma_half(r.acc[tile][m], a[k][0], a[k][1], a[k][2], a[k][3], p[tile][2 * k], p[tile][2 * k + 1]);
#endif
            }
    }
}

// Leaves what a warp has of its pages in shared memory, as floats in the order of dims; adds it to what is there if `more`.
__device__ __forceinline__ void leave_pages(Sums& r, float* sums, float2* sums_ml, bool more) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const float unit = V_FORMAT == SIXTEEN_BIT ? 1.f : exp2_fast(r.exponent - (float)V_SHIFT);
    const float first = V_FORMAT == INT4 || V_FORMAT == INT8 ? unit * CODE_ONE : unit;
    const float second = V_FORMAT == INT4 ? first / 16.f : first;
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        float l = r.l[tile] + __shfl_xor_sync(FULL, r.l[tile], 1);
        l += __shfl_xor_sync(FULL, l, 2);
        const float2 exact = more ? sums_ml[tile * HEADS + g] : make_float2(NOTHING, 0.f);
        const float top = fmaxf(exact.x, r.m[tile]), theirs = exp2_fast(exact.x - top), mine = exp2_fast(r.m[tile] - top);
        __syncwarp();
        if (t == 0) sums_ml[tile * HEADS + g] = make_float2(top, exact.y * theirs + l * mine);
        float x[2], y[2];
#pragma unroll
        for (int q = 0; q < 2; q++) {
            x[q] = __shfl_sync(FULL, theirs, 8 * t + 4 * q);
            y[q] = __shfl_sync(FULL, mine, 8 * t + 4 * q);
        }
        float zero[ZEROS ? ZEROS : 1][2] = {};
#pragma unroll
        for (int z = 0; z < ZEROS; z++) {
            float sum = r.zero[tile][z] + __shfl_xor_sync(FULL, r.zero[tile][z], 1);
            sum += __shfl_xor_sync(FULL, sum, 2);
            zero[z][0] = __shfl_sync(FULL, sum, 8 * t);
            zero[z][1] = __shfl_sync(FULL, sum, 8 * t + 4);
        }
#pragma unroll
        for (int m = 0; m < VALUE_TILES; m++) {
            const int z = V_FORMAT == INT4 ? min(m / GROUP_TILES, GROUPS - 1) : 0;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int dim = value_dim(16 * m + g + 8 * half);
                if (dim >= D) continue;
#pragma unroll
                for (int q = 0; q < 2; q++) {
                    float* to = &sums[(tile * 4 + t) * PAIR + q * D + dim];
                    const float sum = (r.acc[tile][m][2 * half + q] * (half ? second : first) + zero[z][q]) * y[q];
                    *to = more ? *to * x[q] + sum : sum;
                }
            }
        }
    }
}

// Leaves what a warp has of exact rows in shared memory, one tile of queries.
__device__ __forceinline__ void leave_exact(Running& r, float* sums, float2* sums_ml) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    r.l += __shfl_xor_sync(FULL, r.l, 1);
    r.l += __shfl_xor_sync(FULL, r.l, 2);
    if (t == 0) sums_ml[g] = make_float2(r.m, r.l);
#pragma unroll
    for (int q = 0; q < 2; q++)
#pragma unroll
        for (int s = 0; s < SETS; s++) {
            if (set_dim(s, g) >= D) continue;
            float* to = sums + t * PAIR + q * D + set_dim(s, g);
#pragma unroll
            for (int i = 0; i < 8; i++) to[i] = r.acc[s][i >> 1][2 * (i & 1) + q];
        }
}

// Queries on their way to shared memory: for exact rows and for pages.
struct Words {
    float4 exact[(TILES * K16 * 2 * 32 + THREADS - 1) / THREADS];
    float page[(QUERIES + WARPS - 1) / WARPS][PADDED / 32];
};

__device__ __forceinline__ void load_queries(Words& words, const Args& a, const Place& p) {
    const float* from = a.query + (p.head * a.group + p.first_query) * D;
#pragma unroll
    for (int j = 0; j * THREADS < TILES * K16 * 2 * 32; j++) {
        const int i = threadIdx.x + j * THREADS, item = i % (K16 * 2 * 32), dim = operand_dim(item);
        const int q = i / (K16 * 2 * 32) * HEADS + ((i & 31) >> 2);
        words.exact[j] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (q < p.queries && dim < D) words.exact[j] = *reinterpret_cast<const float4*>(from + (size_t)q * D + dim);
    }
#pragma unroll
    for (int j = 0; j * WARPS < QUERIES; j++)
#pragma unroll
        for (int i = 0; i < PADDED / 32; i++) {
            const int q = (threadIdx.x >> 5) + j * WARPS, dim = (threadIdx.x & 31) + 32 * i;
            words.page[j][i] = q < p.queries && dim < D ? from[(size_t)q * D + dim] : 0.f;
        }
}

// Leaves them there as operands.
__device__ __forceinline__ void stage_queries(Words& words, const Args& a, Shared& shared) {
#pragma unroll
    for (int j = 0; j * THREADS < TILES * K16 * 2 * 32; j++)
        if (const int i = threadIdx.x + j * THREADS; i < TILES * K16 * 2 * 32)
            shared.exact_query[i] = query_operand(words.exact[j], a.scale_log2);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j * WARPS < QUERIES; j++) {
        const int q = warp + j * WARPS;
        if (q >= QUERIES) continue;
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < PADDED / 32; i++) {
            words.page[j][i] *= a.scale_log2;
            most = fmaxf(most, fabsf(words.page[j][i]));
        }
        for (int i = 16; i; i >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL, most, i));
        char* tile = reinterpret_cast<char*>(shared.page_query + q / HEADS * KEY_STEPS * 32);
#if K_FORMAT == INT8
        const float step = most / 16256.f, inverse = most > 0.f ? 16256.f / most : 0.f;
#elif K_FORMAT == SIXTEEN_BIT
        const float step = 1.f, inverse = 1.f;
#else
        // A power of two above all of them: fp16 has no range to spare.
        const u32 power = min((__float_as_uint(most) & 0x7f800000u) + 0x00800000u, 0x7e800000u);
        const float step = __uint_as_float(power), inverse = __uint_as_float(0x7f000000u - power);
#endif
        if (lane == 0) shared.steps[q] = step;
#pragma unroll
        for (int i = 0; i < PADDED / 32; i++) {
            const int dim = lane + 32 * i, lanes = q % HEADS * 4 + (dim >> 2 & 3);
#if K_FORMAT == INT8
            const int code = __float2int_rn(words.page[j][i] * inverse), high = (code + 64) >> 7;
            char* to = tile + ((dim >> 5) * 32 + lanes) * 16 + (dim >> 4 & 1) * 8 + (dim & 3);
            to[0] = (char)high;
            to[4] = (char)(code - high * 128);
#else
            if ((dim >> 4) >= KEY_STEPS) continue;
            u16* to = reinterpret_cast<u16*>(tile + ((dim >> 4) * 32 + lanes) * 16 + (dim >> 1 & 1) * 8 + (dim & 1) * 2);
            const float scaled = words.page[j][i] * inverse;
#if K_FORMAT == SIXTEEN_BIT
            const u32 high = pack16(scaled, 0.f), low = pack16(scaled - unpack16(high).x, 0.f);
#else
            const u32 high = pack_half(scaled, 0.f), low = pack_half(scaled - __half2float(__ushort_as_half((u16)high)), 0.f);
#endif
            to[0] = (u16)high;
            to[2] = (u16)low;
#endif
        }
    }
}

// A part of a problem that one block attends to. Its exact units are as large a share of them as its pages are: under way
// behind everybody's pages they take long, and one block must not have them all.
struct Task {
    Span s;
    Place p;
    int cold_begin, cold_end, exact_begin, exact_end;  // units
    int stride;  // between units of a block
};

__device__ __forceinline__ void take_units(Task& task, u32 begin, u32 end) {
    task.stride = 1;
    const u32 exact = task.s.exact ? task.s.units - task.s.cold_units : 0;
    task.exact_begin = (u64)begin * exact / task.s.units;
    task.exact_end = (u64)end * exact / task.s.units;
    task.cold_begin = min((int)begin - task.exact_begin, task.s.cold_units);
    task.cold_end = min((int)end - task.exact_end, task.s.cold_units);
}

__device__ __forceinline__ Place place_of(const Args& a, u32 problem) {
    Place p;
    p.head = problem / a.passes;
    p.first_query = problem % a.passes * QUERIES;
    p.queries = min(QUERIES, a.group - p.first_query);
    p.problem = problem;
    return p;
}

__device__ __forceinline__ Task task_of(const Args& a, const Work& w) {
    Task task;
    task.p = place_of(a, w.problem);
    task.s = span_at(a, task.p.head);
    take_units(task, w.offset, w.offset + min(w.left, (u32)task.s.units - w.offset));
    task.p.first_block = w.base / w.per;
    task.p.last_block = (w.base + task.s.units - 1) / w.per;
    return task;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) decode(ARGS_SIGNATURE) {
    extern __shared__ __align__(128) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    __shared__ Task kept;  // while the loops need the registers
    __shared__ Work kept_work;
    const Args a = ARGS_VALUE;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u32 stages = shared_address(shared.stages[warp]), arrived = shared_address(shared.arrived[warp]);
#if BULK
    if (lane < STAGES) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(arrived + 8 * lane) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
#endif
    u32 used = 0;    // pages that this warp has gone through
    int issued = 0;  // of those under way before the first of a problem was used
    Walk walk;
    Unit16 exact;
    Words words;
    Task task = {};
    auto start = [&](int end) {
        issued = 0;
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) {
            const u32 stage = (used + i) % STAGES;
            const int page = __shfl_sync(FULL, walk.numbers, i);
            if (walk.first + i * walk.step < end) {
                start_page(stages + stage * STAGE, arrived + 8 * stage, walk.planes, page);
                issued++;
            }
            end_group();
        }
    };
    // Exact units go to the first warps, pages from the last on.
    auto first_page = [&] { return task.cold_begin + (WARPS - 1 - warp) * task.stride; };
    auto first_exact = [&](const Task& task) { return task.exact_begin + warp * task.stride; };
#if FIXED
    const u32 problems = a.batch * a.kv_heads * a.passes, splits = gridDim.x / problems, split = blockIdx.x % splits;
    Work w = {};
    w.problems = problems;
    task.p = place_of(a, blockIdx.x / splits);
    task.p.first_block = blockIdx.x - split;
    task.p.last_block = task.p.first_block + splits - 1;
    task.stride = splits;
    task.cold_begin = split;
    task.exact_begin = splits - 1 - split;
    task.exact_end = (a.exact_rows + EXACT_UNIT - 1) / EXACT_UNIT;
    const size_t head = task.p.head;
    walk.planes = planes_of(a, head);
    walk.first = first_page();
    walk.step = splits * WARPS;
    // What was written two launches ago or earlier may be read before this one waits for the last: without a list (append came
    // last) all pages but one that append quantises; with one (select came last) everything but a list that is made just now.
#if !SELECT
    look_ahead(walk, a, task.s, head, 0);
    start(a.page_capacity);
    wait_for_previous();
#endif
    let_next_start();
    const int2 length = load_state(a.state + head);
    if (EARLY && first_exact(task) < task.exact_end) {
        load_keys16<false>(exact, a, task.s, a.exact_k + head * a.exact_rows * EXACT_ROW, a.exact_rows, first_exact(task));
        load_values16<false>(exact, a, task.s, a.exact_v + head * a.exact_rows * EXACT_ROW, a.exact_rows, first_exact(task));
    }
    if (EARLY) load_queries(words, a, task.p);
#if SELECT
    const bool anchor = max(length.y, 0) % a.anchor_every == 0;
    if (anchor) wait_for_previous();
#endif
    task.s = span_with(a, head, length);
    walk.end = task.cold_end = task.s.cold_units;
#if SELECT
    look_ahead(walk, a, task.s, head, 0);
    start(walk.end);
    if (!anchor) wait_for_previous();
#else
    const int newest = walk.end - 1 - walk.first;
    if (cold_tokens(a, length.x) > cold_tokens(a, length.x - 1) && newest >= 0 && newest % walk.step == 0 &&
        newest / walk.step < STAGES) {
        // This warp may have the newest page as it was before append: once more.
        for (; issued; issued--, used++) wait_for_page(arrived + 8 * (used % STAGES), used / STAGES & 1);
        __syncwarp();
        start(walk.end);
    }
#endif
#else
    auto begin = [&] {
        const int exact_unit = first_exact(task);
        if (EARLY && exact_unit < task.exact_end) {
            const size_t first = task.p.head * a.exact_rows * EXACT_ROW;
            load_keys16<true>(exact, a, task.s, a.exact_k + first, task.s.exact, exact_unit);
            load_values16<true>(exact, a, task.s, a.exact_v + first, task.s.exact, exact_unit);
        }
        walk.planes = planes_of(a, task.p.head);
        walk.first = first_page();
        walk.end = task.cold_end;
        walk.step = WARPS;
        look_ahead(walk, a, task.s, task.p.head, 0);
        start(walk.end);
        if (EARLY) load_queries(words, a, task.p);
    };
    wait_for_previous();
    let_next_start();
    Work w = find_work(a);
    if (!w.left || w.problem >= w.problems) return;
    task = task_of(a, w);
    begin();
#endif
    while (true) {
        __syncthreads();
        if (threadIdx.x == 0) {
            kept = task;
            kept_work = w;
        }
        if (!EARLY) load_queries(words, a, task.p);
        stage_queries(words, a, shared);
        __syncthreads();
        // Exact rows first: meanwhile the first pages arrive.
        const int exact_unit = first_exact(kept), exact_step = WARPS * kept.stride;
        const bool has_exact = exact_unit < kept.exact_end;
        if (has_exact) {
            const size_t first = kept.p.head * a.exact_rows * EXACT_ROW;
            const Span s = kept.s;
            const char *keys = a.exact_k + first, *values = a.exact_v + first;
#if FIXED
            const InRing tokens = {a.sinks, a.ring, s.ring_start, s.exact};
            const int rows = a.exact_rows;
#else
            const First tokens = {s.exact};
            const int rows = s.exact;
#endif
            Running r = {};
            r.m = NOTHING;
            attend16<!FIXED, EARLY>(r, exact, a, s, keys, values, rows, tokens, exact_unit, kept.exact_end, exact_step,
                                    shared.exact_query, 0.f);
            leave_exact(r, shared.sums[warp], shared.sums_ml[warp]);
#if TILES > 1
            r = Running{};
            r.m = NOTHING;
            attend16<!FIXED, false>(r, exact, a, s, keys, values, rows, tokens, exact_unit, kept.exact_end, exact_step,
                                    shared.exact_query + K16 * 2 * 32, 0.f);
            leave_exact(r, shared.sums[warp] + 4 * PAIR, shared.sums_ml[warp] + HEADS);
#endif
            __syncwarp();
        }
        {
            Sums r = {};
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) r.m[tile] = NOTHING;
            r.exponent = -100.f;
            int now = walk.numbers;  // numbers of the pages in use; `walk` is ahead of them
#pragma unroll 1
            for (int i = 0, unit = walk.first; unit < walk.end; i++, unit += walk.step) {
                const u32 stage = used % STAGES;
                wait_for_page(arrived + 8 * stage, used / STAGES & 1);
                const char* at = shared.stages[warp][stage];
                const int page = __shfl_sync(FULL, now, i & 31);
                float score[TILES][8];
                score_page(score, at, shared, page);
                raise_maxima(r, score);
                add_values(r, score, at, page);
                __syncwarp();
                if ((i & 31) == 31) now = walk.numbers;
                const int ahead = i + STAGES;
                if ((ahead & 31) == 0) look_ahead(walk, a, kept.s, kept.p.head, ahead);
                const int next = __shfl_sync(FULL, walk.numbers, ahead & 31);
                if (unit + STAGES * walk.step < walk.end) start_page(stages + stage * STAGE, arrived + 8 * stage, walk.planes, next);
                end_group();
                used++;
                issued--;
            }
#pragma unroll 1
            for (; issued > 0; issued--, used++) wait_for_page(arrived + 8 * (used % STAGES), used / STAGES & 1);
            leave_pages(r, shared.sums[warp], shared.sums_ml[warp], has_exact);
        }
        w = kept_work;
        const Place p = kept.p;
#if FIXED
        const bool more = false;
#else
        const u32 size = w.pad ? w.pad : kept.s.units;
        Work next = w;
        next.left -= min(w.left, size - w.offset);
        next.base += size;
        next.offset = 0;
        next.problem++;
        const bool more = next.left && next.problem < next.problems;
        if (more) {
            task = task_of(a, next);
            begin();
        }
#endif
        __syncthreads();
        const bool alone = p.first_block == p.last_block;
        const int items = p.queries * (D / 4);
        for (int item = threadIdx.x; item < items; item += THREADS) {
            const int q = item / (D / 4), dim = item % (D / 4) * 4;
            const Merged sum = add_up<WARPS>([&](int i) { return shared.sums_ml[i][q]; },
                                             [&](int i) {
                                                 return *reinterpret_cast<const float4*>(
                                                     &shared.sums[i][(q >> 1) * PAIR + (q & 1) * D + dim]);
                                             });
            if (alone) {
                write_result(a, p, q, dim, sum);
                continue;
            }
            const size_t row = partial_row(p, blockIdx.x, 0, q, QUERIES);
            __stcg(reinterpret_cast<float4*>(a.partial + row * D + dim), sum.o);
            if (dim == 0) __stcg(a.partial_ml + row, make_float2(sum.m, sum.l));
        }
        if (!alone) arrive_and_merge(a, p, kept.s, w, QUERIES, &shared.sums[0][0]);
        if (!more) return;
#if !FIXED
        w = next;
#endif
    }
}
