"""On a device: every variant against the float64 oracle, storage against the NumPy twin, programs against a NumPy loop."""

import itertools
import random

import numpy as np
import pytest

from elastickv.backends.cuda import cache as cache_module
from elastickv.backends.cuda import device as device_module
from elastickv.backends.feedback import Feedback
from elastickv.errors import NonFiniteError, UsageError
from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.kvcache.quantize import CODECS
from elastickv.kvcache.scorers import scale_factor
from elastickv.kvcache.scorers.bounds import page_bounds, score_pages
from elastickv.recipe import DENSE, HEAD_DIMS, PAGE_TOKENS, AttentionShape, Recipe, regions
from elastickv.recipe.formats import value_groups
from elastickv.recipe.regions import selected

pytestmark = pytest.mark.gpu
LIMITS = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 4e-3}
RECIPES = (
    "dense",
    "bf16,sinks=0,window=0",
    "fp16",
    "bf16,stride=3,sinks=3,window=40",
    "bf16,reuse,anchor_every=3,decay=0.95,sinks=0,window=0",
    "bf16,reuse,anchor_every=4",
    "int8",
    "int8,sinks=0,window=0",
    "int8,stride=2,sinks=5,window=33",
    "int8,reuse,anchor_every=2,window=20",
)
# Recipes whose cold tokens lie in pages; V means the least group of V channels that the head allows.
PAGED = (
    "int4",
    "int4,vgroup=V,sinks=0,window=0",
    "fp8",
    "fp8,sinks=7,window=45",
    "k=int8,v=int4",
    "k=int4,v=int8,window=1",
    "k=fp8,v=int4,vgroup=V",
    "k=fp16,v=int4",
    "k=int4,v=bf16,sinks=1",
    "k=int8,v=fp8,window=64",
    "k=bf16,v=int8",
    "k=int8_per_channel,v=int8",
    "k=int8_per_channel,v=int4,sinks=0,window=0",
    "k=int8_per_channel,v=bf16,window=33",
)
LENGTHS = (1, 3, 4, 5, 31, 32, 33, 63, 65, 127, 128, 129, 131, 132, 133, 159, 160, 163, 164, 165, 195, 196, 197, 513, 900)
GROUPS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 20)
# The tensor-core kernel that shares out work, those of a fixed split with and without clusters, and the one for older parts.
KERNELS = {
    "mma": ("mma", {"SPLITS": 0}),
    "split": ("mma", {"SPLITS": 8}),
    "split-scratch": ("mma", {"SPLITS": 4, "CLUSTER": 0}),
    "simt": ("simt", {}),
}


def open_kernel(open_cuda, name):
    kind, macros = KERNELS[name]
    return open_cuda(kind, **macros)


def paged_recipe(text, head_dim):
    return Recipe.parse(text.replace("=V", f"={value_groups(head_dim)[0]}"))


def random_tokens(rng, shape, tokens):
    return rng.standard_normal((2, shape.batch, shape.kv_heads, tokens, shape.head_dim), dtype=np.float32)


def limit_of(recipe, dtype):
    return LIMITS[recipe.exact_dtype(dtype)]


def check_decode(cache, oracle, queries, limit):
    outputs, lse = cache.decode(queries)
    expected, expected_lse = oracle.decode(queries)
    error = relative_l2(outputs, expected)
    assert error.max() <= limit, f"kernel error {error.max():.2e} at {np.unravel_index(error.argmax(), error.shape)}"
    np.testing.assert_allclose(lse, expected_lse, atol=max(limit, 2e-5) * 4)
    return error.max()


def cases():
    rng = random.Random(7)
    pool = []
    for kind, dtype, text in itertools.product(KERNELS, LIMITS, RECIPES):
        if kind != "simt" and Recipe.parse(text).exact_dtype(dtype) == "fp32":
            continue
        if kind.startswith("split") and Recipe.parse(text).selection == "reuse":
            continue
        pool.append((kind, dtype, text))
    every = itertools.cycle(HEAD_DIMS), itertools.cycle(GROUPS)
    short = itertools.cycle(d for d in HEAD_DIMS if d <= 128), itertools.cycle(g for g in GROUPS if g <= 8)
    for kind, dtype, text in pool:
        dims, groups = short if kind.startswith("split") else every
        for _ in range(2):
            lengths = tuple(rng.choice(LENGTHS) for _ in range(3))
            yield pytest.param(kind, dtype, text, next(dims), next(groups), lengths)
        next(dims)


@pytest.mark.parametrize(("kind", "dtype", "text", "head_dim", "group", "lengths"), list(cases()))
def test_decode_agrees_with_the_oracle(open_cuda, kind, dtype, text, head_dim, group, lengths):
    recipe, shape = Recipe.parse(text), AttentionShape(3, 2 * group, 2, head_dim)
    rng = np.random.default_rng([head_dim, group, *lengths])
    cache = open_kernel(open_cuda, kind).cache(shape, max(lengths) + 40, dtype, recipe)
    assert kind.startswith("split") == bool(cache.variant.splits)
    keys, values = random_tokens(rng, shape, max(lengths))
    cache.prefill(keys, values, np.array(lengths))
    oracle = Oracle(cache)
    for step in range(6):
        queries = rng.standard_normal((3, 2 * group, head_dim), dtype=np.float32) * (1 if step % 2 else 4)
        check_decode(cache, oracle, queries, limit_of(recipe, dtype))
        cache.append(*rng.standard_normal((2, 3, 2, head_dim), dtype=np.float32))


