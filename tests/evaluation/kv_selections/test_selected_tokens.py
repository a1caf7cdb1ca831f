"""Which tokens each selection reads, against formulas of its publication in NumPy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from elastickv.evaluation.kv_selections.published_selections import SELECTIONS
from elastickv.evaluation.kv_selections.quest import page_bounds
from elastickv.evaluation.kv_selections.reference_selection import LayerPrompt
from elastickv.evaluation.kv_selections.selected_layer import SelectedLayer

ROWS, HEADS, GROUP, CHANNELS = 2, 2, 3, 8


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def query_and_keys(tokens):
    return states(ROWS, HEADS, GROUP, CHANNELS), states(ROWS, HEADS, tokens, CHANNELS, seed=1)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def prompt(tokens, scaling=0.5):
    queries, keys = states(1, HEADS * GROUP, tokens, CHANNELS, seed=2), states(1, HEADS, tokens, CHANNELS, seed=3)
    return LayerPrompt(queries, keys, keys, scaling, None, None, SimpleNamespace(), {})


def attention(of):
    """Causal attention of every query head: (query_heads, tokens, tokens)."""
    keys = np.repeat(of.keys[0].numpy(), GROUP, axis=0)
    scores = of.scaling * of.queries[0].numpy() @ keys.swapaxes(1, 2)
    tokens = scores.shape[-1]
    return softmax(np.where(np.tri(tokens, dtype=bool), scores, -np.inf))


def test_streaming_llm_reads_four_sinks_and_the_newest():
    layer = SELECTIONS["streaming_llm"].layer(9, None)
    chosen = layer.select(*query_and_keys(30))
    assert chosen.shape == (ROWS, HEADS, 30)
    assert all(row.nonzero().flatten().tolist() == [0, 1, 2, 3, 25, 26, 27, 28, 29] for row in chosen.flatten(0, 1))
    assert layer.select(*query_and_keys(7)).all(), "a cache that is not full evicts nothing"


def test_quest_reads_the_pages_with_the_largest_upper_bounds_and_the_newest_page():
    query, keys = query_and_keys(16 * 7 + 5)
    chosen = SELECTIONS["quest"].layer(3, None).select(query, keys).numpy()
    for row in range(ROWS):
        for head in range(HEADS):
            bounds = []
            for page in range(7):
                of = keys[row, head, 16 * page : 16 * page + 16].numpy()
                products = [np.maximum(q * of.min(0), q * of.max(0)).sum() for q in query[row, head].numpy()]
                bounds.append(np.mean(products))
            best = sorted(np.argsort(bounds)[-2:].tolist())
            expected = [token for page in best for token in range(16 * page, 16 * page + 16)] + list(range(112, 117))
            assert chosen[row, head].nonzero()[0].tolist() == expected


def test_a_bound_of_quest_is_above_every_product():
    query, keys = query_and_keys(16)
    bound = page_bounds(query, keys.amin(2, keepdim=True), keys.amax(2, keepdim=True))
    products = query @ keys.mT
    assert (bound >= products.amax(-1, keepdim=True)).all() and (bound > products.amax(-1, keepdim=True)).any()


@pytest.mark.parametrize(("tokens", "pages"), [(33, 3), (48, 3), (49, 4)])
def test_quest_reads_everything_until_there_are_more_pages_than_it_may_read(tokens, pages):
    chosen = SELECTIONS["quest"].layer(3, None).select(*query_and_keys(tokens))
    assert chosen.all() == (pages <= 3)
    assert (chosen.sum(-1) == (tokens if pages <= 3 else 33)).all()


def test_snapkv_scores_are_the_pooled_attention_of_the_last_32_queries():
    of, tokens = prompt(90), 90
    scores = SELECTIONS["snapkv"].prompt_scores(50, of).numpy()
    summed = attention(of)[:, -32:, :-32].sum(1)
    padded = np.pad(summed, ((0, 0), (2, 2)))
    pooled = np.stack([padded[:, i : i + 5].sum(1) / 5 for i in range(tokens - 32)], axis=1)
    np.testing.assert_allclose(scores[:, :-32], pooled.reshape(HEADS, GROUP, -1).mean(1), rtol=1e-5)
    assert np.isinf(scores[:, -32:]).all()


def test_snapkv_evicts_once_and_reads_all_that_follows():
    of = prompt(90)
    scores = SELECTIONS["snapkv"].prompt_scores(40, of)
    layer = SELECTIONS["snapkv"].layer(40, scores[None])
    chosen = layer.select(states(1, HEADS, GROUP, CHANNELS), states(1, HEADS, 95, CHANNELS))[0].numpy()
    for head in range(HEADS):
        best = np.argsort(scores[head, :58].numpy())[-8:]
        assert chosen[head].nonzero()[0].tolist() == sorted([*best.tolist(), *range(58, 95)])


def test_snapkv_leaves_prompts_that_are_its_window():
    assert SELECTIONS["snapkv"].prompt_scores(40, prompt(20)).isinf().all()


def test_h2o_sums_attention_over_all_queries_of_the_prompt():
    of = prompt(300)
    expected = attention(of).sum(1).reshape(HEADS, GROUP, -1).sum(1)
    np.testing.assert_allclose(SELECTIONS["h2o"].prompt_scores(50, of).numpy(), expected, rtol=1e-4)


def test_h2o_evicts_the_older_token_with_the_least_attention_for_good():
    size, tokens = 11, 40
    scores = states(1, 1, tokens).abs()
    layer = SELECTIONS["h2o"].layer(size, scores)
    sums = {token: float(score) for token, score in enumerate(scores[0, 0])}

    def evict():
        newest = sorted(sums)[-5:]
        heavy = sorted((token for token in sums if token not in newest), key=sums.get)[-5:]
        for token in [token for token in sums if token not in newest + heavy]:
            del sums[token]

    evict()
    for step in range(30):
        query, keys = states(1, 1, GROUP, CHANNELS, seed=step), states(1, 1, tokens + step + 1, CHANNELS)
        chosen = layer.select(query, keys)
        sums[tokens + step] = 0.0
        assert chosen[0, 0].nonzero().flatten().tolist() == sorted(sums) and len(sums) == size
        weights = states(1, 1, GROUP, tokens + step + 1, seed=100 + step).abs() * chosen[:, :, None]
        layer.attended(weights)
        for token in sums:
            sums[token] += float(weights[0, 0, :, token].sum())
        evict()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_layer_attends_to_what_is_selected(softcap, with_sinks):
    """Four sinks and two newest of 20 tokens, with a soft cap and a model's own attention sinks."""
    layer = SelectedLayer(0, SELECTIONS["streaming_llm"].layer(6, None))
    keys, values = (states(1, HEADS, 20, CHANNELS, seed=seed).bfloat16().float() for seed in (4, 5))
    layer.update(keys[:, :, :19], values[:, :, :19])
    carried, _ = layer.update(keys[:, :, 19:], values[:, :, 19:])
    query = states(1, HEADS * GROUP, 1, CHANNELS, seed=6)
    sinks = states(HEADS * GROUP, seed=7) if with_sinks else None
    call = SimpleNamespace(query=query, scaling=0.5, softcap=softcap, sinks=sinks)
    output = layer.attend(carried.elastickv_pending, call)
    read = [0, 1, 2, 3, 18, 19]
    for head in range(HEADS * GROUP):
        scores = 0.5 * keys[0, head // GROUP, read].numpy() @ query[0, head, 0].numpy()
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        extra = [] if sinks is None else [float(sinks[head])]
        weights = softmax(np.concatenate([scores, extra]))[:6]
        np.testing.assert_allclose(output[0, 0, head].numpy(), weights @ values[0, head // GROUP, read].numpy(), rtol=1e-4)
