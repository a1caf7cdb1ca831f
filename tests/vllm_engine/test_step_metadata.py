"""What is said of a step's batch: decodes and chunks apart, and where each request's window begins."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backend import CommonAttentionMetadata

from elastickv.recipe import AttentionShape
from elastickv.vllm import cpu_attention, step_metadata
from elastickv.vllm.serving_options import ServingOptions, recipe_of
from elastickv.vllm.step_metadata import PageMetadataBuilder, WindowMetadataBuilder

CPU = torch.device("cpu")
MARKS = []


def configuration(layer, drafts=0, captured=(), method="ngram", blocks=100):
    return SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=blocks),
        model_config=SimpleNamespace(max_model_len=128, model_arch_config=SimpleNamespace(rswa_window=None)),
        compilation_config=SimpleNamespace(static_forward_context={"layer": layer}, cudagraph_capture_sizes=list(captured)),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        speculative_config=SimpleNamespace(method=method, num_speculative_tokens=drafts, parallel_drafting=False)
        if drafts
        else None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        num_speculative_tokens=drafts,
    )


def common(counts, lengths=None, table=None, on_host=True, padded_to=None):
    """Return what vLLM's runner says of requests with so many tokens in the step."""
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    lengths = torch.tensor(lengths or counts, dtype=torch.int32)
    tokens = padded_to or int(starts[-1])
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(counts),
        num_actual_tokens=tokens,
        max_query_len=max(counts),
        max_seq_len=int(lengths.max()),
        block_table_tensor=torch.zeros(len(counts), 4, dtype=torch.int32) if table is None else table,
        slot_mapping=torch.arange(tokens),
        seq_lens_cpu_upper_bound=lengths.clone() if on_host else None,
    )


def implementation(selects=False):
    bad_tokens = SimpleNamespace(mark_step=lambda: MARKS.append(1))
    return SimpleNamespace(bad_tokens=bad_tokens, selects_pages=selects, rows_for=lambda requests, device: None)


def page_batch(counts, drafts=0, method="ngram", of_drafter=False, **options):
    MARKS.clear()
    layer = SimpleNamespace(impl=implementation(), is_draft_layer=of_drafter)
    builder = PageMetadataBuilder(None, ["layer"], configuration(layer, drafts, method=method), CPU)
    return builder.build(0, common(counts, **options))


@pytest.mark.parametrize(
    ("counts", "drafts", "decodes", "decode_tokens", "uniform"),
    [
        ([1, 1, 1], 0, 3, 3, 1),
        ([1, 1, 40], 0, 2, 2, 1),
        ([40, 7], 0, 0, 0, 0),
        ([1, 2], 0, 1, 1, 1),
        ([4, 4, 4], 3, 3, 12, 4),
        ([4, 1, 3], 3, 3, 8, 0),  # 8 tokens of 3 requests
        ([3, 1, 2], 3, 3, 6, 0),  # 2 each on average, and not uniform
        ([2, 2, 90, 80], 3, 2, 4, 2),
        ([5, 5], 3, 0, 0, 0),
    ],
)
def test_decodes_come_first_and_are_uniform_if_they_have_equally_many_tokens(counts, drafts, decodes, decode_tokens, uniform):
    batch = page_batch(counts, drafts)
    assert (batch.decodes, batch.decode_tokens, batch.uniform_queries) == (decodes, decode_tokens, uniform)
    assert (batch.requests, batch.tokens, batch.longest) == (len(counts), sum(counts), max(counts))
    assert batch.starts_list == batch.starts.tolist()
    assert MARKS == [1]  # kernels learn which step theirs is


@pytest.mark.parametrize(("counts", "drafts", "uniform"), [([1, 1, 0, 0], 0, 1), ([4, 4, 0, 0], 3, 4), ([0, 0], 0, 1)])
def test_a_graph_sees_requests_that_only_fill_it_up_as_decodes_like_the_others(counts, drafts, uniform):
    """vLLM pads a captured batch: requests without tokens, and as many tokens as if they had some."""
    batch = page_batch(counts, drafts, padded_to=uniform * len(counts))
    assert (batch.decodes, batch.decode_tokens, batch.uniform_queries) == (len(counts), uniform * len(counts), uniform)


@pytest.mark.parametrize("on_host", [True, False])
def test_lengths_are_on_the_host_where_there_are_chunks(on_host):
    assert page_batch([1, 30], lengths=[200, 130], on_host=on_host).lengths_list == [200, 130]
    assert page_batch([1, 1], lengths=[200, 130], on_host=on_host).lengths_list == []


def test_requests_of_a_draft_model_are_a_token_longer_than_the_host_says():
    """vLLM gives the lengths of the model, whose step is a token shorter."""
    options = {"drafts": 3, "method": "draft_model", "lengths": [200, 130]}
    batch = page_batch([5, 31], of_drafter=True, **options)
    assert (batch.decodes, batch.decode_tokens, batch.lengths_list) == (1, 5, [201, 131])
    assert page_batch([4, 31], **options).lengths_list == [200, 130]
    options["method"] = "eagle"
    assert page_batch([4, 31], of_drafter=True, **options).lengths_list == [200, 130]


def test_what_layers_share_is_of_one_step_alone():
    one, other = page_batch([1]), page_batch([1])
    one.shared["chunks"] = 1
    assert other.shared == {}


