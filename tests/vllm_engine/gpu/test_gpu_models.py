"""Models whose windowed layers a stock backend serves, under the flags that the start prints, and experts.

`python -m pytest tests/vllm_engine/gpu/test_gpu_models.py -m gpu`; only where vLLM chooses a backend for each kind of layer.
"""

import json
import re
import shlex

import numpy as np
import pytest

from tests.helpers.model_families import VOCABULARY, write_family, write_gemma3
from tests.helpers.serving_scenarios import GPU_MEMORY

pytestmark = pytest.mark.gpu

NEW_TOKENS, COVERED, WINDOW = 24, 1024, 64
LENGTHS = (60, 300, 129, 411)
# bfloat16, whose sums each backend rounds differently.
ROUNDING = 0.15
SHARED = {"enable_prefix_caching": True, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module")
def start(serve, device):
    if device == "cpu":
        pytest.skip("on CPUs one backend serves all layers")
    settings = {"dtype": "bfloat16", "enforce_eager": False, "async_scheduling": None} | GPU_MEMORY
    return lambda *plug_in, **options: serve(*plug_in, **(settings | {"block_size": None} | SHARED | options))


def flags_of_the_start(start, folder, **options):
    """Return the engine's options that the refusal prints, as vLLM's own parser reads them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    with pytest.raises(Exception, match="vllm serve") as refusal:
        start("int4", WINDOW, folder=folder, attention_backend="ELASTICKV", **options)
    words = shlex.split(re.search(r"vllm serve .*", str(refusal.value))[0].splitlines()[0])
    arguments = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", words[2], *words[3:]])
    assert json.loads(words[words.index("--additional-config") + 1])["elastickv"]["format"] == "int4"
    engine = AsyncEngineArgs.from_cli_args(arguments)
    names = ("attention_backend", "attention_config", "kv_cache_dtype", "kv_cache_dtype_skip_layers")
    return {name: getattr(engine, name) for name in names if getattr(engine, name, None) not in (None, [], "auto")}


def answered(engine):
    rng = np.random.default_rng(0)
    asked = [rng.integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
    return engine.generate(asked, NEW_TOKENS), engine.generate(asked, NEW_TOKENS)


def near(answers, others, most=ROUNDING):
    """Check the log-probabilities up to the first other token."""
    for one, other in zip(answers, others, strict=True):
        same = int(sum(np.cumprod(np.equal(one.tokens, other.tokens))))
        assert abs(one.logprobs[0] - other.logprobs[0]) < most or one.tokens[0] != other.tokens[0]
        assert np.median(np.abs(np.subtract(one.logprobs[:same], other.logprobs[:same])) if same else 0) < most


def specs(engine):
    """Return name: specification of each group's layers."""
    groups = engine.scheduler.kv_cache_config.kv_cache_groups
    return {name: group.kv_cache_spec for group in groups for name in group.layer_names}


def packed_pages(engine):
    return [spec for name, spec in specs(engine).items() if type(spec).__name__ == "FullAttentionSpec"]


@pytest.fixture(scope="module", params=["sssfsssfsss", "fsssfsssfss"])
def gemma3(request, tmp_path_factory):
    """A folder; vLLM sizes blocks for the backend of the first layer."""
    import torch

    return write_gemma3(tmp_path_factory.mktemp("gemma3"), torch.bfloat16, request.param)


@pytest.fixture(scope="module", params=["auto", "named"])
def flags(request, start, gemma3):
    from elastickv.vllm.versions import installed_version, minor_version

    given = {"attention_backend": "ELASTICKV", "attention_config": {"backend_per_kind": {"sliding_window": "FLASH_ATTN"}}}
    if request.param == "named":
        if not minor_version(installed_version().version).named_cache_dtypes:
            pytest.skip("vLLM 0.32 has no names for KV cache dtypes")
        given |= {"kv_cache_dtype": "elastickv_int4", "kv_cache_dtype_skip_layers": ["sliding_window"]}
    return given


def test_the_printed_flags_are_vllms_and_start(start, gemma3, flags):
    named = {"kv_cache_dtype": flags["kv_cache_dtype"]} if "kv_cache_dtype" in flags else {}
    given = flags_of_the_start(start, gemma3, **named)
    assert given.get("kv_cache_dtype_skip_layers") == flags.get("kv_cache_dtype_skip_layers")
    near(*answered(start("int4", WINDOW, folder=gemma3, **given)))


def test_full_layers_have_packed_pages_beside_windows_in_16_bit(start, gemma3, flags):
    engine = start("int4", WINDOW, folder=gemma3, **flags)
    pages = packed_pages(engine)
    assert pages
    for spec in pages:
        dense = spec.block_size * spec.num_kv_heads * spec.head_size * 2 * 2
        assert spec.page_size_padded is None and 3.2 * spec.page_size_bytes < dense
    windows = [spec for name, spec in specs(engine).items() if type(spec).__name__ == "SlidingWindowSpec"]
    assert windows and all(spec.real_page_size_bytes > 0.8 * spec.page_size_bytes for spec in windows)


def test_a_window_that_covers_all_tokens_answers_as_the_stock_backend(start, gemma3, flags):
    stock, again = answered(start(None, folder=gemma3, attention_backend="FLASH_ATTN"))
    near(stock, again)
    ours, hits = answered(start("int4", COVERED, folder=gemma3, **flags))
    near(stock, ours)
    assert any(answer.cached for answer in hits)
    near(ours, hits)


def test_pages_of_full_layers_are_read(start, gemma3, flags):
    covered, _ = answered(start("int4", COVERED, folder=gemma3, **flags))
    paged, hits = answered(start("int4", WINDOW, folder=gemma3, **flags))
    assert any(one.logprobs != other.logprobs for one, other in zip(covered[1:], paged[1:], strict=True))
    near(paged, hits)


def test_experts_are_served(start, tmp_path_factory):
    import torch

    folder = write_family("qwen3-moe", tmp_path_factory.mktemp("experts"), torch.bfloat16)
    stock, _ = answered(start(None, folder=folder, attention_backend="FLASH_ATTN"))
    engine = start("int4", COVERED, folder=folder, attention_backend="ELASTICKV")
    assert all(spec.page_size_padded is None for spec in packed_pages(engine))
    near(stock, answered(engine)[0])
