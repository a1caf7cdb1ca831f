"""The parts in which prompt chunks attend: together they are the tokens that the read rule says, each once."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from elastickv.vllm.chunk_plan import ChunkPlan, scratch_tokens
from elastickv.vllm.step_metadata import PageMetadata

CPU = torch.device("cpu")


def batch_of(chunks, decodes=()):
    """Return the metadata of decodes, then of chunks: (tokens before the step, tokens of the step) each."""
    starts = [0]
    for _, count in (*decodes, *chunks):
        starts.append(starts[-1] + count)
    lengths = [before + count for before, count in (*decodes, *chunks)]
    return PageMetadata(
        block_table=torch.zeros(len(lengths), 1, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        starts=torch.tensor(starts, dtype=torch.int32),
        starts_list=starts,
        lengths_list=lengths,
        requests=len(lengths),
        tokens=starts[-1],
        decodes=len(decodes),
        decode_tokens=starts[len(decodes)],
        uniform_queries=0,
        longest=max((count for _, count in (*decodes, *chunks)), default=0),
    )


def seen(part, request, query, queries):
    """Return the tokens of a part that a query reads, with a causal mask aligned as FlashAttention does: at the last key."""
    first, count = int(part.first[request]), int(part.count[request])
    end = count - (queries - 1 - query) if part.causal else count
    return list(range(first, first + max(0, end)))


CHUNKS = st.lists(st.tuples(st.one_of(st.just(0), st.integers(0, 700)), st.integers(1, 260)), min_size=1, max_size=5)
DECODES = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 4)), max_size=3)


@given(chunks=CHUNKS, decodes=DECODES, exact_tokens=st.integers(32, 200), scratch=st.sampled_from([32, 64, 256, 32768]))
@example(chunks=[(0, 1)], decodes=[], exact_tokens=32, scratch=32)
@example(chunks=[(0, 32), (31, 1), (32, 1)], decodes=[], exact_tokens=32, scratch=32)
@example(chunks=[(500, 40), (0, 200)], decodes=[(10, 1)], exact_tokens=64, scratch=64)
def test_each_query_reads_what_the_rule_says(chunks, decodes, exact_tokens, scratch):
    plan = ChunkPlan.of(batch_of(chunks, decodes), exact_tokens, scratch, CPU)
    assert (plan.first_request, plan.requests) == (len(decodes), len(chunks))
    for request, (before, count) in enumerate(chunks):
        tail, length = min(before, exact_tokens - 1), before + count
        assert int(plan.tails.first[request]) == before - tail and int(plan.tails.count[request]) == tail
        assert int(plan.exact.count[request]) == tail + count
        for query in {0, 1, count // 2, count - 1} & set(range(count)):
            at = before + query
            # Exact keys begin at the tail; each query sees `exact_tokens` of them, its own token the last.
            last = int(plan.exact.count[request]) - (count - 1 - query)
            exact = [before - tail + row for row in range(max(0, last - exact_tokens), last)]
            assert exact == list(range(max(0, at - exact_tokens + 1), at + 1))
            packed = [token for part in plan.packed for token in seen(part, request, query, count)]
            assert packed == list(range(max(0, at - exact_tokens + 1)))
        assert all(
            int(part.first[request]) + int(part.count[request]) <= max(before, length - exact_tokens) for part in plan.packed
        )


@given(chunks=CHUNKS, decodes=DECODES, exact_tokens=st.integers(32, 200), scratch=st.sampled_from([32, 64, 256, 32768]))
def test_rows_of_requests_follow_each_other(chunks, decodes, exact_tokens, scratch):
    plan = ChunkPlan.of(batch_of(chunks, decodes), exact_tokens, scratch, CPU)
    counts = [count for _, count in chunks]
    assert plan.query_start.diff().tolist() == counts and int(plan.query_start[0]) == 0
    assert plan.longest == max(counts)
    for part in (plan.exact, *plan.packed):
        assert int(part.start[0]) == 0
        assert part.start.diff().tolist() == part.count.tolist()
        assert part.rows == int(part.start[-1])
        assert part.longest == int(part.count.max())
    assert plan.tails.start is plan.exact.start
    assert plan.tails.longest == int(plan.tails.count.max())
    # Behind each request's tail stand its own keys, in order.
    tails = plan.tails.count.tolist()
    own = [int(start) + tail + i for start, tail, n in zip(plan.exact.start, tails, counts, strict=False) for i in range(n)]
    assert (list(range(plan.exact.rows)) if plan.chunk_rows is None else plan.chunk_rows.tolist()) == own
    assert plan.never.tolist() == [2**31 - 1] * len(chunks)


@given(
    chunks=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), min_size=1, max_size=40),
    exact_tokens=st.integers(32, 200),
    scratch=st.sampled_from([32, 256, 1024]),
    more=st.integers(0, 300),
)
def test_no_part_is_larger_than_the_scratch_memory(chunks, exact_tokens, scratch, more):
    """What is reserved is enough for any step that the scheduler may build."""
    steps_tokens = sum(count for _, count in chunks)
    reserved = scratch_tokens(scratch, steps_tokens + more, len(chunks))
    plan = ChunkPlan.of(batch_of(chunks), exact_tokens, scratch, CPU)
    assert max((part.rows for part in plan.packed), default=0) <= reserved
    assert max((part.rows for part in plan.packed if not part.causal), default=0) <= max(scratch, 32 * len(chunks))


def test_many_requests_read_a_page_each_at_a_time():
    plan = ChunkPlan.of(batch_of([(200, 1)] * 40), 32, 1024, CPU)
    assert plan.packed[0].rows == 40 * 32 == scratch_tokens(1024, 40, 40)


def test_pages_that_all_queries_see_are_read_in_tiles():
    plan = ChunkPlan.of(batch_of([(1000, 10), (200, 10)]), 128, 512, CPU)
    *tiles, left = plan.packed
    assert [(part.first.tolist(), part.count.tolist()) for part in tiles] == [
        ([0, 0], [256, 73]),
        ([256, 73], [256, 0]),
        ([512, 73], [256, 0]),
        ([768, 73], [105, 0]),
    ]
    assert not any(part.causal for part in tiles)
    assert left.causal and left.first.tolist() == [873, 73] and left.count.tolist() == [9, 9]


def test_tiles_of_whole_pages_begin_on_a_page():
    plan = ChunkPlan.of(batch_of([(5000, 1)] * 3), 128, 1000, CPU)
    assert all(int(first) % 32 == 0 for part in plan.packed if not part.causal for first in part.first)
    assert [part.rows for part in plan.packed][:2] == [960, 960]


@pytest.mark.parametrize(("before", "count"), [(0, 1), (0, 128), (127, 1), (60, 68)])
def test_a_chunk_within_the_window_reads_no_pages(before, count):
    assert ChunkPlan.of(batch_of([(before, count)]), 128, 32768, CPU).packed == []


def test_one_token_beyond_the_window_is_read_from_a_page():
    (part,) = ChunkPlan.of(batch_of([(0, 129)]), 128, 32768, CPU).packed
    assert part.causal and part.first.tolist() == [0] and part.count.tolist() == [1]
