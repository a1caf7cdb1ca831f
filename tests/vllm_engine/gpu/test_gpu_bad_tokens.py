"""Tokens that cannot be stored, and what graphs took: with the second model runner, asynchronous scheduling and full graphs."""

import time

import pytest

from tests.helpers.bad_words import (
    INFINITE,
    LARGE,
    NAN,
    TOO_LARGE,
    WHY,
    ended_by_error,
    ends,
    errors,
    named,
    with_bad_word,
    with_bad_words,
)
from tests.helpers.served_llama import Sizes, random_weights, write_model
from tests.helpers.serving_scenarios import NGRAM, random_prompts

pytestmark = pytest.mark.gpu

PREFIXES = {"enable_prefix_caching": True}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory):
    """A model of as many words as vLLM's samplers take at a time: of fewer they choose one beyond the last if all are NaN."""
    sizes = Sizes(vocabulary=8192)
    return write_model(tmp_path_factory.mktemp("bad_words") / "llama", with_bad_words(random_weights(sizes)), sizes)


def fails(engine, prompt, position, tokens, **sampling):
    """A request fails; others of the batch and the pool do not notice."""
    engine.settle()
    start, others = engine.free_blocks, random_prompts([90, 40], seed=3)
    with errors() as messages:
        bad = engine.add(prompt, 30, **sampling)
        names = [engine.add(other, 30) for other in others]
        ended = ends(engine)
        engine.settle()
        time.sleep(1)  # a thread logs what the last step left
    assert len(ended_by_error(ended[bad])) <= tokens
    assert named(position) in messages
    assert f"ElasticKV: request {bad} ends with an error: {WHY}" in messages
    for name in names:
        (answer,) = ended[name].outputs
        assert (len(answer.token_ids), answer.finish_reason) == (30, "length")
    assert engine.free_blocks == start


@pytest.mark.parametrize("word", [NAN, INFINITE])
def test_a_bad_token_of_a_prompt_fails_its_request(serve_bf16, bad_folder, word):
    fails(serve_bf16(folder=bad_folder, **PREFIXES), with_bad_word(word), 70, 0)


def test_a_bad_token_far_before_the_end_of_a_chunk_fails_its_request(serve_bf16, bad_folder):
    prompt = random_prompts([900], seed=9)[0]
    prompt[70] = NAN
    fails(serve_bf16(folder=bad_folder, **PREFIXES), prompt, 70, 0)


def test_a_bad_token_that_the_model_chose_fails_its_request(serve_bf16, bad_folder):
    """A decode, by a captured graph."""
    fails(serve_bf16(folder=bad_folder, **PREFIXES), random_prompts([50], seed=9)[0], 50, 1, allowed_token_ids=[NAN])


def test_a_bad_token_is_computed_again_and_fails_again(serve_bf16, bad_folder):
    engine = serve_bf16(folder=bad_folder, **PREFIXES)
    for _ in range(2):
        fails(engine, with_bad_word(NAN), 70, 0)


def test_all_requests_of_a_step_with_keys_that_are_too_large_fail(serve_bf16, bad_folder):
    engine = serve_bf16(folder=bad_folder, **PREFIXES)
    engine.settle()
    start, positions = engine.free_blocks, (70, 33, 5)
    prompts, (other,) = random_prompts([100, 60, 90], seed=13), random_prompts([80], seed=14)
    for prompt, position in zip(prompts, positions, strict=True):
        prompt[position] = LARGE
    with errors() as messages:
        bad = [engine.add(prompt, 30) for prompt in prompts]
        good = engine.add(other, 30)
        ended = ends(engine)
        engine.settle()
    assert [ended_by_error(ended[name]) for name in bad] == [[], [], []]
    assert len(ended[good].outputs[0].token_ids) == 30
    assert {named(position, TOO_LARGE) for position in positions} <= set(messages)
    assert engine.free_blocks == start


def test_with_drafts_a_bad_token_fails_its_request(serve_bf16, bad_folder):
    fails(serve_bf16(folder=bad_folder, speculative_config=NGRAM), with_bad_word(NAN), 70, 0)


def test_the_memory_of_graphs_is_said_once_they_are_captured(serve_bf16, device, monkeypatch):
    from elastickv.vllm import capacity, model_setup

    if device == "cpu":
        pytest.skip("captures graphs on a GPU only")
    lines = []
    for module in (model_setup, capacity):
        monkeypatch.setattr(module._log, "info", lambda text, *arguments: lines.append(text % arguments))
    serve_bf16(max_num_seqs=7)
    said = [line for line in lines if line.startswith(("ElasticKV: page", "ElasticKV: graphs"))]
    assert [line.split()[1] for line in said] == ["page", "graphs"]
    assert said[1].endswith(" MB")
