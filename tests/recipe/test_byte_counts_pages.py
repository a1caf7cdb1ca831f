"""Bytes of narrow formats and of selected pages equal a walk over tokens and pages that knows nothing of the formulas."""

from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.recipe import HEAD_DIMS, AttentionShape, Recipe, interval_bytes, largest_step_bytes, step_bytes, stored_bytes
from elastickv.recipe.formats import value_groups
from tests.helpers.cases import tried

BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}


def up(n_bytes, multiple=32):
    return -(-n_bytes // multiple) * multiple


def padded_row(fmt, dim):
    return up(-(-dim * BITS[fmt] // 8), 16)


def key_scales(fmt, dim, tokens):
    """int8: bf16 a token; fp8: bf16 a page; int4: fp16 scale and zero a channel and page, channels padded as the row is."""
    pages = -(-tokens // 32)
    return {"int8": 2 * tokens, "fp8": 2 * pages, "int4": 4 * (padded_row("int4", dim) * 2) * pages}.get(fmt, 0)


def value_scales(fmt, dim, group, tokens):
    pages = -(-tokens // 32)
    return {"int8": 2 * tokens, "fp8": 2 * pages, "int4": 4 * (dim // (group or dim)) * tokens}.get(fmt, 0)


def cold_pages(recipe, length):
    """Pages all of whose tokens are older than the window, by looking at each token."""
    number = 0
    while all(recipe.sinks + 32 * number + i < length - recipe.window for i in range(32)):
        number += 1
    return number


def counted(recipe, length, dim, kv_heads, steps_since_refresh):
    """KV bytes of a step of one sequence, plane by plane and page by page."""
    total = 0
    for head in range(kv_heads):
        cold = cold_pages(recipe, length)
        exact = length - 32 * cold
        total += 2 * up(exact * 2 * dim)
        k, v, group = recipe.key_format, recipe.value_format, recipe.value_group
        if recipe.selection == "all":
            tokens = 32 * cold
            planes = [tokens * padded_row(k, dim), tokens * padded_row(v, dim)]
            planes += [key_scales(k, dim, tokens), value_scales(v, dim, group, tokens)]
            total += sum(map(up, planes))
            continue
        at_anchor = cold_pages(recipe, max(length - steps_since_refresh, 0))
        share = recipe.fractions[head] if len(recipe.fractions) > 1 else recipe.fractions[0]
        listed = min(at_anchor, max(1, floor(share * at_anchor)))
        read = listed + cold - at_anchor
        # Codes of pages are whole sectors; scales of each page are read apart.
        total += up(read * 32 * padded_row(k, dim)) + up(read * 32 * padded_row(v, dim))
        for _ in range(read):
            total += up(key_scales(k, dim, 32)) + up(value_scales(v, dim, group, 32))
        total += up(4 * listed)
        if steps_since_refresh == 0:
            total += up(key_scales(k, dim, 32 * cold))
    return total


@st.composite
def cases(draw):
    dim = draw(st.sampled_from(HEAD_DIMS))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    pages = draw(st.booleans())
    key = "int4" if pages else draw(st.sampled_from(["fp8", "int8", "int4", "bf16"]))
    value = draw(st.sampled_from(["fp8", "int8", "int4", "bf16"]))
    many = draw(st.sampled_from([1, kv_heads]))
    recipe = Recipe(
        key,
        value,
        value_group=draw(st.sampled_from([0, *value_groups(dim)])) if value == "int4" else 0,
        selection="pages" if pages else "all",
        fractions=tuple(draw(st.floats(0.001, 1)) for _ in range(many)) if pages else (),
        anchor_every=draw(st.integers(1, 70)) if pages else 1,
        sinks=draw(st.sampled_from([0, 4, 7])),
        window=draw(st.sampled_from([0, 33, 128])),
    )
    return recipe, AttentionShape(1, kv_heads * group, kv_heads, dim), draw(st.integers(1, 900))


@given(cases())
def test_an_interval_is_the_mean_of_its_steps_and_every_step_is_counted_to_the_byte(case):
    recipe, shape, length = case
    steps = [
        counted(recipe, length, shape.head_dim, shape.kv_heads, steps_since_refresh)
        for steps_since_refresh in range(recipe.anchor_every)
    ]
    for steps_since_refresh in {0, recipe.anchor_every // 2, recipe.anchor_every - 1}:
        assert step_bytes(recipe, [length], shape, steps_since_refresh=steps_since_refresh).kv == steps[steps_since_refresh]
    assert interval_bytes(recipe, [length], shape).kv == pytest.approx(sum(steps) / len(steps), rel=1e-12)
    assert largest_step_bytes(recipe, [length], shape).kv == max(steps)


@tried(50)
@given(cases())
def test_a_selection_of_pages_stores_everything(case):
    recipe, shape, length = case
    everything = Recipe(recipe.key_format, recipe.value_format, recipe.value_group, sinks=recipe.sinks, window=recipe.window)
    assert stored_bytes(recipe, [length], shape) == counted(everything, length, shape.head_dim, shape.kv_heads, 0)


@tried(50)
@given(cases(), st.lists(st.integers(1, 600), min_size=1, max_size=4))
def test_sequences_and_heads_add_up(case, lengths):
    recipe, shape, _ = case
    batch = AttentionShape(len(lengths), shape.query_heads, shape.kv_heads, shape.head_dim)
    alone = [interval_bytes(recipe, [length], shape).kv for length in lengths]
    assert abs(interval_bytes(recipe, lengths, batch).kv - sum(alone)) <= 1e-9 * sum(alone)
