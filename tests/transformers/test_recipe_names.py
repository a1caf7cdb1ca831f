"""A recipe, a calibration, a model and a saved cache by name: long texts are texts, and no name ends in a traceback."""

import json

import pytest

from elastickv import UsageError
from elastickv.recipe import Recipe
from tests.helpers.names import TEXTS, files
from tests.helpers.tiny_models import tiny_llama

torch = pytest.importorskip("torch")

HEADS = 40
# More bytes than a file's name may have.
LONG = "int4,vgroup=32,pages=" + ":".join(f"{0.21 + n / 97!r}" for n in range(HEADS)) + ",anchor_every=4"


@pytest.fixture(scope="module")
def model():
    return tiny_llama().model


@pytest.fixture(scope="module")
def wide():
    return tiny_llama(num_attention_heads=HEADS, num_key_value_heads=HEADS, hidden_size=2 * HEADS).model


def refused(call):
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TEXTS.values(), ids=TEXTS)
def test_a_name_that_no_file_has_is_refused_in_one_line(model, name):
    from elastickv.transformers import ElasticCache
    from elastickv.transformers.model_loading import load_model

    refused(lambda: ElasticCache.for_model(model, recipe=name))
    refused(lambda: ElasticCache.for_model(model, compress=2, layers={0: name}))
    refused(lambda: ElasticCache.for_model(model, compress=2, calibration=name))
    refused(lambda: ElasticCache.load(name, model))
    refused(lambda: load_model(name))


def test_a_path_that_leads_to_no_readable_file_is_refused_in_one_line(model, tmp_path):
    from elastickv.transformers import ElasticCache

    for path in files(tmp_path):
        for name in (path, str(path)):
            refused(lambda: ElasticCache.for_model(model, recipe=name))  # noqa: B023
            refused(lambda: ElasticCache.for_model(model, compress=2, calibration=name))  # noqa: B023
            refused(lambda: ElasticCache.load(name, model))  # noqa: B023


@pytest.mark.parametrize("name", ["a long name", "a zero byte", "half a character"])
def test_a_cache_is_not_saved_under_a_name_that_no_file_can_have(model, name):
    from elastickv.transformers import ElasticCache

    refused(lambda: ElasticCache.for_model(model, compress=2).save(TEXTS[name]))


@pytest.mark.parametrize("value", [3, b"int4", object()])
def test_what_is_neither_recipe_nor_calibration_is_refused_in_one_line(model, value):
    from elastickv.transformers import ElasticCache

    refused(lambda: ElasticCache.for_model(model, recipe=value))
    refused(lambda: ElasticCache.for_model(model, compress=2, calibration=value))


def test_a_recipe_of_forty_heads_is_taken_as_text_and_from_files(wide, tmp_path):
    from elastickv.transformers import ElasticCache

    recipe = Recipe.parse(LONG)
    assert len(LONG) > 255 and len(recipe.fractions) == HEADS and str(recipe) == LONG
    (tmp_path / "recipe.txt").write_text(LONG + "\n")
    record = {"format": "elastickv-recipes", "version": 1, "recipe": None, "layers": {"0": LONG, "1": LONG}}
    (tmp_path / "recipes.json").write_text(json.dumps(record))
    for value in (LONG, recipe, [LONG, LONG], {0: LONG, 1: LONG}, tmp_path / "recipe.txt", str(tmp_path / "recipes.json")):
        cache = ElasticCache.for_model(wide, recipe=value)
        assert dict(cache.report().recipes) == {0: recipe, 1: recipe}
    with torch.no_grad():
        wide(torch.arange(100)[None], past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    again = ElasticCache.load(tmp_path / "cache.safetensors", wide)
    assert dict(again.report().recipes) == {0: recipe, 1: recipe}
