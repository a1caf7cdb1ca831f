"""The table of what combines with what is what the recipe accepts, tried term by term; what is refused is refused by name."""

import re
from itertools import product
from pathlib import Path

import pytest

from elastickv.errors import UsageError
from elastickv.recipe import Recipe
from elastickv.recipe.formats import FORMATS, cold_formats
from elastickv.recipe.recipe import SELECTIONS

DOCUMENT = Path(__file__).parents[2] / "docs" / "recipes.md"
KEY_FORMATS = list(cold_formats())
VALUE_FORMATS = [name for name in cold_formats() if FORMATS[name].values is not None]
BASE = {"all": {}, "stride": {"stride": 2}, "reuse": {}, "pages": {"fractions": (0.25,)}}
SIXTEEN_BIT_MIXED = {("bf16", "fp16"), ("fp16", "bf16")}


def accepts(selection, key, value, **terms):
    try:
        Recipe(key, value, selection=selection, **(BASE[selection] | terms))
    except UsageError:
        return False
    return True


def row(selection):
    pairs = {pair for pair in product(KEY_FORMATS, VALUE_FORMATS) if accepts(selection, *pair)}
    keys = [name for name in KEY_FORMATS if any(key == name for key, _ in pairs)]
    if pairs == {(key, key) for key in keys}:
        values = "as the keys"
    else:
        assert pairs == {(k, v) for k in keys for v in VALUE_FORMATS} - SIXTEEN_BIT_MIXED
        values = "any"
    key, value = next(iter(sorted(pairs)))
    grouped = {v for k, v in pairs if accepts(selection, k, v, value_group=32)}
    terms = [
        "refused" if not grouped else "with values in " + ", ".join(sorted(grouped)),
        "yes" if accepts(selection, key, value, anchor_every=4) else "refused",
        "yes" if accepts(selection, key, value, anchor_every=4, decay=0.9) else "refused",
    ]
    named = "any" if keys == KEY_FORMATS else ", ".join(f"`{key}`" for key in keys)
    return " | ".join([f"`{selection}`", named, values, *terms])


def test_the_table_in_the_documents_is_what_recipes_accept():
    text = DOCUMENT.read_text(encoding="utf-8")
    for selection in SELECTIONS:
        assert f"| {row(selection)} |" in text
    only = {name: " (keys only)" for name in cold_formats() if name not in VALUE_FORMATS}
    assert ", ".join(f"`{name}`{only.get(name, '')}" for name in cold_formats()) in text
    assert len(only) == 1


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("pair", list(product(KEY_FORMATS, VALUE_FORMATS)))
def test_a_refusal_names_what_does_not_combine(selection, pair):
    if accepts(selection, *pair):
        return
    with pytest.raises(UsageError) as refusal:
        Recipe(*pair, selection=selection, **BASE[selection])
    message = str(refusal.value)
    assert "combine" in message
    assert any(re.search(rf"\b{name}\b", message) for name in pair)
    assert pair in SIXTEEN_BIT_MIXED or f"'{selection}'" in message


@pytest.mark.parametrize("text", ["int8_per_channel", "k=int8_per_channel", "k=int8,v=int8_per_channel"])
def test_a_format_of_keys_only_is_refused_for_values_with_those_that_are_not(text):
    accepted = ", ".join(VALUE_FORMATS)
    refusal = f"^format int8_per_channel stores keys only: write k=int8_per_channel and v= one of {accepted}$"
    with pytest.raises(UsageError, match=refusal):
        Recipe.parse(text)


@pytest.mark.parametrize(
    ("terms", "named"),
    [
        ({"selection": "all", "anchor_every": 2}, "anchor_every=2"),
        ({"selection": "stride", "stride": 2, "anchor_every": 2}, "anchor_every=2"),
        ({"selection": "all", "decay": 0.5}, "decay=0.5"),
        ({"selection": "pages", "fractions": (0.5,), "stride": 2}, "stride=2"),
        ({"selection": "pages", "fractions": (0.5,), "decay": 0.5}, "decay=0.5"),
        ({"selection": "pages"}, "'pages' takes a fraction"),
        ({"selection": "all", "fractions": (0.5,)}, "'pages' takes a fraction"),
        ({"selection": "pages", "fractions": (0.5, 0.0)}, "pages=0.0"),
        ({"selection": "pages", "fractions": (float("nan"),)}, "pages=nan"),
        ({"value_group": 16}, "vgroup=16"),
    ],
)
def test_terms_that_do_not_combine_are_named(terms, named):
    with pytest.raises(UsageError, match=named):
        Recipe("int4", "int4", **({"selection": "all"} | terms)) if terms.get("selection") != "stride" else Recipe(
            "int8", "int8", **terms
        )


def test_a_group_and_fractions_must_fit_the_shape():
    with pytest.raises(UsageError, match="vgroup=64 does not divide a head of 80 channels: choose 40, 80"):
        Recipe.parse("int4,vgroup=64").check_shape(80, 2)
    with pytest.raises(UsageError, match="3 fractions for 2 KV heads"):
        Recipe.parse("pages=1/2:1/4:1/8").check_shape(64, 2)
    Recipe.parse("int4,vgroup=40,pages=1/2:1/4").check_shape(80, 2)
