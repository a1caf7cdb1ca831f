// Memory layout of a cold page (32 tokens of one KV head).
//
// Codes of K, scales of K, codes of V, scales of V, each padded to 16 bytes, so that one bulk copy loads a page. The pages of a
// (sequence, KV head) follow each other, PAGE_STRIDE bytes apart; a serving engine has blocks of them (blocks.cuh). Codes are
// in MMA fragment order: rows of 32 vectors of 16 bytes, one per lane of a warp, that are operands without conversion. With g =
// lane / 4 and t = lane % 4, the elements of a vector are
//   K, tile kt of 16 channels: channels 16 kt + 4 t + 0..3 of tokens 8 i + g, i = 0..3;
//   V, tile m of 16 positions: positions 16 m + g + 8 d, d = 0..1, of tokens 8 i + 2 t + 0..1;
// in the order that `key_element` and `value_element` give. int4, and scales of channels, are padded to a multiple of 32
// channels. A position is a dim; int4 dims that share a scale start at a multiple of 16.
//
// Macros in addition to those of common.cuh: K_FORMAT, V_FORMAT, V_GROUP (dims of V that share a scale and a zero; else
// HEAD_DIM); from the table of formats (format_macros.py) K_BITS and V_BITS of an element, KEY_SCALES and VALUE_SCALES (bytes
// of a page), LARGEST_KEY (the largest magnitude that can be stored; 0: no limit), and CHANNEL_LEVELS (the largest code of keys
// with a scale and a zero for each channel of a page; 0: they have none).
#pragma once
#include "common.cuh"

#define PADDED ((D + 31) / 32 * 32)
// Channels of a row, which is padded to 16 bytes, in tiles of 16.
#define TILES_OF(bits) (((D * bits + 127) / 128 * 128 / bits) / 16)
#define KEY_TILES TILES_OF(K_BITS)
#define VALUE_TILES TILES_OF(V_BITS)
#define GROUPS (D / V_GROUP)
#define GROUP_TILES ((V_GROUP + 15) / 16)
#define KEY_PAGE (KEY_TILES * 16 * PAGE * K_BITS / 8)
#define VALUE_PAGE (VALUE_TILES * 16 * PAGE * V_BITS / 8)

#define KEY_SCALES_AT KEY_PAGE
#define VALUES_AT (KEY_SCALES_AT + (KEY_SCALES + 15) / 16 * 16)
#define VALUE_SCALES_AT (VALUES_AT + VALUE_PAGE)
#define PAGE_BYTES (VALUE_SCALES_AT + (VALUE_SCALES + 15) / 16 * 16)
#define PAGE_STRIDE ((PAGE_BYTES + 127) / 128 * 128)  // whole lines of the cache

struct Element {
    int token, dim;  // dim D or more: padding
};

// Dim at a position of V.
__device__ __forceinline__ int value_dim(int position) {
#if V_GROUP % 16
    const int group = position / (16 * GROUP_TILES), in = position % (16 * GROUP_TILES);
    return group < GROUPS && in < V_GROUP ? group * V_GROUP + in : D;
#else
    return position;
#endif
}

#define STORE_THREADS 256
#define TILE_ROW (D + 1)

// A page in shared memory while it is stored or read back, by STORE_THREADS threads.
struct PageTile {
    float x[PAGE][TILE_ROW];
    float scale[PAGE * GROUPS > PADDED ? PAGE * GROUPS : PADDED], zero[PAGE * GROUPS > PADDED ? PAGE * GROUPS : PADDED];
    float most[STORE_THREADS / 32];
};
