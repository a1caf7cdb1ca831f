"""How much of the pool a request's window may take, and what capacity vLLM reports for it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastickv.errors import UsageError
from elastickv.recipe import AttentionShape
from elastickv.vllm.layer_formats import SlabPlan
from elastickv.vllm.serving_options import ServingOptions, recipe_of
from elastickv.vllm.window_cache import WindowShape
from elastickv.vllm.window_manager import register_specs
from elastickv.vllm.window_spec import WindowSpec
from tests.helpers.served_llama import Sizes, write_model

LAYERS, KV_HEADS, HEAD_DIM, WINDOW = 32, 8, 128, 128
GIB = 2**30


def window(*, block=8, exact=WINDOW, steps=1, rollback=0, hit=0):
    return WindowSpec(
        block_size=block,
        num_kv_heads=KV_HEADS,
        head_size=HEAD_DIM,
        dtype=torch.uint8,
        state_content_bytes=4 * HEAD_DIM,
        sliding_window=exact,
        steps_in_flight=steps,
        rollback_tokens=rollback,
        hit_tokens=hit,
    )


def stock_blocks(spec, in_flight, longest):
    return super(WindowSpec, spec).max_admission_blocks_per_request(in_flight, longest)


@pytest.mark.parametrize(
    ("options", "tokens", "first"),
    [
        ({}, 0, 0),
        ({}, 127, 0),
        ({}, 128, 1),  # the query at 128 reads 1 to 127
        ({}, 1000, 873),
        ({"exact": 32}, 1000, 969),
        ({"rollback": 8}, 1000, 865),  # the next query may be at 992
        ({"hit": 32}, 1000, 865),  # a hit may end at 992
        ({"hit": 32}, 992, 833),  # all 992 tokens again: the last is computed, so that a hit ends at 960
        ({"hit": 128, "rollback": 8}, 1000, 769),
        ({"hit": 32}, 20, 0),
    ],
)
def test_the_first_stored_token_is_that_which_the_next_query_or_a_repeated_prompt_reads(options, tokens, first):
    assert window(**options).first_stored(tokens) == first


@given(
    tokens=st.integers(0, 3000),
    exact=st.integers(32, 300),
    rollback=st.integers(0, 20),
    hit=st.sampled_from([0, 32, 64, 128]),
)
def test_no_token_is_left_out_that_a_later_query_reads(tokens, exact, rollback, hit):
    """Queries of the next step begin at most `rollback` tokens before its end, those after a hit where the hit ends."""
    first = window(exact=exact, rollback=rollback, hit=hit).first_stored(tokens)
    queries = {max(0, tokens - back) for back in range(rollback + 1)}
    if hit:
        queries |= {max(0, tokens - back - 1) // hit * hit for back in range(rollback + 1)}
    assert first == min(max(0, query - exact + 1) for query in queries)


@given(
    exact=st.integers(32, 4096),
    block=st.sampled_from([1, 2, 4, 8, 16, 32]),
    steps=st.integers(1, 4),
    drafts=st.integers(0, 8),
    hit=st.sampled_from([0, 32, 128]),
    in_flight=st.integers(1, 65536),
    longest=st.integers(1, 131072),
)
def test_a_request_reserves_a_window_for_each_step_and_never_more_than_stock(
    exact, block, steps, drafts, hit, in_flight, longest
):
    rollback = drafts * steps
    spec = window(block=block, exact=exact, steps=steps, rollback=rollback, hit=hit)
    blocks = spec.max_admission_blocks_per_request(in_flight, longest)
    stock = stock_blocks(spec, in_flight, longest)
    assert blocks <= stock
    # A step leaves these tokens at most, which begin anywhere in a block, behind those of the step before.
    tokens = exact - 1 + 2 * rollback + hit
    most_blocks = max(-(-(offset + tokens) // block) for offset in range(block))
    assert min(stock, (steps + 1) * most_blocks) <= blocks <= (steps + 1) * (most_blocks + 1)


def test_the_reserve_grows_with_steps_in_flight_and_not_with_the_chunk():
    at = [window(steps=steps).max_admission_blocks_per_request(8192 * steps, 131072) for steps in (1, 2, 3)]
    assert at == [34, 51, 68]
    assert window().max_admission_blocks_per_request(65536, 131072) == 34
    assert window(exact=64).max_admission_blocks_per_request(8192, 131072) == 18


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    """Return a function that builds vLLM's configuration; no engine is started."""
    from vllm.engine.arg_utils import EngineArgs

    folder = write_model(tmp_path_factory.mktemp("configured") / "llama", {}, Sizes(positions=65536))

    def configured(longest, batched=8192, steps=1):
        config = EngineArgs(
            model=str(folder),
            block_size=32,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=longest,
            max_num_batched_tokens=batched,
            max_num_seqs=64,
            skip_tokenizer_init=True,
        ).create_engine_config()
        config.cache_config.kv_cache_layout = "LBHNC"
        config.scheduler_config.async_scheduling = steps == 2
        assert config.max_concurrent_batches == steps
        return config

    return configured


