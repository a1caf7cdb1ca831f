"""An elastic cache in place of Transformers' own: iteration, state, copies and what it cannot do."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from transformers import DynamicCache

import elastickv.transformers as ekv
from elastickv.errors import UsageError
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from tests.helpers.model_matrix import model, padded, prompt

INPUTS = padded([220, 190])


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def tiny(request):
    return model(request.param)


def filled(tiny, cache, inputs=INPUTS):
    with torch.no_grad():
        tiny(**inputs, **{CACHE_ARGUMENT: cache})
    return cache


@pytest.mark.parametrize(
    ("options", "tolerance"), [({"compress": 1}, 0), ({"recipe": "int8"}, 0.02), ({"compress": 1, "prefill": "exact"}, 0)]
)
def test_iterating_yields_what_the_stock_cache_yields(tiny, options, tolerance):
    stock = filled(tiny, DynamicCache(config=tiny.config))
    cache = filled(tiny, ekv.ElasticCache.for_model(tiny, **options))
    assert len(cache) == len(stock) == len(list(cache))
    for ours, theirs in zip(cache, stock, strict=True):
        real = INPUTS["attention_mask"][:, None, -theirs[0].shape[2] :, None]
        for tensor, expected in zip(ours[:2], theirs[:2], strict=True):
            assert tensor.shape == expected.shape and tensor.dtype == expected.dtype
            assert ((tensor - expected) * real).abs().max() <= tolerance * expected.abs().max()
        assert ours[2] == theirs[2]


def test_dtypes_are_the_models():
    tiny = model("llama").to(torch.bfloat16)
    cache = filled(tiny, ekv.ElasticCache.for_model(tiny, recipe="int8"))
    assert {tensor.dtype for layer in cache for tensor in layer[:2]} == {torch.bfloat16}


def test_an_empty_cache_yields_nothing_for_each_layer(tiny):
    cache, stock = ekv.ElasticCache.for_model(tiny, compress=1), DynamicCache(config=tiny.config)
    assert [layer[:2] for layer in cache] == [layer[:2] for layer in stock] == [(None, None)] * 2


def test_dropped_tokens_cannot_be_iterated(tiny):
    cache = filled(tiny, ekv.ElasticCache.for_model(tiny, recipe="int8,stride=2"))
    with pytest.raises(UsageError, match="has dropped tokens"):
        list(cache)


def test_every_public_property_is_the_stock_ones(tiny):
    cache, stock = ekv.ElasticCache.for_model(tiny, compress=1), DynamicCache(config=tiny.config)
    names = [name for name in dir(type(stock)) if not name.startswith("_") and isinstance(getattr(type(stock), name), property)]
    assert {"is_initialized", "is_sliding"} <= set(names)

    def properties(one):
        return {name: getattr(one, name) for name in names}

    assert properties(cache) == properties(stock)
    assert not cache.is_initialized
    assert properties(filled(tiny, cache)) == properties(filled(tiny, stock))
    assert cache.is_initialized
    cache.reset()
    assert not cache.is_initialized


@pytest.mark.parametrize(
    "write",
    [pickle.dumps, lambda one: torch.save(one, io.BytesIO()), ForkingPickler.dumps, lambda one: pickle.dumps([{1: one}])],
)
def test_pickling_names_the_method_to_use(tiny, write):
    cache = filled(tiny, ekv.ElasticCache.for_model(tiny, compress=1))
    for kind in (UsageError, TypeError):
        for part in (cache, cache.layers, cache.elastic_layers[0]):
            with pytest.raises(kind, match=r"cannot be pickled.*cache\.save\(path\).*ElasticCache\.load\(path, model\)"):
                write(part)


def test_copies_still_work(tiny):
    cache = filled(tiny, ekv.ElasticCache.for_model(tiny, recipe="int8"))
    shallow, deep, layers = copy.copy(cache), copy.deepcopy(cache), copy.deepcopy(cache.layers)
    assert shallow.layers is cache.layers and shallow.lengths == (220, 190)
    filled(tiny, cache, {"input_ids": prompt(2, 3)["input_ids"]})
    assert (shallow.lengths, deep.lengths) == ((223, 193), (220, 190))
    assert [layer.get_seq_length() for layer in layers] == [220, 220]
