"""What a compressed cache computes, compared with its definition in float64: exact prompts, decodes, chunks, padding."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

import elastickv.transformers as ekv
from elastickv.kvcache import Oracle
from elastickv.kvcache.attention import attend
from elastickv.recipe import Recipe
from elastickv.transformers import chunked_attention
from elastickv.transformers.chunked_attention import Scoring, attend_stored
from tests.helpers.model_matrix import model, padded, prompt

RECIPES = [
    "dense",
    "int8",
    "k=int8,v=int4",
    "int4,vgroup=32",
    "k=int8_per_channel,v=int8",
    "int4,pages=1/4,anchor_every=3",
    "int8,stride=2",
    "int8,reuse,anchor_every=3",
]
LIMIT = 2e-4  # kernel error of int4 codes in float32 (docs/bench.md), and the model's own rounding


class Watch:
    """Records the arguments and outputs of an elastic layer's attention."""

    def __init__(self, monkeypatch) -> None:
        from elastickv.transformers.layer import ElasticLayer

        self.calls: list[tuple[Any, ...]] = []
        own = ElasticLayer.attend

        def attend_and_note(layer, pending, call):
            before = None if layer.store is None else copy.deepcopy(layer.store.cache)
            output = own(layer, pending, call)
            self.calls.append((layer, before, pending, call, output))
            return output

        monkeypatch.setattr(ElasticLayer, "attend", attend_and_note)


@pytest.fixture(scope="module")
def tiny():
    return model("llama")


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


def relative(output: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(output) - expected) / np.linalg.norm(expected))


def run(tiny, cache, inputs) -> torch.Tensor:
    with torch.no_grad():
        positions = inputs["attention_mask"].cumsum(1) - 1
        past = cache.get_seq_length()
        return tiny(
            inputs["input_ids"][:, past:],
            attention_mask=inputs["attention_mask"],
            position_ids=positions[:, past:].clamp(min=0),
            past_key_values=cache,
        ).logits


def longer(inputs, count: int, seed: int = 9) -> dict[str, torch.Tensor]:
    more = prompt(len(inputs["input_ids"]), count, seed)
    return {name: torch.cat([inputs[name], more[name]], dim=1) for name in inputs}


