"""An engine that slept: what only a GPU runs."""

import pytest

from tests.helpers.rounded_answers import agree, follow
from tests.helpers.serving_scenarios import NEW_TOKENS

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def rested(device, serve_bf16, prompts):
    """Return an engine that may sleep, with its answers before and the blocks that were free."""
    if device == "cpu":
        pytest.skip("runs on a GPU only")
    engine = serve_bf16(enable_sleep_mode=True, enable_prefix_caching=True)
    before = engine.generate(prompts, NEW_TOKENS)
    engine.settle()
    return engine, before, engine.free_blocks


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_gives_the_same_answers(rested, rounded_rule, prompts, level):
    """At level 2 the weights are gone too, and are loaded again."""
    engine, before, free = rested
    engine.llm.sleep(level=level)
    if level == 1:
        engine.llm.wake_up()
    else:
        engine.llm.wake_up(tags=["weights"])
        engine.llm.collective_rpc("reload_weights")
        engine.llm.wake_up(tags=["kv_cache"])
    after = engine.generate(prompts, NEW_TOKENS)
    assert [answer.cached for answer in after] == [0] * len(prompts)
    follow(rounded_rule, after)
    agree(rounded_rule, after, before)
    engine.settle()
    assert engine.free_blocks == free
