"""Types of kernel arguments, and the structs of those that outnumber eight or that several kernels share.

A struct's fields have the kernel's order, names and C types. What depends on the cache alone is built once, by `of`.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, TypeAlias, get_args

from elastickv.backends.cuda.device import Argument, DeviceMemory
from elastickv.backends.cuda.kernel_selection import Variant
from elastickv.backends.cuda.storage import Scratch, Storage
from elastickv.backends.feedback import Feedback
from elastickv.recipe import AttentionShape, Recipe

Address: TypeAlias = Annotated[DeviceMemory | int | None, ctypes.c_void_p]
I32: TypeAlias = Annotated[int, ctypes.c_int]
I64: TypeAlias = Annotated[int, ctypes.c_longlong]
U64: TypeAlias = Annotated[int, ctypes.c_ulonglong]
F32: TypeAlias = Annotated[float, ctypes.c_float]


def pack(annotation: Any, value: Any) -> Argument:
    """Return a value as the C type of its annotation; memory and addresses become pointers, None the null pointer."""
    ctype = get_args(annotation)[1]
    packed: Argument = ctype((getattr(value, "pointer", value) or 0) if ctype is ctypes.c_void_p else value)
    return packed


class ArgumentStruct:
    """Arguments that kernels share or that outnumber eight: a frozen dataclass whose fields are in the kernel's order."""

    types: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        cls.types = dict(cls.__annotations__)

    @cached_property
    def packed(self) -> tuple[Argument, ...]:
        """The fields as C values."""
        return tuple(pack(each, getattr(self, name)) for name, each in self.types.items())


@dataclass(frozen=True, kw_only=True)
class StoreArguments(ArgumentStruct):
    """The planes of a cache and its layout: `Store` of kernels/store.cuh.

    Attributes
    ----------
    bad : of each (sequence, KV head), where a value is not finite or cannot be stored.
    sinks, window, ring, stride : tokens.
    exact_rows, cold_rows : rows of a (sequence, KV head) in the exact and in the cold planes.
    """

    exact_k: Address
    exact_v: Address
    cold_k: Address
    cold_v: Address
    k_scale: Address
    v_scale: Address
    cold_pages: Address
    bad: Address
    sinks: I32
    window: I32
    ring: I32
    stride: I32
    exact_rows: I32
    cold_rows: I32

    @classmethod
    def of(cls, storage: Storage, recipe: Recipe) -> "StoreArguments":
        """Return the arguments of kernels that store, read or move tokens laid out for `recipe`."""
        layout = storage.layout
        return cls(
            exact_k=storage.exact_k,
            exact_v=storage.exact_v,
            cold_k=storage.cold_k,
            cold_v=storage.cold_v,
            k_scale=storage.k_scale,
            v_scale=storage.v_scale,
            cold_pages=storage.cold_pages,
            bad=storage.bad,
            sinks=recipe.sinks,
            window=recipe.window,
            ring=layout.ring,
            stride=recipe.stride,
            exact_rows=layout.exact_rows,
            cold_rows=layout.cold_rows,
        )


@dataclass(frozen=True, kw_only=True)
class TokenRows(ArgumentStruct):
    """Keys and values in device memory, (batch, kv_heads, tokens, dim): `TokenRows` of kernels/store.cuh.

    Attributes
    ----------
    key_batch_stride, ... : elements from one sequence, head or token to the next.
    type : a value of `kernel_selection.TYPES`.
    dim : channels that are present; the rest, up to the cache's, are zeros.
    """

    keys: Address
    values: Address
    key_batch_stride: I64
    key_head_stride: I64
    key_token_stride: I64
    value_batch_stride: I64
    value_head_stride: I64
    value_token_stride: I64
    type: I32
    dim: I32


@dataclass(frozen=True, kw_only=True)
class RowTarget(ArgumentStruct):
    """Where keys and values are read to, (heads, tokens, dim) each.

    Attributes
    ----------
    type : a value of `kernel_selection.TYPES`.
    dim : channels of a row.
    """

    keys: Address
    values: Address
    type: I32
    dim: I32


@dataclass(frozen=True, kw_only=True)
class QueryArguments(ArgumentStruct):
    """The queries of the decode that follows an append, which copies and scales them.

    Attributes
    ----------
    query_rows : (sequence, query head) rows of the tokens' type; None if no decode follows.
    query_batch_stride, query_head_stride : elements from one sequence or query head to the next.
    queries : (heads, group, head_dim) float32 that decode and select read.
    group : query heads of a KV head.
    query_scale : factor of every query.
    """

    query_rows: Address
    query_batch_stride: I64
    query_head_stride: I64
    queries: Address
    group: I32
    query_scale: F32


@dataclass(frozen=True, kw_only=True)
class FeedbackArguments(ArgumentStruct):
    """How a layer's outputs become the next layer's queries, key and value: `FeedbackInput` of kernels/append.cu.

    Attributes
    ----------
    outputs : (heads, group, head_dim) float32 of the previous layer.
    queries : the same shape, of the next decode.
    group : query heads of a KV head.
    tables : reflector, sign and permutation of queries, keys and values, head_dim each.
    query_rms, key_rms, value_rms : root mean squares of the results.
    """

    outputs: Address
    queries: Address
    group: I32
    tables: Address
    query_rms: F32
    key_rms: F32
    value_rms: F32

    @classmethod
    def of(
        cls, outputs: DeviceMemory, queries: DeviceMemory, group: int, tables: DeviceMemory, feedback: Feedback
    ) -> "FeedbackArguments":
        """Return the arguments of an append of what `feedback` makes of `outputs`."""
        return cls(
            outputs=outputs,
            queries=queries,
            group=group,
            tables=tables,
            query_rms=feedback.query_rms,
            key_rms=feedback.key_rms,
            value_rms=feedback.value_rms,
        )


