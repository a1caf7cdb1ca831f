"""The cache that the backends are held against follows the definitions of the recipe."""

import numpy as np
import pytest

from elastickv.errors import NonFiniteError, UsageError
from elastickv.kvcache import Oracle, ReferenceCache
from elastickv.kvcache.attention import attend, merge
from elastickv.kvcache.quantize import stored_values
from elastickv.kvcache.rounding import rounded
from elastickv.recipe import AttentionShape, Recipe, regions

SHAPE = AttentionShape(2, 4, 2, 64)


def tokens(count, seed=0):
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal((400, 2, SHAPE.batch, SHAPE.kv_heads, SHAPE.head_dim)).astype(np.float32)
    return np.moveaxis(drawn[:count], 0, 3)


def queries(seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((SHAPE.batch, SHAPE.query_heads, SHAPE.head_dim)).astype(np.float32)


def filled(text, lengths, capacity=400, dtype="bf16", anchor_offset=0):
    cache = ReferenceCache(SHAPE, capacity, dtype, Recipe.parse(text), anchor_offset)
    cache.prefill(*tokens(max(lengths)), np.array(lengths))
    return cache


def test_dense_fp32_is_plain_attention():
    cache, q = filled("dense", [300, 17], dtype="fp32"), queries()
    keys, values = tokens(300)
    output, lse = cache.decode(q)
    expected = attend(q[1, 2:], keys[1, 1, :17], values[1, 1, :17])
    np.testing.assert_allclose(output[1, 2:], expected.output)
    np.testing.assert_allclose(lse[1, 2:], expected.lse)


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "fp8",
        "int4,vgroup=32",
        "k=int8,v=int4",
        "int4,pages=1/2,anchor_every=4",
        "bf16,stride=3",
        "int8,stride=5",
        "bf16,reuse,anchor_every=3",
    ],
)
def test_appending_one_by_one_stores_what_a_block_stores(text):
    block, steps = filled(text, [330, 250]), filled(text, [200, 120])
    keys, values = tokens(330)
    for i in range(130):
        at = np.array([200, 120]) + i
        steps.append(keys[[0, 1], :, at], values[[0, 1], :, at])
    for row in range(2):
        one, other = block.stored(row, 1), steps.stored(row, 1)
        for name in ("cold_keys", "cold_values", "exact_keys", "exact_values"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_stride_gives_the_mass_of_dropped_tokens_to_the_retained_ones():
    cache = filled("bf16,stride=4,sinks=0,window=32", [160, 160])
    # Equal keys: every token weighs the same, so the log-sum-exp is that of all 160.
    keys, values = tokens(160)
    cache.prefill(np.ones_like(keys), values, np.array([160, 160]))
    q = queries()
    _, lse = cache.decode(q)
    np.testing.assert_allclose(lse, q.sum(-1) / 8 + np.log(160), rtol=1e-6)


def test_reuse_merges_the_anchors_output_with_what_came_since():
    recipe = "bf16,reuse,anchor_every=3,decay=0.5,sinks=2,window=8"
    cache, reference = filled(recipe, [100, 100]), tokens(200)
    outputs = []
    for i in range(3):
        cache.append(reference[0][:, :, 150 + i], reference[1][:, :, 150 + i])
        outputs.append(cache.decode(queries(i)))
    length, steps_since_refresh = 103, 2
    stored = cache.stored(0, 0)
    at_anchor = (101 - 2 - 8) // 32 * 32
    cold = attend(queries(0)[0, :2], stored.cold_keys[:at_anchor], stored.cold_values[:at_anchor])
    fresh = attend(queries(2)[0, :2], stored.cold_keys[at_anchor:], stored.cold_values[at_anchor:])
    exact = attend(queries(2)[0, :2], stored.exact_keys, stored.exact_values)
    expected = merge(cold.weighted(steps_since_refresh * np.log(0.5)), fresh, exact)
    np.testing.assert_allclose(outputs[2][0][0, :2], expected.output)
    assert len(stored.exact_keys) + len(stored.cold_keys) == length


def test_the_window_is_exact_and_the_rest_is_rounded():
    cache = filled("int8", [300, 300])
    keys = rounded(tokens(300)[0][0, 0], "bf16")
    stored = cache.stored(0, 0)
    np.testing.assert_array_equal(stored.exact_keys[:4], keys[:4])
    np.testing.assert_array_equal(stored.exact_keys[-128:], keys[-128:])
    error = np.abs(stored.cold_keys - keys[4 : 4 + len(stored.cold_keys)])
    assert 0 < error.max() < 0.04


def test_rewind_forgets_what_was_appended():
    cache = filled("int8", [200, 150])
    before = cache.decode(queries())[0]
    cache.mark()
    cache.append(*tokens(1, seed=5)[:, :, :, 0])
    assert (cache.decode(queries())[0] != before).any()
    cache.rewind()
    np.testing.assert_array_equal(cache.decode(queries())[0], before)


@pytest.mark.parametrize("text", ["int4,pages=1/4,anchor_every=5,window=0", "bf16,reuse,anchor_every=5,window=0"])
def test_rewinding_to_between_anchors_brings_back_what_is_reused(text):
    cache, (keys, values) = filled(text, [200, 150], anchor_offset=3), tokens(12, seed=5)

    def play(first, end):
        outputs = []
        for i in range(first, end):
            cache.append(keys[:, :, i], values[:, :, i])
            outputs.append(cache.decode(queries(i))[0])
        return outputs

    play(0, 4)
    cache.mark()
    assert cache.recipe.steps_since_refresh(cache.step, cache.anchor_offset) == 1
    once = play(4, 12)
    cache.rewind()
    np.testing.assert_array_equal(play(4, 12), once)


def test_the_oldest_age_in_a_phase_weighs_least_and_the_first_step_is_an_anchor():
    recipe = "bf16,reuse,anchor_every=3,decay=0.5,sinks=0,window=0"
    cache, (keys, values) = filled(recipe, [96, 96], anchor_offset=2), tokens(101)
    masses = []
    for i in range(5):
        cache.append(keys[:, :, 96 + i], values[:, :, 96 + i])
        # All scores are 0: the mass is the number of tokens, that of reused ones halved at every step.
        masses.append(np.exp(cache.decode(np.zeros_like(queries()))[1][0, 0]))
    np.testing.assert_allclose(masses, [96 + 1, 96 + 2, 96 / 2 + 3, 96 / 4 + 4, 96 + 5])


@pytest.mark.parametrize("anchor_offset", [-1, 3])
def test_a_phase_outside_the_interval_is_refused(anchor_offset):
    with pytest.raises(ValueError, match="takes 0 to 2"):
        filled("bf16,reuse,anchor_every=3", [10, 10], anchor_offset=anchor_offset)


def test_a_full_cache_says_so():
    cache = filled("dense", [10, 4], capacity=10)
    with pytest.raises(UsageError, match="sequence 0 holds 10 of 10"):
        cache.append(*tokens(1)[:, :, :, 0])


def test_a_nan_is_raised_with_its_position():
    cache = filled("int8", [200, 150])
    bad = tokens(1)[:, :, :, 0]
    bad[1, 1, 0, 3] = np.nan
    cache.append(bad[0], bad[1])
    with pytest.raises(NonFiniteError, match="sequence 1, KV head 0, position 150"):
        cache.raise_non_finite()


def walk(text, start=300, steps=70, anchor_offset=0):
    """The pages read of row 0, head 1 at every step, beside the cold pages there."""
    cache, (keys, values) = filled(text, [start, start], anchor_offset=anchor_offset), tokens(400)
    for i in range(steps):
        cache.append(keys[:, :, start + i], values[:, :, start + i])
        cache.decode(queries(i))
        yield cache, i, cache.pages_read(0, 1), max(0, start + i + 1 - 4 - 128) // 32


@pytest.mark.parametrize("head", [0, 1])
def test_the_best_pages_by_their_scales_are_read_at_an_anchor(head):
    for cache, i, _, cold in walk("int4,pages=1/2", steps=3):
        stored = cache.stored(0, head)
        pages = rounded(tokens(400)[0][0, head, 4 : 4 + 32 * cold], "bf16").reshape(cold, 32, 64).astype(np.float64)
        low, high = pages.min(axis=1), pages.max(axis=1)
        middle, half = (low + high) / 2, (high - low) / 4
        q = queries(i)[0, 2 * head : 2 * head + 2].astype(np.float64)
        scores = (q @ middle.T + np.abs(q) @ half.T).sum(axis=0)
        assert set(cache.pages_read(0, head)) == set(np.argsort(-scores)[: cold // 2])
        assert len(stored.cold_keys) == 32 * cold


def test_an_oracle_that_was_not_marked_rewinds_to_its_beginning():
    cache = filled("bf16,reuse,anchor_every=3,window=0", [200, 150])
    oracle = Oracle(cache)
    oracle.rewind()
    np.testing.assert_array_equal(oracle.decode(queries())[0], cache.decode(queries())[0])


@pytest.mark.parametrize("anchor_offset", [0, 1, 17, 39])
def test_between_anchors_the_list_stays_and_pages_that_turned_cold_are_added(anchor_offset):
    list_, at_anchor, grown = None, 0, 0
    for _, i, read, cold in walk("int4,pages=1/4,anchor_every=40", anchor_offset=anchor_offset):
        if i == 0 or (i + anchor_offset) % 40 == 0:
            list_, at_anchor = read, cold
            assert len(read) == max(1, cold // 4)
        np.testing.assert_array_equal(read, np.r_[list_, at_anchor:cold])
        grown += cold > at_anchor
    assert grown


def test_every_head_reads_its_own_share():
    for cache, _, _, cold in walk("pages=1/5:1", steps=2):
        assert [len(cache.pages_read(0, head)) for head in range(2)] == [cold // 5, cold]
        assert cold == 5


def test_reading_every_page_is_reading_everything():
    everything, pages = filled("int4", [330, 250]), filled("int4,pages=1", [330, 250])
    np.testing.assert_allclose(pages.decode(queries())[0], everything.decode(queries())[0], rtol=1e-12)


def test_a_decode_at_an_anchor_can_be_repeated():
    cache = filled("int4,pages=1/2,anchor_every=4", [300, 200])
    first = cache.decode(queries())[0]
    np.testing.assert_array_equal(cache.decode(queries())[0], first)


@pytest.mark.parametrize("text", ["int4", "fp8", "k=fp8,v=int4,vgroup=32", "k=int4,v=int8"])
def test_the_window_is_exact_and_cold_rows_are_near(text):
    cache = filled(text, [300, 300])
    keys, values = (rounded(x[0, 0], "bf16") for x in tokens(300))
    stored = cache.stored(0, 0)
    assert len(stored.cold_keys) == len(stored.cold_values) == 160
    np.testing.assert_array_equal(stored.exact_keys, np.r_[keys[:4], keys[164:]])
    for got, exact, fmt in (
        (stored.cold_keys, keys[4:164], cache.recipe.key_format),
        (stored.cold_values, values[4:164], cache.recipe.value_format),
    ):
        # Standard normal numbers stay below 5: a step of int4 is at most 10 / 15, fp8 has 4 bits of significand, int8 7.
        assert 0 < np.abs(got - exact).max() <= {"int4": 1 / 3, "fp8": 5 / 32, "int8": 5 / 254}[fmt] * 1.02


@pytest.mark.parametrize("text", ["int4", "k=int4,v=fp8,window=40", "k=int8,v=int4,vgroup=32", "dense"])
def test_what_is_stored_is_what_the_quantisers_make_of_keys_and_of_values(text):
    cache = filled(text, [330, 250], dtype="fp16")
    keys, values = (rounded(array, "fp16") for array in tokens(330))
    recipe = cache.recipe
    for row, length in enumerate((330, 250)):
        split = regions(length, recipe.sinks, recipe.window)
        cold = slice(split.sinks, split.sinks + (0 if recipe.is_dense else split.cold))
        stored = cache.stored(row, 1)
        for name, tokens_of_row, is_value in (
            ("keys", keys[row, 1, :length], False),
            ("values", values[row, 1, :length], True),
        ):
            fmt = (recipe.value_format if is_value else recipe.key_format) or "fp16"
            group = recipe.v_group(64) if is_value else 64
            np.testing.assert_array_equal(
                getattr(stored, f"cold_{name}"), stored_values(tokens_of_row[cold], fmt, is_value, group)
            )
            exact = np.r_[tokens_of_row[: cold.start], tokens_of_row[cold.stop :]]
            np.testing.assert_array_equal(getattr(stored, f"exact_{name}"), exact)
            assert getattr(stored, f"exact_{name}").dtype == getattr(stored, f"cold_{name}").dtype == np.float64


def test_tokens_that_turn_cold_after_the_anchor_are_read_afresh():
    recipe = "bf16,reuse,anchor_every=40,sinks=0,window=0"
    cache, (keys, values) = filled(recipe, [90, 60]), tokens(140)
    at_anchor = None
    for i in range(40):
        at = np.array([90, 60]) + i
        cache.append(keys[[0, 1], :, at], values[[0, 1], :, at])
        outputs, lse = cache.decode(queries(i))
        stored = cache.stored(0, 1)
        if i == 0:
            at_anchor = attend(queries(0)[0, 2:], stored.cold_keys, stored.cold_values)
        fresh = attend(queries(i)[0, 2:], stored.cold_keys[64:], stored.cold_values[64:])
        expected = merge(at_anchor, fresh, attend(queries(i)[0, 2:], stored.exact_keys, stored.exact_values))
        np.testing.assert_allclose(outputs[0, 2:], expected.output)
        np.testing.assert_allclose(lse[0, 2:], expected.lse)
    assert len(stored.cold_keys) == 128


def test_a_new_cache_is_empty_before_its_first_step():
    cache = ReferenceCache(SHAPE, 40, "bf16", Recipe.parse("int8"))
    assert (cache.step, cache.lengths.tolist(), cache.anchor_offset) == (-1, [0, 0], 0)
    cache.rewind()
    cache.append(*tokens(1)[:, :, :, 0])
    assert (cache.step, cache.lengths.tolist(), cache.lengths.dtype) == (0, [1, 1], np.int64)
    with pytest.raises(UsageError, match="a sequence of 41 tokens does not fit a capacity of 40"):
        cache.prefill(*tokens(41), np.array([41, 3]))
    assert cache.allocated_bytes == 2 * 2 * 2 * 40 * 64 * 4


def test_random_tokens_repeat_by_their_seed():
    caches = [ReferenceCache(SHAPE, 40, "fp32", Recipe.parse("dense")) for _ in range(3)]
    for cache, seed in zip(caches, (1, 1, 2), strict=True):
        cache.fill_random(np.array([40, 7]), seed)
    held = [cache.stored(1, 1).exact_keys for cache in caches]
    assert held[0].shape == (7, 64) and abs(caches[0].stored(0, 0).exact_values.std() - 1) < 0.1
    np.testing.assert_array_equal(held[0], held[1])
    assert (held[0] != held[2]).all()


def test_a_value_behind_the_end_is_not_reported():
    cache, (keys, values) = filled("int4,window=0,sinks=0", [64, 64]), tokens(65)
    keys[0, 1, 64] = np.nan
    cache.prefill(keys, values, np.array([64, 65]))
    cache.raise_non_finite()
    cache.prefill(keys, values, np.array([65, 64]))
    with pytest.raises(NonFiniteError, match=r"^a value that is not finite: sequence 0, KV head 1, position 64$"):
        cache.raise_non_finite()


@pytest.mark.parametrize(
    ("text", "shares"), [("int4,pages=1/4,anchor_every=4", (1 / 4, 1 / 4)), ("bf16,reuse,anchor_every=4", (0.5, 0.5))]
)
def test_shares_that_change_nothing_leave_the_count_of_steps_alone(text, shares):
    cache = filled(text, [200, 150])
    cache.append(*tokens(1)[:, :, :, 0])
    cache.set_fractions(shares)
    assert cache.step == 0


def test_new_shares_make_the_next_step_an_anchor_that_reads_them():
    cache = filled("int4,pages=1/4,anchor_every=4,sinks=0,window=0", [256, 256])
    cache.append(*tokens(1)[:, :, :, 0])
    cache.set_fractions([1 / 2, 1])
    assert cache.step == -1
    cache.decode(queries())
    assert [len(cache.pages_read(1, head)) for head in range(2)] == [4, 8]


def test_a_state_holds_the_tokens_there_are_and_nothing_that_changes_later():
    assert ReferenceCache(SHAPE, 40, "bf16", Recipe.parse("int8")).state()["keys"].shape == (2, 2, 0, 64)
    cache = filled("int4,pages=1/4:1/2", [150, 90], dtype="fp32")
    state = cache.state()
    assert state["keys"].shape == state["values"].shape == (2, 2, 150, 64)
    before = {name: array.copy() for name, array in state.items()}
    cache.prefill(*tokens(150, seed=9), np.array([7, 150]))
    for name, array in before.items():
        np.testing.assert_array_equal(state[name], array)
    other = ReferenceCache(SHAPE, 150, "fp32", Recipe.parse("int4,pages=1/8"))
    other.load_state(state)
    for mine, theirs in zip(other.read(0, 150), filled("int4", [150, 90], dtype="fp32").read(0, 150), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert (other.lengths.tolist(), other.step, other.state()["fractions"].tolist()) == ([150, 90], -1, [1 / 4, 1 / 2])


@pytest.mark.parametrize(("batch", "capacity"), [(2, 10), (3, 40)], ids=["too short", "more rows"])
def test_a_state_that_does_not_fit_is_refused_with_both_shapes(batch, capacity):
    other = ReferenceCache(AttentionShape(batch, 4, 2, 64), capacity, "bf16", Recipe.parse("int8"))
    said = rf"^the saved tokens of shape \(2, 2, 11, 64\) do not fit a cache of \({batch}, 2, {capacity}, 64\)$"
    with pytest.raises(ValueError, match=said):
        other.load_state(filled("int8", [11, 3]).state())


def test_rows_that_are_gathered_keep_what_the_cache_is():
    cache = filled("int4,pages=1/4,anchor_every=4", [200, 150], dtype="fp16", anchor_offset=3)
    cache.set_fractions([1 / 2, 1])
    other = cache.gather(np.array([1, 1, 0]), 210)
    assert other.shape == AttentionShape(3, 4, 2, 64)
    assert (other.capacity, other.dtype, other.recipe, other.anchor_offset) == (210, "fp16", cache.recipe, 3)
    assert (other.lengths.tolist(), other.step, other.state()["fractions"].tolist()) == ([150, 150, 200], -1, [1 / 2, 1])
    other.set_fractions([1, 1])
    assert cache.state()["fractions"].tolist() == [1 / 2, 1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_what_a_crop_makes_exact_again_is_what_the_codes_stand_for_in_the_windows_dtype(dtype):
    cache = filled("int4,sinks=4,window=32", [200, 100], dtype=dtype)
    before = cache.read(0, 200)
    cache.crop(np.array([120, 100]))
    # Behind 4 sinks and before 32 tokens, of 200 tokens 160 are cold, of 120 only 64.
    stored = cache.stored(0, 1)
    for now, was in ((stored.exact_keys, before[0]), (stored.exact_values, before[1])):
        np.testing.assert_array_equal(now, rounded(was[0, 1, [*range(4), *range(68, 120)]], dtype))
    assert cache.lengths.dtype == np.int64
    for array, was in zip(cache.read(0, 100), before, strict=True):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array[1], was[1, :, :100])


@pytest.mark.parametrize("change", ["prefill", "fill_random", "extend", "crop", "load_state"])
def test_tokens_that_change_begin_the_count_of_steps_anew(change):
    cache, more = filled("int4,pages=1/4,anchor_every=4", [200, 150]), tokens(3)
    state = cache.state()
    cache.append(*more[:, :, :, 0])
    assert cache.step == 0
    lengths = np.array([3, 2])
    arguments = {"prefill": (*more, lengths), "fill_random": (lengths, 0), "extend": (*more, lengths), "crop": (lengths,)}
    getattr(cache, change)(*arguments.get(change, (state,)))
    assert cache.step == -1
