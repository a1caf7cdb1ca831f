"""What an engine says of its memory when it starts, what it refuses, and small pools."""

import re
import weakref

import pytest

from elastickv.vllm.window_cache import WindowCache
from tests.helpers.serving_scenarios import all_follow, random_prompts

LONG = {"max_model_len": 4096, "max_num_batched_tokens": 8192, "enable_prefix_caching": True}


def test_the_reported_capacity_is_that_of_the_pages_even_with_long_prompt_chunks(serve):
    """float32 keys and values take 6.7 times the bytes of int4 pages; some of the memory holds windows."""
    stock = serve(fmt=None, **LONG).capacity
    assert serve(**LONG).capacity > 5 * stock


def test_the_start_line_says_how_many_tokens_the_pages_hold(serve, monkeypatch):
    """Blocks hold two pages here, and vLLM's own number of tokens in a block is the window's by then."""
    from elastickv.vllm import model_setup

    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(model_setup._log, level, lambda text, *arguments: lines.append(text % arguments))
    engine = serve(block_size=64, max_num_seqs=5)
    (line,) = lines
    told = int(re.search(r"capacity ([0-9,]+) tokens", line)[1].replace(",", ""))
    of_request = 1024 // 64 + -(-63 // engine.window_block_tokens) + 1
    assert told == int(engine.free_blocks / of_request * 1024)


def test_a_pool_for_one_request_starts_and_serves_a_prompt_in_one_chunk(serve, rule):
    """vLLM's own sliding window would reserve a block for every token of the chunk."""
    engine = serve(num_gpu_blocks_override=72, max_model_len=1024, max_num_batched_tokens=2048)
    assert engine.capacity >= 1024
    all_follow(rule(), engine.generate(random_prompts([900]), 60))


def test_a_long_chunk_takes_no_window_blocks_for_tokens_that_leave_the_window(serve):
    engine = serve()
    start = engine.free_blocks
    engine.add(random_prompts([960])[0], 2)
    engine.step()
    assert start - engine.free_blocks <= 960 // 32 + 64 // engine.window_block_tokens + 2
    while engine.engine.has_unfinished_requests():
        engine.step()
    assert engine.free_blocks == start


def test_blocks_smaller_than_a_page_are_refused(serve):
    with pytest.raises(Exception, match=r"block.*16.*32"):
        serve(block_size=16)


@pytest.mark.parametrize("size", [64, None])
def test_larger_blocks_hold_several_pages(serve, rule, size):
    """Without a block size vLLM takes 128 tokens on the CPU."""
    engine, asked = serve(block_size=size, enable_prefix_caching=True), random_prompts([300, 130], seed=8)
    answers = [engine.generate(asked, 60) for _ in range(2)]
    assert engine.record.page_tokens == (size or 128)
    assert [answer.cached for answer in answers[1]] == [256, 128]
    all_follow(rule(), answers[0] + answers[1])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"elastickv": {"sinks": 4}}, "sinks"),
        ({"window": 31}, "window"),
        ({"fmt": "int3"}, "int3"),
        ({"disable_hybrid_kv_cache_manager": True}, "hybrid"),
        ({"kv_cache_dtype": "fp8"}, "fp8"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(serve, options, word):
    with pytest.raises(Exception, match=word) as refusal:
        serve(**options)
    assert "\n" not in str(refusal.value).strip() or "elastickv" in str(refusal.value)


def test_without_options_the_stock_backend_serves(serve, rule, prompts):
    engine = serve(fmt=None)
    assert len(engine.managers) == 1
    all_follow(rule(recipe=None), engine.generate(prompts, 20))


def test_asynchronous_scheduling_changes_no_token(serve, rule, prompts, base):
    answers = serve(async_scheduling=True).generate(prompts, 120)
    all_follow(rule(), answers)


def test_a_compiled_model_follows_the_rule(serve, rule, prompts):
    all_follow(rule(), serve(enforce_eager=False).generate(prompts, 60))


def test_a_closed_engine_keeps_no_memory(serve):
    layers = serve().engine.vllm_config.compilation_config.static_forward_context
    window = weakref.ref(next(layer for layer in layers.values() if isinstance(layer, WindowCache)))
    del layers
    serve.close()
    assert window() is None
