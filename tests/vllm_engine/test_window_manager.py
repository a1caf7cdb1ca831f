"""The window's blocks under random schedules: what is counted is taken, what is read is there, and all comes back."""

from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from elastickv.vllm.window_manager import WindowManager
from elastickv.vllm.window_spec import WindowSpec

PAGE, POOL, LONGEST, MOST_A_STEP = 32, 120, 600, 300


@dataclass
class Step:
    """A step that was scheduled: its tokens, how many of them are drafts, and the request's blocks at that time."""

    count: int
    drafts: int
    blocks: list


@dataclass
class Served:
    """One request, as vLLM's scheduler sees it.

    Attributes
    ----------
    processed : tokens of processed steps; a step in flight begins there at the earliest.
    missing : blocks of the window that were gone when the request began with a prefix hit.
    """

    request: Request
    processed: int = 0
    flight: deque = field(default_factory=deque)
    missing: set = field(default_factory=set)

    @property
    def computed(self):
        return self.processed + sum(step.count for step in self.flight)


class CarefulPool(BlockPool):
    """A pool to which no null block may be given back."""

    def free_blocks(self, ordered_blocks):
        blocks = list(ordered_blocks)
        assert not any(block.is_null or block.ref_cnt < 1 for block in blocks)
        super().free_blocks(blocks)