def pages(**packed):
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=32, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, **({"dtype": torch.bfloat16} | packed))


def caches(config, fmt, soft=True, reserve="ours"):
    """Return what the layers of an 8B model ask vLLM for; `fmt=None`: 16 bit. `reserve='stock'`: vLLM's own window."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    if fmt is None:
        return {f"layers.{layer}.attn": pages() for layer in range(LAYERS)}
    shape = AttentionShape(1, 32, KV_HEADS, HEAD_DIM)
    recipe = recipe_of(ServingOptions.parse({"elastickv": {"format": fmt, "window": WINDOW}}), "auto")
    slab = SlabPlan.of([recipe] * LAYERS, shape).slab_bytes
    spec = WindowShape(WINDOW, slab, KV_HEADS, HEAD_DIM, torch.bfloat16, soft).spec(config)
    if reserve == "stock":
        names = ("block_size", "num_kv_heads", "head_size", "dtype", "state_content_bytes", "sliding_window")
        spec = SlidingWindowSpec(**{name: getattr(spec, name) for name in names})
    packed = pages(dtype=torch.uint8, state_content_bytes=slab // 32)
    asked = {f"layers.{layer}.attn": packed for layer in range(LAYERS)}
    return asked | {f"layers.{layer}.attn.window": spec for layer in range(LAYERS)}


def reported(config, memory=40 * GIB, fmt=None, **options):
    """Return the tokens that vLLM reports with so many bytes."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity, get_kv_cache_configs

    register_specs()
    (found,) = get_kv_cache_configs(config, [caches(config, fmt, **options)], [memory])
    return get_kv_cache_capacity(config, found)[0]


# Requests of so many tokens: at least so many times the tokens of 16 bit, with one step in flight and with two.
FACTORS = {1024: (1.67, 1.33), 8192: (3.05, 2.88), 32768: (3.34, 3.29)}


@pytest.mark.parametrize("longest", FACTORS)
def test_vllm_reports_more_tokens_than_in_16_bit_even_with_chunks_of_8192(configure, longest):
    for steps, factor in zip((1, 2), FACTORS[longest], strict=True):
        config = configure(longest, steps=steps)
        dense = reported(config)
        assert dense == 40 * GIB // (LAYERS * 4 * KV_HEADS * HEAD_DIM)
        ours, reserved = reported(config, fmt="int4"), reported(config, fmt="int4", reserve="stock")
        assert ours > factor * dense
        assert reserved < ours
        # A request of up to a chunk costs more than in 16 bit, if its tokens all have a block in the window.
        assert longest > 8192 or reserved < dense
        strict = reported(config, fmt="int4", soft=False)
        assert reserved < strict < ours


def test_larger_formats_report_fewer_tokens(configure):
    config = configure(32768)
    tokens = [reported(config, fmt=fmt) for fmt in ("int4", "k8v4", "int8")]
    assert tokens == sorted(set(tokens), reverse=True)
    assert tokens[-1] > 1.5 * reported(config)


def test_a_pool_that_the_stock_reserve_refuses_is_accepted(configure):
    config = configure(8192)
    memory = 300 * LAYERS * 37888  # a request of 8192 tokens takes 256 blocks of pages
    with pytest.raises(ValueError, match="max seq len"):
        reported(config, memory, fmt="int4", reserve="stock")
    assert reported(config, memory, fmt="int4") >= 8192
    with pytest.raises(ValueError, match="max seq len"):
        reported(config, 256 * LAYERS * 37888, fmt="int4")


def test_a_block_size_whose_windows_have_blocks_of_no_power_of_two_is_refused(configure, monkeypatch):
    config, shape = configure(1024), WindowShape(128, 2432, KV_HEADS, 64, torch.bfloat16, True)
    monkeypatch.setattr(config.cache_config, "block_size", 2048)
    with pytest.raises(UsageError, match=r"`block_size=2048` makes blocks of 608 exact tokens.*give `block_size=32`"):
        shape.spec(config)
    monkeypatch.setattr(config.cache_config, "block_size", 64)
    assert shape.spec(config).block_size.bit_count() == 1


def test_the_window_of_a_layer_is_described_by_the_configuration(configure):
    config = configure(1024, steps=2)
    shape = WindowShape(96, 4736, KV_HEADS, HEAD_DIM, torch.bfloat16, True)
    soft, strict = shape.spec(config), replace(shape, soft=False).spec(config)
    assert (soft.steps_in_flight, soft.rollback_tokens, soft.hit_tokens, strict.hit_tokens) == (2, 0, 0, 32)
    assert (soft.block_size, soft.sliding_window) == (8, 96)
    assert soft.page_size_bytes == 8 * KV_HEADS * 4 * HEAD_DIM <= KV_HEADS * 4736
