"""The output error of the very code path that is timed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from elastickv.backends import Backend
from elastickv.benchmark.sample_inputs import Sample
from elastickv.benchmark.time_budget import seconds_text
from elastickv.errors import KernelMismatch, UsageError
from elastickv.kvcache import LayerCache, Oracle
from elastickv.kvcache.error_metrics import ErrorSummary, relative_l2, summarize
from elastickv.recipe import AttentionShape, Recipe

_QUERIES_AT_ONCE = 64
LARGEST_FP16, LARGEST_FP32 = 65504.0, 3e38
_TIMED_QUERIES = 4  # of a replay after the first, whose kernels are compiled or loaded; they say how long it takes
KERNEL_ERROR_LIMITS = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 4e-3}


@dataclass(frozen=True)
class SampleAccuracy:
    """Errors on real activations, per (layer, query head, query).

    Attributes
    ----------
    recipe, recipe_hash : the recipe that was replayed.
    context : tokens before the first query and after the last.
    kernel_error : backend against the float64 reference of the same recipe on the same codes.
    recipe_error : backend against float64 dense attention on the unquantized keys and values.
    """

    recipe: str
    recipe_hash: str
    context: tuple[int, int]
    kernel_error: ErrorSummary
    recipe_error: ErrorSummary


def sample_shape(sample: Sample) -> AttentionShape:
    """Return the shape in which a sample is replayed: its layers as a batch."""
    return AttentionShape(sample.q.shape[0], sample.q.shape[1], sample.k.shape[1], sample.k.shape[3])


class ReplayTimeout(Exception):
    """A replay would not end in time."""


def replay(
    backend: Backend,
    sample: Sample,
    recipe: Recipe,
    dtype: str,
    within_s: float = math.inf,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SampleAccuracy:
    """Decode the sample's consecutive queries through `backend`: prefill, then append and decode token by token.

    Parameters
    ----------
    within_s : seconds that it may take once its kernels are compiled, which all that follows needs too; estimated after a few
        queries and watched from there on.
    progress : called with the queries done and all of them.

    Raises
    ------
    ReplayTimeout : if it takes longer.
    KernelMismatch : if the backend is further from its float64 reference than its dtype allows.
    """
    shape = sample_shape(sample)
    tokens, queries = sample.k.shape[2], sample.q.shape[2]
    start = tokens - queries
    cache = backend.cache(shape, tokens, dtype, recipe)
    began = time.monotonic()
    cache.prefill(sample.k[:, :, :start], sample.v[:, :, :start], np.full(shape.batch, start))
    oracle = Oracle(cache)
    kernel_errors, recipe_errors, dense = [], [], _dense(sample)
    first_ended = began
    for i in range(queries):
        if i == 1:
            first_ended = time.monotonic()
        if i > _TIMED_QUERIES and (expected := _expected_s(began, first_ended, i, queries)) > within_s:
            left = f"the time limit leaves {seconds_text(within_s)} s for it"
            raise ReplayTimeout(f"it takes about {seconds_text(expected)} s, and {left}")
        position = start + i
        cache.append(sample.k[:, :, position], sample.v[:, :, position])
        q = np.ascontiguousarray(sample.q[:, :, i])
        output, _ = cache.decode(q)
        kernel_errors.append(relative_l2(output, oracle.decode(q)[0]))
        recipe_errors.append(relative_l2(output, dense[i]))
        progress(i + 1, queries)
    cache.raise_non_finite()
    by_query = np.array(kernel_errors)
    kernel = summarize(by_query)
    # One wrong head among many must not hide in a quantile over all: the worst (layer, head) counts.
    check_kernel_error(by_query.mean(axis=0).max(), recipe.exact_dtype(dtype), f"{recipe} on the real sample")
    return SampleAccuracy(str(recipe), recipe.hash, (start + 1, tokens), kernel, summarize(np.array(recipe_errors)))


def _expected_s(began: float, first_ended: float, done: int, queries: int) -> float:
    """Return the seconds of a whole replay of which `done` queries are done: only what each query takes is multiplied."""
    now = time.monotonic()
    return now - began + (now - first_ended) / (done - 1) * (queries - done)


def timed_kernel_error(cache: LayerCache, output: np.ndarray, queries: np.ndarray, heads: int = 2) -> ErrorSummary:
    """Return the kernel error of the output of a timed program on a cache at an anchor.

    Parameters
    ----------
    output : (batch, query_heads, head_dim), of the program that is timed.
    queries : its queries.
    heads : KV heads, of the first and of the last sequence, that the reference computes; the others must be what
        `cache.decode` computes.

    Raises
    ------
    KernelMismatch : if an output is further from its reference than its dtype allows.
    """
    if cache.recipe.steps_since_refresh(cache.step, cache.anchor_offset):
        raise ValueError("a cache between anchors has no reference: its anchor was not seen")
    shape, oracle = cache.shape, Oracle(cache)
    what, dtype = f"{cache.recipe} on the timing data", cache.recipe.exact_dtype(cache.dtype)
    check_kernel_error(float(relative_l2(output, cache.decode(queries)[0]).max()), dtype, f"{what}, timed against single step")
    errors = []
    for row in sorted({0, shape.batch - 1}):
        for head in np.unique(np.linspace(0, shape.kv_heads - 1, heads).astype(int)):
            group = slice(head * shape.group, (head + 1) * shape.group)
            errors.append(relative_l2(output[row, group], oracle.decode_head(row, int(head), queries[row, group]).output))
    summary = summarize(np.concatenate(errors))
    check_kernel_error(summary.max, dtype, what)
    return summary


def check_kernel_error(error: float, dtype: str, what: str) -> None:
    """Refuse to time a backend whose output is wrong."""
    limit = KERNEL_ERROR_LIMITS[dtype]
    if not error <= limit:
        raise KernelMismatch(f"{what}: kernel error {error:.2g} is above {limit:g} for {dtype}; no figure is reported")


def check_range(sample: Sample, dtype: str) -> None:
    """Refuse a sample whose values, or their scores, do not fit the arithmetic.

    Raises
    ------
    UsageError : naming what is too large and what to do.
    """
    largest = {name: float(np.abs(getattr(sample, name)).max()) for name in ("q", "k", "v")}
    if dtype == "fp16" and max(largest["k"], largest["v"]) > LARGEST_FP16:
        raise UsageError(
            f"input {sample.name} holds values up to {max(largest['k'], largest['v']):g}: use `dtype=bf16` or fp32"
        )
    if largest["q"] * largest["k"] * sample.k.shape[-1] > LARGEST_FP32 or largest["v"] > LARGEST_FP32 / sample.k.shape[2]:
        raise UsageError(f"input {sample.name}: its scores overflow float32; scale q and k down")


def _dense(sample: Sample) -> np.ndarray:
    """Return (queries, layers, query_heads, head_dim) float64: each query's attention over everything up to its position."""
    layers, heads, queries, head_dim = sample.q.shape
    group, start = sample.shape.group, sample.tokens - queries
    output = np.empty((queries, layers, heads, head_dim))
    for layer, head in np.ndindex(layers, sample.k.shape[1]):
        rows = slice(head * group, (head + 1) * group)
        keys, values = (each[layer, head].astype(np.float64) for each in (sample.k, sample.v))
        for first in range(0, queries, _QUERIES_AT_ONCE):
            block = sample.q[layer, rows, first : first + _QUERIES_AT_ONCE].astype(np.float64)
            ends = start + first + 1 + np.arange(block.shape[1])
            scores = block @ keys[: ends[-1]].T / np.sqrt(head_dim)
            scores[:, np.arange(ends[-1]) >= ends[:, None]] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            attended = weights @ values[: ends[-1]] / weights.sum(axis=-1, keepdims=True)
            output[first : first + len(ends), layer, rows] = attended.swapaxes(0, 1)
    return output