class Schedules(RuleBasedStateMachine):
    """Requests that share their start arrive, run in chunks and with drafts, roll back, end and are preempted."""

    soft = True

    @initialize(
        block=st.sampled_from([1, 8, 32]),
        exact=st.integers(32, 90),
        steps=st.integers(1, 3),
        drafts=st.integers(0, 3),
        caching=st.booleans(),
    )
    def start(self, block, exact, steps, drafts, caching):
        init_none_hash(sha256)
        self.size, self.exact, self.drafts, self.caching = block, exact, drafts, caching
        self.spec = WindowSpec(
            block_size=block,
            num_kv_heads=1,
            head_size=64,
            dtype=torch.uint8,
            state_content_bytes=256,
            sliding_window=exact,
            steps_in_flight=steps,
            rollback_tokens=drafts * steps,
            hit_tokens=0 if self.soft else PAGE,
        )
        self.most = self.spec.max_admission_blocks_per_request(MOST_A_STEP * steps, LONGEST)
        self.pool = CarefulPool(POOL * PAGE // block, caching, block)
        self.manager = WindowManager(
            self.spec,
            block_pool=self.pool,
            enable_caching=caching,
            kv_cache_group_id=0,
            scheduler_block_size=PAGE,
            needs_kv_cache_zeroing=True,
            max_admission_blocks_per_request=self.most,
        )
        self.hasher = get_request_block_hasher(block, sha256)
        self.served, self.arrived = {}, 0
        self.longest = [0, 0]  # tokens whose pages are cached, of each family

    def held(self, name):
        return [block for block in self.manager.req_to_blocks[name] if not block.is_null]

    def take(self, name, count, drafts, hit=(), external=0):
        """Allocate as `KVCacheManager.allocate_slots` does; return whether the pool had room."""
        served, manager, pool = self.served[name], self.manager, self.pool
        local = served.computed + len(hit) * self.size
        computed = local + external
        tokens = min(computed + count + self.drafts, LONGEST)
        manager.remove_skipped_blocks(name, max(0, computed - (served.computed - served.processed)))
        needed = manager.get_num_blocks_to_allocate(name, tokens, hit, computed, local, computed + count)
        free = pool.get_num_free_blocks()
        if needed > free:
            return False
        if name not in manager.num_cached_block:
            manager.add_local_computed_blocks(name, hit, local, external)
            manager.allocate_external_computed_blocks(name, local, external)
            manager.take_new_block_ids()
        served.processed += computed - served.computed
        before = len(manager.req_to_blocks[name])
        new = manager.allocate_new_blocks(name, tokens, computed + count)
        assert free - pool.get_num_free_blocks() == needed
        blocks = manager.req_to_blocks[name]
        assert blocks[before:] == new
        assert manager.take_new_block_ids() == [block.block_id for block in new if not block.is_null]
        assert len(blocks) >= -(-tokens // self.size)
        outside = max(0, computed - sum(step.count for step in served.flight) - self.exact + 1) // self.size
        assert all(block.is_null for block in blocks[:outside])
        served.flight.append(Step(count, drafts, list(blocks)))
        if self.caching:
            manager.cache_blocks(served.request, min(computed + count, served.request.num_tokens), replay_boundaries=())
        return True

    @rule(
        prompt=st.integers(1, 400),
        family=st.integers(0, 1),
        chunk=st.integers(1, MOST_A_STEP),
        external=st.sampled_from([0, 0, 0, 64]),
    )
    def arrive(self, prompt, family, chunk, external):
        self.arrived += 1
        name, words = f"request {self.arrived}", [2 * i + family for i in range(prompt)]
        params = SamplingParams(max_tokens=LONGEST)
        request = Request(name, words, params, None, block_hasher=self.hasher if self.caching else None)
        hit = []
        if self.caching:
            hit = self.longest_hit(request, min(prompt - 1, self.longest[family]))
        at = len(hit) * self.size
        external = min(external, (prompt - 1 - at) // PAGE * PAGE)
        count = min(chunk, prompt - at - external)
        self.served[name] = served = Served(request)
        read = range(max(0, at + external - self.exact + 1) // self.size, len(hit))
        served.missing = {i for i in read if hit[i].is_null}
        assert self.soft or not served.missing
        if not self.take(name, count, 0, hit, external):
            self.leave(name)

    def longest_hit(self, request, most):
        (hit,), tokens = self.manager.find_longest_cache_hit(request.block_hashes, most, [0], self.pool, self.spec, False, PAGE)
        assert tokens == len(hit) * self.size <= most and tokens % PAGE == 0
        # The window's blocks are those that are cached up to the hit's end without a gap.
        read = range(max(0, tokens - self.exact + 1) // self.size, len(hit))
        cached = [self.pool.get_cached_block(hashed, [0]) is not None for hashed in request.block_hashes]
        assert [not hit[i].is_null for i in read] == [all(cached[i : len(hit)]) for i in read]
        assert tokens == most // PAGE * PAGE if self.soft else all(cached[i] for i in read)
        return hit

    @precondition(lambda self: self.served)
    @rule(data=st.data(), count=st.integers(1, MOST_A_STEP))
    def schedule(self, data, count):
        name = data.draw(st.sampled_from(sorted(self.served)))
        served = self.served[name]
        if len(served.flight) == self.spec.steps_in_flight:
            return
        prompt = served.request.num_prompt_tokens
        drafts = 0
        count = min(count, prompt - served.computed) if served.computed < prompt else 1
        if served.computed + count >= prompt:
            drafts = data.draw(st.integers(0, self.drafts))
            count += drafts
        if served.computed + count <= LONGEST and not self.take(name, count, drafts):
            self.leave(data.draw(st.sampled_from(sorted(self.served))))

    @precondition(lambda self: any(served.flight for served in self.served.values()))
    @rule(data=st.data(), reject=st.integers(0, 3))
    def process(self, data, reject):
        """Process a request's oldest step in flight: what it read was there, and some of its drafts are rejected."""
        name = data.draw(st.sampled_from(sorted(name for name, served in self.served.items() if served.flight)))
        served = self.served[name]
        step, start = served.flight.popleft(), served.processed
        read = range(max(0, start - self.exact + 1) // self.size, -(-start // self.size))
        now = self.manager.req_to_blocks[name]
        for i in set(read) - served.missing:
            assert not step.blocks[i].is_null
            assert now[i] is step.blocks[i] and now[i].ref_cnt > 0
        served.processed += step.count - min(reject, step.drafts)
        words, family = served.request.num_tokens, served.request.all_token_ids[0]
        self.longest[family] = max(self.longest[family], served.processed)
        if served.processed >= words:
            served.request.append_output_token_ids([2 * i + family for i in range(words, served.processed + 1)])

    @precondition(lambda self: self.served)
    @rule(data=st.data())
    def end(self, data):
        self.leave(data.draw(st.sampled_from(sorted(self.served))))

    def leave(self, name):
        """End, abort or preempt: at any moment, also with steps in flight."""
        held, free = self.held(name), self.pool.get_num_free_blocks()
        del self.served[name]
        alone = sum(block.ref_cnt == 1 for block in held)
        self.manager.free(name)
        assert self.pool.get_num_free_blocks() == free + alone
        assert name not in self.manager.req_to_blocks and name not in self.manager._freed

    @invariant()
    def blocks_are_accounted_for(self):
        if not hasattr(self, "served"):
            return
        held = Counter(block.block_id for name in self.served for block in self.held(name))
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1 - len(held)
        assert all(self.pool.blocks[number].ref_cnt == count for number, count in held.items())
        for name in self.served:
            assert len(self.held(name)) <= self.most

    def teardown(self):
        if hasattr(self, "served"):
            for name in list(self.served):
                self.leave(name)
            assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1


class StrictSchedules(Schedules):
    soft = False


@pytest.mark.parametrize("machine", [Schedules, StrictSchedules], ids=["soft", "strict"])
def test_any_schedule_counts_what_it_takes_and_keeps_what_is_read(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))


@pytest.mark.parametrize("block", [1, 8, 32])
@pytest.mark.parametrize("machine", [Schedules, StrictSchedules], ids=["soft", "strict"])
def test_a_prompt_that_is_asked_again_finds_the_window_before_its_last_page(machine, block):
    """Whole pages, so that the last one is computed again: the hit ends a page before the end."""
    pool = machine()
    pool.start(block, 64, 1, 0, True)
    pool.arrive(320, 0, 320, 0)
    pool.served["request 1"].flight.clear()
    pool.leave("request 1")
    assert len(pool.longest_hit(again(pool, 320), 319)) == 288 // block
    request = again(pool, 288)
    assert len(pool.longest_hit(request, 287)) * block == (256 if pool.soft else 0)
    pool.teardown()


def again(pool, prompt):
    return Request("again", [2 * i for i in range(prompt)], SamplingParams(max_tokens=1), None, block_hasher=pool.hasher)
