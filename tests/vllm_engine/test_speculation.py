"""Drafts that are rejected leave nothing behind: pages that they completed are written again."""

import pytest

from tests.helpers.serving_scenarios import NEW_TOKENS, SMALL_POOL, all_equal, all_follow

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@pytest.mark.parametrize("pool", [{}, SMALL_POOL], ids=["room", "preempted"])
def test_drafts_by_ngrams_change_no_token(serve, rule, prompts, base, pool):
    engine = serve(speculative_config=NGRAM, **pool)
    answers = engine.generate(prompts, NEW_TOKENS)
    drafted, accepted = (engine.counter(f"vllm:spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
    assert drafted > accepted > 0
    if pool:
        assert sum(answer.preemptions for answer in answers) > 0
    all_follow(rule(), answers)
    all_equal(rule(), answers, base)


def test_drafts_and_cached_prefixes_go_together(serve, rule, prompts):
    engine = serve(speculative_config=NGRAM, enable_prefix_caching=True)
    engine.generate(prompts, 80)
    again = engine.generate(prompts, 80)
    assert sum(answer.cached for answer in again) > 0
    all_follow(rule(), again)