@pytest.mark.parametrize("text", RECIPES)
def test_a_prompt_in_one_call_is_exact_whatever_the_recipe(tiny, text):
    inputs = padded([300, 211])
    stock = tiny(**inputs, use_cache=False).logits.detach()
    logits = run(tiny, ekv.ElasticCache.for_model(tiny, recipe=text), inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], stock[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", RECIPES)
def test_decodes_are_the_oracles_on_the_same_codes_and_pages(tiny, watch, text):
    inputs = padded([300, 211, 2])
    cache = ekv.ElasticCache.for_model(tiny, recipe=text)
    run(tiny, cache, inputs)
    oracles = {layer.number: Oracle(layer.store.cache) for layer in cache.elastic_layers}
    for seed in range(7):
        inputs = longer(inputs, 1, seed)
        watch.calls.clear()
        run(tiny, cache, inputs)
        assert len(watch.calls) == 2
        for layer, _, _, call, output in watch.calls:
            expected, _ = oracles[layer.number].decode(call.query[:, :, 0].numpy())
            assert relative(output[:, 0], expected) < LIMIT
    assert cache.lengths == (307, 218, 9)


def expected_chunk(before, call, pending, real, stride: int, recipe: Recipe) -> np.ndarray:
    """Return float64 attention to all stored tokens and the new ones up to each query's own."""
    batch, heads, new, dim = call.query.shape
    outputs = np.zeros((batch, heads, new, dim))
    group = heads // pending.keys.shape[1]
    for row, head in np.ndindex(batch, heads):
        stored = before.stored(row, head // group)
        keys = np.concatenate([stored.cold_keys, stored.exact_keys])
        values = np.concatenate([stored.cold_values, stored.exact_values])
        own = [tensor[row, head // group].double().numpy() for tensor in (pending.keys, pending.values)]
        for query in range(new):
            seen = np.flatnonzero(real[row, : query + 1])
            if not real[row, query]:
                continue
            k, v = (np.concatenate([x, y[seen]]) for x, y in zip((keys, values), own, strict=True))
            # `attend` divides by the root of the head's size, as this model does.
            outputs[row, head, query] = attend(call.query[row, head, query : query + 1].numpy(), k, v).output[0]
    return outputs


@pytest.mark.parametrize("text", [text for text in RECIPES if "stride" not in text])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "blocks"])
def test_chunks_read_all_that_is_stored_as_its_codes_say(tiny, watch, monkeypatch, text, padding, whole):
    if not whole:
        monkeypatch.setattr(chunked_attention, "WHOLE_ELEMENTS", 0)
        monkeypatch.setattr(chunked_attention, "BLOCK_TOKENS", 70)
    monkeypatch.setattr(chunked_attention, "SCORES_AT_ONCE", 5000)
    inputs = padded([300, 211])
    cache = ekv.ElasticCache.for_model(tiny, recipe=text)
    run(tiny, cache, inputs)
    for seed in range(3):
        inputs = longer(inputs, 1, seed)
        run(tiny, cache, inputs)
    inputs = longer(inputs, 9)
    real = np.ones((2, 9), bool)
    if padding:
        inputs["attention_mask"][1, -9 : -9 + padding] = 0
        real[1, :padding] = False
    watch.calls.clear()
    run(tiny, cache, inputs)
    for layer, before, pending, call, output in watch.calls:
        expected = expected_chunk(before, call, pending, real, 1, layer.store.cache.recipe)
        attended = output.transpose(1, 2).numpy() * real[:, None, :, None]
        assert relative(attended, expected) < LIMIT
    assert cache.lengths == (312, 223 - padding)
    assert cache.report().chunks == 1
    run(tiny, cache, longer(inputs, 1))


def test_a_stride_weighs_retained_tokens_for_those_dropped(tiny):
    """With all keys equal, every retained token counts for cold / retained of them: the sums are those of the oracle."""
    cache = ekv.ElasticCache.for_model(tiny, recipe="int8,stride=4")
    run(tiny, cache, prompt(1, 300))
    store = cache.elastic_layers[0].store
    query = torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(3))
    new = torch.zeros(1, 2, 1, 64)
    far = torch.full((1, 2, 1, 64), -1e3) * torch.sign(query.reshape(1, 2, 2, 1, 64).sum(2))
    outputs = attend_stored(query, far, new, None, store, Scoring(64**-0.5))
    expected, _ = Oracle(store.cache).decode(query[:, :, 0].numpy())
    sure = (query * far.repeat_interleave(2, 1)).sum(-1).flatten() < -100
    assert sure.any()
    for head in np.flatnonzero(sure):
        assert relative(outputs[0, head, 0], expected[0, head]) < LIMIT


def test_padding_is_neither_stored_nor_scored(tiny):
    short = padded([211])
    alone = ekv.ElasticCache.for_model(tiny, recipe="int4,pages=1/4")
    beside = ekv.ElasticCache.for_model(tiny, recipe="int4,pages=1/4")
    both = padded([300, 211])
    both["input_ids"][1, -211:] = short["input_ids"][0]
    run(tiny, alone, short)
    run(tiny, beside, both)
    for mine, other in zip(alone.elastic_layers, beside.elastic_layers, strict=True):
        assert mine.store.lengths.tolist() == [211]
        assert other.store.lengths.tolist() == [300, 211]
        for k, v in zip(mine.store.read(0, 211), other.store.read(0, 211), strict=True):
            # Attention over padded batches rounds otherwise: codes of a step differ by a step at most.
            assert relative(v[1:], k.numpy()) < 1e-2


def test_right_padding_is_no_token_either(tiny):
    ids = prompt(1, 60)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 50:] = 0
    cache = ekv.ElasticCache.for_model(tiny, 1)
    with torch.no_grad():
        tiny(ids, attention_mask=mask, past_key_values=cache)
        after = tiny(
            ids[:, :1],
            attention_mask=torch.cat([mask, torch.ones(1, 1, dtype=torch.int64)], 1),
            position_ids=torch.tensor([[50]]),
            past_key_values=cache,
        ).logits
        plain = tiny(torch.cat([ids[:, :50], ids[:, :1]], 1)).logits[:, -1:]
    assert cache.lengths == (51,)
    torch.testing.assert_close(after, plain, rtol=1e-4, atol=1e-4)


