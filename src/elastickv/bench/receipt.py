"""The receipt: what the code path that is timed does to the output."""

from dataclasses import dataclass

import numpy as np

from elastickv.attention.errors import ErrorSummary, relative_l2, summarise
from elastickv.attention.reference import attend
from elastickv.backends import Backend
from elastickv.cache import LayerCache, Oracle
from elastickv.data import Sample
from elastickv.errors import KernelMismatch
from elastickv.recipe import AttentionShape, Recipe

KERNEL_ERROR_LIMITS = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 4e-3}


@dataclass(frozen=True)
class SampleReceipt:
    """Errors on real activations, per (layer, query head, query).

    Attributes
    ----------
    recipe, recipe_hash : the recipe as solved for the sample's context.
    context : tokens before the first query and after the last.
    kernel_error : back end against the float64 reference of the same recipe on the same codes.
    recipe_error : back end against float64 dense attention on the unquantised keys and values.
    """

    recipe: str
    recipe_hash: str
    context: tuple[int, int]
    kernel_error: ErrorSummary
    recipe_error: ErrorSummary


def sample_shape(sample: Sample) -> AttentionShape:
    """Return the shape in which a sample is replayed: its layers as a batch."""
    return AttentionShape(sample.q.shape[0], sample.q.shape[1], sample.k.shape[1], sample.k.shape[3])


def replay(backend: Backend, sample: Sample, recipe: Recipe, dtype: str) -> SampleReceipt:
    """Decode the sample's consecutive queries through `backend`: prefill, then append and decode token by token.

    Raises
    ------
    KernelMismatch : if the back end is further from its float64 reference than its dtype allows.
    """
    shape = sample_shape(sample)
    tokens, queries = sample.k.shape[2], sample.q.shape[2]
    start = tokens - queries
    cache = backend.cache(shape, tokens, dtype, recipe)
    cache.prefill(sample.k[:, :, :start], sample.v[:, :, :start], np.full(shape.batch, start))
    oracle = Oracle(cache)
    kernel_errors, recipe_errors = [], []
    for i in range(queries):
        position = start + i
        cache.append(sample.k[:, :, position], sample.v[:, :, position])
        q = np.ascontiguousarray(sample.q[:, :, i])
        output, _ = cache.decode(q)
        kernel_errors.append(relative_l2(output, oracle.decode(q)[0]))
        recipe_errors.append(relative_l2(output, _dense(sample, q, position + 1)))
    cache.raise_non_finite()
    kernel = summarise(np.array(kernel_errors))
    check_kernel_error(kernel, recipe.exact_dtype(dtype), f"{recipe} on the real sample")
    return SampleReceipt(str(recipe), recipe.hash, (start + 1, tokens), kernel, summarise(np.array(recipe_errors)))


def timed_kernel_error(cache: LayerCache, queries: np.ndarray, heads: int = 2) -> ErrorSummary:
    """Return the kernel error of a cache that is about to be timed, over `heads` KV heads of its first and last sequence."""
    shape, oracle = cache.shape, Oracle(cache)
    if cache.recipe.age(cache.step):
        raise ValueError("a cache between anchors has no reference: its anchor was not seen")
    output, _ = cache.decode(queries)
    errors = []
    for row in sorted({0, shape.batch - 1}):
        for head in np.unique(np.linspace(0, shape.kv_heads - 1, heads).astype(int)):
            group = slice(head * shape.group, (head + 1) * shape.group)
            errors.append(relative_l2(output[row, group], oracle.decode_head(row, int(head), queries[row, group]).output))
    summary = summarise(np.concatenate(errors))
    check_kernel_error(summary, cache.recipe.exact_dtype(cache.dtype), f"{cache.recipe} on the timing data")
    return summary


def check_kernel_error(error: ErrorSummary, dtype: str, what: str) -> None:
    """Refuse to time a back end that computes something else."""
    limit = KERNEL_ERROR_LIMITS[dtype]
    if not error.p95 <= limit:
        raise KernelMismatch(
            f"{what}: kernel error {error.p95:.2g} (p95) is above {limit:g} for {dtype}; no figure is reported"
        )


def _dense(sample: Sample, queries: np.ndarray, length: int) -> np.ndarray:
    layers, heads, head_dim = queries.shape
    group = heads // sample.k.shape[1]
    output = np.empty((layers, heads, head_dim))
    for layer in range(layers):
        for head in range(sample.k.shape[1]):
            rows = slice(head * group, (head + 1) * group)
            keys, values = sample.k[layer, head, :length], sample.v[layer, head, :length]
            output[layer, rows] = attend(queries[layer, rows], keys, values).output
    return output
