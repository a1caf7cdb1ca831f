"""Requests of a serving engine in host memory, and the plain numbers that were stored in them."""

import itertools
import math

import numpy as np

from elastickv.backends.cpu.blocks import open_block_kernels
from elastickv.backends.cpu.blocks.host_blocks import HostBlocks
from elastickv.kvcache.quantize import CODECS, stored_values
from elastickv.kvcache.rounding import from_bf16_bits, rounded, to_bf16_bits
from elastickv.kvcache.scorers import scale_factor, select_pages
from elastickv.kvcache.scorers.bounds import BOUNDS
from elastickv.recipe import AttentionShape, Recipe
from elastickv.recipe.formats import FORMATS, PAGE_TOKENS

KINDS = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}


def as_rows(numbers, dtype):
    """Return float32 numbers as an engine's tensor holds them: bits of bfloat16 as uint16."""
    return to_bf16_bits(numbers) if dtype == "bf16" else numbers.astype(KINDS[dtype])


def numbers(rows):
    return from_bf16_bits(rows) if rows.dtype == np.uint16 else rows.astype(np.float32)


def nothing(shape, dtype):
    """What no step has written is NaN: reading it shows."""
    return as_rows(np.full(shape, np.nan, np.float32), dtype)


class HostEngine:
    """Requests whose blocks are scattered, and the plain numbers that were stored in them."""

    def __init__(self, lengths, text, head_dim=128, kv_heads=2, group=4, window=128, window_block=8, dtype="bf16", seed=0):
        self.random = np.random.default_rng(seed)
        self.recipe, self.dtype, self.window, self.size = Recipe.parse(text), dtype, window, window_block
        self.dim, self.kv_heads, self.group = head_dim, kv_heads, group
        self.keys, self.values = ([self.rows(n, kv_heads) for n in lengths] for _ in range(2))
        shape = AttentionShape(1, kv_heads * group, kv_heads, head_dim)
        self.kernels = open_block_kernels(shape, dtype, self.recipe, window)
        self.page_table, self.window_table = self.table(lengths, PAGE_TOKENS), self.table(lengths, window_block)
        self.pages = np.full((self.page_table.max() + 1, kv_heads, self.kernels.slab_bytes), 0xFF, np.uint8)
        self.recent = nothing((self.window_table.max() + 1, kv_heads, window_block, 2 * head_dim), dtype)
        self.first = np.zeros(len(lengths), np.int32)

    def rows(self, *shape):
        return as_rows(self.random.standard_normal((*shape, self.dim), np.float32), self.dtype)

    def table(self, lengths, size):
        """Blocks in random order; block 0 belongs to nobody."""
        counts = [-(-n // size) for n in lengths]
        order = self.random.permutation(sum(counts)).astype(np.int32) + 1
        table = np.zeros((len(lengths), max(counts) + 1), np.int32)
        for row, end, count in zip(table, itertools.accumulate(counts), counts, strict=True):
            row[:count] = order[end - count : end]
        return table

    def blocks(self, requests=slice(None)):
        return HostBlocks.of(self.pages, self.recent, self.page_table[requests], self.window_table[requests])

    def step(self, before, after, requests):
        """Return the arguments of a step of some requests: keys, values, lengths and starts."""
        spans = list(zip(requests, before, after, strict=True))
        rows = [np.concatenate([of[i][n:m] for i, n, m in spans]) for of in (self.keys, self.values)]
        # As an engine's projection leaves them: behind each other in wider rows.
        joined = np.concatenate(rows, axis=1)
        rows = [joined[:, : self.kv_heads], joined[:, self.kv_heads :]]
        starts = np.array([0, *itertools.accumulate(m - n for n, m in zip(before, after, strict=True))], np.int32)
        return *rows, np.array(after, np.int32), starts

    def store(self, before, after, requests=None):
        """Store tokens before[i] to after[i] of each request. Tokens that leave the window in the step get no block."""
        requests = list(range(len(before)) if requests is None else requests)
        arguments, slots = self.step(before, after, requests), []
        for i, n, m in zip(requests, before, after, strict=True):
            tokens = np.arange(n, m)
            own = self.window_table[i, tokens // self.size].astype(np.int64) * self.size + tokens % self.size
            slots.append(np.where(tokens < m - self.window - self.size, tokens % self.size, own))
        self.kernels.store(self.blocks(requests), *arguments, np.concatenate(slots))
        return arguments

    def attend(self, query, arguments, requests, selected=None):
        output = nothing(query.shape, self.dtype)
        keys, values, lengths, starts = arguments
        first = np.ascontiguousarray(self.first[requests])
        scale = 1 / math.sqrt(self.dim)
        self.kernels.decode(self.blocks(requests), keys, values, query, output, lengths, starts, first, scale, selected)
        return output

    def decode(self, before, after):
        """Store and attend with the tokens of a step."""
        arguments = self.store(before, after)
        query = self.rows(len(arguments[0]), self.kv_heads * self.group)
        return query, self.attend(query, arguments, list(range(len(before))))

    def stored(self, request, value, tokens):
        """Return the numbers of a request's first `tokens` tokens in pages, (tokens, kv_heads, head_dim)."""
        fmt = self.recipe.value_format if value else self.recipe.key_format
        rows = numbers((self.values if value else self.keys)[request][: -(-tokens // PAGE_TOKENS) * PAGE_TOKENS])
        if FORMATS[fmt].is_float:
            return rounded(rows[:tokens], fmt).astype(np.float64)
        of_heads = [stored_values(rows[:, head], fmt, value, self.recipe.v_group(self.dim)) for head in range(self.kv_heads)]
        return np.stack(of_heads, axis=1)[:tokens]

    def best_pages(self, request, query, pages, counts):
        """Return the pages of the best scores for a query, (query heads, head_dim), among the first `pages`, for each KV head.

        The first page is always among them.
        """
        q = numbers(query).reshape(self.kv_heads, self.group, self.dim)
        keys, fmt = numbers(self.keys[request][: pages * PAGE_TOKENS]), self.recipe.key_format
        for head, count in enumerate(counts):
            _, scales, zeros = CODECS[fmt].quantize_keys(keys[:, head].reshape(pages, PAGE_TOKENS, self.dim))
            scores = BOUNDS.score(q[head], scale_factor(fmt) * scales.astype(np.float64), zeros)
            scores[:1] = np.inf
            yield select_pages(scores, count)

    def expected(self, request, length, query, unread=None):
        """Float64 attention of one query, (query heads, head_dim), with `length` tokens.

        `unread` are the pages that a KV head does not read, one list for each.
        """
        cold = max(length - self.window, int(self.first[request]), 0)
        keys, values = (numbers(of[request][:length]).astype(np.float64) for of in (self.keys, self.values))
        if cold:
            keys[:cold], values[:cold] = (self.stored(request, value, cold) for value in (False, True))
        q = numbers(query).astype(np.float64).reshape(self.kv_heads, self.group, self.dim)
        scores = np.einsum("hgd,khd->hgk", q, keys) / math.sqrt(self.dim)
        for head, pages in enumerate(unread or ()):
            for page in pages:
                scores[head, :, page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hgk,khd->hgd", weights / weights.sum(-1, keepdims=True), values).reshape(-1, self.dim)

    def errors(self, query, output, before, after):
        """Relative L2 error of every row of a decode."""
        positions = [(i, position) for i, span in enumerate(zip(before, after, strict=True)) for position in range(*span)]
        for (request, position), q, o in zip(positions, query, output, strict=True):
            expected = self.expected(request, position + 1, q)
            yield np.linalg.norm(numbers(o) - expected) / np.linalg.norm(expected)
