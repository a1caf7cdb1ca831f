"""Tokens whose keys or values cannot be stored: the log names them, their request fails, and no other request notices."""

from types import SimpleNamespace

import pytest
import torch

from elastickv.backends.bad_token import NO_BAD_TOKEN, BadToken
from elastickv.vllm import window_spec
from elastickv.vllm.bad_tokens import BadTokens, of_engine
from tests.helpers.bad_words import (
    INFINITE,
    LARGE,
    NAN,
    NOT_FINITE,
    POSITION,
    TOO_LARGE,
    WHY,
    ended_by_error,
    ends,
    errors,
    named,
    with_bad_word,
    with_bad_words,
)
from tests.helpers.served_llama import write_model
from tests.helpers.serving_scenarios import all_follow, random_prompts

STEPS = 40


@pytest.fixture(scope="module")
def poisoned(weights):
    return with_bad_words(weights)


@pytest.fixture(scope="module")
def poisoned_folder(poisoned, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("poisoned") / "llama", poisoned)


@pytest.fixture
def logged():
    with errors() as messages:
        yield messages


@pytest.fixture(scope="module")
def alone(serve, rule, poisoned, poisoned_folder, prompts):
    """Answers where no request has a bad word."""
    engine = serve(folder=poisoned_folder)
    with errors() as messages:
        answers = engine.generate(prompts, STEPS)
    all_follow(rule(weights=poisoned), answers)
    assert messages == []
    return answers


WITH_PREFIXES = {"enable_prefix_caching": True}


@pytest.mark.parametrize(
    ("word", "reason"),
    [(NAN, NOT_FINITE), (INFINITE, NOT_FINITE), (LARGE, TOO_LARGE)],
    ids=["nan", "infinite", "large"],
)
def test_a_request_with_a_bad_token_fails_and_others_answers_are_theirs(serve, alone, poisoned_folder, prompts, word, reason):
    engine = serve(folder=poisoned_folder)
    start = engine.free_blocks
    with errors() as messages:
        bad = engine.add(with_bad_word(word), 10)
        names = [engine.add(prompt, STEPS) for prompt in prompts]
        ended = ends(engine)
    assert ended_by_error(ended[bad]) == []
    # What is wrong is said before the request fails.
    assert messages[0] == named(POSITION, reason)
    assert messages[-1] == f"ElasticKV: request {bad} ends with an error: {WHY}"
    together = [engine.answers(ended[name], prompt)[0] for name, prompt in zip(names, prompts, strict=True)]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert engine.free_blocks == start
    # Blocks that held bad numbers serve others.
    with errors() as messages:
        again = engine.generate(prompts, STEPS)
    assert [answer.tokens for answer in again] == [answer.tokens for answer in alone]
    assert messages == []
    assert engine.free_blocks == start


def test_a_bad_token_far_before_the_end_of_a_chunk_fails_its_request(serve, poisoned_folder):
    """No later token of the chunk needs it: by the last one it is in a page."""
    engine = serve(folder=poisoned_folder)
    prompt = random_prompts([900], seed=9)[0]
    prompt[POSITION] = NAN
    with errors() as messages:
        bad = engine.add(prompt, 10)
        assert ended_by_error(ends(engine)[bad]) == []
    assert messages[0] == named(POSITION)


def test_a_bad_token_that_the_model_chose_fails_its_request_in_the_next_step(serve, poisoned_folder):
    engine = serve(folder=poisoned_folder)
    start = engine.free_blocks
    with errors() as messages:
        bad = engine.add(random_prompts([50], seed=9)[0], 10, allowed_token_ids=[NAN])
        assert ended_by_error(ends(engine)[bad]) == [NAN]
    assert messages[0] == named(50)
    assert engine.free_blocks == start


def test_blocks_of_a_bad_token_serve_no_prefix_hit(serve, poisoned_folder):
    engine = serve(folder=poisoned_folder, **WITH_PREFIXES)
    prompt = with_bad_word(NAN)
    for _ in range(2):  # the bad token is computed again
        with errors() as messages:
            bad = engine.add(prompt, 10)
            ended_by_error(ends(engine)[bad])
        assert messages[0] == named(POSITION)
    clean = [*prompt[:POSITION], *random_prompts([60], seed=10)[0]]
    (answer,) = engine.generate([clean], 10)
    assert answer.cached == 0 and len(answer.tokens) == 10
    (again,) = engine.generate([clean], 10)
    assert again.cached == 128 and again.tokens == answer.tokens


