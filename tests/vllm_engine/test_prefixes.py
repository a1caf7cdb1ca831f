"""Prefix caching: hits as long as the stock backend's, and the numbers that the blocks of the hit hold."""

import pytest

from tests.helpers.read_rule import follows
from tests.helpers.serving_scenarios import NEW_TOKENS, SMALL_POOL, all_equal, all_follow, random_prompts

STRICT = {"prefix_reuse": "strict"}


def conversation(engine, turns=4):
    """Answer a chat in which each turn's prompt is all that was said before, and some words more."""
    said, answers = [], []
    for turn in range(turns):
        said = said + random_prompts([90 + 7 * turn], seed=100 + turn)[0]
        answers += engine.generate([said], 45)
        said = said + answers[-1].tokens
    return answers


def repeated(engine):
    """Ask the same prompt twice, then prompts that share its start."""
    prompt = random_prompts([300], seed=50)[0]
    endings = random_prompts([40, 70], seed=51)
    asked = [prompt, prompt, prompt[:230] + endings[0], prompt[:260] + endings[1]]
    return [engine.generate([each], 24)[0] for each in asked]


def ways_to_share(engine):
    answers = conversation(engine)
    engine.forget_prefixes()
    return answers + repeated(engine)


@pytest.fixture(scope="module")
def stock_hits(serve):
    return [answer.cached for answer in ways_to_share(serve(fmt=None, enable_prefix_caching=True))]


def test_hits_are_as_long_as_the_stock_backends(serve, rule, stock_hits):
    assert sum(hit > 0 for hit in stock_hits) >= 6
    answers = ways_to_share(serve(enable_prefix_caching=True))
    assert all(answer.cached >= hit for answer, hit in zip(answers, stock_hits, strict=True))
    all_follow(rule(), answers)


def test_a_hit_without_its_window_reads_pages(serve, rule):
    """The window's blocks of a cached prompt are taken away: the next request reads those tokens from pages."""
    engine, prompt = serve(enable_prefix_caching=True), random_prompts([300], seed=60)[0]
    first = engine.generate([prompt], 20)[0]
    engine.evict_windows()
    second = engine.generate([[*prompt[:290], 7, 8, 9]], 60)[0]
    assert second.cached == 288
    assert second.window_first[288] == 288
    assert follows(rule(), first) is None
    assert follows(rule(), second) is None
    assert follows(rule(), second, window_first=False) is not None


def test_a_hit_with_half_a_window_reads_the_other_half_from_pages(serve, rule):
    engine, prompt = serve(enable_prefix_caching=True), random_prompts([300], seed=61)[0]
    engine.generate([prompt], 20)
    engine.evict_windows(before=250)
    answer = engine.generate([[*prompt[:290], 7, 8, 9]], 60)[0]
    assert answer.window_first[288] == 256
    assert follows(rule(), answer) is None
    assert follows(rule(), answer, window_first=False) is not None


def test_preempted_requests_come_back_from_the_prefix_cache(serve, rule, prompts, base):
    engine = serve(enable_prefix_caching=True, **SMALL_POOL)
    answers = engine.generate(prompts, NEW_TOKENS)
    assert sum(answer.preemptions for answer in answers) > 0
    all_follow(rule(), answers)
    again = engine.generate(prompts, NEW_TOKENS)
    assert sum(answer.cached for answer in again) > 0
    all_follow(rule(), again)


def test_strict_answers_are_those_of_the_request_alone(serve, rule, stock_hits):
    engine = serve(enable_prefix_caching=True, elastickv=STRICT)
    shared = ways_to_share(engine)
    assert sum(answer.cached for answer in shared) > 0
    assert all(answer.cached <= hit for answer, hit in zip(shared, stock_hits, strict=True))
    alone = []
    for answer in shared:
        engine.forget_prefixes()
        alone += engine.generate([answer.prompt], len(answer.tokens))
    all_equal(rule(), shared, alone)
    for answer in shared:
        assert follows(rule(), answer, window_first=False) is None


def test_strict_answers_survive_preemption(serve, rule, prompts, base):
    engine = serve(enable_prefix_caching=True, elastickv=STRICT, **SMALL_POOL)
    answers = engine.generate(prompts, NEW_TOKENS)
    assert sum(answer.preemptions for answer in answers) > 0
    for answer in answers:
        assert follows(rule(), answer, window_first=False) is None
    all_equal(rule(), answers, base)


def test_strict_hits_need_the_window(serve):
    engine, prompt = serve(enable_prefix_caching=True, elastickv=STRICT), random_prompts([300], seed=60)[0]
    engine.generate([prompt], 20)
    assert engine.generate([prompt], 20)[0].cached > 0
    engine.evict_windows()
    assert engine.generate([prompt], 20)[0].cached == 0


def test_the_record_of_windows_starts_where_blocks_are_there(serve):
    """The harness itself: without prefix caching no window is missing."""
    answer = serve().generate(random_prompts([300]), 20)[0]
    assert not answer.window_first.any()
