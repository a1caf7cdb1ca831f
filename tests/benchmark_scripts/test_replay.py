"""The study's replay is decoding token by token: its outputs are those of the reference cache."""

import numpy as np
import pytest

from benchmarks import replay
from elastickv.kvcache import ReferenceCache
from elastickv.kvcache.attention import attend
from elastickv.kvcache.quantize import quantize_int4_keys, stored_values
from elastickv.kvcache.scorers.bounds import page_bounds, score_pages
from elastickv.recipe import AttentionShape, Recipe
from elastickv.recipe.regions import selected

SHAPE = AttentionShape(1, 3, 1, 64)
TOKENS, QUERIES = 420, 70


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    q = rng.standard_normal((3, QUERIES, 64)).astype(np.float32)
    k, v = rng.standard_normal((2, TOKENS, 64)).astype(np.float32)
    return q, k, v


def decoded(text, q, k, v):
    cache, start = ReferenceCache(SHAPE, TOKENS, "bf16", Recipe.parse(text)), TOKENS - QUERIES
    cache.prefill(k[None, None, :start], v[None, None, :start], np.array([start]))
    outputs = []
    for i in range(QUERIES):
        cache.append(k[None, None, start + i], v[None, None, start + i])
        outputs.append(cache.decode(q[None, :, i])[0][0])
    return np.stack(outputs, axis=1)


def stored(head, fmt, value):
    pages = head.pages[int(value)]
    return stored_values(pages.reshape(-1, 64), fmt, value, 64).reshape(pages.shape).astype(np.float32)


@pytest.mark.parametrize("text", ["bf16", "int8", "k=fp8,v=int4"])
def test_formats(inputs, text):
    head, recipe = replay.Head(*inputs), Recipe.parse(text)
    output = head.output(stored(head, recipe.key_format, False), stored(head, recipe.value_format, True))
    np.testing.assert_allclose(output, decoded(text, *inputs), atol=2e-5)


@pytest.mark.parametrize("anchor_every", [1, 5, 40])
def test_pages_and_anchors(inputs, anchor_every):
    head = replay.Head(*inputs)
    _, scales, zeros = quantize_int4_keys(head.pages[0])
    scores = np.stack([score_pages(page_bounds(head.q[:, i], scales, zeros)) for i in range(QUERIES)])
    counts = np.array([selected(int(pages), 0.4) for pages in head.cold_pages])
    read = replay.listed(head, scores, counts, anchor_every)
    output = head.output(stored(head, "int4", False), stored(head, "int4", True), read)
    np.testing.assert_allclose(output, decoded(f"int4,pages=0.4,anchor_every={anchor_every}", *inputs), atol=2e-5)


def test_dense_is_attention_over_all_tokens_so_far(inputs):
    q, k, v = inputs
    head = replay.Head(*inputs)
    for i in (0, QUERIES - 1):
        length = TOKENS - QUERIES + i + 1
        np.testing.assert_allclose(head.dense[:, i], attend(q[:, i], k[:length], v[:length]).output, atol=2e-5)
    assert head.errors(head.dense).max() == 0
