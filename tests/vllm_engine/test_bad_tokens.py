"""Tokens whose keys or values cannot be stored: the log names them, and no other request notices."""

import logging
import math
from contextlib import contextmanager

import pytest
import torch

from elastickv.backends.bad_token import NO_BAD_TOKEN, BadToken
from elastickv.vllm.bad_tokens import BadTokens
from tests.helpers.served_llama import Sizes, write_model
from tests.helpers.serving_scenarios import all_follow, random_prompts

NAN, INFINITE, LARGE = 509, 510, 511  # words that random prompts do not have
LOOKS = 8  # steps from one look to the next
POSITION, STEPS = 70, 40


@pytest.fixture(scope="module")
def poisoned(weights):
    """Return the weights with three bad words: one is NaN, one infinite, and one has huge keys and usual values.

    The last differs from others in one channel, which only the keys of the first layer read.
    """
    sizes, made = Sizes(), {name: tensor.clone() for name, tensor in weights.items()}
    embedding = made["model.embed_tokens.weight"]
    embedding[:, -1] = 0
    embedding[NAN], embedding[INFINITE] = math.nan, math.inf
    embedding[LARGE] = 0
    embedding[LARGE, -1] = 1
    for name, tensor in made.items():
        if tensor.dim() == 2 and tensor.shape[1] == sizes.hidden and "embed" not in name:
            tensor[:, -1] = 0
    # The norm before attention makes the channel 16 times its weight.
    made["model.layers.0.self_attn.k_proj.weight"][:, -1] = 1e5
    return made


@pytest.fixture(scope="module")
def poisoned_folder(poisoned, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("poisoned") / "llama", poisoned)


@contextmanager
def errors():
    """Keep the messages that are logged as errors. vLLM takes other handlers away when an engine starts."""
    messages = []

    class Kept(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler, logger = Kept(logging.ERROR), logging.getLogger("vllm.elastickv")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


@pytest.fixture
def logged():
    with errors() as messages:
        yield messages


def with_bad_word(word):
    prompt = random_prompts([100], seed=7)[0]
    return [*prompt[:POSITION], word, *prompt[POSITION + 1 :]]


@pytest.fixture(scope="module")
def alone(serve, rule, poisoned, poisoned_folder, prompts):
    """Answers where no request has a bad word."""
    engine = serve(folder=poisoned_folder)
    with errors() as messages:
        answers = engine.generate(prompts, STEPS)
        engine.generate(prompts[:1], 2 * LOOKS)
    all_follow(rule(weights=poisoned), answers)
    assert messages == []
    return answers


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        (NAN, "a NaN or an infinity in keys or values"),
        (INFINITE, "a NaN or an infinity in keys or values"),
        (LARGE, "a key beyond the range of the page format"),
    ],
    ids=["nan", "infinite", "large"],
)
def test_a_bad_token_is_named_and_others_answers_are_theirs(serve, alone, poisoned_folder, prompts, word, reason):
    engine = serve(folder=poisoned_folder)
    start = engine.free_blocks
    with errors() as messages:
        bad = engine.add(with_bad_word(word), 10)
        names = [engine.add(prompt, STEPS) for prompt in prompts]
        ended = {}
        while engine.engine.has_unfinished_requests():
            ended |= engine.step()
    assert bad in ended
    assert messages[0] == (
        f"ElasticKV: layer model.layers.0.self_attn.attn has {reason} at position {POSITION} of a request: "
        "its answer is wrong from there on"
    )
    together = [engine.answers(ended[name], prompt)[0] for name, prompt in zip(names, prompts, strict=True)]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert engine.free_blocks == start
    # Blocks that held bad numbers serve others.
    with errors() as messages:
        again = engine.generate(prompts, STEPS)
    assert [answer.tokens for answer in again] == [answer.tokens for answer in alone]
    assert messages == []
    assert engine.free_blocks == start


def looked(found, times=LOOKS):
    for _ in range(times):
        found.look()


def test_what_was_found_is_logged_once_with_its_layer(logged):
    found = BadTokens("cpu")
    first, second = found.word("first"), found.word("second")
    assert first.tolist() == second.tolist() == [NO_BAD_TOKEN]
    second.fill_(BadToken(3, 1234, too_large=True).word)
    looked(found, 2 * LOOKS)
    assert logged == [
        "ElasticKV: layer second has a key beyond the range of the page format at position 1234 of a request: "
        "its answer is wrong from there on"
    ]
    looked(found, 4 * LOOKS)
    assert len(logged) == 1
    assert first.tolist() == second.tolist() == [NO_BAD_TOKEN]
    first.fill_(BadToken(0, 5, too_large=False).word)
    looked(found, 2 * LOOKS)
    assert len(logged) == 2 and "layer first has a NaN or an infinity" in logged[1]


def test_steps_between_two_looks_read_nothing(logged):
    found = BadTokens("cpu")
    found.word("first").fill_(BadToken(0, 0, too_large=False).word)
    looked(found, 2 * LOOKS - 1)
    assert logged == []
    found.look()
    assert len(logged) == 1


@pytest.mark.parametrize("token", [BadToken(0, 0, True), BadToken(0, 0, False), BadToken(2**31 - 2, 2**32 - 1, True)])
def test_a_word_says_which_token_it_was(token):
    word = torch.tensor([token.word], dtype=torch.int64)
    assert BadToken.of(int(word)) == token
