"""Chunks, rows that move, tokens taken back: every backend against its own plain storage and the float64 twin."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from elastickv.backends import load
from elastickv.errors import UsageError
from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.recipe import AttentionShape, Recipe, regions
from tests.helpers.reference_backend import ReferenceBackend

SHAPE = AttentionShape(3, 4, 2, 64)
RECIPES = [
    "dense",
    "bf16",
    "int8",
    "fp8",
    "k=int8,v=int4,vgroup=32",
    "int4",
    "int4,pages=1/4,anchor_every=3",
    "k=int8_per_channel,v=int8",
    "int8,stride=3",
    "int8,reuse,anchor_every=4",
    "int4,rotate=kv,pages=1/4,anchor_every=3",
    "k=int8,v=int4,rotate=v",
]
CAPACITY = 420


@dataclass(frozen=True)
class Kind:
    """A backend, and the dtype of the model it serves."""

    backend: Any
    dtype: str

    def limit(self, recipe: Recipe) -> float:
        """The error that kernels may have."""
        return 1e-4 if self.backend.name != "cuda" or recipe.exact_dtype(self.dtype) == "fp32" else 4e-3

    @property
    def rounding(self) -> float:
        """How far results on the same codes may lie apart where the work is cut differently."""
        return 1e-6 if self.backend.name != "cuda" else 4e-3

    def made(self, text: str, capacity: int = CAPACITY, shape: AttentionShape = SHAPE):
        return self.backend.cache(shape, capacity, self.dtype, Recipe.parse(text))

    def filled(self, text: str, lengths: list[int]):
        cache = self.made(text)
        cache.prefill(*tokens(0, 400), np.array(lengths))
        return cache


@pytest.fixture(
    params=[
        "reference",
        "cpu",
        *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda fp32", "cuda bf16", "cuda fp16", "cuda simt fp16")),
    ]
)
def kind(request):
    where, *how = request.param.split()
    if where in ("reference", "cpu"):
        return Kind(ReferenceBackend() if where == "reference" else load("cpu")[0], "fp32")
    kernels = "simt" if "simt" in how else "auto"
    return Kind(request.getfixturevalue("open_cuda")(kernels), how[-1])


def tokens(seed: int, count: int, shape: AttentionShape = SHAPE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, shape.batch, shape.kv_heads, count, shape.head_dim), dtype=np.float32)


def step(cache, seed: int, shape: AttentionShape = SHAPE):
    keys, values = tokens(seed, 1, shape)
    cache.append(keys[:, :, 0], values[:, :, 0])
    queries = np.random.default_rng(seed + 1).standard_normal((shape.batch, shape.query_heads, shape.head_dim), np.float32)
    return cache.decode(queries)


def same(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def stored_rows(cache, row: int, head: int, first: int, last: int):
    """Return what `stored` tells of tokens first to last - 1, where the recipe keeps all."""
    held, length = cache.stored(row, head), int(cache.lengths[row])
    split = regions(length, cache.recipe.sinks, cache.recipe.window)
    if cache.recipe.is_dense:
        return held.exact_keys[first:last], held.exact_values[first:last]
    sinks = split.sinks
    parts = ((held.exact_keys, held.cold_keys), (held.exact_values, held.cold_values))
    return [np.concatenate([exact[:sinks], cold, exact[sinks:]])[first:last] for exact, cold in parts]


@pytest.mark.parametrize("text", [text for text in RECIPES if "stride" not in text])
def test_reading_back_gives_what_is_stored_and_zeros_behind_the_end(text, kind):
    cache = kind.filled(text, [400, 7, 211])
    keys, values = cache.read(1, 401)
    for row, head in np.ndindex(3, 2):
        length = int(cache.lengths[row])
        expected = stored_rows(cache, row, head, 1, length)
        # The rotation back is of float32, where sums cancel.
        off = 2e-6 if cache.recipe.rotate else 0
        np.testing.assert_allclose(keys[row, head, : length - 1], expected[0], rtol=1e-6, atol=off)
        np.testing.assert_allclose(values[row, head, : length - 1], expected[1], rtol=1e-6, atol=off)
        assert not keys[row, head, length - 1 :].any()


def test_reading_back_gives_zeros_for_what_a_stride_dropped(kind):
    cache = kind.filled("int8,stride=3", [400, 7, 211])
    keys, _ = cache.read(4, 4 + 96)
    np.testing.assert_allclose(keys[0, 1, ::3], cache.stored(0, 1).cold_keys[:32], rtol=1e-6)
    assert not keys[0, 1, 1::3].any()
    assert not keys[0, 1, 2::3].any()


@pytest.mark.parametrize("text", RECIPES)
def test_chunks_store_what_one_prefill_stores(text, kind):
    keys, values = tokens(0, 400)
    whole, chunked = kind.filled(text, [400, 400, 400]), kind.filled(text, [150, 0, 33])
    for row, rest in enumerate((slice(150, None), slice(0, None), slice(33, None))):
        more = np.zeros((2, 3, 2, 400, 64), np.float32)
        length = np.zeros(3, np.int64)
        length[row] = keys[row, 0, rest].shape[0]
        more[0, row, :, : length[row]], more[1, row, :, : length[row]] = keys[row, :, rest], values[row, :, rest]
        chunked.extend(*more, length)
    same(whole.read(0, 400), chunked.read(0, 400))
    assert chunked.step == -1
    same(step(whole, 5), step(chunked, 5))


def test_a_chunk_that_does_not_fit_is_refused_and_nothing_is_stored(kind):
    cache = kind.filled("int4", [400, 7, 211])
    with pytest.raises(UsageError, match="sequence 0 holds 400 of 420 tokens, 21 are added"):
        cache.extend(*tokens(1, 21), np.array([21, 21, 21]))
    assert cache.lengths.tolist() == [400, 7, 211]


@pytest.mark.parametrize("text", RECIPES)
def test_rows_move_with_all_they_have(text, kind):
    cache = kind.filled(text, [400, 7, 211])
    step(cache, 1)
    rows = np.array([2, 0, 0])
    moved, grown = copy.deepcopy(cache), cache.gather(rows, 500)
    moved.reorder(rows)
    wide = AttentionShape(4, 4, 2, 64)
    repeated = cache.gather(np.array([0, 0, 1, 2]), CAPACITY)
    queries = np.random.default_rng(9).standard_normal((3, 4, 64), np.float32)
    keys, values = tokens(8, 1)
    for c, order in ((cache, [0, 1, 2]), (moved, rows), (grown, rows)):
        c.append(keys[order, :, 0], values[order, :, 0])
    expected, lse = cache.decode(queries)
    for c in (moved, grown):
        assert c.step == cache.step == 1
        outputs, moved_lse = c.decode(queries[rows])
        np.testing.assert_allclose(outputs, expected[rows], rtol=kind.rounding, atol=kind.rounding / 10)
        np.testing.assert_allclose(moved_lse, lse[rows], rtol=kind.rounding)
    assert repeated.lengths.tolist() == [401, 401, 8, 212]
    step(repeated, 3, wide)


def test_a_copy_shares_nothing(kind):
    cache = kind.filled("int4,pages=1/4", [400, 7, 211])
    other = copy.deepcopy(cache)
    step(other, 1)
    assert cache.lengths.tolist() == [400, 7, 211]
    same(step(cache, 2), step(kind.filled("int4,pages=1/4", [400, 7, 211]), 2))


@pytest.mark.parametrize("text", ["dense", "int8", "int4,pages=1/4"])
def test_a_crop_within_the_window_leaves_no_trace(text, kind):
    cache = kind.filled(text, [4 + 128 + 96 + 20, 40, 4 + 128 + 64])
    before = copy.deepcopy(cache)
    cache.extend(*tokens(3, 11), np.array([11, 5, 11]))
    cache.crop(before.lengths)
    same(cache.read(0, 260), before.read(0, 260))
    same(step(cache, 5), step(before, 5))


@pytest.mark.parametrize(
    "text",
    ["int8", "int4", "k=int8,v=int4", "int4,pages=1/4,anchor_every=2", "int8,reuse,anchor_every=2", "k=int8,v=int4,rotate=kv"],
)
def test_a_crop_keeps_what_the_codes_stand_for(text, kind):
    cache = kind.filled(text, [400, 300, 211])
    keys, values = cache.read(0, 400)
    lengths = np.array([250, 40, 211])
    cache.crop(lengths)
    assert cache.lengths.tolist() == lengths.tolist()
    for row, length in enumerate(lengths):
        for now, was in zip(cache.read(0, 400), (keys, values), strict=True):
            # bfloat16 keeps 8 bits: half a unit in the last place of the largest in a page.
            off = 2**-6 if cache.recipe.rotate else 0  # of any channel of a token, once it is rotated back
            np.testing.assert_allclose(now[row, :, :length], was[row, :, :length], rtol=2**-8, atol=off)
            assert not now[row, :, length:].any()
    limit = kind.limit(cache.recipe)
    outputs, lse = step(cache, 6)
    expected, expected_lse = Oracle(cache).decode(np.random.default_rng(7).standard_normal((3, 4, 64), np.float32))
    # The kernel error that a backend may have in float32 (test_cpu_decode), on codes.
    assert np.linalg.norm(outputs - expected) < limit * np.linalg.norm(expected)
    np.testing.assert_allclose(lse, expected_lse, rtol=limit)
    for seed in range(10, 150):
        step(cache, seed)
    cache.raise_non_finite()


def test_a_crop_that_needs_what_a_stride_dropped_is_refused(kind):
    cache = kind.filled("int8,stride=2", [400, 300, 211])
    with pytest.raises(UsageError, match="has dropped tokens"):
        cache.crop(np.array([200, 300, 211]))
    with pytest.raises(UsageError, match="give fewer"):
        cache.crop(np.array([401, 300, 211]))


def test_everything_is_read_on_request_and_the_selection_comes_back(kind):
    cache = kind.filled("int4,pages=1/8,anchor_every=4", [400, 300, 211])
    step(cache, 1)
    assert len(cache.pages_read(0, 0)) == 1
    cache.set_fractions([1.0, 1.0])
    assert cache.step == -1
    outputs, _ = step(cache, 2)
    assert cache.pages_read(0, 0).tolist() == list(range(8))
    whole = kind.filled("int4", [400, 300, 211])
    step(whole, 1)
    np.testing.assert_allclose(outputs, step(whole, 2)[0], rtol=10 * kind.rounding, atol=kind.rounding)
    cache.set_fractions([1 / 8, 1 / 2])
    step(cache, 3)
    assert [len(cache.pages_read(0, head)) for head in (0, 1)] == [1, 4]


@pytest.mark.parametrize("text", RECIPES)
def test_a_saved_state_goes_on_where_it_was(text, kind):
    if kind.backend.name == "reference" and Recipe.parse(text).anchor_every > 1:
        pytest.skip("the reference begins with an anchor again")
    cache = kind.filled(text, [400, 7, 211])
    step(cache, 1)
    other = kind.made(text, CAPACITY + 100)
    other.load_state(cache.state())
    a, b = step(cache, 2), step(other, 2)
    np.testing.assert_allclose(a[0], b[0], rtol=kind.rounding, atol=kind.rounding / 10)


def test_a_state_that_does_not_fit_is_refused(kind):
    small = kind.made("int4", 100)
    with pytest.raises(ValueError, match="do not fit"):
        small.load_state(kind.filled("int4", [400, 7, 211]).state())


@pytest.mark.parametrize("text", RECIPES)
def test_the_float64_twin_does_the_same(text, kind):
    def twin_of(text: str, capacity: int):
        return ReferenceCache(SHAPE, capacity, kind.dtype, Recipe.parse(text))

    mine, twin = (make(text, CAPACITY) for make in (kind.made, twin_of))
    both: list = [mine, twin]
    limit = kind.limit(mine.recipe)

    def agree() -> None:
        assert mine.lengths.tolist() == twin.lengths.tolist()
        for a, b in zip(mine.read(0, CAPACITY), twin.read(0, CAPACITY), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=0)
        (outputs, lse), (expected, expected_lse) = (step(cache, 50) for cache in both)
        assert np.linalg.norm(outputs - expected) < limit * np.linalg.norm(expected)
        np.testing.assert_allclose(lse, expected_lse, rtol=limit)

    for cache in both:
        cache.prefill(*tokens(0, 300), np.array([300, 5, 211]))
    agree()
    for cache in both:
        cache.extend(*tokens(1, 40), np.array([40, 3, 0]))
    agree()
    for cache in both:
        cache.reorder(np.array([2, 0, 0]))
        cache.set_fractions([1.0, 0.3])
    agree()
    both = [cache.gather(np.array([1, 2, 0]), 600) for cache in both]
    mine, twin = both
    shorter = mine.lengths - (np.array([7, 0, 3]) if "stride" in text else np.array([7, 150, 90]))
    for cache in both:
        cache.crop(shorter)
    agree()
    both = [make(text, 600) for make in (kind.made, twin_of)]
    for cache, before in zip(both, (mine, twin), strict=True):
        before.extend(*tokens(2, 1), np.ones(3, np.int64))
        cache.load_state(before.state())
    mine, twin = both
    agree()
