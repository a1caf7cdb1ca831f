"""A draft model, whose layers have caches of their own, and an engine that slept: what only a GPU runs."""

import pytest

from tests.helpers.rounded_answers import agree, follow
from tests.helpers.serving_scenarios import NEW_TOKENS

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu(device):
    if device == "cpu":
        pytest.skip("runs on a GPU only")


@pytest.fixture
def second_runner(gpu):
    import vllm

    if vllm.__version__.startswith("0.32"):
        pytest.skip("the first model runner has no room for a draft model's caches")


def test_a_draft_model_that_is_the_model_drafts_its_tokens(second_runner, serve_bf16, rounded_rule, prompts, folder):
    engine = serve_bf16(speculative_config={"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3})
    answers = engine.generate(prompts, NEW_TOKENS)
    drafted, accepted = (engine.counter(f"vllm:spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
    assert [len(answer.tokens) for answer in answers] == [NEW_TOKENS] * len(prompts)
    assert drafted > 0 and accepted / drafted > 0.8
    follow(rounded_rule, answers)


def test_an_engine_that_slept_gives_the_same_answers(gpu, serve_bf16, rounded_rule, prompts):
    engine = serve_bf16(enable_sleep_mode=True, enable_prefix_caching=True)
    before = engine.generate(prompts, NEW_TOKENS)
    engine.settle()
    start = engine.free_blocks
    engine.llm.sleep(level=1)
    engine.llm.wake_up()
    after = engine.generate(prompts, NEW_TOKENS)
    assert [answer.cached for answer in after] == [0] * len(prompts)
    follow(rounded_rule, after)
    agree(rounded_rule, after, before)
    engine.settle()
    assert engine.free_blocks == start
