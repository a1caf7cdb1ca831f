"""The plain model of the read rule is the model that vLLM serves, and it notices a wrong read."""

import numpy as np
import pytest
import torch

from benchmarks.read_rule import ReadRule
from elastickv.recipe import Recipe
from tests.helpers.read_rule import NEAR, compare, follows
from tests.helpers.serving_scenarios import WINDOW, random_prompts


def test_the_plain_model_is_the_model_of_transformers(folder, rule):
    from transformers import AutoModelForCausalLM

    tokens = random_prompts([150])[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(rule(recipe=None).logits(tokens), expected, rtol=0, atol=1e-3)  # its angles are float32


def test_stock_vllm_answers_as_the_plain_model_without_pages(serve, rule, prompts):
    for answer in serve(fmt=None).generate(prompts, 40):
        assert follows(rule(recipe=None), answer) is None


def test_queries_read_pages_once_tokens_are_older_than_the_window():
    rule, positions = ReadRule(Recipe.parse("int4"), 64), torch.arange(200)
    assert rule.first_exact(positions)[[63, 64, 199]].tolist() == [0, 1, 136]
    assert rule.first_exact(positions, torch.full((200,), 96))[[50, 120, 199]].tolist() == [50, 96, 136]


@pytest.mark.parametrize(("recipe", "window"), [(None, WINDOW), ("int4", WINDOW - 32), ("int4", WINDOW + 32), ("int8", WINDOW)])
def test_another_read_is_noticed(rule, prompts, recipe, window):
    """Greedy answers of the rule itself are not accepted as those of another."""
    tokens = prompts[2]
    own = rule().logits(tokens)
    chosen = own[:-1].argmax(-1).tolist()
    logprobs = own[:-1].log_softmax(-1).gather(1, torch.tensor(chosen)[:, None])[:, 0].tolist()
    bad, differences = compare(rule().logits(tokens), 1, chosen, logprobs)
    assert bad == 0 and differences.max() == 0
    bad, differences = compare(rule(recipe, window).logits(tokens), 1, chosen, logprobs)
    assert np.quantile(differences[window:], 0.8) > NEAR
    assert bad > len(chosen) // 50


def test_where_a_window_was_missing_is_noticed(rule, prompts):
    """The start of the window of each token is an input that matters."""
    tokens, first = prompts[2], np.zeros(211, int)
    first[128:160] = 128
    own, other = (rule().logits(tokens, each).log_softmax(-1) for each in (first, None))
    torch.testing.assert_close(own[:128], other[:128])
    assert (own[128:160] - other[128:160]).abs().max() > 0.1
