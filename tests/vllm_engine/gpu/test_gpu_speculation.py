"""Drafters with layers of their own, under graphs and asynchronous scheduling: vLLM's model runner V2 of a GPU.

With ELASTICKV_SERVING_DEVICE=cpu vLLM has model runner V1, which has no such drafters; `test_speculation.py` interprets V2.
"""

import pytest

from tests.helpers.rounded_answers import follow
from tests.helpers.served_llama import Sizes, eagle_weights, random_weights, write_model
from tests.helpers.serving_scenarios import CHUNKED, NEW_TOKENS

pytestmark = pytest.mark.gpu


@pytest.fixture
def drafting(serve_bf16, prompts, device):
    """Return the answers of an engine with a drafter, and how many drafts were made and accepted."""
    if device == "cpu":
        pytest.skip("runs on a GPU only")

    def generate(method, model):
        speculation = {"method": method, "model": str(model), "num_speculative_tokens": 3}
        engine = serve_bf16(speculative_config=speculation, **CHUNKED)
        answers = engine.generate(prompts, NEW_TOKENS)
        return answers, *(engine.counter(f"vllm:spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))

    return generate


def test_a_model_that_drafts_for_itself_is_mostly_right(drafting, rounded_rule, folder):
    answers, drafted, accepted = drafting("draft_model", folder)
    assert accepted > 0.7 * drafted
    follow(rounded_rule, answers)


def test_a_draft_model_of_another_size_changes_no_token(drafting, rounded_rule, tmp_path):
    sizes = Sizes(layers=1, heads=2, kv_heads=1)
    answers, drafted, accepted = drafting("draft_model", write_model(tmp_path / "small", random_weights(sizes, seed=5), sizes))
    assert drafted > accepted
    follow(rounded_rule, answers)


def test_an_eagle_head_changes_no_token(drafting, rounded_rule, weights, tmp_path):
    answers, drafted, accepted = drafting("eagle", write_model(tmp_path / "head", eagle_weights(weights)))
    assert drafted > accepted > 0.1 * drafted
    follow(rounded_rule, answers)
