"""Any sequence of what can be asked of a cache, beside a cache of plain token lists and the float64 oracle."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from elastickv.errors import NonFiniteError, UsageError
from elastickv.kvcache import Oracle
from elastickv.kvcache.error_metrics import relative_l2
from elastickv.recipe import PAGE_TOKENS, AttentionShape
from tests.helpers.cases import DTYPES, Case, recipes, tried
from tests.helpers.token_lists import TokenLists

SEEDS = st.integers(0, 1 << 20)


class Caches(RuleBasedStateMachine):
    """A cache of a backend, and what it should be."""

    each = selection = None

    @initialize(data=st.data())
    def make(self, data):
        each, draw = self.each, data.draw
        batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        group, head_dim = draw(st.sampled_from(each.groups)), draw(st.sampled_from(each.head_dims[:2]))
        recipe = draw(recipes(head_dim, kv_heads, (self.selection,), rotations=True))
        if not recipe.is_dense and draw(st.integers(0, 9)) < 9:
            # Most with pages that leave the window soon.
            recipe = replace(recipe, sinks=recipe.sinks % 8, window=draw(st.sampled_from([0, 1, 16, 31, 32, 33, 48])))
        shape = AttentionShape(batch, kv_heads * group, kv_heads, head_dim)
        near = recipe.sinks + min(recipe.window, 200)
        capacity = draw(
            st.one_of(st.sampled_from([1, PAGE_TOKENS, near + 1, near + PAGE_TOKENS]), st.integers(near + 70, near + 250))
        )
        anchor_offset = draw(st.integers(0, recipe.anchor_every - 1))
        self.case = Case(shape, recipe, draw(st.sampled_from(DTYPES)), (capacity,) * batch, anchor_offset)
        self.cache, self.model = each.new(self.case), TokenLists(self.case, capacity)
        self.extend(data, 0, False)
        self.go_and_come_back(draw(SEEDS), draw(st.integers(30, 70)))

    def tokens(self, seed, count):
        shape, rng = self.case.shape, np.random.default_rng(seed)
        return rng.standard_normal((2, shape.batch, shape.kv_heads, count, shape.head_dim), dtype=np.float32)

    @property
    def room(self):
        return [self.model.capacity - length for length in self.model.lengths]

    @rule(seed=SEEDS, steps=st.integers(1, 40), decodes=st.booleans())
    def append(self, seed, steps, decodes):
        keys, values = self.tokens(seed, steps)
        for step in range(steps):
            token = keys[:, :, step], values[:, :, step]
            if not min(self.room):
                with pytest.raises(UsageError, match="the cache is full"):
                    self.cache.append(*token)
                return
            self.cache.append(*token)
            self.model.add(token[0][:, :, None], token[1][:, :, None], [1] * self.case.shape.batch)
            self.model.step += 1
            needed = self.model.steps_since_refresh == 0 and self.case.recipe.anchor_every > 1
            if decodes and (needed or step in (0, steps - 1)):
                self.decode(seed + step)

    @rule(seed=SEEDS, steps=st.integers(1, 70))
    def go_and_come_back(self, seed, steps):
        self.append(seed + 2, 1 + seed % 3, True)
        self.mark()
        self.append(seed, steps, True)
        self.it_holds_what_it_should()
        self.rewind()
        self.append(seed + 1, 3, True)

    @rule(data=st.data(), seed=SEEDS, anew=st.booleans())
    def extend(self, data, seed, anew):
        """With a chunk, or with a prompt that replaces what is there; sometimes with one token too many."""
        room = [self.model.capacity if anew else room for room in self.room]
        some = [st.integers(0, max(0, free - 60)) for free in room]
        counts = [data.draw(least) for least in some]
        if data.draw(st.integers(0, 5)) == 5:
            counts = [data.draw(st.integers(count, free + 1)) for count, free in zip(counts, room, strict=True)]
        keys, values = self.tokens(seed, max(counts))
        store = self.cache.prefill if anew else self.cache.extend
        if any(count > free for count, free in zip(counts, room, strict=True)):
            with pytest.raises(UsageError):
                store(keys, values, np.array(counts))
            return
        store(keys, values, np.array(counts))
        if anew:
            self.model.clear()
        self.model.add(keys, values, counts)
        self.model.restart()

    @rule(data=st.data())
    def crop(self, data):
        lengths = [data.draw(st.one_of(st.integers(max(0, n - 40), n), st.integers(0, n))) for n in self.model.lengths]
        if self.model.refuses_crop(lengths):
            with pytest.raises(UsageError, match="has dropped tokens"):
                self.cache.crop(np.array(lengths))
            return
        self.cache.crop(np.array(lengths))
        self.model.crop(lengths)

    @rule()
    def mark(self):
        self.cache.mark()
        self.model.mark()

    @rule()
    def rewind(self):
        if self.model.marked is None:
            with pytest.raises(RuntimeError, match="no mark"):
                self.cache.rewind()
            return
        self.cache.rewind()
        self.model.rewind()

    @rule(data=st.data())
    def reorder(self, data):
        rows = data.draw(st.lists(st.integers(0, self.case.shape.batch - 1), min_size=len(self.room), max_size=len(self.room)))
        self.cache.reorder(np.array(rows))
        if rows != list(range(len(rows))):
            self.model.take(rows)

    @rule(data=st.data(), more=st.integers(0, 50))
    def gather(self, data, more):
        """Into a cache that may be larger, for fewer rows or more."""
        rows = data.draw(st.lists(st.integers(0, self.case.shape.batch - 1), min_size=1, max_size=4))
        shape, capacity = self.case.shape, self.model.capacity + more
        self.cache = self.cache.gather(np.array(rows), capacity)
        self.case = Case(
            AttentionShape(len(rows), shape.query_heads, shape.kv_heads, shape.head_dim),
            self.case.recipe,
            self.case.dtype,
            (capacity,) * len(rows),
            self.case.anchor_offset,
        )
        self.model.case, self.model.shape, self.model.capacity = self.case, self.case.shape, capacity
        self.model.take(rows)

    @rule(seed=SEEDS, back=st.booleans())
    def copy(self, seed, back):
        """One of the two is spoilt, the other goes on."""
        retained, other = (copy.deepcopy(self.cache), self.cache) if back else (self.cache, copy.deepcopy(self.cache))
        if back:
            self.model.marked = None
        other.prefill(*self.tokens(seed, self.model.capacity), np.full(len(self.room), self.model.capacity))
        other.decode(self.queries(seed))
        self.cache = retained

    @rule()
    def save_and_load(self):
        other = self.each.new(self.case)
        other.load_state(self.cache.state())
        if self.each.name == "reference":
            self.model.restart()
        self.cache, self.model.marked = other, None

    @precondition(lambda self: self.case.recipe.selection == "pages")
    @rule(data=st.data())
    def set_fractions(self, data):
        heads = self.case.shape.kv_heads
        fractions = data.draw(st.lists(st.sampled_from([1.0, 0.5, 0.3]), min_size=heads, max_size=heads))
        self.cache.set_fractions(fractions)
        if fractions != self.model.fractions:
            self.model.fractions, self.model.marked = fractions, None
            self.model.restart()

    def queries(self, seed):
        shape = self.case.shape
        return np.random.default_rng(seed).standard_normal((shape.batch, shape.query_heads, shape.head_dim), dtype=np.float32)

    @rule(seed=SEEDS)
    def decode(self, seed):
        queries, steps_since_refresh = self.queries(seed), self.model.steps_since_refresh
        if steps_since_refresh and self.model.anchor != self.model.step - steps_since_refresh:
            with pytest.raises(RuntimeError, match="was not decoded"):
                self.cache.decode(queries)
            return
        outputs, lse = self.each.decode(self.cache, queries)
        again = self.each.decode(self.cache, queries)
        np.testing.assert_array_equal(again[0], outputs)
        np.testing.assert_array_equal(again[1], lse)
        self.near(outputs, lse, *self.model.decode(queries, self.cache.pages_read))
        if self.case.recipe.selection != "reuse" or steps_since_refresh == 0:
            self.near(outputs, lse, *Oracle(self.cache).decode(queries))

    def near(self, outputs, lse, expected, expected_lse):
        limit = self.each.limit(self.case)
        assert relative_l2(outputs, expected).max() < limit
        there = np.isfinite(expected_lse)
        assert (np.isneginf(lse) == ~there).all()
        np.testing.assert_allclose(lse[there], expected_lse[there], rtol=2e-6, atol=4 * max(limit, 2e-5))

    @rule(seed=SEEDS, data=st.data())
    def take_something_bad(self, seed, data):
        """A token that is not finite is told, wherever rows move; taken back, it is gone."""
        if not min(self.room) or self.cache.step % 7:
            return
        shape = self.case.shape
        row, head = data.draw(st.integers(0, shape.batch - 1)), data.draw(st.integers(0, shape.kv_heads - 1))
        keys, values = self.tokens(seed, 1)
        (keys if seed % 2 else values)[row, head, 0, seed % shape.head_dim] = (np.nan, np.inf, -np.inf)[seed % 3]
        lengths = self.model.lengths
        position = lengths[row]
        self.cache.extend(keys, values, np.ones(shape.batch, np.int64))
        rows = np.roll(np.arange(shape.batch), 1)
        for moved in (rows, np.argsort(rows)):
            with pytest.raises(NonFiniteError, match=f"sequence {row}, KV head {head}, position {position}$"):
                self.cache.raise_non_finite()
            self.cache.reorder(moved)
            row = int(np.flatnonzero(moved == row)[0])
        if self.model.refuses_crop(lengths) or any(self.model.cold(n + 1) > self.model.cold(n) for n in lengths):
            self.model.clear()
            self.cache.prefill(keys[:, :, :0], values[:, :, :0], np.zeros(shape.batch, np.int64))
        else:
            self.cache.crop(np.array(lengths))
            self.model.crop(lengths)

    @invariant()
    def it_holds_what_it_should(self):
        cache, model = self.cache, self.model
        assert cache.lengths.tolist() == model.lengths and cache.step == model.step and cache.capacity == model.capacity
        cache.raise_non_finite()
        for row, head in np.ndindex(self.case.shape.batch, self.case.shape.kv_heads):
            held, (expected, _) = cache.stored(row, head), model.parts(row, head)
            for name, wanted in zip(("cold_keys", "cold_values", "exact_keys", "exact_values"), expected, strict=True):
                np.testing.assert_array_equal(getattr(held, name), wanted, err_msg=f"{name} of {row}, {head}")


@pytest.mark.parametrize("selection", ["dense", "all", "stride", "reuse", "pages"])
def test_any_sequence_of_requests_leaves_what_plain_lists_of_tokens_hold(each, selection):
    machine = type("Machine", (Caches,), {"each": each, "selection": selection})
    examples = tried(3 if each.name.startswith("cuda") else 6).max_examples
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=12, deadline=None))