def paged_cases():
    rng, dims, groups = random.Random(8), itertools.cycle(HEAD_DIMS), itertools.cycle(GROUPS)
    kinds = [(kind, text) for text in (*PAGED, "int8", "bf16") for kind in ("pages", "simt") if kind == "pages" or "," in text]
    for (kind, text), dtype in itertools.product(kinds, ("bf16", "fp16", "fp32")):
        for _ in range(2):
            yield pytest.param(kind, dtype, text, next(dims), next(groups), tuple(rng.choice(LENGTHS) for _ in range(3)))
        next(dims)


@pytest.mark.parametrize(("kind", "dtype", "text", "head_dim", "group", "lengths"), list(paged_cases()))
def test_pages_of_every_format_agree_with_the_oracle(open_cuda, kind, dtype, text, head_dim, group, lengths):
    recipe, shape = paged_recipe(text, head_dim), AttentionShape(3, 2 * group, 2, head_dim)
    rng = np.random.default_rng([head_dim, group, *lengths])
    cache = open_cuda(kind).cache(shape, max(lengths) + 40, dtype, recipe)
    assert cache.variant.paged
    keys, values = random_tokens(rng, shape, max(lengths))
    keys[..., 3] += 6
    cache.prefill(keys, values, np.array(lengths))
    oracle = Oracle(cache)
    for step in range(6):
        queries = rng.standard_normal((3, 2 * group, head_dim), dtype=np.float32) * (1 if step % 2 else 4)
        check_decode(cache, oracle, queries, limit_of(recipe, dtype))
        cache.append(*rng.standard_normal((2, 3, 2, head_dim), dtype=np.float32))


def few_heads_cases():
    """Every pair of formats with at most four query heads."""
    formats = ("int4", "int8", "fp8", "bf16", "fp16")
    sizes = zip(itertools.cycle(HEAD_DIMS), itertools.cycle([4, 1, 3, 2]), strict=False)
    for key, value in itertools.product(("int8_per_channel", *formats), formats):
        if {key, value} != {"bf16", "fp16"}:
            yield f"k={key},v={value}", *next(sizes)
    for dim in (80, 112):  # an odd number of products of a query with the keys
        yield "k=int8_per_channel,v=int8", dim, 4
        yield "k=fp8,v=fp8", dim, 4


@pytest.mark.parametrize("lengths", [(700, 700, 700), (700, 133, 5)], ids=["equal", "ragged"])
@pytest.mark.parametrize(("text", "head_dim", "group"), list(few_heads_cases()))
def test_at_most_four_query_heads_share_a_product_with_keys(open_cuda, text, head_dim, group, lengths):
    recipe, shape = Recipe.parse(text), AttentionShape(3, 2 * group, 2, head_dim)
    rng = np.random.default_rng([head_dim, group, *lengths])
    cache = open_cuda("pages").cache(shape, max(lengths) + 40, "bf16", recipe)
    assert cache.variant["KEYS_AS_ROWS"] == 1
    keys, values = random_tokens(rng, shape, max(lengths))
    keys[..., 3] += 6
    cache.prefill(keys, values, np.array(lengths))
    oracle = Oracle(cache)
    for step in range(3):
        queries = rng.standard_normal((3, 2 * group, head_dim), dtype=np.float32) * (1 if step % 2 else 4)
        check_decode(cache, oracle, queries, limit_of(recipe, "bf16"))
        cache.append(*rng.standard_normal((2, 3, 2, head_dim), dtype=np.float32))


def assert_best(cache, twin, queries, row, head):
    """The pages that an anchor lists are those of the highest scores, up to the rounding of scores."""
    recipe, group = cache.recipe, cache.shape.group
    split = regions(int(cache.lengths[row]), recipe.sinks, recipe.window)
    count = split.cold // PAGE_TOKENS
    pages = cache.pages_read(row, head)
    assert len(pages) == selected(count, recipe.fraction(head)) and np.array_equal(pages, np.unique(pages))
    if not count:
        return
    keys = twin.stored(row, head).exact_keys[split.sinks : split.sinks + split.cold].reshape(count, PAGE_TOKENS, -1)
    _, scales, zeros = CODECS[recipe.key_format].quantize_keys(keys)
    scales = scale_factor(recipe.key_format) * scales.astype(np.float64)
    scores = score_pages(page_bounds(queries[row, head * group : (head + 1) * group], scales, zeros))
    left = np.setdiff1d(np.arange(count), pages)
    if len(left):
        assert scores[pages].min() >= scores[left].max() - 1e-3 * np.abs(scores).max()


