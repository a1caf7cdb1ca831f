"""Tokens gathered from the blocks of a serving engine, and tokens that cannot be stored there; needs a GPU."""

import itertools
import math

import numpy as np
import pytest

from elastickv.backends.bad_token import NO_BAD_TOKEN, BadToken
from elastickv.backends.cuda import block_launch
from elastickv.backends.cuda.builds import recipe_for
from elastickv.recipe import Recipe
from tests.backends.cuda.block_engine import Engine

FORMATS_OF_PAGES = (
    *itertools.product(("int4", "int8", "fp8", "k=int8,v=int4", "int4,vgroup=V"), ("bf16", "fp16")),
    ("k=bf16,v=int4", "bf16"),
)
ALL_FROM_PAGES = (1 << 31) - 1


@pytest.fixture
def engine(open_cuda):
    pytest.importorskip("torch")
    return Engine


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("text", "dtype"), FORMATS_OF_PAGES)
def test_gathered_tokens_are_those_of_pages_and_exactly_those_of_the_window(engine, text, head_dim, dtype):
    lengths = [1, 200, 333, 161, 40]
    of = engine(lengths, recipe_for(text, head_dim), head_dim, 2, 4, dtype=dtype)
    of.store([0] * 5, lengths)
    # Of requests 1 to 4: a part of each, a part that ends in a page, the window alone, and nothing.
    first, count, exact = [70, 3, 101, 0], [130, 150, 60, 0], [72, 1 << 30, 0, 0]
    gathered = of.gather(1, first, count, exact)
    for value, (read, rows) in enumerate(zip(gathered, (of.keys, of.values), strict=True)):
        row = 0
        for request, (n, m, e) in enumerate(zip(first, count, exact, strict=True), 1):
            expected = of.numbers(request, min(max(n, e), n + m), value)[n : n + m]
            part = read[row : row + m].double().cpu().numpy()
            np.testing.assert_allclose(part, expected[: len(part)], rtol=4e-3 if dtype == "bf16" else 1e-3, atol=1e-6)
            stored = rows[request][max(n, e) : n + m]
            assert of.torch.equal(read[row + m - len(stored) : row + m], stored)
            row += m


@pytest.mark.gpu
@pytest.mark.parametrize("window_block", [1, 32])
def test_a_grid_smaller_than_the_work_gathers_all(engine, monkeypatch, window_block):
    monkeypatch.setattr(block_launch, "_GATHER_BLOCKS", 1)
    of = engine([5000, 64], Recipe.parse("int4"), 128, 2, 4, window_block=window_block)
    of.store([0, 0], [5000, 64])
    for value, read in enumerate(of.gather(0, [0, 32], [4992, 32], [4900, ALL_FROM_PAGES])):
        expected = np.concatenate([of.numbers(0, 4900, value)[:4992], of.numbers(1, 64, value)[32:]])
        np.testing.assert_allclose(read.double().cpu().numpy(), expected, rtol=4e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("position", [3, 299])  # its window block is null; in a page that is not complete
@pytest.mark.parametrize(
    ("text", "value", "number", "too_large"),
    [
        ("int4", False, math.nan, False),
        ("int4", True, -math.inf, False),
        ("fp8", True, math.nan, False),
        ("int8", False, math.inf, False),
        ("int4", False, -1e6, True),
    ],
)
def test_a_token_that_cannot_be_stored_is_named(engine, text, value, number, too_large, position):
    of = engine([500, 300], Recipe.parse(text), 128, 2, 4)
    (of.values if value else of.keys)[1][position, 1, 37] = number
    of.store([0, 0], [500, 300])
    assert named(of) == {1: BadToken(0, position, too_large)}


@pytest.mark.gpu
def test_a_step_of_one_token_names_it_and_only_it(engine):
    of = engine([500, 300, 65], Recipe.parse("int4"), 128, 2, 4)
    of.store([0] * 3, [499, 299, 64])
    of.keys[1][7] = math.nan  # stored before, as it was
    of.values[2][64, 0, 127] = math.nan
    of.store([499, 299, 64], [500, 300, 65])
    assert named(of) == {2: BadToken(0, 64, False)}


@pytest.mark.gpu
def test_of_each_request_the_first_token_is_named(engine):
    of = engine([500, 300, 80], Recipe.parse("int4"), 128, 2, 4)
    of.keys[0][3, 0, 0] = 1e6
    of.keys[0][4, 0, 0] = of.keys[1][290, 1, 0] = of.values[1][200, 0, 64] = math.nan
    of.store([0] * 3, [500, 300, 80])
    assert named(of) == {0: BadToken(0, 3, True), 1: BadToken(0, 200, False)}


@pytest.mark.gpu
def test_a_later_layer_names_earlier_tokens_only(engine):
    of = engine([80, 300], Recipe.parse("int4"), 128, 2, 4)
    of.keys[0][7, 0, 0] = of.keys[1][9, 0, 0] = math.nan
    of.bad[0], of.bad[1] = BadToken(0, 7, True).word, BadToken(0, 10, False).word
    of.store([0, 0], [80, 300], layer=1)
    assert named(of) == {0: BadToken(0, 7, True), 1: BadToken(1, 9, False)}


@pytest.mark.gpu
@pytest.mark.parametrize(("text", "value"), [("int4", True), ("int8", False), ("fp8", False)])
def test_what_the_format_holds_is_not_reported(engine, text, value):
    of = engine([500, 300], Recipe.parse(text), 128, 2, 4)
    (of.values if value else of.keys)[1][3, 1, 37] = 1e6
    of.store([0, 0], [500, 300])
    assert named(of) == {}


def named(engine):
    """Return the first tokens that an engine could not store, by request."""
    return {request: BadToken.of(word) for request, word in enumerate(engine.bad.tolist()) if word != NO_BAD_TOKEN}
