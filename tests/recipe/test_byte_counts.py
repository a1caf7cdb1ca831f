"""Bytes are exact: they equal a count of rows that knows nothing of the formulas."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.recipe import (
    DENSE,
    HEAD_DIMS,
    AttentionShape,
    Recipe,
    dense_bytes,
    interval_bytes,
    largest_step_bytes,
    read_ratio,
    step_bytes,
    stored_bits,
    stored_bytes,
    stored_ratio,
)
from elastickv.recipe.slab import Slab

shapes = st.builds(
    lambda batch, kv, group, dim: AttentionShape(batch, kv * group, kv, dim),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(HEAD_DIMS),
)


def up_to_sectors(n_bytes):
    return (n_bytes + 31) // 32 * 32


def counted(recipe, length, dim):
    """KV bytes of one head, from a walk over the tokens."""
    exact = cold = 0
    for position in range(length):
        page = (position - recipe.sinks) // 32
        is_cold = position >= recipe.sinks and recipe.sinks + 32 * (page + 1) <= length - recipe.window
        if not is_cold:
            exact += 1
        elif (position - recipe.sinks) % recipe.stride == 0:
            cold += 1
    row, scale = (dim, 2) if recipe.key_format == "int8" else (2 * dim, 0)
    return 2 * (up_to_sectors(exact * 2 * dim) + up_to_sectors(cold * row) + up_to_sectors(cold * scale))


@given(shapes, st.integers(1, 700), st.sampled_from(["bf16", "int8", "bf16,stride=3", "int8,stride=5,sinks=0,window=7"]))
def test_kv_bytes_are_those_of_the_rows_read(shape, length, text):
    recipe = Recipe.parse(text)
    expected = counted(recipe, length, shape.head_dim) * shape.kv_heads * shape.batch
    assert step_bytes(recipe, [length] * shape.batch, shape).kv == expected


@given(shapes, st.integers(1, 100_000))
def test_dense_16_bit_has_ratio_one_and_fp32_a_half(shape, length):
    lengths = [length] * shape.batch
    assert read_ratio(DENSE, lengths, shape, "bf16") == pytest.approx(1, abs=1e-12)
    assert read_ratio(DENSE, lengths, shape, "fp32") == pytest.approx(0.5, abs=1e-12)
    assert dense_bytes(lengths, shape) == length * shape.batch * shape.kv_heads * shape.head_dim * 4


def test_reuse_averages_one_anchor_interval_and_reports_the_anchor_as_the_largest_step():
    shape = AttentionShape(1, 8, 2, 64)
    recipe = Recipe.parse("reuse,anchor_every=4,sinks=0,window=0")
    anchor, *between = (
        step_bytes(recipe, [4096], shape, steps_since_refresh=steps_since_refresh).kv for steps_since_refresh in range(4)
    )
    assert anchor == dense_bytes([4096], shape)
    # At 4096 tokens the newest page turned cold after each of the earlier anchors: its 32 rows are read until the next.
    assert between == [32 * 2 * 2 * 64 * 2] * 3
    assert interval_bytes(recipe, [4096], shape).kv == (anchor + sum(between)) / 4
    assert largest_step_bytes(recipe, [4096], shape).kv == anchor


def test_selection_by_reuse_saves_reads_only():
    shape = AttentionShape(1, 8, 2, 64)
    recipe = Recipe.parse("reuse,anchor_every=4,sinks=0,window=0")
    assert read_ratio(recipe, [8192], shape) > 3.9
    assert stored_ratio(recipe, [8192], shape) < 1


def test_reuse_stores_an_output_with_its_log_sum_exp_for_every_query_head():
    shape = AttentionShape(2, 24, 6, 64)
    recipe = Recipe.parse("reuse,anchor_every=4,sinks=0,window=0")
    reused = 2 * 24 * (64 + 1) * 4
    assert stored_bytes(recipe, [4096, 64], shape) == dense_bytes([4096, 64], shape) + reused


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "fp8",
        "k=int8,v=int4,vgroup=32",
        "k=int4,v=int3",
        "int3",
        "int2",
        "int4,pages=1/4",
        "int4,pages=1",
        "int8,stride=3",
        "dense",
    ],
)
def test_bytes_are_whole_numbers_by_their_type(text):
    step = step_bytes(Recipe.parse(text), [500], AttentionShape(1, 4, 2, 64))
    assert {type(n_bytes) for n_bytes in vars(step).values()} == {int}


def test_a_stride_stores_the_rows_it_keeps():
    # Every 4th of 128 tokens: 32 rows of 64 codes and a scale of 2 bytes, of K and of V.
    recipe = Recipe.parse("int8,stride=4,sinks=0,window=0")
    assert stored_bytes(recipe, [128, 128], AttentionShape(2, 9, 3, 64)) == 2 * 3 * 2 * 32 * (64 + 2)


def test_outputs_and_queries_are_itemised_and_do_not_count_in_c():
    shape = AttentionShape(2, 8, 2, 64)
    step = step_bytes(Recipe.parse("int8"), [500, 300], shape)
    assert step.query == step.output == 2 * 8 * 64 * 4
    assert step.moved == step.kv + step.query + step.output


def test_what_dense_stores_depends_on_the_models_dtype():
    shape = AttentionShape(1, 2, 1, 64)
    assert [stored_ratio(DENSE, [100], shape, dtype) for dtype in ("fp32", "fp16", "bf16")] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_values_in_3_bits_take_three_eighths_of_a_byte_at_every_head_size(head_dim):
    shape, recipe = AttentionShape(1, 2, 1, head_dim), Recipe.parse("k=int8,v=int3,sinks=0,window=0")
    keys, codes, scales = head_dim + 2, head_dim * 3 // 8, 4
    assert stored_bytes(recipe, [320], shape) == 320 * (keys + codes + scales)
    slab = Slab.of(recipe, head_dim)
    assert (slab.value_codes, slab.value_scales) == (32 * codes, 32 * scales)
    narrow = Recipe.parse("k=int8,v=int3,vgroup=32,sinks=0,window=0")
    if head_dim % 32 == 0:
        assert stored_bytes(narrow, [320], shape) == 320 * (keys + codes + 4 * head_dim // 32)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_keys_in_3_bits_take_three_eighths_of_a_byte_of_whole_32_channels(head_dim):
    shape, recipe = AttentionShape(1, 2, 1, head_dim), Recipe.parse("k=int3,v=int8,sinks=0,window=0")
    channels = -(-head_dim // 32) * 32
    codes, values = channels * 3 // 8, head_dim + 2
    assert stored_bytes(recipe, [320], shape) == 320 * (codes + values) + 10 * 4 * head_dim
    slab = Slab.of(recipe, head_dim)
    assert (slab.key_codes, slab.key_scales) == (32 * codes, 4 * head_dim)
    if head_dim == channels:
        assert stored_bits(Recipe.parse("int3"), head_dim) == (3 + 1 + 3 + 32 / head_dim) / 2
