"""A recipe's pages in 16 bit: those that the cache which decodes reads, and their bytes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from elastickv.evaluation import sessions
from elastickv.evaluation.evaluate import evaluate
from elastickv.evaluation.evaluation_options import EvaluationOptions
from elastickv.evaluation.kv_selections.recipe_pages import RecipePages, read_bytes
from elastickv.evaluation.prefill import prefill
from elastickv.evaluation.recipes_by_ratio import Span
from elastickv.kvcache.reference import ReferenceCache
from elastickv.recipe import AttentionShape, Recipe
from elastickv.results.formats.fidelity_table import fidelity_tables
from elastickv.results.kinds.evaluation_result import EvaluationResult
from tests.evaluation.test_evaluate import TEXTS, Silent
from tests.helpers.tiny_models import tiny_llama

RECIPE = Recipe.parse("int4,pages=1/4:1/2,anchor_every=4,sinks=2,window=40")


def tokens_of_reference(cache, head):
    """Sinks, the pages that the reference read, and the exact tokens after the cold ones."""
    length, pages = int(cache.lengths[0]), cache.pages_read(0, head)
    cold = (length - 2 - 40) // 32 * 32
    return sorted([0, 1, *(2 + 32 * page + i for page in pages for i in range(32)), *range(2 + cold, length)])


@pytest.mark.parametrize("offset", [0, 3])
def test_the_pages_are_those_that_the_cache_reads(offset):
    shape, prompt, steps = AttentionShape(1, 4, 2, 64), 300, 40
    states = torch.randn(2, 1, 2, prompt + steps, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    queries = torch.randn(steps, 1, 2, 2, 64, generator=torch.Generator().manual_seed(1))
    cache = ReferenceCache(shape, prompt + steps, "bf16", RECIPE, offset)
    keys, values = states.numpy()
    cache.prefill(keys[:, :, :prompt], values[:, :, :prompt], [prompt])
    layer, wrong = RecipePages(RECIPE, offset), 0
    for step in range(steps):
        cache.append(keys[:, :, prompt + step], values[:, :, prompt + step])
        cache.decode(queries[step].flatten(1, 2).numpy())
        chosen = layer.select(queries[step], states[0][:, :, : prompt + step + 1])
        for head in range(2):
            mine, theirs = chosen[0, head].nonzero()[:, 0].tolist(), tokens_of_reference(cache, head)
            assert len(mine) == len(theirs)
            wrong += mine != theirs
    assert wrong <= 2, "scales of 16 bit may swap pages of nearly equal scores"


def test_bytes_are_tokens_in_16_bit_and_what_scoring_reads():
    shape, span = AttentionShape(1, 4, 2, 64), Span(1000, 8)
    every = replace(RECIPE, anchor_every=1)
    assert read_bytes(RECIPE, span, shape, "bf16") < read_bytes(every, span, shape, "bf16")
    # 29 cold pages: 7 and 14 are read. Scores read 4 bytes a channel of each, lists are sectors of 32 bytes.
    (one,) = [read_bytes(every, Span(1000, 1), shape, "bf16")]
    pages, exact = 7 + 14, 1001 - 29 * 32 - 1 + 1
    lists = 32 + 64
    assert (one - lists) == (pages * 32 + 2 * exact) * 256 + 2 * 29 * 64 * 4


def test_reading_all_pages_is_16_bit_attention():
    loaded = tiny_llama()
    start = prefill(loaded.model, [tuple(range(100)) * 3, tuple(range(20, 120)) * 3], 250, 5)
    ids = torch.tensor([[5, 7, 9], [6, 8, 10]])
    everything = Recipe.parse("int4,pages=1")
    with sessions.recipe_pages(loaded.model, [everything] * 2, start) as session:
        selected = session.read(ids)
    with sessions.recipe_pages(loaded.model, [Recipe.parse("int4")] * 2, start) as session:
        exact = session.read(ids)
    torch.testing.assert_close(selected, exact, rtol=1e-3, atol=1e-3)


def test_the_parts_of_a_ratio_are_rows_beside_it():
    options = EvaluationOptions(
        ratios=(4.0,), parts=(4.0,), contexts=(1200,), window_count=2, scored=6, needle_lengths=(), greedy_tokens=0
    )
    result = evaluate(tiny_llama(), TEXTS, options, None, Silent())
    whole, formats, selection = result["rows"]
    assert [row["cache"] for row in result["rows"]] == ["C=4", "C=4 formats alone", "C=4 selection alone"]
    assert max(formats["kl"]["mean"], selection["kl"]["mean"]) < 1.5 * whole["kl"]["mean"]
    assert formats["read_ratio"] < 4 and selection["read_ratio"] < 4
    assert formats["stored_ratio"] == pytest.approx(whole["stored_ratio"])
    assert 4 < formats["stored_format"]["bits_per_element"] < formats["stored_format"]["stored_bits_per_element"]
    assert np.isclose(selection["selection"]["compress"], 4) and selection["stored_ratio"] < 1
    assert "C=4 selection alone" in fidelity_tables(EvaluationResult.from_dict(result))