SELECTING = (
    ("int4,pages=1/4", 128, 4, (700, 133, 5)),
    ("int4,pages=1/3:1/8,window=0,sinks=0", 64, 3, (31, 32, 900)),
    ("k=int4,v=int8,pages=1/2,anchor_every=4", 80, 7, (500, 195, 340)),
    ("int4,vgroup=V,pages=0.1,anchor_every=3,window=33", 256, 1, (900, 900, 900)),
    ("k=int4,v=fp8,pages=1:1/16,anchor_every=2", 96, 8, (1500, 164, 163)),
    ("k=int4,v=bf16,pages=1/8,anchor_every=5,sinks=3", 112, 16, (640, 645, 650)),
    ("int4,pages=1/64,anchor_every=33,window=20", 192, 2, (4000, 60, 2500)),
    ("k=int8_per_channel,v=int8,pages=1/4", 128, 4, (700, 133, 5)),
    ("k=int8_per_channel,v=int4,pages=1/3:1/8,anchor_every=3,window=33", 80, 7, (900, 500, 340)),
)


@pytest.mark.parametrize("kind", ["auto", "simt"])
@pytest.mark.parametrize(("text", "dim", "group", "lengths"), SELECTING)
def test_the_best_pages_are_read_and_reused_between_anchors(open_cuda, kind, text, dim, group, lengths):
    recipe, shape, rng = paged_recipe(text, dim), AttentionShape(3, 2 * group, 2, dim), np.random.default_rng(dim)
    cache = open_cuda(kind).cache(shape, max(lengths) + 80, "bf16", recipe)
    twin = ReferenceCache(shape, max(lengths) + 80, "bf16", Recipe("bf16", "bf16", sinks=0, window=1 << 20))
    tokens = random_tokens(rng, shape, max(lengths)) * np.exp(rng.normal(0, 0.5, (1, 1, 1, max(lengths), 1))).astype(np.float32)
    for each in (cache, twin):
        each.prefill(*tokens, np.array(lengths))
    oracle, before = Oracle(cache), {}
    for step in range(-1, 72):
        queries = rng.standard_normal((3, 2 * group, dim), dtype=np.float32)
        if step < 8 or step % 31 < 4:
            check_decode(cache, oracle, queries, 4e-3)
        else:
            cache.decode(queries)
        for row, head in itertools.product(range(3), range(2)):
            pages = cache.pages_read(row, head)
            cold = regions(int(cache.lengths[row]), recipe.sinks, recipe.window).cold // PAGE_TOKENS
            if recipe.steps_since_refresh(step) == 0:
                assert_best(cache, twin, queries, row, head)
                before[row, head] = pages, cold
            else:
                listed, at_anchor = before[row, head]
                np.testing.assert_array_equal(pages, np.r_[listed, at_anchor:cold])
        token = rng.standard_normal((2, 3, 2, dim), dtype=np.float32)
        for each in (cache, twin):
            each.append(*token)