def test_a_prefix_that_a_request_read_and_failed_with_in_its_first_step_is_computed_again(serve, poisoned_folder):
    """It may have been another one's, whose NaN was not noticed."""
    engine = serve(folder=poisoned_folder, **WITH_PREFIXES)
    prompt = with_bad_word(NAN)
    (answer,) = engine.generate([prompt[:POSITION]], 10)
    bad = engine.add(prompt, 10)
    ended_by_error(ends(engine)[bad])
    (again,) = engine.generate([prompt[:POSITION]], 10)
    assert again.cached == 0 and again.tokens == answer.tokens


def test_a_request_that_read_bad_blocks_before_they_were_noticed_fails_too(serve, poisoned_folder, prompts, monkeypatch):
    """Blocks are in the prefix cache once a step that writes them is planned; another request of it may read them."""
    engine = serve(folder=poisoned_folder, **WITH_PREFIXES)
    start = engine.free_blocks
    prompt = with_bad_word(NAN)
    with errors() as messages:
        first = engine.add(prompt, 10)
        second = engine.add([*prompt, *random_prompts([300], seed=12)[0]], 10)
        other = engine.add(prompts[0], 10)
        # Whatever the second makes of the first one's blocks, it is known to have read them.
        monkeypatch.setattr(engine.scheduler, "_with_nan", lambda *_: iter([first]))
        ended = ends(engine)
    assert [ended_by_error(ended[name]) for name in (first, second)] == [[], []]
    (answer,) = ended[other].outputs
    assert len(answer.token_ids) == 10 and answer.finish_reason == "length"
    assert f"ElasticKV: request {first} ends with an error: {WHY}" in messages
    assert f"ElasticKV: request {second} ends with an error: it read blocks of a request whose logits are NaN" in messages
    assert engine.free_blocks == start


def test_with_drafts_the_request_fails_whose_rows_are_bad(serve, poisoned_folder):
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    engine = serve(folder=poisoned_folder, speculative_config=drafts)
    repeated = random_prompts([8], seed=11)[0] * 8
    alone = engine.generate([repeated], STEPS)[0]
    for order in (0, 1):
        with errors() as messages:
            names = [engine.add(repeated, STEPS)] if order else []
            bad = engine.add(with_bad_word(NAN), 10)
            names += [] if order else [engine.add(repeated, STEPS)]
            ended = ends(engine)
        ended_by_error(ended[bad])
        (answer,) = ended[names[0]].outputs
        assert list(answer.token_ids) == alone.tokens
        assert f"ElasticKV: request {bad} ends with an error: {WHY}" in messages


