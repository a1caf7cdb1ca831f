"""`stored_bits`: a calibration chooses each layer's formats, and what the layers store is what was promised."""

import warnings
from dataclasses import replace

import pytest
import torch

import elastickv.transformers as ekv
from elastickv.errors import UsageError
from elastickv.recipe.calibration import ModelCalibration
from elastickv.recipe.slab import Slab
from elastickv.transformers.model_loading import fingerprint
from tests.helpers.model_matrix import model, prompt

PAGE, KV_HEADS, DIM = 32, 2, 64


@pytest.fixture(scope="module")
def tiny():
    return model("llama")


@pytest.fixture(scope="module")
def windowed():
    return model("gemma3")


@pytest.fixture(autouse=True)
def stock(tiny):
    tiny.set_attn_implementation("sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error", ekv.UncalibratedWarning)
        yield


def calibration_of(made, layers=(0, 1)):
    """The first layer loses a hundred times as much by its keys as the others."""

    def table(error, *, of_keys):
        return tuple(((error * (100 if of_keys and layer == 0 else 1)),) * KV_HEADS for layer in layers)

    curve = {fraction: table(1 - fraction, of_keys=False) for fraction in (1.0, 0.5)}
    keys = {"int8": 1e-5, "int4": 1e-3, "int4+rotated": 5e-4}
    values = {"int8": 1e-5, "int4/64": 1e-4, "int3/64+rotated": 3e-4, "int3/64": 4e-4}
    return ModelCalibration(
        "tiny", fingerprint(made), layers, 4, KV_HEADS, DIM, "a text", 100, 10, {1: curve},
        {name: table(error, of_keys=True) for name, error in keys.items()},
        {name: table(error, of_keys=False) for name, error in values.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def calibration(tiny):
    return calibration_of(tiny)


def cache_of(tiny, bits, calibration):
    return ekv.ElasticCache.for_model(tiny, stored_bits=bits, calibration=calibration)


def generated(tiny, cache, count=3, tokens=400):
    return tiny.generate(**prompt(1, tokens), max_new_tokens=count, do_sample=False, past_key_values=cache)


@pytest.mark.parametrize(("bits", "promised"), [(4.25, 4.25), (5.1, 5.0625), (9, 8.25)])
def test_pages_take_the_bytes_that_were_promised(tiny, calibration, bits, promised):
    cache = cache_of(tiny, bits, calibration)
    assert cache.report().bits_per_element == promised, "before a prompt"
    generated(tiny, cache, count=33, tokens=400)
    stored = cache.report().stored_bytes
    # From 432 tokens to 464, the window, sinks and the tokens that fill no page do not change.
    generated_more = tiny.generate(**prompt(1, 432 + PAGE), max_new_tokens=1, past_key_values=(again := cache.another()))
    assert generated_more.shape[1] == 432 + PAGE + 1 and cache.lengths == (432,) and again.lengths == (432 + PAGE,)
    elements = 2 * PAGE * KV_HEADS * DIM * 2
    assert 8 * (again.report().stored_bytes - stored) / elements == promised
    slabs = [Slab.of(layer.store.cache.recipe, DIM).n_bytes for layer in cache.elastic_layers]
    assert 8 * KV_HEADS * sum(slabs) / elements == promised
    report = again.report()
    assert (report.stored_bits, report.compress, report.calibrated) == (bits, None, True)
    assert f"stored_bits={bits:g} ({promised:.3f} bits an element)" in str(report)
    assert all(f"{recipe}: layers" in str(report) for recipe in report.recipes.values())


def test_the_layer_that_loses_most_gets_the_bits(tiny, calibration):
    recipes = cache_of(tiny, 5.1, calibration).report().recipes
    assert [str(recipe) for recipe in recipes.values()] == ["k=int8,v=int3,rotate=v", "k=int4,v=int3,rotate=kv"]


def test_the_answers_are_those_of_a_cache_with_the_same_recipes(tiny, calibration, tmp_path):
    cache = cache_of(tiny, 5.1, calibration)
    given = ekv.ElasticCache.for_model(tiny, recipe=[str(r) for r in cache.report().recipes.values()], calibration=calibration)
    assert torch.equal(generated(tiny, cache), generated(tiny, given))
    with ekv.elastic(tiny, stored_bits=5.1, calibration=calibration) as session:
        tiny.generate(**prompt(1, 400), max_new_tokens=3)
    assert session.cache.recipes == given.recipes
    cache.save(tmp_path / "cache")
    again = ekv.ElasticCache.load(tmp_path / "cache", tiny)
    assert again.recipes == cache.recipes
    again.reset()
    assert again.report().stored_bits == 5.1 and again.report().recipes == cache.recipes


def test_a_calibration_may_be_a_file_under_either_name(tiny, calibration, tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(calibration.dumps())
    wanted = cache_of(tiny, 5, calibration).report().recipes
    assert cache_of(tiny, 5, str(file)).report().recipes == wanted
    assert ekv.ElasticCache.for_model(tiny, stored_bits=5, recipe=file).report().recipes == wanted


def test_layers_with_a_window_are_not_counted(windowed):
    errors = calibration_of(windowed, layers=(1,))
    cache = cache_of(windowed, 4.5, errors)
    generated(windowed, cache)
    assert list(cache.recipes) == [1] and cache.report().bits_per_element == 4.25
    with pytest.raises(UsageError, match=r"give 4\.25 or more"):
        cache_of(windowed, 4.2, errors)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stored_bits": 4.75}, "`stored_bits`=4.75 needs a calibration: run `elastickv calibrate`"),
        ({"stored_bits": 4.75, "compress": 4}, "leave out compress, recipe and layers"),
        ({"stored_bits": 4.75, "recipe": "int4"}, "leave out compress, recipe and layers"),
        ({"stored_bits": 4.75, "layers": {0: "int8"}}, "leave out compress, recipe and layers"),
        ({"stored_bits": "4.75"}, "is not a number: give bits an element, above 0 and at most 16"),
        ({"stored_bits": True}, "is not a number"),
        ({"stored_bits": -1}, "`stored_bits`=-1 is out of range"),
        ({"stored_bits": float("nan")}, "is out of range"),
        ({"stored_bits": 17}, "is out of range"),
    ],
)
def test_what_contradicts_it_or_is_missing_is_refused_in_one_line(tiny, options, named):
    with pytest.raises(UsageError, match=named) as refusal:
        ekv.ElasticCache.for_model(tiny, **options)
    assert "\n" not in str(refusal.value) and tiny.config._attn_implementation == "sdpa"


def test_too_few_bits_and_another_models_calibration_are_refused_before_there_is_a_prompt(tiny, calibration):
    with pytest.raises(UsageError, match=r"stored_bits=3 is less than .* the CPU reads takes: give 4\.25 or more"):
        cache_of(tiny, 3, calibration)
    with pytest.raises(UsageError, match="not of LlamaForCausalLM"):
        cache_of(tiny, 5, replace(calibration, fingerprint="0" * 16))
    assert tiny.config._attn_implementation == "sdpa"


def test_a_calibration_alone_is_no_budget(tiny, calibration):
    with pytest.raises(UsageError, match="neither compress nor a recipe is given: give compress=4"):
        ekv.ElasticCache.for_model(tiny, calibration=calibration)
