"""Whole programs inside one parallel region: every thread takes work items by ticket, step after step.

A step starts when all items of the previous one are done. Threads wait only for items that some running thread has taken,
never for a *thread*, so this can't deadlock with any number of threads, and a late thread has nothing left to do.

A function here is called with the address of its arguments, int64 words in the order of its first lines, and a thread number.
"""

import numpy as np

from elastickv.backends.cpu import layout
from elastickv.backends.cpu.elements import steps_since_refresh_at
from elastickv.backends.cpu.intrinsics import (
    atomic_add,
    atomic_load,
    inlined,
    invoke_4,
    invoke_6,
    load_f32,
    load_i64,
    pause,
    store_f32,
    store_i64,
    words,
)
from elastickv.backends.cpu.numba_cache import kernel

_F = layout.BufferField
HEADS, KV_HEADS, GROUP, DIM = int(_F.HEADS), int(_F.KV_HEADS), int(_F.GROUP), int(_F.DIM)
COLD_SPLITS, EXACT_SPLITS, STATE_BASE = int(_F.COLD_SPLITS), int(_F.EXACT_SPLITS), int(_F.STATE_BASE)
ITEM_KERNEL, APPEND_KERNEL, SCORE_KERNEL = int(_F.ITEM_KERNEL), int(_F.APPEND_KERNEL), int(_F.SCORE_KERNEL)
IS_PAGES, SCORE_SPLITS = int(_F.IS_PAGES), int(_F.SCORE_SPLITS)
STEP, STATE_BYTES = 8 * int(layout.State.STEP), 8 * layout.STATE_WORDS
TICKET_WORDS = 16  # a counter of items taken and one of items done, each on a cache line of its own
TABLE_BITS = 16
EPSILON = np.float32(1e-12)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SIGNATURE = "void(int64, int64)"


@inlined
def _take(counters, phase):  # type: ignore[no-untyped-def]
    return atomic_add(counters + 8 * TICKET_WORDS * phase, 1)


@inlined
def _finish(counters, phase):  # type: ignore[no-untyped-def]
    atomic_add(counters + 8 * TICKET_WORDS * phase + 64, 1)


@inlined
def _wait(counters, phase, items):  # type: ignore[no-untyped-def]
    while atomic_load(counters + 8 * TICKET_WORDS * phase + 64) < items:
        pause()


@inlined
def _decode(descriptor, q, out, lse, counters, phase, thread):  # type: ignore[no-untyped-def]
    """Decode once, in two phases: at an anchor of a selection the pages are scored and listed, then attended to."""
    c = words(descriptor)
    step = load_i64(c[STATE_BASE] + STEP)
    if c[IS_PAGES] and steps_since_refresh_at(c, step) == 0:
        items = c[HEADS] * c[SCORE_SPLITS]
        item = _take(counters, phase)
        while item < items:
            invoke_4(c[SCORE_KERNEL], descriptor, item, q, thread)
            _finish(counters, phase)
            item = _take(counters, phase)
        _wait(counters, phase, items)
    phase += 1
    items = c[HEADS] * (c[COLD_SPLITS] + c[EXACT_SPLITS])
    item = _take(counters, phase)
    while item < items:
        invoke_6(c[ITEM_KERNEL], descriptor, item, q, out, lse, thread)
        _finish(counters, phase)
        item = _take(counters, phase)
    _wait(counters, phase, items)


@kernel(_SIGNATURE)
def attend(arguments, thread):  # type: ignore[no-untyped-def]
    """Decode `steps` times, going round the caches; the tables hold an address for each cache."""
    a = words(arguments)
    steps, caches, counters = a[0], a[1], a[2]
    descriptors, queries, outputs, lses = words(a[3]), words(a[4]), words(a[5]), words(a[6])
    for step in range(steps):
        i = step % caches
        _decode(descriptors[i], queries[i], outputs[i], lses[i], counters, 2 * step, thread)


@inlined
def _map(target, x, dim, reflector, permutation, sign, scale):  # type: ignore[no-untyped-def]
    """Write scale x the orthogonal map of x (see `backends.feedback.OrthogonalMap`)."""
    dot = np.float32(0)
    for d in range(dim):
        dot += load_f32(x + 4 * d) * load_f32(reflector + 4 * d)
    for d in range(dim):
        p = load_i64(permutation + 8 * d)
        reflected = load_f32(x + 4 * p) - np.float32(2) * load_f32(reflector + 4 * p) * dot
        store_f32(target + 4 * d, scale * load_f32(sign + 4 * d) * reflected)


