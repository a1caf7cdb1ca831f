"""Which tokens of a step are a decode's, and from when on a request's lists are there."""

from types import SimpleNamespace

import pytest

from elastickv.vllm.metrics.decode_reads import SERVERS_RATIO, ReadTotals
from elastickv.vllm.metrics.read_counter import ReadCounter


class Reads:
    """Stands for `DecodeReads`: remembers what it is asked."""

    def __init__(self):
        self.asked = []

    def totals(self, positions, prompts, since, ratios):
        self.asked += list(zip(positions.tolist(), prompts.tolist(), since.tolist(), ratios.tolist(), strict=True))
        return ReadTotals(tokens=len(positions), read_bytes=int(positions.sum()))


@pytest.fixture
def reads():
    return Reads()


@pytest.fixture
def counter(reads):
    return ReadCounter(reads, 1 + 3, lambda params: params, chunks_list=True)


def step(counter, computed, new=(), resumed=(), finished=()):
    """Count a step; `new` are requests with their prompts and ratios, `computed` the tokens of all requests."""
    started = [SimpleNamespace(req_id=name, prompt_len=prompt, sampling_params=ratio) for name, prompt, ratio in new]
    cached = SimpleNamespace(resumed_req_ids=set(resumed))
    output = SimpleNamespace(finished_req_ids=set(finished), scheduled_new_reqs=started, scheduled_cached_reqs=cached)
    counter.count(output, {name: range(*tokens) for name, tokens in computed.items()})


def test_tokens_after_a_prompt_are_counted_with_their_drafts(counter, reads):
    step(counter, {"a": (0, 10), "b": (4, 7)}, new=[("a", 10, None), ("b", 7, 2.0)])
    assert (reads.asked, counter.take()) == ([], ReadTotals())
    step(counter, {"a": (10, 11), "b": (7, 11)})
    assert sorted(reads.asked) == [(7, 7, 4, 2.0), (8, 7, 4, 2.0), (9, 7, 4, 2.0), (10, 7, 4, 2.0), (10, 10, 0, SERVERS_RATIO)]
    assert counter.take() == ReadTotals(tokens=5, read_bytes=10 + 7 + 8 + 9 + 10, steps=1)
    assert counter.take() == ReadTotals()


def test_the_last_token_of_a_prompt_is_no_decode(counter, reads):
    step(counter, {"a": (9, 10)}, new=[("a", 10, None)])
    assert not reads.asked


def test_what_is_computed_again_in_chunks_is_no_decode_and_lists_before_it_are_gone(counter, reads):
    step(counter, {"a": (0, 10)}, new=[("a", 10, None)])
    step(counter, {"a": (32, 40)}, resumed=["a"])
    step(counter, {"a": (40, 41)})
    assert reads.asked == [(40, 10, 32, SERVERS_RATIO)]


def test_a_resumed_request_may_come_as_a_new_one(counter, reads):
    """As vLLM's model runner V2 gets it."""
    step(counter, {"a": (0, 10)}, new=[("a", 10, None)])
    step(counter, {"a": (32, 40)}, new=[("a", 10, None)])
    step(counter, {"a": (40, 41)})
    assert reads.asked == [(40, 10, 32, SERVERS_RATIO)]


@pytest.mark.parametrize("resumed", [{"resumed": ["a"]}, {"new": [("a", 10, None)]}], ids=["known", "new"])
def test_on_gpus_chunks_that_are_computed_again_make_no_lists(reads, resumed):
    counter = ReadCounter(reads, 1 + 3, lambda params: params, chunks_list=False)
    step(counter, {"a": (0, 10)}, new=[("a", 10, None)])
    step(counter, {"a": (10, 12)})
    step(counter, {"a": (12, 13)})
    assert [since for _, _, since, _ in reads.asked] == [10, 10, 10]
    step(counter, {"a": (0, 32)}, **resumed)
    step(counter, {"a": (32, 40)})
    step(counter, {"a": (40, 41)})
    step(counter, {"a": (41, 42)})
    assert reads.asked[3:] == [(40, 10, 40, SERVERS_RATIO), (41, 10, 40, SERVERS_RATIO)]


def test_a_request_that_ended_is_forgotten_and_its_name_may_come_again(counter, reads):
    step(counter, {"a": (0, 10)}, new=[("a", 10, None)])
    step(counter, {"a": (0, 20)}, new=[("a", 20, None)], finished=["a"])
    step(counter, {"a": (20, 21)})
    assert reads.asked == [(20, 20, 0, SERVERS_RATIO)]
    step(counter, {}, finished=["a"])
    assert not counter._requests


def test_a_request_whose_first_step_never_came_back_is_passed_over(counter, reads):
    step(counter, {"a": (10, 11)}, resumed=["a"])
    assert (reads.asked, counter.take()) == ([], ReadTotals())
