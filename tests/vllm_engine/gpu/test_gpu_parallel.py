"""Engines on two GPUs: heads, layers or requests are split, and the answers are those of one.

Sums over two ranks are rounded in another order, so that codes move; all follow the rule. Engines on GPUs refuse float32, in
which answers would be equal: two processes on a CPU try that (`test_parallel.py`).
"""

import pytest

from tests.helpers.parallel_engine import ask, kill_rank
from tests.helpers.rounded_answers import agree, distance, follow
from tests.helpers.served_calibration import write_calibration
from tests.helpers.serving_engine import DEFAULTS
from tests.helpers.serving_scenarios import CHUNKED, LENGTHS, WINDOW, random_prompts

pytestmark = pytest.mark.gpu

TOKENS = 60
KV_BYTES = 2**28  # on each GPU


@pytest.fixture(scope="module")
def two_devices(device):
    """Skip where there are none or one; the CPU's two processes try the tests themselves."""
    import torch

    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")


@pytest.fixture(scope="module")
def settings(two_devices, bf16_settings, folder, device):
    memory = {} if device == "cpu" else {"kv_cache_memory_bytes": KV_BYTES}
    return DEFAULTS | bf16_settings("int4") | CHUNKED | memory | {"model": str(folder)}


@pytest.fixture(scope="module")
def ask_in_bf16(settings):
    """Return a function that asks an engine in processes of its own, with options of ElasticKV and of vLLM."""

    def asked(prompts, tokens=TOKENS, elastickv=None, **options):
        plug_in = {"elastickv": {"format": "int4", "window": WINDOW} if elastickv is None else elastickv}
        return ask(prompts, tokens, **(settings | options), additional_config=plug_in)

    return asked


@pytest.fixture(scope="module")
def of_one(ask_in_bf16):
    return ask_in_bf16(random_prompts(LENGTHS))


@pytest.mark.parametrize("split", ["tensor", "pipeline", "data"])
def test_two_gpus_give_the_answers_of_one(split, of_one, ask_in_bf16, rounded_rule, device):
    if device == "cpu" and split != "tensor":
        pytest.skip("vLLM splits neither layers nor requests on CPUs")
    found = ask_in_bf16(random_prompts(LENGTHS), **{f"{split}_parallel_size": 2})
    assert len(found.answers) == (2 if split == "data" else 1)
    for answers in found.answers:
        follow(rounded_rule, answers)
        agree(rounded_rule, answers, of_one.answers[0])
    print(f"measured: {found.blocks} blocks, {of_one.blocks} on one GPU")
    # Each rank has as much memory for half of the heads, of the layers or of the requests: vLLM adds up blocks of the latter.
    assert found.blocks == pytest.approx(2 * of_one.blocks, rel=0.03)


@pytest.mark.parametrize("split", ["tensor", "pipeline"])
def test_ranks_read_the_shares_of_their_own_heads_and_layers(split, ask_in_bf16, rounded_rule, folder, tmp_path, device):
    """A head reads an eighth of its pages and the other a half, in the second layer the other way round."""
    if device == "cpu" and split != "tensor":
        pytest.skip("vLLM does not split layers on CPUs")
    calibration = write_calibration(tmp_path / "calibration.json", folder)
    options = {"kv_cache_dtype": "auto", "elastickv": calibration | {"compress": 5, "window": WINDOW}}
    found = ask_in_bf16(random_prompts((700, 500, 900), seed=3), 90, **options, **{f"{split}_parallel_size": 2})
    shares = (("1/8", "1/2"), ("1/2", "1/8"), ("1/8", "1/8"), ("1/2", "1/2"))
    own, *others = (
        distance(rounded_rule(layers={0: f"int4,pages={a}:{b}", 1: f"int4,pages={b}:{a}"}), found.answers[0]) for a, b in shares
    )
    print(f"measured: {own:.4f} from the own rule, {', '.join(f'{other:.4f}' for other in others)} from others")
    assert own < min(others) / 2
    assert found.counters["anchors"] == found.counters["layer_tokens"] > 0


def test_requests_end_with_an_error_if_a_process_of_the_model_is_killed(settings):
    """NCCL waits for a rank that is gone: vLLM ends the other one, too."""
    plug_in = {"elastickv": {"format": "int4", "window": WINDOW}}
    outcome, log = kill_rank(1, random_prompts((40, 100)), 900, **settings, tensor_parallel_size=2, additional_config=plug_in)
    print(f"measured: {outcome['seconds']:.1f} s until requests ended")
    assert all(error.startswith("EngineDeadError") for error in outcome["errors"]), outcome
    assert "VllmWorker-1 died unexpectedly (exit code: -9)" in log
    assert outcome["seconds"] < 60 and (outcome["ended"], outcome["left"]) == (3, 0)