@pytest.mark.parametrize("word", [NAN, LARGE], ids=["nan", "large"])
def test_behind_others_with_drafts_a_request_fails_in_the_step_of_its_bad_token(serve, poisoned_folder, word):
    """vLLM's counts of NaN do not reach so far, and a large key is NaN in its own step only."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    engine = serve(folder=poisoned_folder, speculative_config=drafts, **WITH_PREFIXES)
    ended, requests = {}, engine.scheduler.requests
    names = [engine.add(prompt, 60, allowed_token_ids=list(range(NAN))) for prompt in random_prompts([400, 410, 420], seed=11)]
    engine.step()
    while not all(requests[name].spec_token_ids for name in names):
        ended |= engine.step()
    prompt = with_bad_word(word)
    with errors() as messages:
        bad = engine.add(prompt, 30)
        ended |= ends(engine)
    assert ended_by_error(ended[bad]) == []
    assert [len(ended[name].outputs[0].token_ids) for name in names] == [60, 60, 60]
    # One line of the layer, from which the others have it, and one of the scheduler.
    reason = TOO_LARGE if word == LARGE else NOT_FINITE
    assert messages == [named(POSITION, reason), f"ElasticKV: request {bad} ends with an error: {WHY}"]
    # No page of the token serves a prefix hit.
    with errors() as messages:
        again = engine.add(prompt, 10)
        assert ended_by_error(ends(engine)[again]) == []
    assert messages[0] == named(POSITION, reason)


def test_a_scheduler_that_the_user_chose_stays_and_the_log_says_what_it_lacks(monkeypatch):
    warnings = []
    monkeypatch.setattr(window_spec._log, "warning", lambda text, *arguments: warnings.append(text % arguments))
    ours, theirs = SimpleNamespace(scheduler_cls=None, async_scheduling=True), SimpleNamespace(scheduler_cls="mine.Scheduler")
    for _ in range(2):
        window_spec.choose_scheduler(ours)
        window_spec.choose_scheduler(theirs)
    assert ours.scheduler_cls == "elastickv.vllm.fail_on_nan_scheduler.FailOnNanAsyncScheduler"
    assert theirs.scheduler_cls == "mine.Scheduler"
    (warning,) = warnings
    assert "mine.Scheduler" in warning and "NaN" in warning


def test_what_was_found_is_logged_once_with_its_layer(logged):
    found = BadTokens("cpu", 4)
    assert [found.of_layer(name)[0] for name in ("first", "second", "first")] == [0, 1, 0]
    assert found.words.tolist() == [[NO_BAD_TOKEN] * 4] * 2
    found.reported[2, 0, 3] = BadToken(1, 1234, too_large=True).word
    for _ in range(2):
        found.look()
    assert logged == [
        f"ElasticKV: layer second has {TOO_LARGE} at position 1234 of a request, which ends with an error",
    ]
    found.reported[0, 0, 0] = BadToken(0, 5, too_large=False).word
    found.look()
    assert len(logged) == 2 and "layer first has a NaN or an infinity" in logged[1]


def test_tokens_are_taken_by_their_step_and_a_drafters_fail_no_request(logged):
    found = BadTokens("cpu", 4)
    found.add_drafter("drafter")
    words = [found.of_layer(name)[1].data_ptr() for name in ("first", "second", "drafter")]
    assert words[0] == words[1] == found.words[0].data_ptr() and words[2] == found.words[1].data_ptr()
    assert [found.begin_step() for _ in range(5)] == [1, 2, 3, 4, 5]
    here, next_step, of_drafter = BadToken(1, 40, False), BadToken(0, 41, False), BadToken(2, 42, False)
    found.reported[4 % 4, 0, 3] = here.word
    found.reported[5 % 4, 0, 3], found.reported[5 % 4, 1, 0] = next_step.word, of_drafter.word
    assert found.take(4) == {3: here}
    assert found.take(4) == {}
    assert found.take(5) == {3: next_step}
    assert sorted(text.split(" has ")[0].split()[-1] for text in logged) == ["drafter", "first", "second"]
    (line,) = (text for text in logged if "drafter" in text)
    assert line.endswith("position 42 of a request, whose drafts are wrong")


def test_an_engine_is_known_by_its_layers_whatever_it_is_named():
    """In a process of its own vLLM names a configuration anew once the model is loaded."""
    layers = {}
    found = BadTokens("cpu", 4, layers)
    config, other = (SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=each)) for each in (layers, {}))
    assert of_engine(config) is found and of_engine(other) is None
    del found
    assert of_engine(config) is None


def test_kernels_see_the_step_that_was_begun_last():
    found = BadTokens("cpu", 4)
    assert found.begin_step() == 1
    found.mark_step()
    found.of_layer("first")  # of the first step: vLLM on CPUs has computed nothing before
    number = found.step
    assert int(number) == 1
    for step in (2, 3):
        assert found.begin_step() == step
        for _ in range(2):  # of several groups of layers
            found.mark_step()
        assert int(number) == step


@pytest.mark.parametrize("later", [(1, 60, False), (0, 70, True), (1, 70, False)])
def test_of_two_tokens_the_word_of_the_first_in_its_first_layer_is_less(later):
    assert BadToken(0, 70, False).word != BadToken(*later).word
    assert (BadToken(*later).word < BadToken(0, 70, False).word) == (later == (1, 60, False))


@pytest.mark.parametrize("token", [BadToken(0, 0, True), BadToken(0, 0, False), BadToken(2**30 - 1, 2**32 - 1, True)])
def test_a_word_says_which_token_it_was(token):
    word = torch.tensor([token.word], dtype=torch.int64)
    assert BadToken.of(int(word)) == token


def test_two_requests_of_a_step_with_keys_that_are_too_large_are_both_named_and_fail(serve, poisoned_folder, prompts):
    engine = serve(folder=poisoned_folder)
    start = engine.free_blocks
    second = random_prompts([60], seed=13)[0]
    second[33] = LARGE
    with errors() as messages:
        bad = [engine.add(with_bad_word(LARGE), 10), engine.add(second, 10)]
        other = engine.add(prompts[0], 10)
        ended = ends(engine)
    assert [ended_by_error(ended[name]) for name in bad] == [[], []]
    assert len(ended[other].outputs[0].token_ids) == 10
    assert {named(POSITION, TOO_LARGE), named(33, TOO_LARGE)} <= set(messages)
    assert engine.free_blocks == start
