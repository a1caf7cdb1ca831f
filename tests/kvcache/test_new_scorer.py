"""A page scorer is one function and one line in `SCORERS`: the reference and the CPU rank pages by it."""

import numpy as np
import pytest

from elastickv.backends.cpu import open_backend
from elastickv.backends.cuda.kernel_selection import decode_variant
from elastickv.errors import UsageError
from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.kvcache.quantize import quantize_int4_keys
from elastickv.kvcache.scorers import SCORERS, Scorer, scorer_of
from elastickv.kvcache.scorers.bounds import page_bounds, score_pages
from elastickv.recipe import AttentionShape, Recipe
from elastickv.recipe.regions import PAGE_TOKENS

HALF_RANGE = np.float32(7.5)
SHAPE = AttentionShape(2, 6, 2, 64)
LENGTHS = np.array([700, 421])


def mean_key_weights(queries):
    total = np.float32(0)
    for query in queries:
        total = total + query
    return total, HALF_RANGE * total


@pytest.fixture
def midpoint(monkeypatch):
    scorer = Scorer("midpoint", mean_key_weights)
    monkeypatch.setitem(SCORERS, "midpoint", scorer)
    return scorer


def tokens(seed=0):
    return np.random.default_rng(seed).standard_normal((2, 2, SHAPE.kv_heads, 700, SHAPE.head_dim), dtype=np.float32)


def pages_read(cache):
    return [list(cache.pages_read(row, head)) for row in range(SHAPE.batch) for head in range(SHAPE.kv_heads)]


def test_it_ranks_by_what_its_function_says(midpoint):
    rng = np.random.default_rng(1)
    q, scales, zeros = rng.standard_normal((3, 16)), rng.random((9, 16)), rng.standard_normal((9, 16))
    np.testing.assert_allclose(midpoint.score(q, scales, zeros), (zeros + 7.5 * scales) @ q.sum(axis=0))


def test_bounds_scores_pages_as_its_upper_bounds_do():
    rng = np.random.default_rng(1)
    q, scales, zeros = rng.standard_normal((3, 16)), rng.random((9, 16)), rng.standard_normal((9, 16))
    bounds = score_pages(page_bounds(q, scales, zeros))
    np.testing.assert_allclose(SCORERS["bounds"].score(q, scales, zeros), bounds * np.sqrt(16))


def test_the_reference_and_the_cpu_read_the_pages_that_it_ranks_first(midpoint):
    recipe = Recipe.parse("int4,pages=1/4,scorer=midpoint")
    keys, values = tokens()
    queries = np.random.default_rng(2).standard_normal((2, 6, 64), dtype=np.float32)
    reference, cpu = ReferenceCache(SHAPE, 800, "bf16", recipe), open_backend(None).cache(SHAPE, 800, "bf16", recipe)
    outputs = []
    for cache in (reference, cpu):
        cache.prefill(keys, values, LENGTHS)
        outputs.append(cache.decode(queries)[0])
    assert pages_read(reference) == pages_read(cpu)
    np.testing.assert_allclose(outputs[1], outputs[0], atol=2e-3)
    np.testing.assert_allclose(outputs[1], Oracle(cpu).decode(queries)[0], atol=2e-3)
    cold = keys[0, 0, 4 : 4 + 17 * PAGE_TOKENS].reshape(-1, PAGE_TOKENS, 64)
    _, scales, zeros = quantize_int4_keys(reference._keys[0, 0, 4 : 4 + 17 * PAGE_TOKENS].reshape(cold.shape))
    best = np.sort(np.argsort(-midpoint.score(queries[0, :3], scales, zeros), kind="stable")[:4])
    assert pages_read(reference)[0] == best.tolist()


def test_another_scorer_reads_other_pages(midpoint):
    keys, values = tokens()
    queries = np.random.default_rng(2).standard_normal((2, 6, 64), dtype=np.float32)
    read = []
    for text in ("int4,pages=1/4", "int4,pages=1/4,scorer=midpoint"):
        cache = open_backend(None).cache(SHAPE, 800, "bf16", Recipe.parse(text))
        cache.prefill(keys, values, LENGTHS)
        cache.decode(queries)
        read.append(pages_read(cache))
    assert read[0] != read[1]


def test_the_default_scorer_is_in_no_text_and_no_hash():
    plain, named = Recipe.parse("int4,pages=1/4"), Recipe.parse("int4,pages=1/4,scorer=bounds")
    assert plain == named and str(named) == "int4,pages=1/4"
    other = Recipe.parse("int4,pages=1/4,anchor_every=2,scorer=midpoint")
    assert str(other) == "int4,pages=1/4,anchor_every=2,scorer=midpoint" and Recipe.parse(str(other)) == other
    assert other.hash != Recipe.parse("int4,pages=1/4,anchor_every=2").hash


@pytest.mark.parametrize("text", ["int4,scorer=midpoint", "int8,reuse,anchor_every=4,scorer=midpoint"])
def test_only_a_selection_of_pages_takes_one(text):
    with pytest.raises(UsageError, match=r"scorer=midpoint does not combine with .* only with 'pages'"):
        Recipe.parse(text)


@pytest.mark.parametrize("name", ["", "Mean", "a b", "1st", "x" * 65])
def test_what_is_no_name_is_refused_where_it_is_read(name):
    with pytest.raises(UsageError, match=r"is no name of a page scorer: write scorer=bounds$"):
        Recipe.parse(f"int4,pages=1/4,scorer={name}")


def test_an_unknown_one_is_refused_with_those_that_there_are(midpoint):
    recipe = Recipe.parse("int4,pages=1/4,scorer=best")
    for make in (ReferenceCache, open_backend(None).cache):
        with pytest.raises(UsageError, match=r"^scorer 'best' is unknown: page scorers are bounds, midpoint$"):
            make(SHAPE, 800, "bf16", recipe)
    assert scorer_of(Recipe.parse("int4,pages=1/4,scorer=midpoint")) is midpoint


def test_cuda_refuses_one_without_a_device_function(midpoint):
    recipe = Recipe.parse("int4,pages=1/4,scorer=midpoint")
    with pytest.raises(UsageError, match=r"^page scorer midpoint has no CUDA kernel: choose bounds, or the cpu backend$"):
        decode_variant(128, 4, "bf16", recipe, "90")
    built = decode_variant(128, 4, "bf16", Recipe.parse("int4,pages=1/4"), "90")
    assert built.selecting()["SCORER"] == SCORERS["bounds"].cuda_id


def test_two_functions_of_one_factory_and_name_are_compiled_apart(monkeypatch):
    def make(factor):
        def weights(queries):
            total = np.float32(0)
            for query in queries:
                total = total + query
            return total * np.float32(0), total * factor

        return weights

    keys, values = tokens()
    queries = np.random.default_rng(2).standard_normal((2, 6, 64), dtype=np.float32)
    read = []
    for factor in (np.float32(1), np.float32(-1)):
        monkeypatch.setitem(SCORERS, "signed", Scorer("signed", make(factor)))
        cache = open_backend(None).cache(SHAPE, 800, "bf16", Recipe.parse("int4,pages=1/4,scorer=signed"))
        cache.prefill(keys, values, LENGTHS)
        cache.decode(queries)
        read.append(pages_read(cache))
    assert read[0] != read[1]