@pytest.mark.parametrize("window", [32, 33, 64, 128])
def test_decodes_wait_for_pages_that_they_complete_and_read(window):
    for count in range(1, 130):
        # Of a request with `first` tokens, the last row reads pages from tokens before its window.
        completed_and_read = any(
            page + 32 > first and page + 32 <= first + count and page < first + count - window
            for first in range(512, 544)
            for page in range(0, 704, 32)
        )
        assert page_batch([count], drafts=200).reads_new_pages(window) == completed_and_read


@pytest.mark.parametrize(("selects", "blocks", "asked"), [(True, 100, True), (True, None, False), (False, 100, False)], ids=str)
def test_prompts_are_asked_for_only_once_the_builders_of_other_backends_that_serve_are_there(selects, blocks, asked):
    """Before vLLM knows its number of blocks it captures graphs to measure them, and builds every builder anew."""
    config = configuration(SimpleNamespace(impl=implementation(selects)), blocks=blocks)
    builder, model = PageMetadataBuilder(None, ["layer"], config, CPU), config.model_config
    # vLLM says a number while graphs are measured, and takes it back.
    config.cache_config.num_gpu_blocks = 4
    assert model.model_arch_config.rswa_window is None
    builder.build(0, common([1]))
    assert model.model_arch_config.rswa_window == (model.max_model_len if asked else None)


def first_in_window(row, before, exact_tokens, block):
    """Return the least page from which on all blocks that hold tokens of the window are there."""
    pages = range(0, before // 32 * 32 + 1, 32)
    there = [all(row[token // block] for token in range(max(page, before - exact_tokens + 1, 0), before)) for page in pages]
    return next((page for page, all_there in zip(pages, there, strict=True) if all_there), pages[-1])


@pytest.fixture(scope="module")
def find_first():
    """Return a function that builds a step's window; kernels, which take no part, are not compiled."""
    attentions = {}

    def build(exact_tokens, block, table, counts, lengths):
        if exact_tokens not in attentions:
            recipe = recipe_of(ServingOptions.parse({"elastickv": {"format": "int4", "window": exact_tokens}}), "auto")
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(cpu_attention, "open_block_kernels", lambda *_: SimpleNamespace(slab_bytes=0))
                attentions[exact_tokens] = cpu_attention.CpuAttention(AttentionShape(1, 2, 1, 64), "fp32", recipe, 1.0)
        config = configuration(SimpleNamespace(attention=attentions[exact_tokens]), captured=[1, 8])
        builder = WindowMetadataBuilder(SimpleNamespace(block_size=block), ["layer"], config, CPU)
        return builder, builder.build(0, common(counts, lengths, table))

    return build


@given(data=st.data(), exact_tokens=st.sampled_from([32, 33, 64, 100, 128]), block=st.sampled_from([1, 2, 8, 16, 32]))
def test_the_window_begins_after_the_newest_block_that_is_gone(find_first, data, exact_tokens, block):
    requests = data.draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 5)), min_size=1, max_size=6))
    columns = -(-420 // block)
    table = torch.arange(1, len(requests) * columns + 1, dtype=torch.int32).reshape(len(requests), columns)
    for row, (before, count) in zip(table, requests, strict=True):
        gone = data.draw(st.lists(st.integers(0, max(0, before - 1) // block), max_size=3))
        row[gone] = 0
        row[-(-(before + count) // block) :] = 0  # not allocated yet
    counts, lengths = [count for _, count in requests], [sum(request) for request in requests]
    if not any(counts):
        return
    _, window = find_first(exact_tokens, block, table, counts, lengths)
    expected = [
        first_in_window(row.tolist(), before, exact_tokens, block) for row, (before, _) in zip(table, requests, strict=True)
    ]
    assert window.first.tolist() == expected


def test_blocks_below_the_window_may_be_gone(find_first):
    table = torch.tensor([[0, 0, 0, 4, 5, 6, 7, 8], [1, 2, 3, 4, 0, 6, 7, 8]], dtype=torch.int32)
    _, window = find_first(64, 32, table, [1, 1], [192, 192])
    assert window.first.tolist() == [0, 160]


def test_a_captured_graph_finds_the_start_of_windows_where_it_was(find_first):
    table = torch.tensor([[1, 0, 3, 4]], dtype=torch.int32)
    builder, one = find_first(64, 32, table, [1], [97])
    at, first = one.first.data_ptr(), one.first.tolist()
    other = builder.build(0, common([1], [97], torch.tensor([[1, 2, 3, 4]], dtype=torch.int32)))
    assert (first, other.first.tolist()) == ([64], [0])
    assert other.first.data_ptr() == at
    assert len(builder._first) > 8  # of the largest graph, which has more requests than are served
    assert one.slot_mapping.tolist() == [0]


@pytest.mark.parametrize(
    ("captured", "drafts", "told"),
    [([1, 2], 0, [(2, 4)]), ([1, 8], 2, [(2, 4)]), ([1, 4], 0, []), ([4, 12], 2, []), ([], 0, [])],
)
def test_more_requests_than_graphs_are_captured_for_are_told(monkeypatch, captured, drafts, told):
    lines = []
    monkeypatch.setattr(step_metadata._log, "info_once", lambda text, *numbers: lines.append(numbers), raising=False)
    config = configuration(SimpleNamespace(attention=None), drafts, captured)
    WindowMetadataBuilder(SimpleNamespace(block_size=8), ["layer"], config, CPU)
    assert lines == told
