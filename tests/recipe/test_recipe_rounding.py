"""`rounding=` in a recipe: its text and hash, and what it does not combine with."""

import pytest

from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape, Recipe, stored_bytes

GPTQ = "k=int4,v=int3,rotate=kv,rounding=gptq"


def test_a_text_with_it_names_an_equal_recipe_of_another_hash():
    recipe, nearest = Recipe.parse(GPTQ), Recipe.parse("k=int4,v=int3,rotate=kv")
    assert str(recipe) == GPTQ and Recipe.parse(str(recipe)) == recipe
    assert recipe.hash != nearest.hash
    assert Recipe.parse("int4,rounding=nearest") == Recipe.parse("int4")
    assert str(Recipe.parse("int4,rounding=nearest")) == "int4"


def test_it_takes_no_bytes():
    shape = AttentionShape(1, 4, 2, 64)
    gptq, nearest = (stored_bytes(Recipe.parse(text), [1000], shape) for text in ("int4,rounding=gptq", "int4"))
    assert gptq == nearest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int4,rounding=up", r"rounding=up is unknown: write rounding=nearest or rounding=gptq"),
        (
            "fp8,rounding=gptq",
            r"rounding=gptq does not combine with fp8: K or V in one of int8, int4, int8_per_channel, int3, int2",
        ),
        ("bf16,rounding=gptq", r"rounding=gptq does not combine with bf16"),
        ("int8,stride=2,rounding=gptq", r"rounding=gptq does not combine with 'stride', which stores single rows"),
        ("int4,rounding=gptq,rounding=gptq", r"names rounding twice"),
        ("int4,rounding", r"'rounding' is not a term"),
    ],
)
def test_what_it_does_not_combine_with_is_refused(text, message):
    with pytest.raises(UsageError, match=message):
        Recipe.parse(text)


@pytest.mark.parametrize(
    "text", ["k=fp8,v=int3", "k=int8,v=bf16", "int4,pages=1/4,anchor_every=4", "int8,reuse,anchor_every=2"]
)
def test_one_integer_tensor_is_enough(text):
    assert Recipe.parse(f"{text},rounding=gptq").uses_hessians
