"""Which pages a decode reads: those of the reference, but where float32 can't tell two scores apart."""

from typing import Any

import numpy as np
import pytest

from elastickv.backends import Backend
from elastickv.kvcache import LayerCache, ReferenceCache
from elastickv.kvcache.quantize import quantize_int4_keys
from elastickv.kvcache.scorers.bounds import page_bounds, score_pages
from elastickv.kvcache.tensor_view import Float32
from elastickv.recipe import AttentionShape, Recipe, regions
from elastickv.recipe.regions import PAGE_TOKENS


def scores_of(keys: Float32, length: int, recipe: Recipe, queries: Float32) -> tuple[np.ndarray, float]:
    """Return the float64 scores of the cold pages of one KV head, and what float32 may be off by."""
    split = regions(length, recipe.sinks, recipe.window)
    pages = keys[split.sinks : split.sinks + split.cold].reshape(-1, PAGE_TOKENS, keys.shape[-1])
    _, scales, zeros = quantize_int4_keys(pages)
    scores = score_pages(page_bounds(queries, scales, zeros))
    sizes = np.abs(queries).sum(0) @ (np.abs(zeros.astype(float)) + 15 * scales.astype(float)).T
    return scores, float(sizes.max() * 2.0**-20)


@pytest.mark.parametrize(
    "text", ["int4,pages=1/4", "int4,pages=1:1/9,window=0", "k=int4,v=bf16,pages=0.37,anchor_every=3,sinks=0"]
)
@pytest.mark.parametrize(
    "shape", [AttentionShape(2, 6, 2, 96), AttentionShape(2, 2, 2, 256), AttentionShape(2, 32, 2, 64)], ids=str
)
def test_the_best_pages_are_read(text: str, shape: AttentionShape, backend: Backend, driver: Any) -> None:
    recipe = Recipe.parse(text)
    cache, twin = backend.cache(shape, 3000, "bf16", recipe), ReferenceCache(shape, 3000, "bf16", recipe)
    keys, values = driver.tokens(cache, 2900)
    for c in (cache, twin):
        c.prefill(keys, values, np.array([2900, 1333]))
    queries = driver.queries(cache)
    for c in (cache, twin):
        c.decode(queries)
    for row, head in np.ndindex(shape.batch, shape.kv_heads):
        ours, theirs = cache.pages_read(row, head), twin.pages_read(row, head)
        assert ours is not None
        assert theirs is not None
        assert len(ours) == len(theirs)
        assert (np.diff(ours) > 0).all()
        group = slice(head * shape.group, (head + 1) * shape.group)
        scores, rounding = scores_of(twin._keys[row, head], int(cache.lengths[row]), recipe, queries[row, group])
        differing = np.setxor1d(ours, theirs)
        threshold = scores[theirs].min()
        assert np.abs(scores[differing] - threshold).max(initial=0) <= rounding


def read(cache: LayerCache) -> list[list[int]]:
    return [list(cache.pages_read(row, head)) for row in range(2) for head in range(2)]


@pytest.mark.parametrize(("anchor_every", "anchor_offset"), [(1, 0), (4, 0), (4, 2), (4, 3), (70, 0), (70, 33), (70, 69)])
def test_between_anchors_the_list_stays_and_pages_that_turn_cold_are_read(
    anchor_every: int, anchor_offset: int, backend: Backend, driver: Any
) -> None:
    shape, recipe = AttentionShape(2, 6, 2, 64), Recipe.parse(f"int4,pages=1/4:1/2,anchor_every={anchor_every},window=16")
    cache, twin = (new(shape, 800, "bf16", recipe, anchor_offset) for new in (backend.cache, ReferenceCache))
    tokens = driver.tokens(cache, 500)
    for c in (cache, twin):
        c.prefill(*tokens, np.array([500, 20]))
    grown, listed_at = 0, []
    for step in range(150):
        keys, values = (a[:, :, 0] for a in driver.tokens(cache, 1))
        queries = driver.queries(cache)
        before = read(cache) if step else [[]] * 4
        for c in (cache, twin):
            c.append(keys, values)
            c.decode(queries)
        assert read(cache) == read(twin)
        unchanged = all(now[: len(then)] == then for now, then in zip(read(cache), before, strict=True))
        if recipe.steps_since_refresh(cache.step, anchor_offset):
            assert unchanged
            grown += read(cache) != before
        elif not unchanged or step == 0:
            listed_at.append(step)
    assert bool(grown) == (anchor_every > 1)
    # Random queries list other pages at every anchor, and nowhere else.
    assert listed_at == [step for step in range(150) if step == 0 or (step + anchor_offset) % anchor_every == 0]


def test_equal_scores_list_the_first_pages(backend: Backend) -> None:
    cache = backend.cache(AttentionShape(1, 2, 1, 64), 1000, "bf16", Recipe.parse("int4,pages=1/3,sinks=0,window=0"))
    cache.prefill(*np.ones((2, 1, 1, 992, 64), np.float32), np.array([992]))
    cache.decode(np.ones((1, 2, 64), np.float32))
    assert list(cache.pages_read(0, 0)) == list(range(10))


def test_a_sequence_without_cold_pages_reads_none(backend: Backend, driver: Any) -> None:
    cache = backend.cache(AttentionShape(2, 2, 1, 64), 400, "bf16", Recipe.parse("int4,pages=1/4"))
    cache.prefill(*driver.tokens(cache, 400), np.array([400, 1]))
    output, _ = cache.decode(driver.queries(cache))
    assert np.isfinite(output).all()
    assert len(cache.pages_read(0, 0)) == 2
    assert len(cache.pages_read(1, 0)) == 0
