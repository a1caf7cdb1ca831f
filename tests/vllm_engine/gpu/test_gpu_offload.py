"""Blocks that vLLM's own connector keeps in the host's memory: vLLM offers it on GPUs only."""

import time

import pytest

from tests.helpers.rounded_answers import agree, follow
from tests.helpers.serving_scenarios import random_prompts

pytestmark = pytest.mark.gpu

OFFLOAD = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 1 << 28},
}


def test_a_prompt_comes_back_from_the_hosts_memory_with_the_same_answer(serve_bf16, rounded_rule, device):
    if device == "cpu":
        pytest.skip("vLLM offloads from GPUs only")
    strict = {"prefix_reuse": "strict"}
    engine = serve_bf16(enable_prefix_caching=True, kv_transfer_config=OFFLOAD, elastickv=strict)
    asked = random_prompts([300, 270], seed=62)
    before = engine.generate(asked, 40)
    engine.settle()
    time.sleep(1)  # copies are not waited for
    engine.forget_prefixes()
    again = engine.generate(asked, 40)
    assert all(answer.cached >= 224 for answer in again)
    follow(rounded_rule, before)
    agree(rounded_rule, again, before)
