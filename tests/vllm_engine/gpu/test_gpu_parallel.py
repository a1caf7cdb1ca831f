"""Engines on two GPUs: heads, layers or requests are split, and the answers are those of one.

Sums over two ranks are rounded in another order, so that codes move; all follow the rule.
"""

import pytest

from tests.helpers.parallel_engine import ask
from tests.helpers.rounded_answers import agree, follow
from tests.helpers.serving_engine import DEFAULTS
from tests.helpers.serving_scenarios import CHUNKED, LENGTHS, WINDOW, random_prompts

pytestmark = pytest.mark.gpu

TOKENS = 60


@pytest.fixture(scope="module")
def two_devices(device):
    """Skip where there are none or one; the CPU's two processes try the tests themselves."""
    import torch

    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")


@pytest.fixture(scope="module")
def of_one(two_devices, serve_bf16):
    return serve_bf16(**CHUNKED).generate(random_prompts(LENGTHS), TOKENS)


@pytest.mark.parametrize("split", ["tensor", "pipeline", "data"])
def test_two_gpus_give_the_answers_of_one(split, of_one, rounded_rule, bf16_settings, folder, device):
    if device == "cpu" and split != "tensor":
        pytest.skip("vLLM splits neither layers nor requests on CPUs")
    settings = DEFAULTS | bf16_settings("int4") | CHUNKED
    plug_in = {"elastickv": {"format": "int4", "window": WINDOW}}
    found = ask(
        random_prompts(LENGTHS),
        TOKENS,
        **settings,
        model=str(folder),
        additional_config=plug_in,
        **{f"{split}_parallel_size": 2},
    )
    assert len(found) == (2 if split == "data" else 1)
    for answers in found:
        follow(rounded_rule, answers)
        agree(rounded_rule, answers, of_one)