def test_many_pages_are_selected_from(open_cuda):
    recipe, shape, rng = Recipe.parse("int4,pages=1/16"), AttentionShape(1, 8, 2, 64), np.random.default_rng(3)
    cache = open_cuda().cache(shape, 600_000, "bf16", recipe)
    cache.fill_random(np.array([599_990]), seed=5)
    queries = rng.standard_normal((1, 8, 64), dtype=np.float32)
    check_decode(cache, Oracle(cache), queries, 4e-3)
    first = cache.pages_read(0, 1)
    assert len(first) == regions(599_990, recipe.sinks, recipe.window).cold // PAGE_TOKENS // 16
    stored = cache.stored(0, 1).cold_keys.reshape(-1, PAGE_TOKENS, 64)
    low, high = stored.min(axis=1), stored.max(axis=1)
    scores = score_pages(page_bounds(queries[0, 4:], (high - low) / 15, low))
    # Codes need not reach both ends of their range: the order is that of the scales up to a little.
    assert np.isin(np.argsort(-scores)[: len(first)], first).mean() > 0.9


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("text", ["dense", "int8", "bf16,stride=2", "bf16,reuse,anchor_every=2"])
@pytest.mark.parametrize("shape", [AttentionShape(1, 4, 1, 128), AttentionShape(2, 64, 64, 64), AttentionShape(5, 320, 80, 64)])
def test_long_contexts_are_split_among_blocks(open_cuda, kind, text, shape):
    recipe, rng = Recipe.parse(text), np.random.default_rng(3)
    longest = 20000 if shape.kv_heads == 1 else 1500
    cache = open_kernel(open_cuda, kind).cache(shape, longest + 8, "bf16", recipe)
    lengths = np.array([longest - 613 * i % longest // 2 for i in range(shape.batch)])
    cache.fill_random(lengths, seed=11)
    oracle = Oracle(cache)
    for _ in range(2):
        queries = rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
        check_decode(cache, oracle, queries, 4e-3)
        cache.append(*rng.standard_normal((2, shape.batch, shape.kv_heads, shape.head_dim), dtype=np.float32))


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("text", ["int4", "k=int8,v=int4", "k=int4,v=int8", "int4,pages=1", "fp8"])
@pytest.mark.parametrize(("dim", "group"), [(64, 4), (128, 16)])
def test_sums_over_a_thousand_pages_keep_what_is_small_beside_them(open_cuda, monkeypatch, text, dim, group, fixed):
    """One block alone goes through a whole context of values that cancel: sums of codes are hundreds of times the output."""
    monkeypatch.setattr(cache_module, "fixed_blocks", lambda heads, _: heads * fixed)
    recipe, shape, tokens = Recipe.parse(text), AttentionShape(1, group, 1, dim), 1 << 18
    cache = open_cuda("pages").cache(shape, tokens, "bf16", recipe)
    cache.blocks = 1
    cache._choose()
    variant, blocks = cache._decoding
    assert blocks == 1 and variant.uses_split_kv_buffer == fixed and tokens // PAGE_TOKENS // variant["WARPS"] >= 1000
    cache.fill_random(np.array([tokens]), seed=3)
    queries = np.random.default_rng(3).standard_normal((1, group, dim), dtype=np.float32)
    check_decode(cache, Oracle(cache), queries, 4e-3)


@pytest.mark.parametrize("text", ["dense", "int8", "bf16,stride=2", "int8,sinks=0,window=0"])
@pytest.mark.parametrize("splits", [2, 4, 8, 16])
def test_lengths_around_the_ends_of_units_and_rounds(open_cuda, text, splits):
    recipe, rng, shape = Recipe.parse(text), np.random.default_rng(12), AttentionShape(1, 6, 2, 64)
    unit = 32 if recipe.key_format == "int8" else 16
    round_tokens = splits * 8 * unit
    cache = open_cuda("mma", SPLITS=splits).cache(shape, 2 * round_tokens + 300, "bf16", recipe)
    keys, values = random_tokens(rng, shape, cache.capacity)
    around = {
        n + d for n in (1, unit, splits * unit, round_tokens, 2 * round_tokens, 2 * round_tokens + 298) for d in (-1, 0, 1)
    }
    for length in sorted(around | {cache.capacity} - {0}):
        cache.prefill(keys, values, np.array([max(length, 1)]))
        queries = rng.standard_normal((1, 6, 64), dtype=np.float32)
        check_decode(cache, Oracle(cache), queries, 4e-3)


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("text", ["dense", "int8", "bf16,stride=2", "bf16,sinks=3,window=40"])
def test_what_lies_behind_the_last_token_does_not_count(open_cuda, kind, text):
    shape, rng = AttentionShape(1, 4, 2, 128), np.random.default_rng(13)
    cache = open_kernel(open_cuda, kind).cache(shape, 900, "bf16", Recipe.parse(text))
    keys, values = random_tokens(rng, shape, 900)
    for length in (7, 130, 333, 700):
        cache.prefill(np.full_like(keys, np.nan), np.full_like(values, np.nan), np.array([900]))
        cache.prefill(keys, values, np.array([length]))
        check_decode(cache, Oracle(cache), rng.standard_normal((1, 4, 128), dtype=np.float32), 4e-3)


@pytest.mark.parametrize("text", ["int4,window=40", "k=bf16,v=fp8", "bf16,sinks=0,window=0"])
@pytest.mark.parametrize(("dim", "group"), [(128, 4), (128, 16), (256, 4)])
def test_what_lies_in_unused_rows_of_the_ring_does_not_count(open_cuda, text, dim, group):
    shape, rng = AttentionShape(1, 2 * group, 2, dim), np.random.default_rng(13)
    cache = open_cuda("pages").cache(shape, 900, "bf16", Recipe.parse(text))
    keys, values = random_tokens(rng, shape, 900)
    for length in (7, 130, 333, 700):
        cache.prefill(np.full_like(keys, np.nan), np.full_like(values, np.nan), np.array([900]))
        cache.prefill(keys, values, np.array([length]))
        check_decode(cache, Oracle(cache), rng.standard_normal((1, 2 * group, dim), dtype=np.float32), 4e-3)


def test_a_capacity_without_cold_pages_selects_none_and_harms_nothing(open_cuda):
    shape, rng = AttentionShape(32, 16, 8, 64), np.random.default_rng(14)
    cache = open_cuda().cache(shape, 100, "bf16", Recipe.parse("int4,pages=1/4"))
    cache.prefill(*random_tokens(rng, shape, 90), np.full(32, 90))
    queries = rng.standard_normal((32, 16, 64), dtype=np.float32)
    for _ in range(3):
        check_decode(cache, Oracle(cache), queries, 4e-3)
        assert all(len(cache.pages_read(row, head)) == 0 for row in (0, 31) for head in (0, 7))
        cache.append(*rng.standard_normal((2, 32, 8, 64), dtype=np.float32))


@pytest.mark.parametrize("text", ["int8", "bf16,reuse,anchor_every=2", "int4,pages=1/2,anchor_every=2"])
def test_a_new_cache_is_empty_and_marked(open_cuda, text):
    shape, rng = AttentionShape(1, 4, 2, 64), np.random.default_rng(15)
    cache = open_cuda().cache(shape, 300, "bf16", Recipe.parse(text))
    for _ in range(2):
        assert cache.step == -1 and cache.lengths.tolist() == [0]
        oracle = Oracle(cache)
        for _ in range(5):
            cache.append(*rng.standard_normal((2, 1, 2, 64), dtype=np.float32))
            check_decode(cache, oracle, rng.standard_normal((1, 4, 64), dtype=np.float32), 4e-3)
        cache.rewind()


@pytest.mark.parametrize("text", ["bf16,reuse,anchor_every=4", "int4,pages=1/4,anchor_every=4"])
def test_an_anchor_that_was_not_decoded_is_not_reused(open_cuda, text):
    shape, rng = AttentionShape(1, 4, 2, 64), np.random.default_rng(16)
    cache = open_cuda().cache(shape, 1200, "bf16", Recipe.parse(text))
    tokens, queries = random_tokens(rng, shape, 1000), rng.standard_normal((1, 4, 64), dtype=np.float32)
    for length in (1000, 500):
        cache.prefill(*tokens, np.array([length]))
        cache.decode(queries)
        for _ in range(2):
            cache.append(*rng.standard_normal((2, 1, 2, 64), dtype=np.float32))
        with pytest.raises(RuntimeError, match="anchor 0, which was not decoded"):
            cache.decode(queries)


def test_arrays_of_another_shape_are_refused(open_cuda):
    cache = open_cuda().cache(AttentionShape(1, 4, 2, 64), 100, "bf16", DENSE)
    with pytest.raises(ValueError, match="queries of shape"):
        cache.decode(np.zeros((1, 5, 64), np.float32))
    with pytest.raises(ValueError, match="values of shape"):
        cache.append(np.zeros((1, 2, 64), np.float32), np.zeros((2, 2, 64), np.float32))


def test_short_contexts_are_split_as_planned(open_cuda):
    backend = open_cuda()
    units = [backend.cache(AttentionShape(1, 2, 2, 64), n, "bf16", DENSE).variant.splits for n in (100, 1 << 18)]
    assert units[1] == 0
    if int(backend.device.sm.replace(".", "")) >= 80:
        assert units[0] == 8


@pytest.mark.parametrize("text", ["dense", "int8", "bf16,stride=2"])
def test_kernels_of_older_parts_run_here(open_cuda, text):
    shape, rng, recipe = AttentionShape(2, 8, 2, 128), np.random.default_rng(5), Recipe.parse(text)
    cache = open_cuda("simt", OLD_PART=1).cache(shape, 600, "fp16", recipe)
    cache.prefill(*random_tokens(rng, shape, 555), np.array([555, 320]))
    queries = rng.standard_normal((2, 8, 128), dtype=np.float32)
    check_decode(cache, Oracle(cache), queries, 4e-3)


def test_scores_far_apart_and_tiny_values_keep_their_precision(open_cuda):
    shape, rng = AttentionShape(1, 8, 2, 128), np.random.default_rng(9)
    keys, values = random_tokens(rng, shape, 700)
    keys[..., 5] *= 30
    values *= np.exp(rng.uniform(-9, 3, (1, 2, 700, 1))).astype(np.float32)
    for kind, text in itertools.product(KERNELS, ("dense", "int8")):
        cache = open_kernel(open_cuda, kind).cache(shape, 700, "bf16", Recipe.parse(text))
        cache.prefill(keys, values, np.array([700]))
        queries = rng.standard_normal((1, 8, 128), dtype=np.float32) * 3
        check_decode(cache, Oracle(cache), queries, 4e-3)


@pytest.mark.parametrize(("text", "dim"), [*((t, 80) for t in RECIPES), *((t, d) for t in PAGED for d in (80, 128))])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_storage_is_bit_equal_to_the_reference(open_cuda, text, dim, dtype):
    recipe, shape, rng = paged_recipe(text, dim), AttentionShape(2, 2, 2, dim), np.random.default_rng(1)
    lengths = np.array([300, 161])
    ours, reference = (make(shape, 420, dtype, recipe) for make in (open_cuda().cache, ReferenceCache))
    keys, values = random_tokens(rng, shape, 300)
    for cache in (ours, reference):
        cache.prefill(keys, values, lengths)
    for step in range(70):
        if step % 23 == 0 or step in (1, 69):
            for row, head in itertools.product(range(2), range(2)):
                a, b = ours.stored(row, head), reference.stored(row, head)
                for name in ("cold_keys", "cold_values", "exact_keys", "exact_values"):
                    np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=f"{name}, step {step}")
        token = rng.standard_normal((2, 2, 2, dim), dtype=np.float32)
        for cache in (ours, reference):
            cache.append(*token)
    assert ours.step == reference.step == 69
    np.testing.assert_array_equal(ours.lengths, reference.lengths)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("dense", "fp32"),
        ("int8", "bf16"),
        ("bf16,reuse,anchor_every=3", "bf16"),
        ("int4,window=20", "bf16"),
        ("int4,pages=1,anchor_every=2,window=20", "fp16"),
    ],
)
def test_a_cycle_is_the_loop_of_append_and_decode(open_cuda, text, dtype, graph):
    shape, recipe, rng, backend = AttentionShape(2, 6, 2, 64), Recipe.parse(text), np.random.default_rng(2), open_cuda()
    feedback = Feedback.seeded(64, 5, 1.0, 1.0, 1.0)
    tokens = random_tokens(rng, shape, 200)
    first = rng.standard_normal((2, 6, 64), dtype=np.float32)
    ours = [backend.cache(shape, 260, dtype, recipe) for _ in range(2)]
    twins = [ReferenceCache(shape, 260, dtype, recipe) for _ in range(2)]
    for cache in (*ours, *twins):
        cache.prefill(*tokens, np.array([200, 150]))
    program = backend.cycle(ours, first, feedback, graph)
    assert program.captured == graph
    per_layer = 3 if recipe.selection == "pages" else 2
    assert program.kernels_per_step == per_layer and program.nodes == (2 * per_layer if graph else None)
    limit = 1e-4 if dtype == "fp32" else 3e-2
    outputs = first
    for launch in range(12):
        times = program.run(1)
        assert len(times) == 1 and times[0] > 0
        for i, cache in enumerate(twins):
            queries, keys, values = feedback(outputs.astype(np.float32), shape.group)
            cache.append(keys, values)
            outputs, _ = cache.decode(queries)
            error = relative_l2(program.outputs()[i], outputs).max()
            assert error < limit, f"launch {launch}, layer {i}: {error:.1e}"
    before = program.outputs()
    program.reset()
    assert ours[0].step == -1
    program.run(12)
    for a, b in zip(before, program.outputs(), strict=True):
        np.testing.assert_array_equal(a, b)


