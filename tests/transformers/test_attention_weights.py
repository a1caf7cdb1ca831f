"""Without an elastic cache a model's own attention is whole, weights and gradients included; with one, weights are refused."""

import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import elastickv.transformers as ekv
from elastickv.errors import UsageError
from elastickv.transformers.attention import eager_of
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from tests.helpers.model_matrix import model, padded, prompt

INPUTS = padded([40, 31])


def eager(name):
    made = model(name)
    made.set_attn_implementation("eager")
    return made


def with_a_stock_cache(tiny):
    cache = DynamicCache(config=tiny.config)
    mask = torch.cat([INPUTS["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], 1)
    with torch.no_grad():
        tiny(**INPUTS, **{CACHE_ARGUMENT: cache})
        outputs = tiny(torch.tensor([[7], [8]]), attention_mask=mask, output_attentions=True, **{CACHE_ARGUMENT: cache})
    return outputs.logits, outputs.attentions


def without_a_cache(tiny):
    with torch.no_grad():
        outputs = tiny(**INPUTS, output_attentions=True, use_cache=False)
    return outputs.logits, outputs.attentions


def without_a_mask(tiny):
    with torch.no_grad():
        outputs = tiny(**prompt(1, 30), output_attentions=True)
    return outputs.logits, outputs.attentions


def in_training(tiny):
    tiny.train()
    tiny.gradient_checkpointing_enable()
    tiny.zero_grad()
    outputs = tiny(**INPUTS, labels=INPUTS["input_ids"], output_attentions=True, use_cache=False)
    outputs.loss.backward()
    tiny.gradient_checkpointing_disable()
    tiny.eval()
    gradients = [parameter.grad.flatten() for parameter in tiny.parameters() if parameter.grad is not None]
    return torch.cat(gradients), outputs.attentions


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("called", [with_a_stock_cache, without_a_cache, without_a_mask, in_training])
def test_weights_and_outputs_are_those_of_eager_attention(name, called):
    tiny = eager(name)
    outputs, weights = called(tiny)
    ekv.ElasticCache.for_model(tiny, recipe="int4")
    ours, our_weights = called(tiny)
    assert torch.equal(ours, outputs)
    assert len(our_weights) == len(weights) == 2
    assert all(map(torch.equal, our_weights, weights))
    ekv.release(tiny)
    assert all(map(torch.equal, called(tiny)[1], weights))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_weights_of_an_elastic_cache_are_refused(name, implementation):
    tiny = model(name)
    tiny.set_attn_implementation(implementation)
    cache = ekv.ElasticCache.for_model(tiny, recipe="int4")
    with pytest.raises(UsageError, match=r"output_attentions=True.*no attention weights"), torch.no_grad():
        tiny(**INPUTS, output_attentions=True, **{CACHE_ARGUMENT: cache})
    options = {"max_new_tokens": 2, "output_attentions": True, "return_dict_in_generate": True}
    with (
        ekv.elastic(tiny, recipe="int4"),
        pytest.raises(UsageError, match=r"output_attentions=True.*no attention weights"),
    ):
        tiny.generate(**INPUTS, **options)


def test_weights_that_the_configuration_requests_are_refused_too():
    tiny = eager("llama")
    tiny.config.output_attentions = True
    cache = ekv.ElasticCache.for_model(tiny, recipe="int4")
    with pytest.raises(UsageError, match="output_attentions=True"), torch.no_grad():
        tiny(**INPUTS, **{CACHE_ARGUMENT: cache})


def test_a_hybrid_whose_pass_was_refused_halfway_refuses_the_next_one():
    tiny = model("gemma3")
    cache = ekv.ElasticCache.for_model(tiny, recipe="int4")
    with pytest.raises(UsageError, match="no gradient"):
        tiny(**INPUTS, **{CACHE_ARGUMENT: cache})
    with pytest.raises(UsageError, match=r"broke off.*reset\(\)"), torch.no_grad():
        tiny(**INPUTS, **{CACHE_ARGUMENT: cache})
    cache.reset()
    with torch.no_grad():
        tiny(**INPUTS, **{CACHE_ARGUMENT: cache})
    assert cache.lengths == (40, 31)


def test_a_module_that_is_not_causal_gets_no_causal_mask():
    tiny = eager("llama")
    ekv.ElasticCache.for_model(tiny, recipe="int4")
    module = tiny.model.layers[0].self_attn
    query, key, value = (torch.randn(1, heads, 9, 64) for heads in (4, 2, 2))
    ours = AttentionInterface()["elastickv_eager"](module, query, key, value, None, scaling=0.125)
    stock = eager_of(module)(module, query, key, value, None, scaling=0.125)
    assert all(map(torch.equal, ours, stock))


def test_the_attention_of_a_parent_class_is_used_for_a_class_in_another_file():
    class Own(type(model("llama").model.layers[0].self_attn)):
        pass

    tiny = eager("llama")
    tiny.model.layers[0].self_attn.__class__ = Own
    outputs, weights = without_a_cache(tiny)
    ekv.ElasticCache.for_model(tiny, recipe="int4")
    ours, our_weights = without_a_cache(tiny)
    assert torch.equal(ours, outputs) and all(map(torch.equal, our_weights, weights))


@pytest.mark.parametrize("implementation", ["elastickv", "elastickv_eager"])
def test_a_wrapper_may_pass_dropout_by_position(implementation, monkeypatch):
    """As kvpress wraps every registered attention function: mask, dropout, then the rest by name."""
    tiny = model("gemma3")
    tiny.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = tiny(**INPUTS, use_cache=False).logits
    attend, dropouts = ALL_ATTENTION_FUNCTIONS[implementation], []

    def wrapper(module, query, key, value, attention_mask, dropout, **kwargs):
        dropouts.append(dropout)
        return attend(module, query, key, value, attention_mask, dropout, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, implementation, wrapper)
    with torch.no_grad():
        assert torch.equal(tiny(**INPUTS, use_cache=False).logits, expected)
    assert set(dropouts) == {0.0}