@dataclass(frozen=True, kw_only=True)
class SelectArguments(ArgumentStruct):
    """What a selection of pages reads and writes, the same at every step.

    Attributes
    ----------
    cold_pages, page_stride : the pages, of which it reads the scales of the keys, and bytes between them.
    state : length and step of each (sequence, KV head), three planes.
    counts : (kv_heads, counts_stride) numbers of pages to list, by the number of pages.
    scores, counters : scratch memory; counters are zero before and after.
    listed_pages, listed : the page numbers of each (sequence, KV head), and their count with the number of pages.
    """

    cold_pages: Address
    page_stride: I32
    state: Address
    counts: Address
    counts_stride: I32
    scores: Address
    counters: Address
    listed_pages: Address
    listed: Address
    kv_heads: I32
    group: I32
    sinks: I32
    window: I32
    anchor_every: I32
    anchor_offset: I32
    page_capacity: I32

    @classmethod
    def of(
        cls, shape: AttentionShape, storage: Storage, scratch: Scratch, recipe: Recipe, anchor_offset: int
    ) -> "SelectArguments":
        """Return the arguments of a selection of pages."""
        layout = storage.layout
        return cls(
            cold_pages=storage.cold_pages,
            page_stride=layout.page_stride,
            state=storage.state,
            counts=storage.counts,
            counts_stride=layout.page_capacity + 1,
            scores=scratch.scores,
            counters=scratch.counters,
            listed_pages=storage.lists,
            listed=storage.listed,
            kv_heads=shape.kv_heads,
            group=shape.group,
            sinks=recipe.sinks,
            window=recipe.window,
            anchor_every=recipe.anchor_every,
            anchor_offset=anchor_offset,
            page_capacity=layout.page_capacity,
        )


@dataclass(frozen=True, kw_only=True)
class DecodeArguments(ArgumentStruct):
    """What a decode reads of its cache, the same at every step: `Args` of kernels/common.cuh without queries and outputs.

    Attributes
    ----------
    exact_k, ..., cold_pages : planes, as in `StoreArguments`.
    state : length and step of each (sequence, KV head), three planes.
    partial, partial_ml, counters : what blocks leave for each other to merge.
    cached_output, cached_lse : cold results of the last anchor, where the recipe reuses them.
    listed_pages, listed : what `select` has written.
    passes : passes over the query heads of a KV head.
    log2_decay : log2 of the decay of a reused result.
    scale_log2 : factor of every score, in units of log2.
    """

    exact_k: Address
    exact_v: Address
    cold_k: Address
    cold_v: Address
    k_scale: Address
    v_scale: Address
    cold_pages: Address
    state: Address
    partial: Address
    partial_ml: Address
    counters: Address
    cached_output: Address
    cached_lse: Address
    listed_pages: Address
    listed: Address
    batch: I32
    kv_heads: I32
    group: I32
    passes: I32
    sinks: I32
    window: I32
    ring: I32
    stride: I32
    anchor_every: I32
    anchor_offset: I32
    exact_rows: I32
    cold_rows: I32
    page_capacity: I32
    log2_decay: F32
    scale_log2: F32

    @classmethod
    def of(
        cls, shape: AttentionShape, storage: Storage, scratch: Scratch, recipe: Recipe, anchor_offset: int, variant: Variant
    ) -> "DecodeArguments":
        """Return the arguments of a decode by `variant`."""
        layout, reused = storage.layout, storage.cached_output
        partial, partial_ml = (
            (scratch.split_kv_buffer, scratch.split_kv_buffer_ml)
            if variant.uses_split_kv_buffer
            else (scratch.partial, scratch.partial_ml)
        )
        return cls(
            exact_k=storage.exact_k,
            exact_v=storage.exact_v,
            cold_k=storage.cold_k,
            cold_v=storage.cold_v,
            k_scale=storage.k_scale,
            v_scale=storage.v_scale,
            cold_pages=storage.cold_pages,
            state=storage.state,
            partial=partial,
            partial_ml=partial_ml,
            counters=scratch.counters,
            cached_output=reused,
            cached_lse=reused.pointer + shape.batch * shape.query_heads * shape.head_dim * 4,
            listed_pages=storage.lists,
            listed=storage.listed,
            batch=shape.batch,
            kv_heads=shape.kv_heads,
            group=shape.group,
            passes=variant.passes(shape.group),
            sinks=recipe.sinks,
            window=recipe.window,
            ring=layout.ring,
            stride=recipe.stride,
            anchor_every=recipe.anchor_every,
            anchor_offset=anchor_offset,
            exact_rows=layout.exact_rows,
            cold_rows=layout.cold_rows,
            page_capacity=layout.page_capacity,
            log2_decay=math.log2(recipe.decay),
            scale_log2=math.log2(math.e) / math.sqrt(shape.head_dim),
        )
