"""What a cache is called with: kernels take addresses, so what they would read otherwise is refused, and nothing changes."""

import numpy as np
import pytest

from elastickv.recipe import AttentionShape, Recipe
from tests.helpers.cases import Case

CASE = Case(AttentionShape(2, 4, 2, 64), Recipe.parse("int4,pages=1/2,window=32"), "bf16", (300, 200))


def tokens(count, seed=1):
    return np.random.default_rng(seed).standard_normal((2, 2, 2, count, 64), dtype=np.float32)


LAYOUTS = {
    "every other": lambda lengths: np.repeat(lengths, 2)[::2],
    "backwards": lambda lengths: lengths[::-1].copy()[::-1],
    "big-endian": lambda lengths: lengths.astype(">i4"),
    "16 bit": lambda lengths: lengths.astype(np.uint16),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lengths_are_read_as_they_are_however_they_lie(each, layout):
    lay_out = LAYOUTS[layout]
    cache = each.new(CASE, room=100)
    cache.prefill(*tokens(300), lay_out(np.array([300, 200])))
    assert cache.lengths.tolist() == [300, 200]
    cache.extend(*tokens(40), lay_out(np.array([0, 40])))
    cache.crop(lay_out(np.array([290, 240])))
    expected, queries = each.filled(CASE, room=100)
    expected.prefill(*tokens(300), np.array([300, 200]))
    expected.extend(*tokens(40), np.array([0, 40]))
    expected.crop(np.array([290, 240]))
    for got, wanted in zip(cache.decode(queries), expected.decode(queries), strict=True):
        np.testing.assert_array_equal(got, wanted)


WRONG = {
    "lengths of one row": lambda cache: cache.prefill(*tokens(9), np.array([9])),
    "lengths of three rows": lambda cache: cache.prefill(*tokens(9), np.array([9, 9, 9])),
    "negative lengths": lambda cache: cache.prefill(*tokens(9), np.array([9, -1])),
    "lengths that are no whole numbers": lambda cache: cache.prefill(*tokens(9), np.array([9.5, 2])),
    "a random fill of one row": lambda cache: cache.fill_random(np.array([9]), 1),
    "a chunk of one row": lambda cache: cache.extend(*tokens(9), np.array([9])),
    "a negative chunk": lambda cache: cache.extend(*tokens(9), np.array([-5, 9])),
    "values of another length": lambda cache: cache.extend(tokens(9)[0], tokens(1)[1], np.array([1, 1])),
    "a token of one channel": lambda cache: cache.append(np.ones((2, 2, 1), np.float32), np.ones((2, 2, 1), np.float32)),
    "queries of more rows": lambda cache: cache.decode(np.ones((4, 4, 64), np.float32)),
    "a crop of one row": lambda cache: cache.crop(np.array([9])),
    "a crop to a fraction": lambda cache: cache.crop(np.array([9.5, 9])),
    "a row that is not there": lambda cache: cache.gather(np.array([0, 2]), 400),
    "a row from the end": lambda cache: cache.gather(np.array([0, -1]), 400),
    "an order of one row": lambda cache: cache.reorder(np.array([1])),
    "an order of truths": lambda cache: cache.reorder(np.array([True, False])),
    "a token before the first": lambda cache: cache.read(-1, 9),
    "an end before the start": lambda cache: cache.read(9, 8),
    "one share for two heads": lambda cache: cache.set_fractions([0.5]),
    "no share at all": lambda cache: cache.set_fractions([0.0, 0.5]),
    "a share that is not a number": lambda cache: cache.set_fractions([np.nan, 0.5]),
}


@pytest.mark.parametrize("call", WRONG)
def test_what_no_kernel_may_read_is_refused_and_nothing_changes(each, call):
    cache, queries = each.filled(CASE, room=10)
    before = cache.decode(queries)
    with pytest.raises(ValueError, match=r"needed|give"):
        WRONG[call](cache)
    assert (cache.lengths.tolist(), cache.step) == ([300, 200], -1)
    for got, expected in zip(cache.decode(queries), before, strict=True):
        np.testing.assert_array_equal(got, expected)


OVERWRITES = {
    "prefill": lambda cache: cache.prefill(*tokens(300, 5), np.array([300, 200])),
    "fill_random": lambda cache: cache.fill_random(np.array([300, 200]), 5),
    "crop": lambda cache: cache.crop(np.array([50, 60])),
    "reorder": lambda cache: cache.reorder(np.array([1, 0])),
    "set_fractions": lambda cache: cache.set_fractions([0.25, 0.25]),
    "load_state": lambda cache: cache.load_state(cache.state()),
}


@pytest.mark.parametrize("overwrite", OVERWRITES)
def test_a_mark_whose_tokens_were_written_over_is_not_returned_to(each, overwrite):
    cache, queries = each.filled(CASE, room=10)
    expected = cache.decode(queries)
    cache.mark()
    cache.extend(*tokens(9), np.array([9, 0]))
    cache.rewind()
    OVERWRITES[overwrite](cache)
    with pytest.raises(RuntimeError, match=r"mark\(\) once more"):
        cache.rewind()
    cache.prefill(*CASE.prompt()[:2], np.array(CASE.lengths))
    cache.set_fractions([0.5, 0.5])
    cache.mark()
    cache.append(*(array[:, :, 0] for array in tokens(1)))
    cache.rewind()
    for got, wanted in zip(cache.decode(queries), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("text", ["int4,pages=1/4,anchor_every=2,window=32", "int8,reuse,anchor_every=2,window=32"])
def test_what_an_anchor_that_was_not_decoded_would_have_left_is_not_reused(each, text):
    case = Case(CASE.shape, Recipe.parse(text), "bf16", CASE.lengths)
    cache, queries = each.filled(case, room=10)
    for step in range(3):
        cache.append(*case.token(step)[:2])
        if step < 2:
            cache.decode(queries)
    cache.append(*case.token(3)[:2])
    with pytest.raises(RuntimeError, match=r"of anchor 2.* not decoded|anchor 2 computes, which was not decoded"):
        cache.decode(queries)


def test_a_chunk_of_nothing_begins_the_count_of_steps_anew_as_any_chunk_does(each):
    case = Case(AttentionShape(2, 4, 2, 64), Recipe.parse("int4,pages=1/2,anchor_every=4"), "bf16", (300, 200))
    cache, _ = each.filled(case, room=8)
    cache.append(*case.token(0)[:2])
    assert cache.step == 0
    cache.extend(np.zeros((2, 2, 0, 64), np.float32), np.zeros((2, 2, 0, 64), np.float32), np.zeros(2, np.int64))
    assert cache.step == -1 and cache.lengths.tolist() == [301, 201]
