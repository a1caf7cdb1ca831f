"""Drafts that are rejected leave nothing behind: pages that they completed are written again."""

import pytest

from tests.helpers import interpreted_runner
from tests.helpers.served_llama import Sizes, eagle_weights, random_weights, write_model
from tests.helpers.serving_scenarios import (
    NEW_TOKENS,
    RECIPE,
    SMALL_POOL,
    WINDOW,
    all_equal,
    all_follow,
    random_prompts,
)

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


@pytest.fixture(scope="module")
def drafted(folder, weights, plug_in, tmp_path_factory):
    """Return what engines say whose drafters have layers, on vLLM's model runner V2."""
    if not interpreted_runner.INSTALLED:
        pytest.skip("needs Triton")
    files = tmp_path_factory.mktemp("drafts")
    small = Sizes(layers=1, heads=2, kv_heads=1)
    small_model = write_model(files / "small", random_weights(small, seed=5), small)
    head = write_model(files / "head", eagle_weights(weights))

    def job(method, model, elastickv=None, rounds=1, **options):
        speculation = {"method": method, "model": str(model), "num_speculative_tokens": 3}
        settings = {"format": RECIPE, "window": WINDOW} | (elastickv or {})
        return {
            "folder": str(folder),
            "elastickv": settings,
            "options": options | {"speculative_config": speculation, "async_scheduling": True},
            "prompts": random_prompts((100, 37, 150)),
            "tokens": 24,
            "rounds": rounds,
        }

    jobs = {
        "itself": job("draft_model", folder, elastickv={"layers": {"0": "int8"}}, max_num_batched_tokens=96),
        "smaller": job("draft_model", small_model, max_num_batched_tokens=96),
        "eagle": job("eagle", head, rounds=2, enable_prefix_caching=True),
    }
    return dict(zip(jobs, interpreted_runner.run(list(jobs.values()), files), strict=True))


def test_a_model_that_drafts_for_itself_is_mostly_right(drafted, rule):
    """Its own layer 0 has the default format: the option `layers` is about the model's."""
    (answers,), count, accepted = drafted["itself"]
    assert count > accepted > count / 2
    all_follow(rule(layers={0: "int8"}), answers)


def test_a_draft_model_of_another_size_changes_no_token(drafted, rule):
    (answers,), count, accepted = drafted["smaller"]
    assert count > accepted
    all_follow(rule(), answers)


def test_an_eagle_head_changes_no_token_and_hits_cached_prefixes(drafted, rule):
    rounds, count, accepted = drafted["eagle"]
    assert count > accepted > count / 10
    assert sum(answer.cached for answer in rounds[1]) > 0
    for answers in rounds:
        all_follow(rule(), answers)
