"""What the host plans for a step: which requests are decodes, and how large the parts of prompt chunks are."""

from types import SimpleNamespace

import pytest
import torch

EXACT_TOKENS, TILE_TOKENS = 128, 32768


def plans(lengths, counts, requests, tokens, decodes=0):
    """Return the plans of a step whose first `decodes` requests are decodes, and the size of scratch memory."""
    from elastickv.vllm.chunk_plan import ChunkPlan, scratch_tokens

    starts = [0, *torch.tensor(counts).cumsum(0).tolist()]
    batch = SimpleNamespace(
        decodes=decodes,
        starts_list=starts,
        lengths_list=lengths,
        starts=torch.tensor(starts, dtype=torch.int32),
        requests=len(counts),
    )
    most = scratch_tokens(TILE_TOKENS, tokens, requests)
    return ChunkPlan.all_of(batch, EXACT_TOKENS, TILE_TOKENS, most, torch.device("cpu")), most


@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        ([131072], [131072]),
        ([100000, 40000, 50], [65536, 2, 50]),
        ([5000] * 2000, [8] * 2000),
        ([EXACT_TOKENS + 1] * 3, [3, 1, 2]),
    ],
)
def test_every_token_outside_the_window_is_read_in_a_part_that_fits(lengths, counts):
    parts, most = plans(lengths, counts, len(counts), sum(counts))
    read = torch.zeros(len(counts), dtype=torch.int64)
    for plan in parts:
        requests = slice(plan.first_request, plan.first_request + plan.requests)
        assert plan.exact.rows < most + EXACT_TOKENS
        for part in plan.packed:
            assert part.rows <= most
            assert torch.equal(part.start.diff(), part.count)
            assert torch.equal(part.first[part.count > 0], read[requests][part.count > 0].int())
            read[requests] += part.count
    assert read.tolist() == [max(0, length - EXACT_TOKENS) for length in lengths]


def test_plans_follow_each_other_through_the_chunks_of_a_step():
    counts = [1] * 3 + [8] * 2000
    parts, _ = plans([900] * len(counts), counts, len(counts), sum(counts), decodes=3)
    assert len(parts) > 1
    ends = [plan.first_request + plan.requests for plan in parts]
    assert [3, *ends] == [*(plan.first_request for plan in parts), len(counts)]
    assert [plan.tokens.start for plan in parts] == [3, *(plan.tokens.stop for plan in parts[:-1])]
    assert parts[-1].tokens.stop == sum(counts)
    assert all(plan.query_start[0] == 0 and plan.query_start[-1] == plan.tokens.stop - plan.tokens.start for plan in parts)


def test_chunks_follow_their_windows():
    (plan,), _ = plans([300, 20, 90], [100, 20, 30], 3, 150)
    assert plan.tails.first.tolist() == [200 - 127, 0, 0]
    assert plan.tails.count.tolist() == [127, 0, 60]
    assert plan.exact.start.tolist() == [0, 227, 247, 337]
    assert plan.tails.start.tolist() == plan.exact.start.tolist()
    assert plan.chunk_rows.tolist() == [*range(127, 227), *range(227, 247), *range(307, 337)]


def metadata(counts, tokens=None, drafts=3, prefilling=None):
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from elastickv.vllm.step_metadata import PageMetadataBuilder

    builder = PageMetadataBuilder.__new__(PageMetadataBuilder)
    builder.reorder_batch_threshold = 1 + drafts
    builder._bad_tokens, builder._extra_tokens = SimpleNamespace(mark_step=lambda: None), 0
    builder._selects, builder._rows = False, None
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    lengths = torch.tensor([500 if count else 0 for count in counts], dtype=torch.int32)
    batch = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(counts),
        num_actual_tokens=int(starts[-1]) if tokens is None else tokens,
        max_query_len=max(counts),
        max_seq_len=500,
        block_table_tensor=torch.zeros(len(counts), 20, dtype=torch.int32),
        slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        seq_lens_cpu_upper_bound=lengths,
        is_prefilling=None if prefilling is None else torch.tensor(prefilling),
    )
    return builder.build(0, batch)


@pytest.mark.parametrize(
    ("counts", "tokens", "uniform"),
    [
        ([1, 1, 1], None, 1),
        ([4, 4], None, 4),
        ([4, 4, 0, 0], 16, 4),
        ([1, 3], None, 0),
        ([2, 2, 0, 0], None, 0),
        ([4, 0, 4], None, 0),
    ],
)
def test_decodes_are_uniform_only_where_each_row_is_at_its_place(counts, tokens, uniform):
    built = metadata(counts, tokens)
    assert (built.decodes, built.uniform_queries) == (len(counts), uniform)


@pytest.mark.parametrize(
    ("counts", "prefilling", "prompts"),
    [
        ([1, 1], None, False),
        ([1, 1], [False, False], False),
        ([1, 1], [False, True], True),  # the last token of a prompt
        ([1, 40], None, True),
        ([1, 40], [True, True], True),
    ],
)
def test_a_step_with_tokens_of_prompts_says_so(counts, prefilling, prompts):
    assert metadata(counts, prefilling=prefilling).computes_prompt is prompts
