"""An engine that slept: what only a GPU runs."""

import pytest

from tests.helpers.rounded_answers import agree, follow
from tests.helpers.serving_scenarios import NEW_TOKENS

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu(device):
    if device == "cpu":
        pytest.skip("runs on a GPU only")


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
