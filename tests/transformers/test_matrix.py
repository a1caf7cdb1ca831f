"""`generate` with an elastic cache, architecture by architecture: with compress=1 it is the stock cache, token for token."""

import copy
from typing import Any

import pytest
import torch
import transformers as tf

import elastickv.transformers as ekv
from tests.helpers.model_matrix import CONFIGS, VOCABULARY, model, padded, prompt

NEW = 24


@pytest.fixture(scope="module", params=list(CONFIGS))
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tiny(name) -> Any:
    return model(name)


@pytest.fixture(autouse=True)
def stock_before_and_after(tiny):
    before = tiny.config._attn_implementation
    yield
    tiny.set_attn_implementation(before)


def elastic(tiny, compress=1, **options):
    return ekv.ElasticCache.for_model(tiny, compress, **options)


def generate(tiny, inputs, **options):
    return tiny.generate(**inputs, max_new_tokens=NEW, **({"do_sample": False} | options))


@pytest.mark.parametrize("lengths", [[70], [70, 41, 3]], ids=["one", "ragged"])
def test_greedy_and_sampled_tokens_are_the_stock_caches(tiny, lengths):
    inputs = padded(lengths)
    stock = generate(tiny, inputs)
    torch.manual_seed(5)
    sampled = generate(tiny, inputs, do_sample=True, num_return_sequences=2)
    assert len(set(stock[0, 70:].tolist())) > 3
    assert torch.equal(generate(tiny, inputs, past_key_values=elastic(tiny)), stock)
    torch.manual_seed(5)
    again = generate(tiny, inputs, do_sample=True, num_return_sequences=2, past_key_values=elastic(tiny))
    assert torch.equal(again, sampled)


def test_beams_are_the_stock_caches(tiny):
    inputs = padded([70, 41])
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}
    stock = generate(tiny, inputs, **options)
    assert torch.equal(generate(tiny, inputs, **options, past_key_values=elastic(tiny)), stock)


def test_turns_and_chunks_are_the_stock_caches(tiny):
    first, more = padded([70, 41]), prompt(2, 9, seed=7)["input_ids"]

    def talk(cache):
        generated = generate(tiny, first, past_key_values=cache)
        ids = torch.cat([generated, more], dim=1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, ids.shape[1] - 70, dtype=torch.int64)], dim=1)
        return generate(tiny, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache)

    stock = talk(tf.DynamicCache(config=tiny.config))
    assert torch.equal(talk(elastic(tiny)), stock)
    chunked = generate(tiny, first, past_key_values=elastic(tiny), prefill_chunk_size=32)
    assert torch.equal(chunked, stock[:, : 70 + NEW])


def test_a_shared_prompt_is_copied_and_a_cache_is_reset(tiny):
    inputs = padded([60, 60])
    cache = elastic(tiny)
    with torch.no_grad():
        tiny(**inputs, past_key_values=cache)
    answers = []
    for seed in (3, 4):
        ids = torch.cat([inputs["input_ids"], prompt(2, 5, seed)["input_ids"]], dim=1)
        full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answers.append((generate(tiny, full, past_key_values=copy.deepcopy(cache)), generate(tiny, full)))
    assert cache.get_seq_length() == 60
    for elastic_ids, stock in answers:
        assert torch.equal(elastic_ids, stock)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(generate(tiny, inputs, past_key_values=cache), generate(tiny, inputs))


def test_a_saved_cache_goes_on_where_it_was(tiny, tmp_path):
    inputs = padded([70, 41])
    cache = elastic(tiny)
    generated = generate(tiny, inputs, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    ids = torch.cat([generated, prompt(2, 6, seed=9)["input_ids"]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, ids.shape[1] - 70, dtype=torch.int64)], dim=1)
    loaded = ekv.ElasticCache.load(tmp_path / "cache.safetensors", tiny)
    assert loaded.get_seq_length() == cache.get_seq_length()
    full = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(generate(tiny, full, past_key_values=loaded), generate(tiny, full, past_key_values=cache))


def test_logits_of_a_compressed_cache_are_near_the_stock_ones(tiny, name):
    """int8 is within a few percent of the spread of the logits; a wrong page, mask or order is not."""
    inputs = padded([300, 230])
    following = prompt(2, 5, seed=3)["input_ids"]

    def logits(cache):
        with torch.no_grad():
            tiny(**inputs, past_key_values=cache)
            mask, steps = inputs["attention_mask"], []
            for number in range(5):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], dim=1)
                positions = mask.cumsum(1)[:, -1:] - 1
                ids = following[:, number : number + 1]
                steps.append(tiny(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits)
        return torch.cat(steps)

    stock = logits(tf.DynamicCache(config=tiny.config))
    near = logits(elastic(tiny, None, recipe="int8") if not name.endswith("windowed") else elastic(tiny))
    assert (near - stock).std() < 0.06 * stock.std()
    assert near.argmax(-1).eq(stock.argmax(-1)).float().mean() > 0.7
    assert stock.shape[-1] == VOCABULARY
