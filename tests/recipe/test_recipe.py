"""Recipes are values: they round-trip through text, hash alike in every process, and refuse what does not combine."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import UsageError
from elastickv.inputs import file_exists
from elastickv.recipe import DENSE, AttentionShape, Recipe


@st.composite
def recipes(draw):
    selection = draw(st.sampled_from(["all", "stride", "reuse", "pages", "dense"]))
    if selection == "dense":
        return DENSE
    key = "int4" if selection == "pages" else draw(st.sampled_from(["bf16", "fp16", "int8"]))
    value = draw(st.sampled_from(["bf16", "fp8", "int8", "int4"])) if selection == "pages" else key
    fraction = st.floats(0, 1, exclude_min=True) | st.integers(1, 64).map(lambda n: 1 / n)
    return Recipe(
        key,
        value,
        value_group=draw(st.sampled_from([0, 32, 64])) if value == "int4" else 0,
        selection=selection,
        fractions=tuple(draw(st.lists(fraction, min_size=1, max_size=8))) if selection == "pages" else (),
        stride=draw(st.integers(1, 64)) if selection == "stride" else 1,
        anchor_every=draw(st.integers(1, 4096)) if selection in ("reuse", "pages") else 1,
        decay=draw(st.floats(0, 1, exclude_min=True)) if selection == "reuse" else 1.0,
        sinks=draw(st.integers(0, 64)),
        window=draw(st.integers(0, 4096)),
    )


@given(st.lists(st.floats(0, 1, exclude_min=True), min_size=40, max_size=128))
def test_the_text_of_many_heads_round_trips_and_is_never_a_file_name(fractions):
    recipe = Recipe("int4", "int8", selection="pages", fractions=tuple(fractions))
    assert Recipe.parse(str(recipe)) == recipe
    assert not file_exists(str(recipe))


@given(recipes())
def test_text_round_trips(recipe):
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    "text",
    [
        "int4",
        "k=int8,v=int4,vgroup=32",
        "int4,pages=1",
        "int4,pages=1/4:0.3",
        "int4,pages=1/4,anchor_every=2",
        "int8,stride=2",
        "bf16,reuse,anchor_every=2",
        "fp16,reuse,anchor_every=3,decay=0.5,sinks=0,window=0",
        "fp8,sinks=3",
        "fp8,window=127",
    ],
)
def test_a_text_says_what_is_chosen_and_no_more(text):
    assert str(Recipe.parse(text)) == text


@pytest.mark.parametrize("fraction", [1e-9, 1e-10, 1 / 999_999_999, 1e-300, 5e-324])
def test_the_smallest_fractions_round_trip(fraction):
    recipe = Recipe("int4", "int4", selection="pages", fractions=(fraction,))
    assert Recipe.parse(str(recipe)) == recipe


def test_a_share_is_written_as_one_over_a_whole_number_where_that_can_be_read_back():
    texts = [str(Recipe("int4", "int4", selection="pages", fractions=(1 / whole,))) for whole in (1, 2, 999_999_999, 10**9)]
    assert texts == ["int4,pages=1", "int4,pages=1/2", "int4,pages=1/999999999", "int4,pages=1e-09"]


def test_numbers_of_any_type_are_one_recipe():
    plain = Recipe("int4", "int4", selection="pages", fractions=(1.0, 0.3))
    odd = Recipe("int4", "int4", selection="pages", fractions=(1, np.float64(0.3)))
    assert (str(odd), odd.hash) == (str(plain), plain.hash)
    assert Recipe(selection="reuse", decay=1).hash == Recipe(selection="reuse", decay=1.0).hash


@given(st.integers(1, 40), st.data())
def test_ages_count_from_step_0_and_then_from_the_anchors_of_the_phase(anchor_every, data):
    recipe, anchor_offset = Recipe(selection="reuse", anchor_every=anchor_every), data.draw(st.integers(0, anchor_every - 1))
    ages = [recipe.steps_since_refresh(step, anchor_offset) for step in range(3 * anchor_every + 2)]
    anchors = {0} | {step for step in range(len(ages)) if (step + anchor_offset) % anchor_every == 0}
    assert ages == [step - max(a for a in anchors if a <= step) for step in range(len(ages))]
    assert max(ages) == anchor_every - 1 or anchor_offset
    assert recipe.steps_since_refresh(-1, anchor_offset) == 0


def test_without_a_phase_anchors_are_multiples_of_the_interval():
    recipe = Recipe.parse("int4,pages=1/2,anchor_every=3")
    assert [recipe.steps_since_refresh(step) for step in range(-1, 7)] == [0, 0, 1, 2, 0, 1, 2, 0]
    assert [recipe.steps_since_refresh(step, 1) for step in range(-1, 7)] == [0, 0, 1, 0, 1, 2, 0, 1]


@given(st.integers(1, 64), st.integers(1, 80))
def test_the_phases_of_layers_spread_their_anchors_evenly(anchor_every, layers):
    recipe = Recipe(selection="reuse", anchor_every=anchor_every)
    phases = [recipe.layer_anchor_offset(layer, layers) for layer in range(layers)]
    for anchor_offset in phases:
        recipe.check_anchor_offset(anchor_offset)
    times = [phases.count(anchor_offset) for anchor_offset in range(anchor_every)]
    assert max(times) - min(times) <= 1


@pytest.mark.parametrize("anchor_offset", [-1, 4, 100])
def test_a_phase_outside_the_interval_is_refused(anchor_offset):
    with pytest.raises(ValueError, match=rf"anchor_offset {anchor_offset} is out of range: .* takes 0 to 3"):
        Recipe.parse("bf16,reuse,anchor_every=4").check_anchor_offset(anchor_offset)


@given(recipes(), recipes())
def test_equal_recipes_and_only_they_share_a_hash(one, other):
    assert (one.hash == other.hash) == (one == other)


def test_the_hash_never_changes_between_versions():
    assert DENSE.hash == "01fc659b2e0a"
    assert Recipe.parse("int8").hash == "71e641100f41"
    assert Recipe.parse("int8,stride=2").hash == "d25d6cbcd663"
    assert Recipe.parse("k=int8_per_channel,v=int8").hash == "a7103fc14571"
    assert Recipe.parse("k=int4,v=int3").hash == "020cd8d8c9a5"


@pytest.mark.parametrize("text", ["int8,stride=3", " int8 , stride=3 ", "stride=3,int8"])
def test_order_and_spaces_do_not_matter(text):
    assert Recipe.parse(text) == Recipe("int8", "int8", selection="stride", stride=3)


def test_a_format_named_for_keys_or_values_alone_is_the_others_too_but_pages_have_keys_in_int4():
    assert Recipe.parse("k=int8") == Recipe.parse("v=int8") == Recipe.parse("int8")
    assert Recipe.parse("v=int8,pages=1/4") == Recipe.parse("k=int4,v=int8,pages=1/4")
    assert Recipe.parse("pages=1/4") == Recipe.parse("int4,pages=1/4")


def test_the_schedule_of_the_original_reads():
    assert Recipe.parse("reuse,anchor-every=4,decay=0.95,sinks=0,window=0") == Recipe(
        "bf16", "bf16", selection="reuse", anchor_every=4, decay=0.95, sinks=0, window=0
    )


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("int9", "int9"),
        ("stride", "stride=N"),
        ("reuse", "anchor_every=N"),
        ("stride=0", "stride=0"),
        ("stride=2.5", "stride=2.5"),
        ("stride=-1", "stride=-1"),
        ("k=int9,v=int8", "format 'int9' is unknown: formats are bf16, fp16, fp8, int8, int4"),
        ("window=1048577", "window=1048577 is out of range: 0 to 1048576 is accepted"),
        ("sinks=4.5", "sinks=4.5 is not a whole number"),
        ("int4,vgroup=x", "vgroup=x is not a whole number"),
        ("reuse,anchor_every=2,decay=.", "decay=. is not a number"),
        ("pages=a/b", "pages=a/b is not a number"),
        ("stride=2,stride=3", "do not combine"),
        ("int8,bf16", "twice"),
        ("stride=2,reuse,anchor_every=2", "do not combine"),
        ("dense,sinks=4", "dense"),
        ("decay=0.5", "decay=0.5"),
        ("reuse,anchor_every=2,decay=1.5", "decay=1.5"),
        ("reuse,anchor_every=2,decay=0", "decay=0"),
        ("reuse,anchor_every=2,decay=nan", "nan"),
        ("sinks=99999999999999", "out of range"),
        ("window", "window"),
        ("__import__('os')", "__import__"),
    ],
)
def test_what_is_no_recipe_is_refused_by_name(text, named):
    with pytest.raises(UsageError, match=named.replace("(", r"\(").replace(")", r"\)")):
        Recipe.parse(text)


@pytest.mark.parametrize(
    "fields", [{"value_format": "int8"}, {"sinks": 4}, {"window": 1}, {"selection": "stride", "stride": 2}]
)
def test_dense_takes_nothing_beside_it(fields):
    with pytest.raises(UsageError, match="'dense' keeps and reads everything"):
        replace(DENSE, **fields)


def test_without_a_selection_every_head_reads_everything():
    assert [Recipe.parse(text).fraction(3) for text in ("dense", "int8", "int8,stride=2")] == [1.0, 1.0, 1.0]


def test_the_window_keeps_the_models_16_bit_dtype():
    assert Recipe.parse("int8").exact_dtype("fp16") == "fp16"
    assert Recipe.parse("int8").exact_dtype("fp32") == "bf16"
    assert DENSE.exact_dtype("fp32") == "fp32"


@pytest.mark.parametrize(
    ("formats", "other"), [("bf16", "fp16"), ("k=int8,v=bf16", "fp16"), ("fp16", "bf16"), ("k=fp16,v=int4", "fp32")]
)
def test_a_16_bit_format_is_the_windows_dtype_too_whatever_the_models_is(formats, other):
    named = "bf16" if "bf16" in formats else "fp16"
    assert Recipe.parse(formats).exact_dtype(other) == named


def test_the_phases_of_layers_are_whole_and_spread_over_an_interval():
    recipe = Recipe.parse("int4,pages=1/4,anchor_every=4")
    phases = [recipe.layer_anchor_offset(layer, 6) for layer in range(6)]
    assert phases == [0, 0, 1, 2, 2, 3]
    assert {type(anchor_offset) for anchor_offset in phases} == {int}


def test_a_ratio_without_a_shape_is_reckoned_for_one_sequence_of_eight_heads():
    assert Recipe.for_ratio(8, 4096) == Recipe.for_ratio(8, 4096, AttentionShape(1, 32, 8, 128))


@pytest.mark.parametrize(
    ("text", "digest"),
    [("int4", "dc4af32e03f5"), ("k=int8,v=int4,vgroup=32", "312c13994b5d"), ("int4,pages=1/4,anchor_every=4", "1b117eea3681")],
)
def test_recipes_that_rotate_nothing_keep_their_hashes(text, digest):
    assert Recipe.parse(text).hash == digest
    assert Recipe.parse(text).rotate == ""


@pytest.mark.parametrize("rotate", ["k", "v", "kv"])
def test_a_rotation_is_part_of_text_and_hash(rotate):
    plain, recipe = Recipe.parse("k=int8,v=int4"), Recipe.parse(f"k=int8,v=int4,rotate={rotate}")
    assert str(recipe) == f"k=int8,v=int4,rotate={rotate}" and recipe.hash != plain.hash
    assert (recipe.rotates_keys, recipe.rotates_values) == ("k" in rotate, "v" in rotate)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("int4,rotate=vk", "rotate=vk is no choice of tensors: write rotate=k, rotate=v or rotate=kv"),
        ("int4,rotate=", "recipe 'int4,rotate=': 'rotate=' is not a term; a recipe is .*"),
        ("bf16,rotate=k", "rotate=k does not combine with keys in bf16: only with quantized ones"),
        ("k=int4,v=bf16,rotate=kv", "rotate=kv does not combine with values in bf16: only with quantized ones"),
    ],
)
def test_a_rotation_without_a_meaning_is_refused_in_one_line(text, refusal):
    with pytest.raises(UsageError, match=f"^{refusal}$"):
        Recipe.parse(text)


def test_dense_takes_no_rotation():
    with pytest.raises(UsageError, match=r"^'dense' keeps and reads everything: it takes no other term$"):
        replace(DENSE, rotate="k")