TOGETHER = (  # shapes whose KV heads have equally many blocks: on 132 multiprocessors 16, 16, 4, 8, 2, 6, 1
    AttentionShape(1, 32, 8, 128),
    AttentionShape(2, 12, 4, 64),
    AttentionShape(1, 32, 32, 128),
    AttentionShape(2, 16, 8, 256),
    AttentionShape(8, 64, 8, 80),
    AttentionShape(3, 14, 7, 96),
    AttentionShape(3, 80, 40, 64),
)


@pytest.mark.parametrize("shape", TOGETHER)
@pytest.mark.parametrize("text", ["int4", "k=int8,v=int4,vgroup=V", "int4,pages=1/4,anchor_every=3", "bf16,sinks=0,window=0"])
def test_blocks_of_a_head_add_up_what_they_have(open_cuda, text, shape):
    recipe, rng = paged_recipe(text, shape.head_dim), np.random.default_rng(shape.query_heads)
    cache = open_cuda("pages").cache(shape, 1200, "bf16", recipe)
    variant, blocks = cache._decoding
    assert variant.uses_split_kv_buffer and blocks % (shape.batch * shape.kv_heads) == 0
    cache.prefill(*random_tokens(rng, shape, 1090), np.full(shape.batch, 1090))
    oracle = Oracle(cache)
    for step in range(40):
        cache.append(*rng.standard_normal((2, shape.batch, shape.kv_heads, shape.head_dim), dtype=np.float32))
        queries = rng.standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
        if step % 8 < 2 or step > 36:
            check_decode(cache, oracle, queries, 4e-3)
            first = cache.decode(queries)
            np.testing.assert_array_equal(first[0], cache.decode(queries)[0])
        else:
            cache.decode(queries)