@inlined
def _map_number(i, target, x, dim, tables):  # type: ignore[no-untyped-def]
    """Apply the map of the query (0), key (1) or value (2); `tables` has four addresses each."""
    t = words(tables + 32 * i)
    _map(target, x, dim, t[0], t[1], t[2], load_f32(t[3]))


@inlined
def _feed(descriptor, head, source, q, scratch, tables):  # type: ignore[no-untyped-def]
    """Turn the outputs of one KV head's group into its next queries, key and value, and append."""
    c = words(descriptor)
    group, dim = c[GROUP], c[DIM]
    x, key, value = scratch, scratch + 4 * dim, scratch + 8 * dim
    for g in range(group):
        start = (head * group + g) * dim * 4
        total = np.float32(0)
        for d in range(dim):
            element = load_f32(source + start + 4 * d)
            total += element * element
        root = np.sqrt(total / np.float32(dim) + EPSILON)
        for d in range(dim):
            store_f32(x + 4 * d, load_f32(source + start + 4 * d) / root)
        _map_number(0, q + start, x, dim, tables)
        if g == 0:
            _map_number(1, key, x, dim, tables)
            _map_number(2, value, x, dim, tables)
    invoke_4(c[APPEND_KERNEL], descriptor, head, key, value)
    state = c[STATE_BASE] + head * STATE_BYTES
    store_i64(state + STEP, load_i64(state + STEP) + 1)


@kernel(_SIGNATURE)
def one_token(arguments, thread):  # type: ignore[no-untyped-def]
    """Run one token through all caches as layers; `first` is the address of the outputs that feed the first layer.

    `scratch` has three rows of head_dim floats for each (sequence, KV head).
    """
    a = words(arguments)
    layers, counters, first, q, lse, scratch, tables = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    descriptors, outputs = words(a[7]), words(a[8])
    for layer in range(layers):
        c = words(descriptors[layer])
        source = first if layer == 0 else outputs[layer - 1]
        head = _take(counters, 3 * layer)
        while head < c[HEADS]:
            _feed(descriptors[layer], head, source, q, scratch + head * c[DIM] * 12, tables)
            _finish(counters, 3 * layer)
            head = _take(counters, 3 * layer)
        _wait(counters, 3 * layer, c[HEADS])
        _decode(descriptors[layer], q, outputs[layer], lse, counters, 3 * layer + 1, thread)


@kernel(_SIGNATURE)
def store_block(arguments, thread):  # type: ignore[no-untyped-def]
    """Append the first `lengths[row]` tokens of (batch, kv_heads, tokens, head_dim) rows."""
    a = words(arguments)
    descriptor, counters, keys, values, tokens, lengths = a[0], a[1], a[2], a[3], a[4], words(a[5])
    c = words(descriptor)
    head = _take(counters, 0)
    while head < c[HEADS]:
        for token in range(lengths[head // c[KV_HEADS]]):
            where = (head * tokens + token) * c[DIM] * 4
            invoke_4(c[APPEND_KERNEL], descriptor, head, keys + where, values + where)
        head = _take(counters, 0)


@inlined
def _mix(x):  # type: ignore[no-untyped-def]
    """SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * MIX_1
    x = (x ^ (x >> np.uint64(27))) * MIX_2
    return x ^ (x >> np.uint64(31))


@kernel(_SIGNATURE)
def store_random(arguments, thread):  # type: ignore[no-untyped-def]
    """Append `lengths[row]` tokens drawn from a table of 2^16 normal numbers; `scratch` as in `one_token`."""
    a = words(arguments)
    descriptor, counters, table, seed, scratch, lengths = a[0], a[1], a[2], a[3], a[4], words(a[5])
    c = words(descriptor)
    dim = c[DIM]
    head = _take(counters, 0)
    while head < c[HEADS]:
        row = scratch + head * dim * 12
        counter = _mix(np.uint64(seed) + np.uint64(head) * GOLDEN)
        for _ in range(lengths[head // c[KV_HEADS]]):
            for i in range(0, 2 * dim, 4):
                counter += GOLDEN
                bits = _mix(counter)
                for j in range(4):
                    entry = np.int64((bits >> np.uint64(16 * j)) & np.uint64(0xFFFF))
                    store_f32(row + 4 * (i + j), load_f32(table + 4 * entry))
            invoke_4(c[APPEND_KERNEL], descriptor, head, row, row + 4 * dim)
        head = _take(counters, 0)
