"""A compiled model works with an elastic cache, and chooses the tokens of the model that is not compiled."""

import pytest
import torch

import elastickv.transformers as ekv
from elastickv.transformers.cache_argument import CACHE_ARGUMENT
from elastickv.transformers.cuda_graph.model_patch import Forward
from tests.helpers.model_matrix import model, padded

INPUTS, RECIPE = padded([180, 150]), "int4,pages=1/4"


@pytest.fixture
def tiny():
    yield model("llama", num_hidden_layers=1)
    torch._dynamo.reset()


def test_a_compiled_forward_generates_the_same_tokens(tiny):
    def text():
        return tiny.generate(**INPUTS, do_sample=False, pad_token_id=0, max_new_tokens=2)

    with ekv.elastic(tiny, recipe=RECIPE) as session:
        plain = text()
        tiny.forward = torch.compile(tiny.forward, backend="eager")
        assert torch.equal(text(), plain)
        assert session.cache.lengths == (181, 151)


def logits(tiny, called):
    cache = ekv.ElasticCache.for_model(tiny, recipe=RECIPE)
    with torch.no_grad():
        prompt = called(**INPUTS, **{CACHE_ARGUMENT: cache}).logits
        return prompt, called(input_ids=torch.tensor([[7], [9]]), **{CACHE_ARGUMENT: cache}).logits


@pytest.mark.parametrize("captures", [False, True])
def test_a_compiled_model_returns_the_same_logits(tiny, captures):
    plain = logits(tiny, tiny)
    if captures:
        tiny.forward = Forward(tiny, None)  # what an instance gets on a CUDA device
    assert all(map(torch.equal, logits(tiny, torch.compile(tiny.forward, backend="eager")), plain))


def test_without_an_elastic_cache_the_graph_stays_whole(tiny):
    ekv.ElasticCache.for_model(tiny, compress=1)
    ids = INPUTS["input_ids"][:1]
    with torch.no_grad():
        whole = torch.compile(tiny.forward, backend="eager", fullgraph=True)
        assert torch.equal(whole(input_ids=ids, use_cache=False).logits, tiny(input_ids=ids, use_cache=False).logits)
