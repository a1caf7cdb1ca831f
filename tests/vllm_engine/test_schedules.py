"""Answers do not depend on how requests were batched, cut into chunks, preempted or aborted."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from elastickv.vllm import model_setup
from tests.helpers.read_rule import follows
from tests.helpers.served_llama import Sizes
from tests.helpers.serving_scenarios import NEW_TOKENS, SMALL_POOL, WINDOW, all_equal, all_follow, random_prompts


def test_ragged_requests_follow_the_read_rule(base, rule):
    all_follow(rule(), base)


@pytest.mark.parametrize(("recipe", "window"), [(None, WINDOW), ("int4", WINDOW - 32), ("int4", WINDOW + 32)])
def test_no_other_rule_is_followed(base, rule, recipe, window):
    assert [follows(rule(recipe, window), answer) for answer in base].count(None) == 0


def test_an_engine_whose_window_is_a_page_too_short_is_noticed(serve, rule, prompts):
    for answer in serve(window=WINDOW - 32).generate(prompts, 60):
        assert (
            len(answer.sequence) <= WINDOW or "differ" in str(follows(rule(), answer)) or "bad" in str(follows(rule(), answer))
        )


@pytest.mark.parametrize(
    ("fmt", "recipe"),
    [
        ("int8", "int8"),
        ("k8v4", "k=int8,v=int4"),
        ("fp8", "fp8"),
        ("int8_per_channel", "k=int8_per_channel,v=int8"),
    ],
)
def test_every_format_follows_its_rule(serve, rule, prompts, fmt, recipe):
    answers = serve(fmt=fmt).generate(prompts, 40)
    all_follow(rule(recipe), answers)
    assert follows(rule("int4"), answers[2]) is not None


@pytest.mark.parametrize("window", [32, 100])
def test_windows_of_any_size_follow_the_rule(serve, rule, prompts, window):
    all_follow(rule(window=window), serve(window=window).generate(prompts, 50))


def test_formats_of_layers_follow_the_rule(serve, prompts, rule):
    """The engine stores one layer in int8; the plain model stores both alike, and neither recipe describes it."""
    answers = serve(elastickv={"layers": {"1": "int8"}}).generate(prompts, 60)
    all_follow(rule("int4", layers={1: "int8"}), answers)
    assert follows(rule("int4"), answers[2]) is not None
    assert follows(rule("int8"), answers[2]) is not None


def test_rotated_layers_follow_the_rule_of_rotated_pages(serve, prompts, rule, monkeypatch):
    """A calibration rotates layers and smooths their keys; here their recipes are changed where the engine gets them."""
    rotate, sizes = {0: "v", 1: "kv"}, Sizes()
    head = [tuple((channel * factor) % 5 - 2 for channel in range(sizes.head_dim)) for factor in range(3, 3 + sizes.kv_heads)]
    smoothing = {0: tuple(head), 1: tuple(head[::-1])}
    solved = model_setup.layer_recipes

    def recipes(*arguments):
        return {layer: replace(recipe, rotate=rotate[layer]) for layer, recipe in solved(*arguments).items()}

    monkeypatch.setattr(model_setup, "layer_recipes", recipes)
    monkeypatch.setattr(model_setup, "layer_smoothing", lambda options: smoothing)
    serve.close()
    try:
        answers = serve(max_num_batched_tokens=48).generate(prompts, 40)
    finally:
        serve.close()
    layers = {layer: f"int4,rotate={each}" for layer, each in rotate.items()}
    all_follow(rule("int4", layers=layers, smoothing=smoothing), answers)
    assert follows(rule("int4", layers=layers), answers[2]) is not None
    assert follows(rule("int4"), answers[2]) is not None


@pytest.mark.parametrize("chunk", [48, 200])
def test_chunked_prompts_give_the_same_answers(serve, rule, prompts, base, chunk):
    engine = serve(max_num_batched_tokens=chunk)
    answers = engine.generate(prompts, NEW_TOKENS)
    assert engine.steps > NEW_TOKENS + 1
    all_follow(rule(), answers)
    all_equal(rule(), answers, base)


def test_preempted_requests_give_the_same_answers(serve, rule, prompts, base):
    answers = serve(**SMALL_POOL).generate(prompts, NEW_TOKENS)
    assert sum(answer.preemptions for answer in answers) > 0
    all_follow(rule(), answers)
    all_equal(rule(), answers, base)


def test_several_answers_to_one_prompt_share_its_pages_and_follow_the_rule(serve, rule, prompts):
    engine = serve(enable_prefix_caching=True)
    for prompt in (prompts[2], prompts[0]):
        name = engine.add(prompt, 70, n=3, temperature=1.0, seed=1)
        ended = {}
        while name not in ended:
            ended |= engine.step()
        answers = engine.answers(ended[name], prompt)
        assert len({tuple(answer.tokens) for answer in answers}) == 3
        for answer in answers:
            assert follows(rule(), answer, greedy=False) is None


def test_aborted_requests_leave_no_block_behind(serve, rule, prompts, base):
    """Requests are added and aborted at random steps, under pressure; later answers and the pool are as before."""
    engine = serve(**SMALL_POOL)
    start, rng = engine.free_blocks, np.random.default_rng(0)
    running, aborted = [], 0
    for step in range(100):
        if step < 80 and rng.random() < 0.4:
            running.append(engine.add(random_prompts([int(rng.integers(1, 300))], step)[0], int(rng.integers(1, 100))))
        if running and rng.random() < 0.3:
            engine.engine.abort_request([running.pop(int(rng.integers(len(running))))])
            aborted += 1
        ended = engine.step()
        running = [name for name in running if name not in ended]
    engine.engine.abort_request(running)
    while engine.engine.has_unfinished_requests():
        engine.step()
    assert aborted > 12
    assert engine.free_blocks == start
    assert not any(manager.req_to_blocks for manager in engine.managers)
    answers = engine.generate(prompts, NEW_TOKENS)
    all_follow(rule(), answers)
    all_equal(rule(), answers, base)
    assert engine.free_blocks == start


RAGGED = [(int(n), int(m)) for n, m in np.random.default_rng(4).integers((1, 3), (150, 16), (40, 2))]


@pytest.fixture(scope="module")
def ragged(serve, rule):
    """40 prompts with their answers by an engine that gets them all at once."""
    prompts = random_prompts([length for length, _ in RAGGED], seed=9)
    engine = serve(**SMALL_POOL)
    answers = engine.finish([engine.add(prompt, count) for prompt, (_, count) in zip(prompts, RAGGED, strict=True)], prompts)
    all_follow(rule(), answers)
    return prompts, answers


@given(
    order=st.permutations(range(len(RAGGED))),
    gaps=st.lists(st.integers(0, 3), min_size=len(RAGGED), max_size=len(RAGGED)),
    chunk=st.integers(32, 300),
)
@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])  # an example takes seconds: none is shrunk
def test_any_schedule_of_ragged_requests_gives_their_answers(serve, rule, ragged, order, gaps, chunk):
    prompts, expected = ragged
    engine = serve(**SMALL_POOL)
    start = engine.free_blocks
    requests = [(prompt, count) for prompt, (_, count) in zip(prompts, RAGGED, strict=True)]
    answers = engine.finish_schedule(requests, order, gaps, chunk)
    all_equal(rule(), expected, [answers[number] for number in range(len(prompts))])
    assert engine.free_blocks == start