@pytest.mark.parametrize("shape", [AttentionShape(1, 32, 8, 128), AttentionShape(2, 32, 32, 64), AttentionShape(1, 6, 3, 80)])
@pytest.mark.parametrize(
    "text",
    [
        "int4,pages=1/4,anchor_every=4",
        "int4,pages=1/8,window=1",
        "int4,pages=1/3,anchor_every=33,sinks=0,window=0",
        "fp8,window=40",
        "int8",
        "int8,stride=2",
        "k=int8,v=int4,sinks=0,window=0",
        "bf16,reuse,anchor_every=5",
        "dense",
    ],
)
@pytest.mark.parametrize("layers", [1, 3])
def test_what_is_loaded_before_the_kernel_before_has_ended_changes_nothing(open_cuda, monkeypatch, text, shape, layers):
    """Kernels that overlap, against the same kernels one after the other: equal to the bit, token by token."""
    recipe, backend = Recipe.parse(text), open_cuda()
    feedback = Feedback.seeded(shape.head_dim, 5, 1.0, 1.0, 1.0)
    first = np.random.default_rng(2).standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)
    seen = []
    for overlapping in (device_module.OVERLAPPING, frozenset()):
        monkeypatch.setattr(device_module, "OVERLAPPING", overlapping)
        offsets = [i * recipe.anchor_every // layers for i in range(layers)]
        caches = [backend.cache(shape, 3000, "bf16", recipe, anchor_offset) for anchor_offset in offsets]
        for i, cache in enumerate(caches):
            cache.fill_random(np.full(shape.batch, 2900), seed=i)
        program = backend.cycle(caches, first, feedback, True)
        outputs = []
        for token in range(72):
            program.run(1)
            outputs.append(np.stack(program.outputs()))
            if token == 40:
                program.reset()
        pages = [cache.pages_read(0, 0) for cache in caches]
        seen.append((np.stack(outputs), pages))
    assert np.isfinite(seen[0][0]).all()
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    for a, b in zip(seen[0][1], seen[1][1], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["auto", "simt"])
@pytest.mark.parametrize("appends", [0, 1, 3, 4, 6])
def test_a_cycle_finds_its_anchors_whatever_came_before(open_cuda, kind, appends):
    """Tokens appended, and not all decoded, before a program: what its kernels expect must still be so."""
    recipe, shape, backend = Recipe.parse("int4,pages=1/4,anchor_every=4"), AttentionShape(1, 8, 2, 64), open_cuda(kind)
    rng, feedback = np.random.default_rng(appends), Feedback.seeded(64, 5, 1.0, 1.0, 1.0)
    ours = [backend.cache(shape, 900, "bf16", recipe, anchor_offset) for anchor_offset in (0, 2)]
    twins = [ReferenceCache(shape, 900, "bf16", recipe, anchor_offset) for anchor_offset in (0, 2)]
    prompt = random_tokens(rng, shape, 800)
    for each in (*ours, *twins):
        each.prefill(*prompt, np.array([800]))
    for _ in range(appends):
        token, queries = rng.standard_normal((2, 1, 2, 64), dtype=np.float32), rng.standard_normal((1, 8, 64), dtype=np.float32)
        for each in (*ours, *twins):
            each.append(*token)
            each.decode(queries)
            each.decode(queries)
    first = rng.standard_normal((1, 8, 64), dtype=np.float32)
    program, outputs = backend.cycle(ours, first, feedback, True), first
    for _ in range(9):
        program.run(1)
        for cache, twin in zip(ours, twins, strict=True):
            queries, keys, values = feedback(outputs.astype(np.float32), shape.group)
            twin.append(keys, values)
            outputs, _ = twin.decode(queries)
            assert twin.step == cache.step
            assert np.isin(cache.pages_read(0, 1), twin.pages_read(0, 1)).mean() > 0.8


@pytest.mark.parametrize("text", ["int4,pages=1/4,anchor_every=4", "bf16,reuse,anchor_every=5"])
def test_an_offset_moves_the_anchors(open_cuda, text):
    recipe, shape, rng = Recipe.parse(text), AttentionShape(2, 8, 2, 64), np.random.default_rng(6)
    for anchor_offset in range(recipe.anchor_every):
        cache, twin = (
            open_cuda().cache(shape, 800, "fp16", recipe, anchor_offset),
            ReferenceCache(shape, 800, "fp16", recipe, anchor_offset),
        )
        tokens = random_tokens(rng, shape, 700)
        for each in (cache, twin):
            each.prefill(*tokens, np.array([700, 640]))
        oracle = Oracle(cache)
        for _ in range(2 * recipe.anchor_every + 2):
            token = rng.standard_normal((2, 2, 2, 64), dtype=np.float32)
            for each in (cache, twin):
                each.append(*token)
            queries = rng.standard_normal((2, 8, 64), dtype=np.float32)
            check_decode(cache, oracle, queries, 4e-3)
            twin.decode(queries)
            if recipe.selection == "pages":
                for row, head in itertools.product(range(2), range(2)):
                    np.testing.assert_array_equal(cache.pages_read(row, head), twin.pages_read(row, head))
    with pytest.raises(ValueError, match="anchor_offset"):
        open_cuda().cache(shape, 800, "fp16", recipe, recipe.anchor_every)


def test_a_program_repeats_to_the_bit_and_a_graph_changes_nothing(open_cuda):
    backend, shape, rng = open_cuda(), AttentionShape(3, 8, 2, 128), np.random.default_rng(4)
    caches = [backend.cache(shape, 3000, "bf16", Recipe.parse("int8")) for _ in range(2)]
    for i, cache in enumerate(caches):
        cache.fill_random(np.array([2999, 17, 1600]), seed=i)
    queries = [rng.standard_normal((3, 8, 128), dtype=np.float32) for _ in caches]
    captured = backend.attention(caches, queries, 4, True)
    plain = backend.attention(caches, queries, 4, False)
    assert captured.nodes == 4 and plain.nodes is None and captured.kernels_per_step == 1
    assert len(captured.run(30)) == 30
    first = captured.outputs()
    for _ in range(20):
        captured.run(3)
        plain.run(1)
        for a, b, c in zip(first, captured.outputs(), plain.outputs(), strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize(
    "text", ["dense", "int8,window=40", "bf16,reuse,anchor_every=4,window=10", "int4,pages=1/3,anchor_every=5"]
)
def test_rewind_returns_to_the_mark(open_cuda, text):
    shape, rng = AttentionShape(2, 4, 2, 64), np.random.default_rng(6)
    cache = open_cuda().cache(shape, 500, "bf16", Recipe.parse(text))
    cache.prefill(*random_tokens(rng, shape, 210), np.array([210, 130]))
    queries = rng.standard_normal((2, 4, 64), dtype=np.float32)
    tokens = rng.standard_normal((120, 2, 2, 2, 64), dtype=np.float32)

    def advance(n):
        results = []
        for token in tokens[:n]:
            cache.append(*token)
            results.append(cache.decode(queries)[0])
        return results

    cache.decode(queries)
    advance(3)
    cache.mark()
    first = advance(120)
    cache.rewind()
    assert cache.step == 2
    for a, b in zip(first, advance(120), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_fill_is_normal_and_seeded(open_cuda):
    shape = AttentionShape(2, 2, 2, 112)
    rows = []
    for seed in (1, 1, 2):
        cache = open_cuda().cache(shape, 4000, "bf16", DENSE)
        cache.fill_random(np.array([4000, 3000]), seed)
        rows.append(np.stack([cache.stored(0, h).exact_keys for h in range(2)] + [cache.stored(0, 1).exact_values]))
        assert cache.stored(1, 0).exact_keys.shape == (3000, 112)
    np.testing.assert_array_equal(rows[0], rows[1])
    assert (rows[0] != rows[2]).mean() > 0.9
    # Standard errors over 4000 x 112 numbers: 0.0015 of the mean, 0.001 of the deviation.
    assert np.abs(rows[0].mean(axis=(1, 2))).max() < 0.01 and np.abs(rows[0].std(axis=(1, 2)) - 1).max() < 0.01
    assert np.abs(np.corrcoef(rows[0].reshape(3, -1))[np.triu_indices(3, 1)]).max() < 0.01


def test_a_value_that_is_not_finite_is_named(open_cuda):
    shape, rng = AttentionShape(2, 2, 2, 64), np.random.default_rng(8)
    cache = open_cuda().cache(shape, 300, "fp16", Recipe.parse("int8"))
    keys, values = random_tokens(rng, shape, 250)
    cache.prefill(keys, values, np.array([250, 250]))
    cache.raise_non_finite()
    token = rng.standard_normal((2, 2, 2, 64), dtype=np.float32)
    token[1, 1, 0, 7] = 1e9  # beyond fp16
    cache.append(*token)
    with pytest.raises(NonFiniteError, match="sequence 1, KV head 0, position 250"):
        cache.raise_non_finite()
    cache.prefill(keys, values, np.array([250, 250]))
    cache.raise_non_finite()


def test_a_full_cache_and_one_too_large_are_refused(open_cuda, monkeypatch):
    backend, shape = open_cuda(), AttentionShape(1, 2, 1, 64)
    cache = backend.cache(shape, 10, "bf16", DENSE)
    cache.fill_random(np.array([10]), 0)
    with pytest.raises(UsageError, match="full"):
        cache.append(*np.zeros((2, 1, 1, 64), np.float32))
    huge = AttentionShape(64, 64, 64, 256)
    allocate = "elastickv.backends.cuda.device.DriverAllocator.allocate"
    monkeypatch.setattr(allocate, lambda *_: pytest.fail("allocated before refusing"))
    with pytest.raises(UsageError, match=r"needs \d+ bytes.*a context of \d+ tokens fits"):
        backend.cache(huge, 1 << 20, "bf16", DENSE)
    assert backend.cache_bytes(huge, 1 << 20, "bf16", DENSE) > 2 * 64 * 64 * 256 * 2 * (1 << 20)


def test_the_device_describes_itself(open_cuda):
    info = open_cuda().device
    assert info.kind == "cuda" and info.sm and info.compute_units > 0 and info.last_level_cache_bytes > 0
    assert info.theoretical_bw_gbs is None or 50 < info.theoretical_bw_gbs < 50000


def test_no_limit_exceeds_the_theoretical_bandwidth(open_cuda):
    limits, info = open_cuda().ceilings(), open_cuda().device
    assert limits.read_gbs > 0 and limits.copy_gbs > 0 and limits.flops > 1e11
    if info.theoretical_bw_gbs:
        assert limits.read_gbs < info.theoretical_bw_gbs and limits.copy_gbs < info.theoretical_bw_gbs


@pytest.mark.gpu
def test_blocks_that_serve_several_heads_each(open_cuda):
    backend = open_cuda()
    heads = backend.device.compute_units + 3
    shape = AttentionShape(1, 2 * heads, heads, 128)
    cache = backend.cache(shape, 700, "bf16", Recipe.parse("int8"))
    cache.fill_random(np.array([700]), 1)
    queries = np.random.default_rng(2).standard_normal((1, shape.query_heads, 128), dtype=np.float32)
    output, _ = cache.decode(queries)
    oracle = Oracle(cache)
    for head in (0, 1, heads // 2, heads - 1):
        expected = oracle.decode_head(0, head, queries[0, 2 * head : 2 * head + 2]).output
        assert relative_l2(output[0, 2 * head : 2 * head + 2], expected).max() < 4e-3


def test_an_int4_key_beyond_the_largest_half_is_named(open_cuda):
    shape, rng = AttentionShape(1, 2, 2, 64), np.random.default_rng(8)
    cache = open_cuda().cache(shape, 400, "bf16", Recipe.parse("int4,window=0"))
    keys, values = random_tokens(rng, shape, 250)
    keys[0, 1, 77, 3] = -1e6
    cache.prefill(keys, values, np.array([250]))
    with pytest.raises(NonFiniteError, match=r"KV head 1, position 77.*65504"):
        cache.raise_non_finite()
    keys[0, 1, 77, 3] = 0
    cache.prefill(keys, values, np.array([250]))
    token = rng.standard_normal((2, 1, 2, 64), dtype=np.float32)
    token[0, 0, 0, 1] = 7e4
    cache.append(*token)
    for _ in range(32):
        cache.append(*rng.standard_normal((2, 1, 2, 64), dtype=np.float32))
    with pytest.raises(NonFiniteError, match=r"KV head 0, position 250.*65504"):
        cache.raise_non_finite()
