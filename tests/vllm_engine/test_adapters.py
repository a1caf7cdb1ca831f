"""An adapter changes keys and values before they are stored."""

from tests.helpers.read_rule import follows
from tests.helpers.serving_scenarios import ADAPTERS, all_follow


def test_requests_with_an_adapter_and_without_share_no_prefix(serve, rule, prompts, weights, adapter):
    """One kind after the other: vLLM 0.32 on CPUs applies the adapter to all requests of a step."""
    folder, added = adapter
    merged = {name: tensor + added.get(name, 0) for name, tensor in weights.items()}
    engine = serve(enable_prefix_caching=True, **ADAPTERS)
    own = engine.finish([engine.add(prompt, 40, lora=folder) for prompt in prompts], prompts)
    plain = engine.generate(prompts, 40)
    all_follow(rule(weights=merged), own)
    all_follow(rule(), plain)
    assert follows(rule(), own[2]) is not None
    assert all(answer.cached == 0 for answer in plain)
