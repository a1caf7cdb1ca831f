"""Settings of `generate` are read the way Transformers resolves them: argument, configuration, the model's own."""

from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria

import elastickv.transformers as ekv
from elastickv.errors import UsageError
from elastickv.model_benchmark import generation
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from elastickv.transformers.generation_settings import plain_decoding
from tests.helpers.model_matrix import model, padded, prompt

LENGTH = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}
RECIPE = "int4,pages=1/4"
INPUTS = padded([220, 190])


@pytest.fixture
def tiny():
    return model("llama")


INPUTS_AND_CACHE = {"attention_mask": INPUTS["attention_mask"]}


def generate(tiny, *args, **options):
    return tiny.generate(INPUTS["input_ids"], *args, **INPUTS_AND_CACHE, **options)


def as_keyword(tiny, settings):
    return generate(tiny, **LENGTH, **settings)


def as_configuration(tiny, settings):
    return generate(tiny, generation_config=GenerationConfig(**LENGTH, **settings))


def as_position(tiny, settings):
    return generate(tiny, GenerationConfig(**LENGTH, **settings))


def as_the_models_own(tiny, settings):
    own = tiny.generation_config
    tiny.generation_config = GenerationConfig(**own.to_dict() | settings)
    try:
        return generate(tiny, **LENGTH)
    finally:
        tiny.generation_config = own


WAYS = [as_keyword, as_configuration, as_position, as_the_models_own]
OTHER_CACHES = [
    {"use_cache": False},
    {"cache_implementation": "static", "disable_compile": True},
    {"cache_implementation": "dynamic"},
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", OTHER_CACHES, ids=str)
def test_a_call_that_is_set_to_another_cache_or_none_is_left_alone(tiny, way, settings):
    stock = way(tiny, settings)
    with ekv.elastic(tiny, recipe=RECIPE) as session:
        assert torch.equal(way(tiny, settings), stock)
        assert session.cache is None
        way(tiny, {})
        assert session.cache is not None and not torch.equal(way(tiny, {}), stock)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [{"num_beams": 3, "num_return_sequences": 2}, {"use_cache": True}], ids=str)
def test_other_settings_are_those_of_the_same_call_with_a_cache(tiny, way, settings):
    with ekv.elastic(tiny, recipe=RECIPE) as session:
        generated = way(tiny, settings)
        assert session.cache is not None
        assert session.cache.lengths[0] == 220 + 7
        rows = session.cache.report().lengths
    assert len(rows) == 2 * settings.get("num_beams", 1)
    assert len(generated) == 2 * settings.get("num_return_sequences", 1)


def test_use_cache_none_is_what_transformers_makes_of_it(tiny):
    stock = as_keyword(tiny, {"use_cache": None})
    with ekv.elastic(tiny, recipe=RECIPE) as session:
        assert torch.equal(as_keyword(tiny, {"use_cache": None}), stock)
        assert session.cache is None


def test_a_keyword_overrides_a_configuration_as_in_transformers(tiny):
    with ekv.elastic(tiny, recipe=RECIPE) as session:
        generate(tiny, generation_config=GenerationConfig(use_cache=False, **LENGTH), use_cache=True)
        assert session.cache is not None


def test_what_transformers_ignores_is_ignored(tiny):
    with ekv.elastic(tiny, recipe=RECIPE) as session:
        as_the_models_own(tiny, {"cache_implementation": "hybrid"})
        assert session.cache is not None


def test_continuous_batching_is_refused_by_name(tiny):
    with ekv.elastic(tiny, compress=1), pytest.raises(UsageError, match=r"cache_implementation='paged'.*outside of the block"):
        generate(tiny, cache_implementation="paged")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("way", [as_keyword, as_configuration, as_position, as_the_models_own])
def test_an_elastic_cache_with_use_cache_false_is_refused(tiny, monkeypatch, way, inside):
    cache = ekv.ElasticCache.for_model(tiny, compress=1)
    monkeypatch.setitem(INPUTS_AND_CACHE, CACHE_ARGUMENT, cache)
    with (
        ekv.elastic(tiny, compress=1) if inside else nullcontext(),
        pytest.raises(UsageError, match=r"use_cache=False is set.*an ElasticCache is passed"),
    ):
        way(tiny, {"use_cache": False})
    assert cache.get_seq_length() == 0


def test_an_elastic_cache_and_the_name_of_another_are_refused_in_a_block(tiny):
    with ekv.elastic(tiny, compress=1):
        cache = ekv.ElasticCache.for_model(tiny, compress=1)
        with pytest.raises(UsageError, match=r"cache_implementation='static' is set.*drop one of them"):
            generate(tiny, **LENGTH, cache_implementation="static", **{CACHE_ARGUMENT: cache})


def test_a_stock_cache_is_used_as_it_is_whatever_is_set(tiny):
    own = DynamicCache(config=tiny.config)
    stock = generate(tiny, **LENGTH)
    with ekv.elastic(tiny, recipe=RECIPE) as session:
        assert torch.equal(generate(tiny, **LENGTH, **{CACHE_ARGUMENT: own}), stock)
        assert session.cache is None


def test_a_draft_by_the_models_own_first_layers_has_the_stock_cache(tiny):
    inputs = prompt(1, 60)
    stock = tiny.generate(**inputs, **LENGTH)
    with ekv.elastic(tiny, compress=1) as session:
        assert torch.equal(tiny.generate(**inputs, **LENGTH, assistant_early_exit=1), stock)
        assert session.cache is not None and len(session.cache.layers) == 2


def test_a_prompt_and_a_configured_length_beyond_the_capacity_are_refused(tiny):
    with (
        ekv.elastic(tiny, compress=1, capacity=224),
        pytest.raises(UsageError, match="227 tokens exceed the cache's capacity of 224"),
    ):
        as_configuration(tiny, {})


def test_a_measured_text_does_not_depend_on_the_models_own_configuration(tiny):
    ids = prompt(1, 200)["input_ids"]

    def text():
        made = generation.elastic(tiny, ids, torch.ones_like(ids), generation.Sampling(), 210, {"recipe": RECIPE})
        made.advance(6)
        return made.text_ids()

    plain = text()
    tiny.generation_config.update(
        use_cache=False, num_beams=2, cache_implementation="static", return_dict_in_generate=True, stop_strings="x"
    )
    own = tiny.generation_config
    assert text() == plain
    assert tiny.generation_config is own and own.num_beams == 2


def test_the_models_configuration_comes_back_after_an_exception(tiny):
    class Stop(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            raise KeyboardInterrupt

    own = tiny.generation_config
    with pytest.raises(KeyboardInterrupt), plain_decoding(tiny):
        generate(tiny, **LENGTH, stopping_criteria=[Stop()])
    assert tiny.generation_config is own