def test_an_exact_prefill_keeps_a_prompts_chunks_in_16_bit_until_it_ends(tiny):
    inputs = padded([300, 211])
    caches = {how: ekv.ElasticCache.for_model(tiny, recipe="int4", prefill=how) for how in ("exact", "stored")}
    stock = tiny(**inputs, use_cache=False).logits.detach()[:, -1]
    error = {}
    for how, cache in caches.items():
        for end in (180, 250, 300):
            part = {name: tensor[:, :end] for name, tensor in inputs.items()}
            logits = run(tiny, cache, part)[:, -1]
        error[how] = relative(logits, stock.numpy())
    assert error["exact"] < 1e-5 < 1e-3 < error["stored"]
    held = caches["exact"].elastic_layers[0]
    assert held.store is None
    assert held.held is not None
    inputs = longer(inputs, 1)
    run(tiny, caches["exact"], inputs)
    assert held.held is None
    assert held.store.lengths.tolist() == [301, 212]
    whole = ekv.ElasticCache.for_model(tiny, recipe="int4")
    run(tiny, whole, {name: tensor[:, :300] for name, tensor in inputs.items()})
    for mine, other in zip(held.store.read(0, 211), whole.elastic_layers[0].store.read(0, 211), strict=True):
        assert relative(mine, other.numpy()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_keep_their_dtype(dtype):
    tiny = model("llama").to(dtype)
    inputs = padded([60, 41])
    stock = tiny.generate(**inputs, max_new_tokens=8, do_sample=False)
    cache = ekv.ElasticCache.for_model(tiny, 1)
    tokens = tiny.generate(**inputs, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert cache.elastic_layers[0].store.cache.dtype == {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    # Rounding in 16 bit differs in the last place: a near tie may fall the other way.
    assert (tokens == stock)[:, 60:].float().mean() > 0.6


@pytest.mark.parametrize("name", ["gpt_oss", "gemma2"])
def test_sinks_and_caps_weigh_in_decodes_and_chunks(name, watch):
    tiny = model(name)
    # Some releases let Gemma 2 run in an attention that caps nothing.
    tiny.set_attn_implementation("eager")
    inputs = prompt(2, 80)
    elastic = ekv.ElasticCache.for_model(tiny, 1)
    run(tiny, elastic, inputs)
    for count in (1, 5, 1):
        inputs = longer(inputs, count, count)
        watch.calls.clear()
        run(tiny, elastic, inputs)
        ((_, before, pending, call, output),) = watch.calls
        keys, values = (
            torch.cat([part, new], 2)
            for part, new in zip(
                map(torch.from_numpy, before.read(0, int(before.lengths[0]))), (pending.keys, pending.values), strict=True
            )
        )
        total = keys.shape[2]
        scores = (
            torch.einsum("bkgqd,bktd->bkgqt", call.query.double().reshape(2, 2, 2, count, 64), keys.double()) * call.scaling
        )
        if name == "gemma2":
            scores = 5.0 * torch.tanh(scores / 5.0)
        hidden = torch.ones(count, total, dtype=torch.bool).triu(total - count + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
        if name == "gpt_oss":
            sinks = call.module.sinks.double().reshape(1, 2, 2, 1, 1).expand(2, 2, 2, count, 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        expected = torch.einsum("bkgqt,bktd->bkgqd", weights, values.double()).reshape(2, 4, count, 64)
        assert relative(output.transpose(1, 2), expected.detach().numpy()) < 1e-5
